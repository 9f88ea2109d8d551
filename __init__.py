"""potamos: pretraining for language models that are not plain Transformers."""

__version__ = "0.1.0"
