"""What goes wrong with an index, where the caller must be able to tell cases apart."""

__all__ = [
    "IndexCorruptError",
    "IndexIncompleteError",
    "IndexVersionError",
    "NotAnIndexError",
    "ShardUnavailableError",
    "TokenizerMismatchError",
]


class NotAnIndexError(ValueError):
    """A file is not part of an index: bad magic or byte order."""


class IndexVersionError(ValueError):
    """An index was written in a format of another major version; the text has both versions."""


class IndexCorruptError(OSError):
    """A file of an index is damaged: cut off, changed, exchanged, or shrunk while open."""


class IndexIncompleteError(OSError):
    """A folder holds no finished index: the manifest is missing, or a build has not ended."""


class TokenizerMismatchError(ValueError):
    """An index and its user, or two indexes, disagree in vocabulary size or fingerprint."""


class ShardUnavailableError(ConnectionError):
    """A shard, or the worker that holds it, did not answer."""
