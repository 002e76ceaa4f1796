"""Whole datasets into codes, once: resumable, with nothing lost.

Needs the extra `batch` (and `ray`, `s3` where they are used).
"""

from dyntok.errors import MissingDependencyError

try:
    import fsspec as _fsspec  # noqa: F401
    import pyarrow as _pyarrow  # noqa: F401
    from braceexpand import braceexpand as _braceexpand  # noqa: F401
except ModuleNotFoundError as error:
    raise MissingDependencyError.of(str(error.name), "batch") from error

from dyntok.batch.dataset import Batch as Batch
from dyntok.batch.dataset import CodesDataset as CodesDataset
from dyntok.batch.dataset import read as read
from dyntok.batch.loaders import prepare_energon as prepare_energon
from dyntok.batch.loaders import write_litdata as write_litdata
from dyntok.batch.loaders import write_memmap as write_memmap
from dyntok.batch.map import TokenizeColumn as TokenizeColumn
from dyntok.batch.options import BatchOptions as BatchOptions
from dyntok.batch.options import EngineOptions as EngineOptions
from dyntok.batch.report import Report as Report
from dyntok.batch.report import inspect as inspect
from dyntok.batch.run import tokenize as tokenize
from dyntok.batch.summary import Summary as Summary
