"""The codebook: search, statistics, k-means start, revival, and that two processes make of their halves what one makes of the whole."""

import math
import multiprocessing

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.testing import assert_close

from dyntok.errors import CodeError, ConfigError
from dyntok.model.codebook import Codebook, CodebookTrainer, gather_rows_of_ranks, perplexity
from dyntok_kernels import reference


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def codebook_of(rows):
    rows = torch.as_tensor(rows, dtype=torch.float32)
    codebook = Codebook(*rows.shape)
    codebook.embedding.copy_(rows)
    return codebook


def clusters(count, each, dim, spread=0.02):
    """Vectors around `count` directions, on any scale: [count * each, dim]."""
    centres = F.normalize(torch.randn(count, dim), dim=-1).repeat_interleave(each, 0)
    return (centres + spread * torch.randn(count * each, dim)) * (0.1 + 3 * torch.rand(count * each, 1))


def distortion(codebook, vectors):
    z = F.normalize(vectors, dim=-1)
    return float((z - codebook.embedding[codebook(vectors)]).square().sum(-1).mean())


# Search.


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


# Learning.


def test_update_by_hand():
    codebook = codebook_of([[1.0, 0.0], [0.0, 1.0]])
    trainer = CodebookTrainer(codebook, decay=0.75, revive_below=0)
    vectors = torch.tensor([[3.0, 4.0], [10.0, 0.0], [0.0, 0.5]])  # directions (0.6, 0.8), (1, 0), (0, 1)
    assert trainer.update(codebook, vectors, torch.tensor([0, 0, 1]), generator()) == 0
    assert_close(trainer.counts, torch.tensor([0.75 * 1 + 0.25 * 2, 0.75 * 1 + 0.25 * 1]))
    assert_close(trainer.sums, torch.tensor([[0.75 * 1 + 0.25 * 1.6, 0.25 * 0.8], [0.0, 0.75 * 1 + 0.25 * 1]]))
    assert_close(
        codebook.embedding, torch.tensor([[1.15, 0.2], [0.0, 1.0]]) / torch.tensor([[math.hypot(1.15, 0.2)], [1.0]])
    )
    trainer.update(codebook, vectors[:0], torch.empty(0, dtype=torch.long), generator())  # nothing seen: rows stay
    assert_close(
        codebook.embedding, torch.tensor([[1.15, 0.2], [0.0, 1.0]]) / torch.tensor([[math.hypot(1.15, 0.2)], [1.0]])
    )


def test_updates_follow_vectors_that_move():
    codebook, target = codebook_of([[1.0, 0.0], [-1.0, 0.0]]), torch.tensor([[0.8, 0.6], [-0.6, 0.8]])
    trainer = CodebookTrainer(codebook, decay=0.9)
    for _ in range(100):
        trainer.update(codebook, target, torch.tensor([0, 1]), generator())
    assert_close(codebook.embedding, target, atol=1e-4, rtol=0)


def test_updates_take_no_gradient():
    codebook, vectors = Codebook(4, 3), torch.randn(9, 3, requires_grad=True)
    trainer = CodebookTrainer(codebook)
    trainer.update(codebook, vectors, codebook(vectors), generator())
    assert not any(t.requires_grad for t in (codebook.embedding, trainer.counts, trainer.sums))


def test_k_means_improves_the_distortion_and_fills_the_codebook():
    vectors = clusters(count=60, each=20, dim=8)
    before = [distortion(Codebook(64, 8), vectors), 1.0]
    codebook = Codebook(64, 8)
    trainer = CodebookTrainer(codebook)
    after = []
    for iterations in (1, 3, 20):
        trainer.start(codebook, vectors, iterations=iterations, generator=generator())
        after.append(distortion(codebook, vectors))
    assert min(before) > 2 * after[0] and after[0] > after[1] > after[2]
    assert_close(codebook.embedding.norm(dim=-1), torch.ones(64))
    assert len(codebook(vectors).unique()) >= 60
    # the running statistics begin in agreement with the rows
    assert_close(F.normalize(trainer.sums, dim=-1), codebook.embedding)
    assert trainer.counts.mean() == pytest.approx(1) and (trainer.counts > 0).all()


def test_k_means_gives_every_code_a_use_where_there_are_enough_directions():
    vectors = torch.randn(1024, 8)
    codebook = Codebook(64, 8)
    CodebookTrainer(codebook).start(codebook, vectors, generator=generator())
    counts = torch.bincount(codebook(vectors), minlength=64)
    assert (counts > 0).all() and perplexity(counts) > 50


