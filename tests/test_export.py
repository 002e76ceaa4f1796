"""Encoder and decoder of fixed shapes give the tokenizer's own results, compiled, exported, run by onnxruntime.

Operations' contracts.
"""

import numpy as np
import pytest
import torch
from support.any_grid import any_grid_tokenizer
from support.kernel_cases import bounds, similar_case
from torch.testing import assert_close

import dyntok
from dyntok.errors import ConfigError, ImageError
from dyntok.export import FixedDecoder, FixedEncoder, export, to_onnx
from dyntok.image import to_pixels
from dyntok_kernels import compact

BUDGET = 40


@pytest.fixture(scope="module")
def tiny():
    return dyntok.load()


@pytest.fixture(scope="module")
def pixels(tiny, photos):
    return torch.stack([to_pixels(photo, tiny.image_config(fit="crop")) for photo in photos[:4]])


@pytest.fixture(scope="module")
def expected(tiny, pixels):
    return tiny.encode_tensor(pixels, budget=BUDGET)


def as_rows(encoding):
    return encoding.packed_codes.view(-1, BUDGET), encoding.packed_positions.view(-1, BUDGET)


@torch.no_grad()
def test_the_encoder_gives_the_tokenizers_codes(tiny, pixels, expected):
    codes, positions = FixedEncoder(tiny, BUDGET)(pixels)
    assert torch.equal(codes, as_rows(expected)[0]) and torch.equal(positions, as_rows(expected)[1])


@torch.no_grad()
@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="this PyTorch has no such settings")
@pytest.mark.parametrize("precision", ["high", "medium"])
def test_the_encoder_rounds_as_encode_does(precision, tiny, pixels):
    """Settings of a program that lower the precision of products hold for neither."""
    seen, encoder = [], FixedEncoder(tiny, BUDGET)
    hook = tiny.backbone.register_forward_hook(lambda *_: seen.append(torch.backends.mkldnn.matmul.fp32_precision))
    torch.set_float32_matmul_precision(precision)
    try:
        encoder(pixels[:1]), tiny.encode_tensor(pixels[:1], budget=BUDGET)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision("highest")
        hook.remove()
    assert seen == ["ieee", "ieee"]


@torch.no_grad()
def test_the_decoder_paints_the_tokenizers_pixels(tiny, expected):
    codes, positions = as_rows(expected)
    assert_close(FixedDecoder(tiny)(codes, positions), tiny.decode_to_pixels(expected), atol=1e-4, rtol=0)
    unknown = tiny.decode_to_pixels(expected.codes)
    assert_close(FixedDecoder(tiny)(codes, torch.full_like(positions, -1)), unknown, atol=1e-4, rtol=0)


@torch.no_grad()
def test_half_precision_computes_as_the_tokenizer_does(pixels):
    tokenizer = dyntok.load(dtype=torch.bfloat16)
    expected = tokenizer.encode_tensor(pixels[:1], budget=BUDGET)
    encoder, decoder = FixedEncoder(tokenizer, BUDGET), FixedDecoder(tokenizer)
    for encode in (
        encoder,
        torch.compile(encoder, fullgraph=True, backend="aot_eager"),
        export(encoder, pixels[:1]).module(),
    ):
        codes, positions = encode(pixels[:1])
        assert torch.equal(codes, as_rows(expected)[0]) and torch.equal(positions, as_rows(expected)[1])
    painted = tokenizer.decode_to_pixels(expected)
    assert painted.dtype == decoder(codes, positions).dtype == torch.bfloat16
    assert_close(decoder(codes, positions), painted, atol=0.05, rtol=0)


@pytest.mark.parametrize("budget", [0, 257])
def test_budgets_that_no_image_has(tiny, budget):
    with pytest.raises(ConfigError, match=f"budget is {budget} tokens, expected 1 to 256"):
        FixedEncoder(tiny, budget)


@torch.no_grad()
def test_both_compile_as_one_graph(tiny, pixels, expected):
    encoder, decoder = FixedEncoder(tiny, BUDGET), FixedDecoder(tiny)
    codes, positions = torch.compile(encoder, fullgraph=True, backend="aot_eager")(pixels)
    assert torch.equal(codes, as_rows(expected)[0]) and torch.equal(positions, as_rows(expected)[1])
    painted = torch.compile(decoder, fullgraph=True, backend="aot_eager")(codes, positions)
    assert_close(painted, decoder(codes, positions), atol=1e-5, rtol=0)


