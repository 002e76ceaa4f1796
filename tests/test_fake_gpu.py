"""On a GPU, without one: devices and dtypes of all stages, no tensor of the host between them, and what the host reads.

Fake tensors have no values, so what reads one fails.
"""

import dataclasses

import pytest
import torch
from support.any_grid import any_grid_config
from support.fake_gpu import FAKE, fake_gpu, to_fake_gpu
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

import dyntok
from dyntok import KeepPolicy
from dyntok.chunks import Chunk
from dyntok.config import PRESETS
from dyntok.encoding import unchecked
from dyntok.export import FixedDecoder, FixedEncoder
from dyntok.ragged import cu_seqlens_from_lengths
from dyntok.refine import Pictures

GPU, BUDGET = torch.device("cuda", 0), 40


class _NoTensorOfTheHost(TorchDispatchMode):
    """Fails where an operation takes or makes a tensor on a CPU."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves((args, kwargs, result)):
            assert not isinstance(x, torch.Tensor) or x.device == GPU, f"{operation} on {x.device}"
        return result


@pytest.fixture(params=["free", "map"])
def config(request, small_config):
    """Of a tokenizer for one grid with free masks, and of one for any grid with canonical masks."""
    return small_config if request.param == "free" else any_grid_config(small_config, request.param)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def on_gpu(request, config, monkeypatch):
    tokenizer = dyntok.DynamicVisualTokenizer(config).eval()
    tokenizer = to_fake_gpu(tokenizer.in_precision(request.param))
    with fake_gpu(monkeypatch):
        yield tokenizer


def pixels_for(tokenizer, images=3):
    return torch.randn(images, 3, tokenizer.image_size, tokenizer.image_size, device=GPU)


def ints(*shape):
    return torch.zeros(shape, dtype=torch.long, device=GPU)


@torch.no_grad()
def test_the_fixed_doors(on_gpu):
    pixels, codes = pixels_for(on_gpu), ints(3, BUDGET)
    encoder, decoder = FixedEncoder(on_gpu, BUDGET), FixedDecoder(on_gpu)
    with _NoTensorOfTheHost():
        for result in encoder(pixels):
            assert (result.shape, result.dtype) == ((3, BUDGET), torch.long)
        painted = decoder(codes, codes)
    assert painted.shape == pixels.shape and painted.is_floating_point()


@pytest.mark.parametrize("quantize", [True, False])
def test_encoding_with_an_exact_budget_reads_nothing(on_gpu, quantize):
    chunk = Chunk(range(3), pixels_for(on_gpu))
    with _NoTensorOfTheHost():
        rows = on_gpu._run(chunk, KeepPolicy(budget=BUDGET), on_gpu.merger, quantize=quantize)
    assert rows.values.dtype == (torch.long if quantize else on_gpu.dtype)
    assert list(rows.lengths) == [BUDGET] * 3 and rows.positions.dtype == torch.long and rows.finite.dtype == torch.bool


def test_8_bit_values_go_to_the_gpu_and_are_normalized_there(on_gpu, monkeypatch):
    sent, side = [], on_gpu.image_size
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: sent.append(tensor) or tensor)
    chunk = Chunk(range(3), torch.zeros(3, 3, side, side, dtype=torch.uint8))
    rows = on_gpu._run(chunk, KeepPolicy(budget=BUDGET), on_gpu.merger, quantize=True)
    assert [(tensor.dtype, tensor.device.type) for tensor in sent] == [(torch.uint8, "cpu")]
    assert rows.values.device == GPU
    there = Chunk(range(3), chunk.pixels.to(GPU))
    with _NoTensorOfTheHost():
        pixels = on_gpu._on_device(there).pixels
    assert pixels.dtype == torch.float32 and pixels.device == GPU


def test_decoding_has_no_tensor_of_the_host(on_gpu):
    cu_seqlens = cu_seqlens_from_lengths(ints(3) + BUDGET)
    with _NoTensorOfTheHost(), on_gpu.inference():
        vectors = torch.randn(3 * BUDGET, on_gpu.config.codebook.dim, device=GPU)
        for positions in (None, ints(3 * BUDGET)):
            features = on_gpu.require_decoder()(vectors, cu_seqlens, positions, grid=on_gpu.grid)
            painted = on_gpu.pixel_head(features, on_gpu.grid)
    assert painted.shape == (3, 3, on_gpu.image_size, on_gpu.image_size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_forward_pass_of_a_training_step(dtype, tokenizer, monkeypatch):
    tokenizer = to_fake_gpu(tokenizer.train())
    with fake_gpu(monkeypatch), _NoTensorOfTheHost(), torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        features = tokenizer.backbone(pixels_for(tokenizer))
        keep = KeepPolicy(budget=BUDGET)(tokenizer.selector(features))
        merged = tokenizer.merger(features, keep, total=3 * BUDGET)
        rows, codes = tokenizer.codebook.quantize(tokenizer.projection(merged))
        cu_seqlens = cu_seqlens_from_lengths(keep.sum(1))
        painted = tokenizer.pixel_head(tokenizer.decoder(rows, cu_seqlens), tokenizer.grid)
    assert rows.dtype == torch.float32 and codes.dtype == torch.long and painted.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_float32_computes_without_tf32(dtype, tokenizer, monkeypatch):
    tokenizer, seen = to_fake_gpu(tokenizer.in_precision(dtype)), []
    allowed = torch.backends.cudnn.allow_tf32
    tokenizer.backbone.model.patch_embed.proj.register_forward_hook(
        lambda *_: seen.append((torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision))
    )
    torch.backends.cuda.matmul.fp32_precision = "tf32"  # as a user's program may want it
    try:
        with fake_gpu(monkeypatch), tokenizer.inference():
            tokenizer.backbone(pixels_for(tokenizer))
        with fake_gpu(monkeypatch), torch.no_grad():
            FixedEncoder(tokenizer, BUDGET)(pixels_for(tokenizer))
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = "none"
    assert seen == [("ieee", "ieee")] * 2 and torch.backends.cudnn.allow_tf32 == allowed


class _Waits(TorchDispatchMode):
    """Counts copies between devices for which the host waits: of memory that is not pinned, too.

    Fake tensors refuse every other read of a value.
    """

    def __init__(self, pinned):
        super().__init__()
        self.pinned, self.seen = pinned, []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        given, made = (
            [x for x in torch.utils._pytree.tree_leaves(some) if isinstance(x, torch.Tensor)] for some in (args, result)
        )
        if len({x.device for x in given + made}) > 1:
            pageable = [x for x in given if x.device.type == "cpu" and all(x is not pinned for pinned in self.pinned)]
            if pageable or not (kwargs or {}).get("non_blocking"):
                self.seen.append(str(operation))
        return result


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize(
    "options, reads",
    [({}, 1), ({"threshold": 0.4}, 1), ({"budget": 0.25}, 0), ({"budget": 30, "max_tokens": 20, "places": "map"}, 0)],
    ids=str,
)
def test_what_the_host_reads(options, reads, chunks, on_gpu, monkeypatch):
    """For each chunk the lengths, which size the merger's kernels, unless they are known. Else nothing."""
    lengths, pinned = [], []
    monkeypatch.setattr(FakeTensor, "tolist", lambda tensor: lengths.append(tensor) or [20] * len(tensor))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    monkeypatch.setattr(type(on_gpu), "fingerprint", "0" * 16)
    options = KeepPolicy(**options)
    pixels = torch.zeros(2 * chunks, 3, on_gpu.image_size, on_gpu.image_size, dtype=torch.uint8)
    on_gpu._run(Chunk(range(2), pixels[:2]), options, on_gpu.merger, quantize=True)  # makes the tables
    lengths.clear()
    with _Waits(pinned) as waits:
        encoding = on_gpu.encode_tensor(pixels, batch_size=2, policy=options)
    assert waits.seen == [] and [tensor.shape for tensor in lengths] == [(2,)] * reads * chunks
    assert encoding.packed_codes.device == encoding.cu_seqlens.device == GPU and len(encoding) == 2 * chunks


