"""Attention and code search against their naive references, and the references against numbers made by hand."""

import math

import pytest
import torch
from torch.testing import assert_close

from dyntok_kernels import lengths_of, nearest_code, reference, soft_masked_attention, varlen_attention

HEADS, WIDTH = 2, 5

LENGTHS = {
    "one image": ([4], [6]),
    "equal lengths": ([3, 3, 3], [5, 5, 5]),
    "ragged": ([1, 7, 3], [6, 2, 9]),
    "equal queries, ragged keys": ([4, 4], [1, 8]),
    "no keys for one": ([2, 5], [0, 3]),
    "no keys for any": ([2, 2], [0, 0]),
    "no images": ([], []),
}


def bounds(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def packed(lengths, **options):
    return torch.randn(sum(lengths), HEADS, WIDTH, **{"dtype": torch.float64} | options)


def reference_ragged(q, k, v, lengths_q, lengths_k, causal):
    """`reference.masked_attention` on all rows of all images at once: a key counts where it belongs to the same image.

    A row without any key is made 0: the one difference, as the docstring of `varlen_attention` says.
    """
    if not sum(lengths_k):
        return torch.zeros_like(q)
    image_q = torch.repeat_interleave(torch.tensor(lengths_q, dtype=torch.long))
    image_k = torch.repeat_interleave(torch.tensor(lengths_k, dtype=torch.long))
    weight = (image_q[:, None] == image_k).to(q.dtype)
    weight = weight.tril() if causal else weight
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return reference.masked_attention(q, k, v, weight[None])[0].transpose(0, 1) * weight.any(1)[:, None, None]


def dense(*shape, **options):
    return torch.randn(2, HEADS, *shape, WIDTH, **{"dtype": torch.float64} | options)


def test_reference_by_hand():
    # One query; logits ln 1, ln 2, ln 3 and values 6, 9, 1 for three keys.
    q = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    k = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64).log().view(1, 1, 3, 1)
    v = torch.tensor([6.0, 9.0, 1.0], dtype=torch.float64).view(1, 1, 3, 1)

    def attend(*weight, eps=0.0):
        return reference.masked_attention(q, k, v, torch.tensor([[weight]], dtype=torch.float64), eps).item()

    assert attend(1, 1, 1) == pytest.approx((6 + 2 * 9 + 3 * 1) / 6)
    assert attend(1, 1, 0) == pytest.approx((6 + 2 * 9) / 3)
    assert attend(1, 0.5, 0) == pytest.approx((6 + 9) / 2)
    assert attend(0, 0, 0) == pytest.approx((6 + 9 + 1) / 3)
    # With eps the largest logit, masked or not, sets the scale: masses 1/3, 2/3 and none.
    assert attend(1, 1, 0, eps=0.3) == pytest.approx((0.1 * (6 + 9 + 1) + 6 / 3 + 9 * 2 / 3) / 1.3)
    assert attend(0, 0, 0, eps=0.3) == pytest.approx((6 + 9 + 1) / 3)


def test_reference_scales_by_the_head_width():
    q, k, v = dense(3), dense(4), dense(4)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert_close(
        reference.masked_attention(q, k, v, torch.ones(2, 3, 4, dtype=torch.float64)), expected, atol=1e-12, rtol=0
    )


@pytest.mark.parametrize("eps", [0.0, 1e-6])
def test_reference_gradients_are_finite_where_a_row_has_no_key(eps):
    q, k, v = (dense(n, requires_grad=True) for n in (3, 4, 4))
    weight = torch.zeros(2, 3, 4, dtype=torch.float64)
    weight[0, 1, 2] = 1
    weight.requires_grad_()
    reference.masked_attention(q, k, v, weight, eps).sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v, weight))


def test_lengths_of_bounds():
    assert lengths_of(torch.tensor([0, 3, 3, 10], dtype=torch.int32)) == [3, 0, 7]
    assert lengths_of(torch.tensor([0], dtype=torch.int32)) == []


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths_q, lengths_k", LENGTHS.values(), ids=LENGTHS)
def test_varlen_attention_agrees_with_the_reference(lengths_q, lengths_k, causal):
    lengths_k = lengths_q if causal else lengths_k
    q, k, v = packed(lengths_q), packed(lengths_k), packed(lengths_k)
    got = varlen_attention(q, k, v, bounds(lengths_q), bounds(lengths_k), causal=causal)
    assert_close(got, reference_ragged(q, k, v, lengths_q, lengths_k, causal), atol=1e-10, rtol=0)


@pytest.mark.parametrize("causal", [False, True])
def test_varlen_gradients_agree_with_the_reference(causal):
    lengths_q, lengths_k = ([1, 7, 3],) * 2 if causal else ([1, 7, 3], [6, 2, 9])
    inputs = [packed(n, requires_grad=True) for n in (lengths_q, lengths_k, lengths_k)]
    towards = packed(lengths_q)
    got = torch.autograd.grad(
        varlen_attention(*inputs, bounds(lengths_q), bounds(lengths_k), causal=causal), inputs, towards
    )
    expected = torch.autograd.grad(reference_ragged(*inputs, lengths_q, lengths_k, causal), inputs, towards)
    assert_close(got, expected, atol=1e-10, rtol=0)


def masks(rows):
    weight = (torch.rand(2, rows, 6, dtype=torch.float64) < 0.5).double()
    weight[0, 0], weight[1, -1] = 0, 1  # a row without any key, a row with all
    return {
        "0 and 1": weight,
        "soft": weight * torch.rand_like(weight),
        "all": torch.ones_like(weight),
        "none": torch.zeros_like(weight),
    }


