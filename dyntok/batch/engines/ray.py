"""The engine for clusters: Ray Data reads and decodes in tasks, encodes in a pool of actors, and the caller writes.

Scheduling, retries, backpressure and spilling are Ray's. A row of Ray's tables is one of our chunks, pickled.
"""

import logging
import pickle
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from dyntok.batch.engines.decoding import DecodeJob, DecodingProcess
from dyntok.batch.engines.process import CAN_FORK
from dyntok.batch.engines.rows import Row, RowChunk, TokenizedImage, Work
from dyntok.batch.engines.stages import DecodeOptions, chunked, decode, encode, read
from dyntok.batch.inputs.samples import Input
from dyntok.batch.options import BatchOptions, EngineOptions
from dyntok.device import device_kind
from dyntok.errors import BatchError, ConfigError, DyntokError, MissingDependencyError
from dyntok.tokenizer import DynamicVisualTokenizer

try:
    import ray
    import ray.data
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
except ModuleNotFoundError as error:
    raise MissingDependencyError.of("ray", "ray") from error

_COLUMN = "chunk"
_WORK_AT_ONCE = 4096  # input shards that Ray is given at a time, so that no list of all of them is held
_FILES_AT_FIRST = 2**20  # in the first portion, about: Ray waits until they are listed
_BLOCK_BYTES = 2**16  # a few chunks of codes: they reach the writer soon, and a dead actor costs little


@dataclass(frozen=True)
class _Shared:
    """What all tasks and actors need; Ray keeps one copy on each machine."""

    source: Input
    options: BatchOptions
    chunk_size: int
    time_limit: float
    tokenizer: DynamicVisualTokenizer

    @property
    def decode_options(self) -> DecodeOptions:
        return DecodeOptions.of(self.tokenizer, self.options)


def run_ray(
    work: Iterable[Work], source: Input, options: BatchOptions, engine: EngineOptions, tokenizer: DynamicVisualTokenizer
) -> Iterator[RowChunk[Row[TokenizedImage]]]:
    """Yields encoded rows in no certain order. Raises `BatchError` where input can't be read or the cluster is lost."""
    with _cluster(engine.address):
        shared = ray.put(_Shared(source, options, engine.batch_size, engine.time_limit, tokenizer.to("cpu")))
        for some in _portions(work):
            try:
                for row in _dataset(some, shared, engine).iter_rows():
                    yield pickle.loads(row[_COLUMN])
            except (ray.exceptions.RayError, ray.exceptions.RayTaskError) as error:
                raise _own_error(error) from error


def kinds_in_cluster(address: str | None) -> set[str]:
    """Returns the kinds of the devices on which actors will encode; each machine with GPUs is asked for its own.

    Raises `BatchError` where no cluster answers, or a machine of it does not.
    """
    if address is None and not ray.is_initialized():  # it will be started on this machine
        return {device_kind("cuda" if torch.cuda.is_available() else "cpu")}
    with _cluster(address):
        nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU")]
        places = [NodeAffinitySchedulingStrategy(node, soft=False) for node in nodes]
        ask = ray.remote(device_kind)
        names = [ask.options(num_gpus=1, scheduling_strategy=place).remote("cuda") for place in places]
        try:
            return set(ray.get(names)) or {"cpu"}
        except (ray.exceptions.RayError, ray.exceptions.RayTaskError) as error:
            raise _own_error(error) from error


@contextmanager
def _cluster(address: str | None) -> Iterator[None]:
    """Uses the cluster that is connected already, or that of `address`, or one on this machine that ends afterwards.

    Raises `BatchError` where none answers.
    """
    context = ray.data.DataContext.get_current()
    before = context.enable_progress_bars, context.target_max_block_size
    started = not ray.is_initialized()
    try:
        if started:
            own = {} if address else {"include_dashboard": False}
            ray.init(address or "local", logging_level=logging.ERROR, log_to_driver=False, **own)
        context.enable_progress_bars, context.target_max_block_size = False, _BLOCK_BYTES
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        yield
    except ConnectionError as error:
        raise BatchError(f"no Ray cluster answers at {address}: {' '.join(str(error).split())}") from error
    finally:
        context.enable_progress_bars, context.target_max_block_size = before
        if started:
            ray.shutdown()


