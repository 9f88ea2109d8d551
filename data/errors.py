"""What can be wrong with data. Every class is a ValueError whose message names the value, its place and the remedy."""


class DataError(ValueError):
    """Base of all errors of this room that a user can mend."""


class SourceError(DataError):
    """A corpus is missing, unreadable, or holds more bad documents than allowed."""


class TokenizerError(DataError):
    """A tokenizer cannot be loaded, or does not do what training needs of it."""


class DatasetError(DataError):
    """A prepared dataset is missing, incomplete, or does not fit the model or the run."""


class CorruptShardError(DatasetError):
    """A shard or its index is truncated, stale, or fails a checksum."""


class TokenizerMismatchError(DatasetError):
    """A dataset was prepared with another tokenizer than the run uses."""


class MixtureError(DataError):
    """Stages, sources or weights of a mixture make no sense together."""


class StateMismatchError(DataError):
    """A saved stream state belongs to other data than the stream it is given to."""