@pytest.mark.parametrize("eps", [0.0, 1e-6, 0.1])
@pytest.mark.parametrize("kind", ["0 and 1", "soft", "all", "none"])
@pytest.mark.parametrize("rows", [4, 1], ids=["a weight per query", "shared by all queries"])
def test_weighted_attention_agrees_with_the_reference(rows, kind, eps):
    q, k, v = (dense(n, requires_grad=True) for n in (4, 6, 6))
    weight = masks(rows)[kind].requires_grad_()
    inputs, towards = (q, k, v, weight), dense(4)
    got = soft_masked_attention(q, k, v, weight, eps=eps)
    expected = reference.masked_attention(q, k, v, weight.expand(2, 4, 6), eps)
    assert_close(got, expected, atol=1e-10, rtol=0)
    got, expected = (torch.autograd.grad(x, inputs, towards) for x in (got, expected))
    for a, b in zip(got, expected, strict=True):
        assert_close(a, b, atol=1e-10 * max(1, float(b.detach().abs().max())), rtol=0)


def test_weights_of_absent_keys_have_a_gradient():
    q, k, v = dense(4), dense(6), dense(6)
    weight = masks(4)["0 and 1"].requires_grad_()
    (soft_masked_attention(q, k, v, weight) * dense(4)).sum().backward()
    some = weight.detach().any(-1)
    absent = (weight.detach() == 0) & some[..., None]
    assert absent.any() and (weight.grad[absent] != 0).all()
    assert (weight.grad[~some] == 0).all()  # an average over nothing says nothing about what one more key would do


def test_a_towering_absent_key_overflows_nothing():
    # exp(300) is infinite in float32, and infinity times the weight 0 is no number.
    q, v = torch.ones(1, 1, 1, 1), torch.tensor([1.0, 2.0, 3.0]).view(1, 1, 3, 1)
    k = torch.tensor([0.0, 1.0, 300.0]).view(1, 1, 3, 1).requires_grad_()
    weight = torch.tensor([[[1.0, 1.0, 0.0]]], requires_grad=True)
    out = soft_masked_attention(q, k, v, weight)
    out.sum().backward()
    assert out.item() == pytest.approx((1 + 2 * math.e) / (1 + math.e))
    assert weight.grad.isfinite().all() and k.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_attention_computes_its_softmax_in_float32(dtype):
    exact = [dense(n, dtype=torch.float32).to(dtype) for n in (4, 6, 6)]
    weight = masks(4)["0 and 1"].float()
    got = soft_masked_attention(*exact, weight)
    expected = reference.masked_attention(*(x.double() for x in exact), weight.double())
    assert got.dtype == dtype
    budget = 4 * torch.finfo(dtype).eps  # logits, probabilities and the product are each rounded once
    assert float((got.double() - expected).abs().max()) <= budget * float(exact[2].abs().max())


@pytest.mark.parametrize("rows", [1, 33, 2048, 2049, 5000], ids="{} codes".format)
@pytest.mark.parametrize("dim", [1, 8, 33])
def test_nearest_code_agrees_with_the_reference(rows, dim):
    codebook = torch.randn(rows, dim) * (0.5 + torch.rand(rows, 1))
    z = torch.randn(40, dim)
    assert torch.equal(
        nearest_code(z, codebook, normalize=False), reference.nearest_code(z.double(), codebook.double())
    )


def test_nearest_code_measures_distance_not_the_angle():
    codebook = torch.tensor([[3.0, 0.0], [0.5, 0.5]])
    assert nearest_code(torch.tensor([[1.0, 0.1]]), codebook, normalize=False).tolist() == [
        1
    ]  # 0.41 against 4.01, though row 0 has the better angle


@pytest.mark.parametrize("tokens", [1, 3, 16, 40])
@pytest.mark.parametrize("rows", [33, 2049, 4099])
def test_of_equal_codes_the_lowest_wins_in_any_shape(rows, tokens):
    # Matrix products round the first and the last columns differently, so a later twin can seem to be nearer.
    for dim in (3, 16, 32):
        codebook = torch.randn(rows, dim)
        first, twin = torch.randperm(rows - 1)[:8], torch.randperm(rows // 2)[:8] + rows // 2
        twin[0] = rows - 1
        codebook[twin] = codebook[first]
        z = codebook[torch.cat([first, twin])].repeat(5, 1)[:tokens] + 1e-3 * torch.randn(tokens, dim)
        expected = reference.nearest_code(z.double(), codebook.double())
        assert torch.equal(nearest_code(z, codebook, normalize=False), expected)
        assert torch.equal(nearest_code(z.double(), codebook.double(), normalize=False), expected)


def test_equally_distant_codes_go_to_the_lowest():
    codebook = torch.eye(3)[[2, 1, 0, 1]]
    assert nearest_code(torch.tensor([[1 / 3] * 3, [0.0, 1.0, 0.0]]), codebook, normalize=False).tolist() == [0, 1]


def test_what_float32_can_not_tell_apart_is_decided_in_float64():
    z = torch.nn.functional.normalize(torch.randn(200, 16), dim=-1)
    # two codes on either side of each vector, 1e-7 nearer and farther: less than the rounding of a score
    side = torch.nn.functional.normalize(torch.randn(200, 16), dim=-1)
    codebook = torch.cat([z + (1 + 1e-7) * 0.1 * side, z - 0.1 * side]).float()
    assert torch.equal(
        nearest_code(z, codebook, normalize=False), reference.nearest_code(z.double(), codebook.double())
    )


def test_nearest_code_of_nothing():
    assert nearest_code(torch.empty(0, 4), torch.randn(9, 4), normalize=False).shape == (0,)