def test_a_full_budget_compiles_too(tiny, pixels):
    with torch.no_grad():
        codes, _ = torch.compile(FixedEncoder(tiny, 256), fullgraph=True, backend="aot_eager")(pixels[:1])
    assert torch.equal(codes[0], tiny.encode_tensor(pixels[:1], budget=256).codes[0])


def test_exported_programs(tiny, pixels, expected):
    encoder = export(FixedEncoder(tiny, BUDGET), pixels)
    for name in ("varlen_attention", "nearest_code", "compact", "gather_rows"):
        assert f"torch.ops.dyntok.{name}.default" in str(encoder)
    codes, positions = encoder.module()(pixels)
    assert torch.equal(codes, as_rows(expected)[0]) and torch.equal(positions, as_rows(expected)[1])
    decoder = FixedDecoder(tiny)
    assert_close(
        export(decoder, codes, positions).module()(codes, positions), decoder(codes, positions), atol=1e-5, rtol=0
    )


def test_onnxruntime_gives_the_same_ids(tiny, pixels, expected, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    codes, positions = as_rows(expected)
    to_onnx(FixedEncoder(tiny, BUDGET), tmp_path / "encoder.onnx", pixels)
    session = onnxruntime.InferenceSession(tmp_path / "encoder.onnx")
    got = session.run(None, {session.get_inputs()[0].name: pixels.numpy()})
    assert np.array_equal(got[0], codes) and np.array_equal(got[1], positions)
    to_onnx(FixedDecoder(tiny), tmp_path / "decoder.onnx", codes, positions)
    session = onnxruntime.InferenceSession(tmp_path / "decoder.onnx")
    (painted,) = session.run(
        None, dict(zip([i.name for i in session.get_inputs()], [codes.numpy(), positions.numpy()], strict=True))
    )
    assert_close(torch.from_numpy(painted), FixedDecoder(tiny)(codes, positions).detach(), atol=1e-3, rtol=0)


def test_a_single_image_goes_to_onnx(tiny, pixels, tmp_path):
    codes, positions = FixedEncoder(tiny, BUDGET)(pixels[:1])
    to_onnx(FixedEncoder(tiny, BUDGET), tmp_path / "encoder.onnx", pixels[:1])
    to_onnx(FixedDecoder(tiny), tmp_path / "decoder.onnx", codes, positions)
    for name in ("encoder.onnx", "decoder.onnx"):
        assert b".py" not in (tmp_path / name).read_bytes(), "names of source files on the machine that made it"


def op_cases():
    ops, lengths = torch.ops.dyntok, bounds([3, 0, 5])
    q, k, v = (torch.randn(8, 2, 16, requires_grad=True) for _ in range(3))
    half = [x.detach().to(torch.bfloat16).requires_grad_() for x in (q, k, v)]
    keep = torch.tensor([[True, False, True, False], [False, True, True, True]])
    index = compact(keep)[0][:5]
    x, _, weights = similar_case(2, 4, 8, torch.float32)
    lists = index, bounds([2, 3]), compact(~keep)[0][:3], bounds([2, 1])
    grid = torch.randn(8, 8, requires_grad=True)
    table = torch.randn(4, 8, requires_grad=True)
    return {
        "attention": (ops.varlen_attention, (q, k, v, lengths, lengths, True)),
        "attention, equal lengths": (ops.varlen_attention, (q, k, v, bounds([4, 4]), bounds([4, 4]), False)),
        "attention in bf16": (ops.varlen_attention, (*half, lengths, lengths, False)),
        "nearest code": (ops.nearest_code, (torch.randn(9, 8), torch.randn(70, 8), True)),
        "nearest code, by distance": (ops.nearest_code, (torch.randn(0, 8), torch.randn(70, 8), False)),
        "compact": (ops.compact, (keep,)),
        "gather": (ops.gather_rows, (grid, index, None)),
        "gather, embedded": (ops.gather_rows, (grid, index, table)),
        "scatter": (ops.scatter_rows, (torch.randn(5, 8, requires_grad=True), index, None, 8)),
        "scatter, based": (ops.scatter_rows, (torch.randn(5, 8, requires_grad=True), index, table, 8)),
        "statistics": (ops.codebook_stats, (torch.randn(9, 8), torch.randint(0, 5, (9,)), 5)),
        "similar": (ops.merge_similar, (x.flatten(0, 1).requires_grad_(), weights.flatten().requires_grad_(), *lists)),
    }  # fmt: skip


@pytest.mark.gpu
@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("name", op_cases())
def test_operations_keep_their_contracts(name):
    torch.library.opcheck(*op_cases()[name])


GRIDS = pytest.mark.parametrize("grid", [(5, 13), (12, 6)], ids=lambda grid: f"{grid[0]}x{grid[1]}")


def of_grid(grid, config, photos):
    """A tokenizer, pixels of two photographs on this grid, their codes, and the modules for it."""
    tokenizer = any_grid_tokenizer(config)
    image = tokenizer.image_config(fit="squash", size=(8 * grid[0], 8 * grid[1]))
    pixels = torch.stack([to_pixels(photo, image) for photo in photos[:2]])
    encoding = tokenizer.encode_tensor(pixels, budget=BUDGET)
    modules = FixedEncoder(tokenizer, BUDGET, grid), FixedDecoder(tokenizer, grid)
    return pixels, as_rows(encoding), tokenizer.decode_to_pixels(encoding), *modules


@GRIDS
@torch.no_grad()
def test_each_grid_has_its_modules(grid, small_config, photos):
    """Sides that 4 does not divide, and a tall grid."""
    pixels, expected, painted, encoder, decoder = of_grid(grid, small_config, photos)
    assert all(map(torch.equal, encoder(pixels), expected))
    assert_close(decoder(*expected), painted, atol=1e-4, rtol=0)


@pytest.mark.slow
@GRIDS
def test_each_grid_has_its_onnx_graphs(grid, small_config, photos, tmp_path):
    """The graphs of `dyntok page` take any grid; tests/page/test_graphs.py runs them."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pixels, (codes, positions), wanted, encoder, decoder = of_grid(grid, small_config, photos)
    to_onnx(encoder, tmp_path / "encoder.onnx", pixels)
    session = onnxruntime.InferenceSession(tmp_path / "encoder.onnx")
    got = session.run(None, {session.get_inputs()[0].name: pixels.numpy()})
    assert np.array_equal(got[0], codes) and np.array_equal(got[1], positions)
    to_onnx(decoder, tmp_path / "decoder.onnx", codes, positions)
    session = onnxruntime.InferenceSession(tmp_path / "decoder.onnx")
    names = [given.name for given in session.get_inputs()]
    (painted,) = session.run(None, dict(zip(names, [codes.numpy(), positions.numpy()], strict=True)))
    assert painted.shape == (2, 3, 8 * grid[0], 8 * grid[1])
    assert_close(torch.from_numpy(painted), wanted, atol=1e-3, rtol=0)


@pytest.mark.parametrize("wrong", ["grid", "uint8", "one picture"])
def test_an_encoder_refuses_pixels_of_another_form(wrong, tiny, pixels):
    """The grid 8 x 32 has as many patches as 16 x 16: without a check, its codes would be wrong in silence."""
    given = {"grid": pixels.reshape(-1, 3, 64, 256), "uint8": pixels.to(torch.uint8), "one picture": pixels[0]}[wrong]
    with pytest.raises(ImageError, match=r"expected normalized floats \[B, 3, 128, 128\]"):
        FixedEncoder(tiny, BUDGET)(given)
    wide = FixedEncoder(tiny, BUDGET, (8, 32))(pixels.reshape(-1, 3, 64, 256))
    assert torch.equal(wide[0], as_rows(tiny.encode_tensor(pixels.reshape(-1, 3, 64, 256), budget=BUDGET))[0])


@pytest.mark.parametrize("grid", [16, (16,), (0, 5), (-1, -4), (300, 1), (128, 128), "ab", (16.0, 16)], ids=str)
def test_grids_that_no_tokenizer_has(grid, tiny):
    for make in (lambda: FixedEncoder(tiny, 1, grid), lambda: FixedDecoder(tiny, grid)):
        with pytest.raises(ConfigError, match=r"expected \(rows, columns\) of 1 to 128, and at most 4,096 patches"):
            make()
