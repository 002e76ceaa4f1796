"""The codebook: search, lookup, quantization, perplexity."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from dyntok.errors import CodeError
from dyntok.model.codebook import Codebook, perplexity
from dyntok_kernels import reference


def codebook_of(rows):
    rows = torch.as_tensor(rows, dtype=torch.float32)
    codebook = Codebook(*rows.shape)
    codebook.embedding.copy_(rows)
    return codebook


def test_codebook_gives_lavits_codes(parity):
    rows = parity["tokenizer_encoder.bin/quantize.embedding.weight"]
    assert (rows.norm(dim=-1).amin() < 0.85) and (rows.norm(dim=-1).amax() > 1.2)  # not of length 1, and that counts
    codebook = codebook_of(rows)
    codes = codebook(parity["io/task_layer_output"])
    assert torch.equal(codes, parity["io/codes"])
    assert torch.equal(codebook.lookup(codes), parity["io/quantized"])
    assert not torch.equal(codebook_of(F.normalize(rows, dim=-1))(parity["io/task_layer_output"]), codes)


@pytest.mark.parametrize("size", [1, 2047, 2048, 2049, 5000])
def test_search_agrees_with_the_reference_for_any_size(size):
    codebook, vectors = Codebook(size, 8), torch.randn(50, 8) * 10
    z = F.normalize(vectors, dim=-1)
    assert torch.equal(codebook(vectors), reference.nearest_code(z.double(), codebook.embedding.double()))


def test_vectors_may_have_any_scale():
    codebook, vectors = Codebook(300, 8), torch.randn(50, 8)
    for scale in (1e-3, 1e4):
        assert torch.equal(codebook(vectors * scale), codebook(vectors))


def test_of_equal_rows_the_lowest_is_the_code():
    codebook = Codebook(3000, 16)
    codebook.embedding[[40, 2048, 2999]] = codebook.embedding[7].clone()
    assert codebook(codebook.embedding[[2999, 7, 40, 2048]]).tolist() == [7] * 4
    assert codebook(codebook.embedding[[2999]]).tolist() == [7]


def test_codes_of_a_vector_do_not_depend_on_the_others():
    codebook, vectors = Codebook(3000, 16), torch.randn(60, 16)
    together = codebook(vectors)
    assert torch.equal(torch.cat([codebook(v[None]) for v in vectors]), together)
    order = torch.randperm(60)
    assert torch.equal(codebook(vectors[order]), together[order])


def test_search_is_in_float32_also_in_half_precision_and_under_autocast():
    codebook, vectors = Codebook(3000, 16), torch.randn(200, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(codebook(vectors), codebook(vectors.float()))
    rounded = codebook_of(codebook.embedding.bfloat16())
    assert torch.equal(codebook.to(torch.bfloat16)(vectors.bfloat16()), rounded(vectors.bfloat16().float()))


def test_lookup_gives_rows_and_refuses_other_codes():
    codebook = Codebook(16, 4)
    assert torch.equal(codebook.lookup(torch.tensor([3, 0, 15])), codebook.embedding[[3, 0, 15]])
    assert codebook.lookup(torch.empty(0, dtype=torch.long)).shape == (0, 4)
    for codes, wrong in (([3, 16], 16), ([-1, 3], -1)):
        with pytest.raises(CodeError, match=f"code {wrong} is out of range, this codebook has codes 0 to 15"):
            codebook.lookup(torch.tensor(codes))


def test_quantize_passes_the_gradient_straight_to_the_normalised_vectors():
    codebook, vectors = Codebook(64, 8), (torch.randn(20, 8) * 3).requires_grad_()
    rows, codes = codebook.quantize(vectors)
    assert torch.equal(codes, codebook(vectors))
    assert_close(rows, codebook.embedding[codes])
    towards = torch.randn(20, 8)
    got = torch.autograd.grad((rows * towards).sum(), vectors)
    assert_close(got, torch.autograd.grad((F.normalize(vectors, dim=-1) * towards).sum(), vectors))
    assert not codebook.embedding.requires_grad  # rows move by statistics, never by gradients
    assert codebook.double().quantize(vectors.double())[0].dtype == torch.float64


def test_perplexity_by_hand():
    assert perplexity(torch.tensor([1, 1, 2])) == pytest.approx(
        2**1.5
    )  # entropy: 1/4 * 2 + 1/4 * 2 + 1/2 * 1 = 1.5 bits
    assert perplexity(torch.full((50,), 7)) == pytest.approx(50)
    assert perplexity(torch.tensor([0, 9, 0])) == pytest.approx(1)
    assert perplexity(torch.zeros(4)) == 0