def _portions(work: Iterable[Work]) -> Iterator[list[Work]]:
    """Yields the work that Ray is given at a time, twice as many files each time: a portion starts new actors."""
    portion: list[Work] = []
    files, limit = 0, _FILES_AT_FIRST
    for some in work:
        portion.append(some)
        files += len(some.shard.entries)
        if len(portion) >= _WORK_AT_ONCE or files >= limit:
            yield portion
            portion, files, limit = [], 0, 2 * limit
    if portion:
        yield portion


def _dataset(work: Iterable[Work], shared: "ray.ObjectRef", engine: EngineOptions) -> "ray.data.Dataset":
    rows = [{_COLUMN: pickle.dumps(task)} for task in work]
    gpus, cpus = (int(ray.cluster_resources().get(name, least)) for name, least in (("GPU", 0), ("CPU", 1)))
    threads = engine.threads or 1
    actors = engine.actors or gpus or max(1, cpus // (2 * threads))
    if not gpus and cpus > 1 and actors * threads >= cpus or gpus and actors > gpus:
        raise ConfigError(
            f"{actors} actors of {threads} threads leave nothing of a cluster of {cpus} cores and {gpus} GPUs for "
            "reading; ask for fewer (actors, --actors; threads, --threads)"
        )
    needs = {"num_gpus": 1} if gpus else {"num_cpus": threads}
    pool = ray.data.ActorPoolStrategy(size=actors)
    return (
        ray.data.from_items(rows, override_num_blocks=len(rows))
        .map_batches(_read, batch_size=1, fn_args=(shared,))
        .map(_decode, fn_args=(shared,))
        .map(_Encoder, fn_constructor_args=(shared, bool(gpus)), compute=pool, **needs)
    )


def _read(tasks: dict[str, Any], shared: "ray.ObjectRef") -> Iterator[dict[str, list[bytes]]]:
    job: _Shared = ray.get(shared)
    for task in tasks[_COLUMN]:
        rows = read(job.source, pickle.loads(task), job.options.shard_size)
        for chunk in chunked(rows, job.chunk_size):
            yield {_COLUMN: [pickle.dumps(chunk)]}


def _decode(row: dict[str, bytes], shared: "ray.ObjectRef") -> dict[str, bytes]:
    chunk = pickle.loads(row[_COLUMN])
    if CAN_FORK:
        return {_COLUMN: pickle.dumps(_decoder_of(shared).decode(chunk))}
    job: _Shared = ray.get(shared)
    return {_COLUMN: pickle.dumps(decode(chunk, job.source, job.decode_options))}


_decoders: dict["ray.ObjectRef", DecodingProcess] = {}  # of this Ray worker: one, which later tasks use again


def _decoder_of(shared: "ray.ObjectRef") -> DecodingProcess:
    if shared not in _decoders:
        for decoder in _decoders.values():  # of an earlier run on the same cluster
            decoder.close()
        _decoders.clear()
        job: _Shared = ray.get(shared)
        _decoders[shared] = DecodingProcess(DecodeJob(job.source, job.decode_options, job.time_limit))
    return _decoders[shared]


class _Encoder:
    """An actor of the pool."""

    def __init__(self, shared: "ray.ObjectRef", gpu: bool) -> None:
        job: _Shared = ray.get(shared)
        self.options, self.tokenizer = job.options, job.tokenizer.to("cuda" if gpu else "cpu")

    def __call__(self, row: dict[str, bytes]) -> dict[str, bytes]:
        return {_COLUMN: pickle.dumps(encode(pickle.loads(row[_COLUMN]), self.tokenizer, self.options))}


def _own_error(error: BaseException) -> DyntokError:
    """Returns the error of ours inside one of Ray's, or one that reports Ray's."""
    seen: set[int] = set()
    inner: BaseException | None = error
    while inner is not None and id(inner) not in seen:
        seen.add(id(inner))
        wrapped = isinstance(inner, ray.exceptions.RayTaskError)  # its text is a page of traceback
        if isinstance(inner, DyntokError) and not wrapped:
            return type(inner)(str(inner).splitlines()[0])  # Ray adds advice of its own
        inner = getattr(inner, "cause", None) or inner.__cause__
    return BatchError(
        f"Ray gave up: {' '.join(str(error).split())[:500]}; "
        "what is finished stays, and the same command resumes from there"
    )
