"""The engine for one machine: a model process for each device, or the model in this process where there is one device.

Each device gives its rows in the order of the input, so that one output shard after the other gets complete.
"""

import multiprocessing
import os
from collections.abc import Iterable, Iterator

import torch

from dyntok.batch.engines.devices import encode_on_devices
from dyntok.batch.engines.pipeline import ModelJob, encode_work
from dyntok.batch.engines.process import CAN_FORK
from dyntok.batch.engines.rows import Row, RowChunk, TokenizedImage, Work
from dyntok.batch.inputs.samples import Input
from dyntok.batch.options import BatchOptions, EngineOptions
from dyntok.errors import ConfigError
from dyntok.tokenizer import DynamicVisualTokenizer

_MAX_WORKERS = 16


def run_local(
    work: Iterable[Work], source: Input, options: BatchOptions, engine: EngineOptions, tokenizer: DynamicVisualTokenizer
) -> Iterator[RowChunk[Row[TokenizedImage]]]:
    """Yields encoded rows. Raises `BatchError` where input can't be read or a process dies."""
    devices = engine.devices or (str(tokenizer.device),)
    job = ModelJob(source, options, engine, tokenizer, _decoding_processes(engine, len(devices)))
    if len(devices) > 1:
        yield from encode_on_devices(
            work, job, devices, engine.threads or max(1, (os.cpu_count() or 1) // len(devices))
        )
        return
    before = torch.get_num_threads()
    torch.set_num_threads(engine.threads or before)
    try:
        yield from encode_work(work, job, devices[0])
    finally:
        torch.set_num_threads(before)


def _decoding_processes(engine: EngineOptions, devices: int) -> int:
    """Returns how many each copy of the model has."""
    if not CAN_FORK:
        return 0
    if devices == 1 and multiprocessing.current_process().daemon:
        if engine.workers:
            raise ConfigError(
                f"workers is {engine.workers}, but this is a daemonic process, such as those of multiprocessing.Pool, "
                "and may have no children; workers=0 decodes in it"
            )
        return 0
    if engine.workers is not None:
        return -(-engine.workers // devices)
    return min(_MAX_WORKERS, max(1, (os.cpu_count() or 1) // (2 * devices)))
