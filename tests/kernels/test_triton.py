"""Every Triton kernel against the references in float64: run by Triton's interpreter, or on a GPU.

`DYNTOK_TEST_DEVICE=cuda python -m pytest -m gpu` runs the same cases compiled.

Memory that a launcher asks for arrives filled with NaN (`poisoned`), so that a place which is never written shows.
"""

import pytest
import torch
from support.kernel_cases import bounds, similar_case
from torch.testing import assert_close

from dyntok_kernels import codebook_stats, compact, gather_rows, merge_similar, nearest_code, reference, scatter_rows

triton = pytest.importorskip("triton")
from dyntok_kernels.gpu import attention, rows  # noqa: E402
from dyntok_kernels.gpu import codebook_stats as stats_kernel  # noqa: E402
from dyntok_kernels.gpu import merge_similar as similar_kernel  # noqa: E402
from dyntok_kernels.gpu import nearest_code as code_kernel  # noqa: E402
from dyntok_kernels.gpu.tiles import slots  # noqa: E402

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = {
    "awkward lengths": ([1, 63, 64, 65, 0, 7], [0, 65, 1, 130, 5, 64]),
    "one image": ([85], [171]),
    "300 images of one token": ([1] * 300, [3] * 300),
    "every patch": ([256, 1], [256, 255]),
}
slow = pytest.mark.slow
pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("on_device")]


@pytest.fixture(autouse=True)
def poisoned():
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def attention_cases():
    for dtype in DTYPES:
        yield pytest.param(dtype, 88, "awkward lengths", id=f"{dtype}-88-awkward")
        for width in attention.HEAD_SIZES:
            for shape in ("awkward lengths", "one image", "every patch"):
                yield pytest.param(dtype, width, shape, marks=slow, id=f"{dtype}-{width}-{shape}")
        yield pytest.param(dtype, 88, "300 images of one token", marks=slow, id=f"{dtype}-88-300 images")


@pytest.mark.parametrize("causal", [False, True], ids=["cross", "causal"])
@pytest.mark.parametrize("dtype, width, shape", list(attention_cases()))
def test_attention_and_its_gradients(dtype, width, shape, causal):
    """At most twice the error of PyTorch's own attention in the same dtype."""
    lengths_q, lengths_k = SHAPES[shape]
    lengths_k = lengths_q if causal else lengths_k
    cu = bounds(lengths_q), bounds(lengths_k)
    q, k, v = (torch.randn(sum(n), 2, width).to(dtype) for n in (lengths_q, lengths_k, lengths_k))
    towards = torch.randn_like(q)
    out, lse = attention.varlen_attention(q, k, v, *cu, causal)
    without_keys = torch.repeat_interleave(torch.tensor(lengths_k) == 0, torch.tensor(lengths_q))
    assert (
        torch.equal((lse == -torch.inf).all(0), without_keys)
        and (out[without_keys] == 0).all()
        and not lse.isnan().any()
    )
    got = out, *attention.varlen_attention_backward(towards, q, k, v, out, lse, *cu, causal)
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    expected = exact_attention(*exact, lengths_q, lengths_k, causal)
    expected = expected, *torch.autograd.grad(expected, exact, towards.double())
    own = [x.requires_grad_() for x in (q, k, v)]
    outputs = pytorch_attention(*own, lengths_q, lengths_k, causal)
    own = outputs, *torch.autograd.grad(outputs, own, towards)
    # the delta of FlashAttention's backward and the product it is subtracted from are rounded apart, even where both
    # are equal
    noise = (
        torch.finfo(torch.float32).eps * float(towards.norm(dim=-1).max() * v.detach().norm(dim=-1).max()) / width**0.5
    )
    for mine, theirs, right in zip(got, own, expected, strict=True):
        assert mine.dtype == dtype and mine.isfinite().all()
        error, budget = (float((x.double() - right).detach().abs().max()) for x in (mine, theirs))
        assert error <= 2 * budget + 2 * noise


def pytorch_attention(q, k, v, lengths_q, lengths_k, causal):
    return by_image(
        lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal),
        q,
        k,
        v,
        lengths_q,
        lengths_k,
    )


