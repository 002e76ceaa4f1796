"""Whole datasets into codes, once: resumable, with nothing lost. Needs the extra `batch` (and `ray`, `s3` where they are used)."""

from dyntok.errors import MissingDependencyError

try:
    import fsspec as _fsspec  # noqa: F401
    import pyarrow as _pyarrow  # noqa: F401
    from braceexpand import braceexpand as _braceexpand  # noqa: F401
except ModuleNotFoundError as error:
    raise MissingDependencyError.of(str(error.name), "batch") from error

from dyntok.batch.inspecting import Report as Report
from dyntok.batch.inspecting import inspect as inspect
from dyntok.batch.mapping import Tokenize as Tokenize
from dyntok.batch.options import BatchOptions as BatchOptions
from dyntok.batch.options import Engine as Engine
from dyntok.batch.reading import Batch as Batch
from dyntok.batch.reading import CodesDataset as CodesDataset
from dyntok.batch.reading import read as read
from dyntok.batch.run import Summary as Summary
from dyntok.batch.run import tokenize as tokenize