def test_the_trials_of_refined_codes_read_nothing(on_gpu, monkeypatch):
    """Without the gradients, which fake tensors of a GPU do not have."""
    size = on_gpu.config.codebook.dim
    monkeypatch.setattr(Pictures, "gradient", lambda self, vectors: torch.zeros_like(vectors))
    monkeypatch.setattr(Pictures, "sensitivity", lambda self, vectors: vectors.new_zeros(3, size, size))
    chunk = Chunk(range(3), pixels_for(on_gpu))
    with _NoTensorOfTheHost():
        rows = on_gpu._run(chunk, KeepPolicy(budget=BUDGET), on_gpu.merger, quantize=True, refine=2)
    assert rows.values.shape == (3 * BUDGET,) and rows.values.dtype == torch.long and rows.values.device == GPU


@pytest.mark.parametrize("invariant", [False, True])
def test_batch_invariance_computes_every_image_alone(invariant, on_gpu, monkeypatch):
    """By the same programs in every run, whatever a user's program has set."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(type(on_gpu), "fingerprint", "0" * 16)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    shapes, timed = [], []
    for part in (on_gpu.backbone, on_gpu.selector, on_gpu.merger):
        part.register_forward_pre_hook(lambda module, args: shapes.append(len(args[0])))
    on_gpu.projection.register_forward_pre_hook(lambda module, args: shapes.append(len(args[0]) / BUDGET))
    on_gpu.codebook.register_forward_pre_hook(lambda module, args: shapes.append(len(args[0]) / BUDGET))
    cudnn = torch.backends.cudnn
    on_gpu.backbone.register_forward_hook(lambda *_: timed.append((cudnn.benchmark, cudnn.deterministic)))
    on_gpu.batch_invariant = invariant
    encoding = on_gpu.encode_tensor(pixels_for(on_gpu, 5), batch_size=3, budget=BUDGET)
    assert len(encoding) == 5 and torch.backends.cudnn.benchmark
    assert shapes == ([1] * 25 if invariant else [3] * 5 + [2] * 5) and timed == (
        [(False, True)] * 5 if invariant else [(True, False)] * 2
    )


def test_a_skipped_image_is_known_by_one_read(on_gpu, monkeypatch):
    finite = []
    monkeypatch.setattr(FakeTensor, "tolist", lambda tensor: finite.append(tensor) or [True] * len(tensor))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(type(on_gpu), "fingerprint", "0" * 16)
    on_gpu.encode_tensor(pixels_for(on_gpu, 6), batch_size=2, budget=BUDGET, errors="skip")
    assert [(tensor.dtype, len(tensor)) for tensor in finite] == [(torch.bool, 6)]


def test_an_encoding_of_the_network_passes_every_check(tokenizer, photos):
    encoding = tokenizer.encode(photos)
    assert dyntok.Encoding(**vars(encoding)) == encoding == unchecked(**vars(encoding))


@pytest.mark.parametrize(
    "section, sizes, message",
    [
        ("codebook", {"dim": 65}, "codebook.dim is 65, and a GPU searches codes of at most 64 channels"),
        (
            "merger",
            {"num_heads": 4},
            "merger.num_heads is 4, so its heads have 12 of 48 channels, and a GPU takes mult",
        ),
        ("decoder", {"num_heads": 12, "placement": "rank"}, "decoder.num_heads is 12, so its heads have 4 of 48"),
    ],
)
def test_sizes_that_no_gpu_kernel_takes_are_refused_when_moved_there(section, sizes, message, small_config):
    part = dataclasses.replace(getattr(small_config, section), **sizes)
    tokenizer = dyntok.DynamicVisualTokenizer(dataclasses.replace(small_config, **{section: part}))
    tokenizer.to(torch.float64).to("cpu").float()
    with FAKE, pytest.raises(dyntok.ConfigError, match=message):
        torch.nn.Module.to(tokenizer, "cuda")
    assert tokenizer.device.type == "cpu"


def test_sizes_that_only_a_cpu_kernel_sees_are_free(small_config):
    decoder = dataclasses.replace(small_config.decoder, num_heads=12)  # attention over the whole grid is PyTorch's
    merger = dataclasses.replace(small_config.merger, num_heads=4, kind="similar")
    config = dataclasses.replace(small_config, decoder=decoder, merger=merger)
    dyntok.DynamicVisualTokenizer(config)._check_gpu(torch.float32)


def test_float64_is_refused_on_a_gpu(tokenizer):
    with FAKE, pytest.raises(dyntok.ConfigError, match="the weights are float64, and a GPU takes fp32, bf16 and fp16"):
        torch.nn.Module.to(tokenizer, "cuda", torch.float64)
    assert tokenizer.dtype == torch.float32


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_fits_a_gpu(name):
    with torch.device("meta"):
        dyntok.DynamicVisualTokenizer(PRESETS[name])._check_gpu(torch.bfloat16)
