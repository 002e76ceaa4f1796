"""Every error that dyntok raises on purpose.

All of them derive from `DyntokError`; the built-in type that a caller would expect (`ValueError`, `OSError`,
`ImportError`) is mixed in. A message says what came, what was expected and what to do.
"""


class DyntokError(Exception):
    """Base class of all errors raised by dyntok."""


class ConfigError(DyntokError, ValueError):
    """A configuration, recipe or option is invalid."""


class ImageError(DyntokError, ValueError):
    """An image can't be read, is unsafe, or is not an image. The message names its source."""


class MissingImageError(ImageError, FileNotFoundError):
    """The file of an image does not exist."""


class CodeError(DyntokError, ValueError):
    """Codes, positions or ids are out of range, of the wrong type, or do not fit together."""


class FingerprintError(CodeError):
    """Codes of one tokenizer were given to another."""


class CheckpointError(DyntokError, OSError):
    """A checkpoint is missing, incomplete, of a newer format, or does not fit its configuration."""


class DataError(DyntokError, ValueError):
    """A data set (folder, tar, label file) can't be read or holds nothing to work on."""


class BatchError(DyntokError, RuntimeError):
    """A batch run is refused, or had to stop; what is finished stays. The message says how to continue."""


class MissingDependencyError(DyntokError, ImportError):
    """An optional dependency is not installed. The message names the extra that brings it."""

    @classmethod
    def of(cls, package: str, extra: str) -> "MissingDependencyError":
        return cls(f"{package} is not installed; this feature needs it: pip install 'dyntok[{extra}]'")
