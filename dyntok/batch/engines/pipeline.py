"""All stages one after the other, for one copy of the model: this process reads and encodes, its children decode."""

import gc
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass

from dyntok.batch.engines.decoding import DecodeJob, decode_chunks
from dyntok.batch.engines.rows import Row, RowChunk, TokenizedImage, Work
from dyntok.batch.engines.stages import DecodeOptions, chunked, encode, read
from dyntok.batch.inputs.samples import Input
from dyntok.batch.options import BatchOptions, EngineOptions
from dyntok.tokenizer import DynamicVisualTokenizer


@dataclass(frozen=True)
class ModelJob:
    """Everything that one copy of the model needs."""

    source: Input
    options: BatchOptions
    engine: EngineOptions
    tokenizer: DynamicVisualTokenizer
    decoding_processes: int


def encode_work(work: Iterable[Work], job: ModelJob, device: str) -> Iterator[RowChunk[Row[TokenizedImage]]]:
    """Yields encoded rows in order. Raises `BatchError` where input can't be read or a decoding process dies."""
    tokenizer, size = job.tokenizer.to(device), job.options.shard_size
    rows = (row for some in work for row in read(job.source, some, size))
    decode_job = DecodeJob(job.source, DecodeOptions.of(tokenizer, job.options), job.engine.time_limit)
    with _garbage_frozen():
        chunks = decode_chunks(chunked(rows, job.engine.batch_size), decode_job, job.decoding_processes)
        with closing(chunks):
            for chunk in chunks:
                yield encode(chunk, tokenizer, job.options)


@contextmanager
def _garbage_frozen() -> Iterator[None]:
    """Keeps the collector from writing to every object, which would copy the pages that forked processes share."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