def test_k_means_is_reproducible_and_says_when_there_is_too_little():
    vectors, books = torch.randn(200, 8), [Codebook(32, 8), Codebook(32, 8)]
    for codebook in books:
        CodebookTrainer(codebook).start(codebook, vectors, generator=generator(5))
    assert torch.equal(books[0].embedding, books[1].embedding)
    with pytest.raises(CodeError, match="k-means got 31 vectors for 32 codes"):
        CodebookTrainer(books[0]).start(books[0], vectors[:31], generator=generator())
    with pytest.raises(ConfigError, match="k-means got 0 iterations, expected at least 1"):
        CodebookTrainer(books[0]).start(books[0], vectors, iterations=0, generator=generator())


def test_dead_codes_come_back_as_recent_vectors():
    vectors = clusters(count=16, each=8, dim=6)
    codebook = codebook_of(
        F.normalize(vectors[::8], dim=-1)[:8].repeat(2, 1) * torch.tensor([1.0, -1.0]).repeat_interleave(8)[:, None]
    )
    trainer = CodebookTrainer(codebook, decay=0.5, revive_below=0.1)
    used = [len(codebook(vectors).unique())]
    revived = []
    for step in range(12):
        revived.append(trainer.update(codebook, vectors, codebook(vectors), generator(step)))
        used.append(len(codebook(vectors).unique()))
    assert used[0] < 14 and used[-1] == 16
    assert sum(revived) > 0 and revived[-1] == 0
    assert_close(codebook.embedding.norm(dim=-1), torch.ones(16))


def test_a_revived_code_is_one_of_the_vectors_and_is_given_time():
    codebook = codebook_of([[1.0, 0.0], [-1.0, 0.0]])
    trainer = CodebookTrainer(codebook, decay=0.5, revive_below=0.2)
    vectors, codes = torch.tensor([[4.0, 3.0], [3.0, 4.0]]), torch.tensor([0, 0])
    revivals = [trainer.update(codebook, vectors, codes, generator()) for _ in range(4)]
    assert revivals.count(1) == 1
    row = codebook.embedding[1]
    assert any(torch.allclose(row, z) for z in F.normalize(vectors, dim=-1))
    last = revivals.index(1)
    assert last < 3 and revivals[last + 1 :] == [0] * (3 - last)  # not again at once, though nothing chose it


def test_living_codes_are_left_alone_and_no_more_revived_than_there_are_vectors():
    codebook = Codebook(50, 6)
    trainer = CodebookTrainer(codebook, decay=0.0, revive_below=0.5)  # every code that this step does not use is dead
    vectors = codebook.embedding[:3].clone()
    assert trainer.update(codebook, vectors, torch.tensor([0, 1, 2]), generator()) == 3
    assert_close(codebook.embedding[:3], vectors)
    trainer = CodebookTrainer(codebook, decay=0.0, revive_below=0)
    assert trainer.update(codebook, vectors, torch.tensor([0, 1, 2]), generator()) == 0


# Several processes.

PARTS = (slice(0, 30), slice(30, 75))  # of different lengths


def learn(vectors, codebook, steps=4):
    """The state after a few updates from these vectors, and how many codes each revived."""
    trainer = CodebookTrainer(codebook, decay=0.6, revive_below=0.3)
    revived = [trainer.update(codebook, vectors, codebook(vectors), generator(step)) for step in range(steps)]
    return {
        "rows": codebook.embedding,
        "counts": trainer.counts,
        "sums": trainer.sums,
        "revived": torch.tensor(revived),
    }


def worker(rank, rendezvous, vectors, rows, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    try:
        state = learn(vectors[PARTS[rank]], codebook_of(rows))
        state["gathered"] = gather_rows_of_ranks(vectors[PARTS[rank]])
        torch.save(state, f"{results}/{rank}.pt")
        dist.barrier()  # neither leaves while the other still talks to it
    finally:
        dist.destroy_process_group()


def test_two_processes_learn_what_one_learns_from_all_vectors(tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    vectors, rows = torch.randn(75, 6), F.normalize(torch.randn(40, 6), dim=-1)
    start = multiprocessing.get_context("spawn").Process
    processes = [
        start(target=worker, args=(rank, (tmp_path / "meet").as_uri(), vectors, rows, str(tmp_path)))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
        process.kill()
    assert [process.exitcode for process in processes] == [0, 0]
    states = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    expected = learn(vectors, codebook_of(rows))
    assert expected["revived"].sum() > 0
    for state in states:
        assert torch.equal(state.pop("gathered"), vectors)
        assert torch.equal(state["revived"], expected["revived"])
        for name in ("rows", "counts", "sums"):
            assert_close(state[name], expected[name], atol=1e-5, rtol=0)
    for name, value in states[0].items():  # and on every rank the very same bits, or the ranks would drift apart
        assert torch.equal(value, states[1][name])
