"""A picture's rows have the same bits whatever the batch: no kernel's order of summation depends on other pictures."""

import pytest
import torch
from support.kernel_cases import bounds, similar_case

pytest.importorskip("triton")
from dyntok_kernels.gpu import attention, merge_similar, nearest_code, rows  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("on_device")]
DTYPES = [torch.float32, torch.bfloat16]
LENGTHS, KEYS = [5, 35, 1, 18], [34, 3, 20, 17]


def parts_of(lengths):
    ends = torch.tensor(lengths, device="cpu").cumsum(0).tolist()
    return [slice(end - length, end) for end, length in zip(ends, lengths, strict=True)]


@pytest.mark.parametrize("causal", [False, True], ids=["cross", "causal"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_and_its_gradients(dtype, causal):
    keys = LENGTHS if causal else KEYS

    def compute(q, k, v, towards, of_queries, of_keys):
        cu = bounds(of_queries), bounds(of_keys)
        out, lse = attention.varlen_attention(q, k, v, *cu, causal)
        return out, *attention.varlen_attention_backward(towards, q, k, v, out, lse, *cu, causal)

    q, k, v, towards = (torch.randn(sum(n), 1, 24).to(dtype) for n in (LENGTHS, keys, keys, LENGTHS))
    together = compute(q, k, v, towards, LENGTHS, keys)
    for own, other in zip(parts_of(LENGTHS), parts_of(keys), strict=True):
        lengths = [own.stop - own.start], [other.stop - other.start]
        alone = compute(q[own], k[other], v[other], towards[own], *lengths)
        for mine, all_of_them, part in zip(alone, together, (own, own, other, other), strict=True):
            assert torch.equal(mine, all_of_them[part])


@pytest.mark.parametrize("normalize", [True, False])
def test_nearest_code(normalize):
    z, codebook = torch.randn(sum(LENGTHS), 16), torch.randn(150, 16)
    together = nearest_code.nearest_code(z, codebook, normalize)
    for part in parts_of(LENGTHS):
        assert torch.equal(nearest_code.nearest_code(z[part], codebook, normalize), together[part])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merging_by_likeness(dtype):
    x, keep, weights = similar_case(3, 70, 40, dtype)

    def compute(x, keep, weights):
        kept, dropped, total = rows.compact(keep), rows.compact(~keep), int(keep.sum())
        lists = kept[0][:total], kept[1], dropped[0][: keep.numel() - total], dropped[1]
        return merge_similar.merge_similar(x.flatten(0, 1), weights.flatten(), *lists)

    merged, sizes, owner = compute(x, keep, weights)
    for image, part in enumerate(parts_of(keep.sum(1).tolist())):
        alone = compute(*(values[image : image + 1] for values in (x, keep, weights)))
        assert torch.equal(alone[0], merged[part]) and torch.equal(alone[1], sizes[part])
        assert torch.equal(alone[2] + part.start, owner.view(3, 70)[image])