def exact_attention(q, k, v, lengths_q, lengths_k, causal):
    def attend(q, k, v):
        weight = torch.ones(1, q.shape[2], k.shape[2], dtype=q.dtype)
        return reference.masked_attention(q, k, v, weight.tril() if causal else weight)

    return by_image(attend, q, k, v, lengths_q, lengths_k)


def by_image(attend, q, k, v, lengths_q, lengths_k):
    """Zeros where there is no key."""
    outputs = []
    for qi, ki, vi in zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True):
        parts = (x.transpose(0, 1)[None] for x in (qi, ki, vi))  # [1, H, T, d]
        outputs.append(attend(*parts)[0].transpose(0, 1) if len(ki) and len(qi) else qi * 0)
    return torch.cat(outputs)


def test_rows_that_lie_apart_need_no_copy():
    qkv = torch.randn(70, 3, 2, 32)
    q, k, v = qkv.unbind(1)
    assert attention._heads_together(k) is k
    cu = bounds([69, 1])
    apart, together = (
        attention.varlen_attention(*rows, cu, cu, True)[0] for rows in ((q, k, v), (q.clone(), k.clone(), v.clone()))
    )
    assert torch.equal(apart, together)


@pytest.mark.parametrize("width", [5, 136])
def test_heads_that_the_kernel_does_not_take(width):
    x, cu = torch.randn(4, 1, width), bounds([4])
    with pytest.raises(ValueError, match=f"heads have {width} channels"):
        attention.varlen_attention(x, x, x, cu, cu, False)


