"""Text in, packed rows of token ids out: sources, tokenizers, shards, order and loader. Needs NumPy, never torch."""