def test_every_block_of_every_image_has_a_slot():
    for block in (1, 16, 64):
        for lengths in ([0], [1] * 9, [block] * 3, [block - 1, block + 1, 0, 5 * block]):
            cu = bounds(lengths).tolist()
            owned = [cu[i] // block + i for i in range(len(cu))]
            assert all(owned[i + 1] - owned[i] >= -(-n // block) for i, n in enumerate(lengths))
            assert slots(sum(lengths), len(lengths), block) >= owned[-1]


def code_cases():
    for dim, size in ((32, 130), (8, 65)):
        yield pytest.param(dim, size, 70, id=f"{size} codes of {dim}")
    for dim in (8, 16, 32, 64):
        for size in (1, 64, 4099):
            for count in (1, 64, 200):
                yield pytest.param(dim, size, count, marks=slow, id=f"{count} vectors, {size} codes of {dim}")


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dim, size, count", list(code_cases()))
def test_nearest_code(dim, size, count, normalize):
    codebook = torch.randn(size, dim)
    codebook = codebook / codebook.norm(dim=-1, keepdim=True) if normalize else codebook * 0.5
    if size > 60:
        codebook[size - 1] = codebook[3]  # exact duplicates, in different blocks
        codebook[50] = codebook[7]
    z = torch.cat([torch.randn(count, dim), codebook[[3 % size, 7 % size]] * (4 if normalize else 1)])
    codes = code_kernel.nearest_code(z, codebook, normalize)
    exact = torch.nn.functional.normalize(z.double(), dim=-1) if normalize else z.double()
    assert_nearest(codes, exact, codebook)
    if size > 60:
        assert codes[-2:].tolist() == [3, 7]


def assert_nearest(codes, z, codebook, tolerance=1e-6):
    """The reference's code wherever the two best are further apart than that; within the near ones otherwise."""
    distance = (z[:, None] - codebook.double()[None]).square().sum(-1)
    best = distance.amin(1)
    assert (distance.gather(1, codes[:, None])[:, 0] - best <= tolerance).all()
    clear = (distance <= best[:, None] + tolerance).sum(1) == 1
    assert clear.any()
    assert torch.equal(codes[clear], reference.nearest_code(z, codebook.double())[clear])


@pytest.mark.parametrize("normalize", [True, False])
def test_codes_that_float32_cannot_tell_apart(normalize):
    """Rows of the codebook that differ in their last bits: the kernel and the form for CPUs find the nearer one."""
    codebook = torch.nn.functional.normalize(torch.randn(100, 16), dim=-1)
    codebook[99] = codebook[3] + 6e-8 * torch.randn(16)
    codebook[70] = codebook[8] - 6e-8 * torch.randn(16)
    z = codebook[[3, 8]].repeat(60, 1) + 0.1 * torch.randn(120, 16)
    exact = torch.nn.functional.normalize(z, dim=-1) if normalize else z
    expected = reference.nearest_code(exact.double(), codebook.double())
    assert set(expected.tolist()) == {3, 8, 70, 99}
    assert torch.equal(code_kernel.nearest_code(z, codebook, normalize), expected)
    assert torch.equal(nearest_code(z, codebook, normalize=normalize), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_nearest_code_in_half_precision(dtype):
    codebook = torch.nn.functional.normalize(torch.randn(130, 32), dim=-1).to(dtype)
    z = torch.nn.functional.normalize(torch.randn(40, 32), dim=-1).to(dtype)
    assert_nearest(code_kernel.nearest_code(z, codebook, False), z.double(), codebook, tolerance=1e-5)


MASKS = {
    "ragged": lambda: torch.rand(5, 70) < 0.4,
    "all and none": lambda: torch.tensor([[True] * 65, [False] * 65]),
    "one patch": lambda: torch.tensor([[True]]),
    "300 images": lambda: torch.rand(300, 4) < 0.3,
    "more than a block": lambda: torch.rand(2, 1500) < 0.5,
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_compaction(mask):
    keep = mask()
    indices, cu_seqlens = rows.compact(keep)
    found = keep.flatten().nonzero()[:, 0]
    assert indices.dtype == cu_seqlens.dtype == torch.int32 and indices.shape == (keep.numel(),)
    assert torch.equal(indices[: len(found)].long(), found) and (indices[len(found) :] == -1).all()
    assert cu_seqlens.tolist() == [0, *keep.sum(1).cumsum(0).tolist()]
    assert all(map(torch.equal, compact(keep), (indices, cu_seqlens)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [5, 130, 192])
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_gather_and_scatter(dtype, width, fused):
    keep = torch.rand(4, 9) < 0.5
    index, cu = rows.compact(keep)
    index = torch.cat([index[: int(cu[-1])], torch.tensor([-1, -1], dtype=torch.int32)])
    x, table = torch.randn(36, width).to(dtype), torch.randn(9, width).to(dtype) if fused else None
    packed = rows.gather_rows(x, index, table)
    expected = reference.gather_rows(x, index, table)
    assert torch.equal(packed, expected) and (packed[-2:] == 0).all()
    assert torch.equal(rows.scatter_rows(packed, index, table, 36), reference.scatter_rows(packed, index, table, 36))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codebook_statistics(dtype):
    z, codes = torch.randn(300, 17).to(dtype), torch.randint(0, 40, (300,))
    codes[codes == 5] = 6  # a code that nothing has
    codes[:70] = 2  # more than a block
    counts, sums = stats_kernel.codebook_stats(z, codes, 41)
    expected = reference.codebook_stats(z.double(), codes, 41)
    assert torch.equal(counts.double(), expected[0])
    assert_close(sums.double(), expected[1], atol=1e-4, rtol=1e-5)
    assert torch.equal(sums, stats_kernel.codebook_stats(z, codes, 41)[1])
    assert_close(codebook_stats(z, codes, 41)[1].double(), expected[1], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "images, patches, width",
    [(3, 70, 40), (1, 1, 8), pytest.param(4, 256, 192, marks=slow), pytest.param(300, 2, 16, marks=slow)],
)
def test_merging_by_likeness(dtype, images, patches, width):
    x, keep, weights = similar_case(images, patches, width, dtype)
    kept, cu_kept = rows.compact(keep)
    dropped, cu_dropped = rows.compact(~keep)
    total = int(keep.sum())
    lists = kept[:total], cu_kept, dropped[: keep.numel() - total], cu_dropped
    merged, sizes, owner = similar_kernel.merge_similar(x.flatten(0, 1), weights.flatten(), *lists)
    expected, expected_sizes, expected_owner = reference.merge_similar(x.double(), keep, weights.double())
    assert torch.equal(owner.view(images, patches), expected_owner)
    assert_close(sizes.double(), expected_sizes, atol=1e-5, rtol=2 * torch.finfo(dtype).eps)
    assert_close(merged.double(), expected, atol=4 * torch.finfo(dtype).eps, rtol=4 * torch.finfo(dtype).eps)
    own = merge_similar(x, keep, weights)
    assert torch.equal(own[2], expected_owner)
    assert_close(own[0].double(), expected, atol=4 * torch.finfo(dtype).eps, rtol=4 * torch.finfo(dtype).eps)


def test_merging_leaves_other_images_alone():
    """A NaN in the first image's first patch must not reach an image whose last block of dropped patches is short."""
    x, keep, weights = similar_case(2, 40, 16, torch.float32)
    lists = [rows.compact(mask) for mask in (keep, ~keep)]
    packed = lists[0][0][: int(keep.sum())], lists[0][1], lists[1][0][: int((~keep).sum())], lists[1][1]
    wanted = similar_kernel.merge_similar(x.flatten(0, 1), weights.flatten(), *packed)[0]
    x[0, 0] = torch.nan
    found = similar_kernel.merge_similar(x.flatten(0, 1), weights.flatten(), *packed)[0]
    first = int(keep[0].sum())
    assert torch.equal(found[first:], wanted[first:])


def test_merging_weighs_in_float32():
    """257 is no number of bfloat16."""
    x = torch.ones(1, 3, 16, dtype=torch.bfloat16)
    x[0, 2] = 0
    keep, weights = torch.tensor([[True, False, False]]), torch.tensor([[1.0, 257.0, 257.0]])
    lists = torch.tensor([0], dtype=torch.int32), bounds([1]), torch.tensor([1, 2], dtype=torch.int32), bounds([2])
    merged = similar_kernel.merge_similar(x[0], weights[0], *lists)[0]
    expected = reference.merge_similar(x.double(), keep, weights.double())[0]
    assert torch.equal(merged, expected.to(merged.dtype))


@pytest.mark.parametrize("backward", [False, True])
def test_bounds_that_are_a_column(backward):
    q, k, v = (torch.randn(12, 2, 16, requires_grad=True) for _ in range(3))
    dense = bounds([5, 7])
    column = torch.stack([dense, dense + 99], 1)[:, 0]
    results = []
    for cu in (dense, column):
        out, lse = attention.varlen_attention(q, k, v, cu, cu, True)
        results.append(attention.varlen_attention_backward(out, q, k, v, out, lse, cu, cu, True) if backward else [out])
    assert not column.is_contiguous() and all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_equal_likeness_goes_to_the_first():
    x = torch.ones(1, 5, 8)
    keep = torch.tensor([[False, True, False, True, True]])
    assert merge_similar(x, keep, torch.ones(1, 5))[2].tolist() == [[0, 0, 0, 1, 2]]
    assert reference.merge_similar(x, keep, torch.ones(1, 5))[2].tolist() == [[0, 0, 0, 1, 2]]
    lists = (
        torch.tensor([1, 3, 4], dtype=torch.int32),
        bounds([3]),
        torch.tensor([0, 2], dtype=torch.int32),
        bounds([2]),
    )
    assert similar_kernel.merge_similar(x[0], torch.ones(5), *lists)[2].tolist() == [0, 0, 0, 1, 2]


def test_gradients_of_gather_scatter_and_merging():
    with torch.device("cpu"):  # kernels do not compute in float64
        check_gradients()


def check_gradients():
    keep = torch.tensor([[True, False, True, False], [False, True, True, True]])
    index = compact(keep)[0][:5]
    x, embed, base = (torch.randn(n, 3, dtype=torch.float64, requires_grad=True) for n in (8, 4, 4))
    packed = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, e: gather_rows(x, index, e), (x, embed))
    assert torch.autograd.gradcheck(lambda r, b: scatter_rows(r, index, b, total=8), (packed, base))
    weights = (0.5 + torch.rand(2, 4, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: merge_similar(x.view(2, 4, 3), keep, w)[:2], (x, weights))
