"""Learning a codebook: moving averages, k-means, revival; two processes learn what one learns from all vectors."""

import math
import multiprocessing

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.testing import assert_close

from dyntok.errors import CodeError
from dyntok.model.codebook import Codebook, perplexity
from dyntok.training.codebook import CodebookTrainer, gather_rows_of_ranks


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
    codebook = Codebook(64, 8)
    trainer = CodebookTrainer(codebook)
    trainer.start(codebook, vectors, generator=generator())
    picked = codebook_of(F.normalize(vectors, dim=-1)[torch.randperm(len(vectors), generator=generator())[:64]])
    assert distortion(codebook, vectors) < distortion(picked, vectors) / 2  # better than the vectors it began with
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


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_infinite_vectors_are_refused_and_change_nothing(value):
    codebook, vectors = Codebook(8, 4), torch.randn(20, 4)
    trainer = CodebookTrainer(codebook)
    trainer.update(codebook, vectors, codebook(vectors), generator())
    before = {**trainer.state_dict(), "rows": codebook.embedding.clone()}
    before = {name: tensor.clone() for name, tensor in before.items()}
    codes = codebook(vectors)
    vectors[3, 1] = value
    remedy = "got vectors with NaN or infinite values.*lower the learning rate, or set precision: fp32"
    with pytest.raises(CodeError, match=f"CodebookTrainer.update {remedy}"):
        trainer.update(codebook, vectors, codes, generator())
    with pytest.raises(CodeError, match=f"k-means {remedy}"):
        trainer.start(codebook, vectors, generator=generator())
    after = {**trainer.state_dict(), "rows": codebook.embedding}
    assert all(torch.equal(after[name], before[name]) for name in before)


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


def test_vectors_of_other_ranks_are_asked_for_only_where_a_code_is_dead(monkeypatch):
    asked = []
    gather = "dyntok.training.codebook.gather_rows_of_ranks"
    monkeypatch.setattr(gather, lambda rows: asked.append(len(rows)) or rows)
    codebook = codebook_of(torch.eye(4))
    trainer = CodebookTrainer(codebook, decay=0.0, revive_below=0.5)
    trainer.update(codebook, torch.eye(4), torch.arange(4), generator(0))
    assert asked == []
    assert trainer.update(codebook, torch.eye(4)[:2], torch.arange(2), generator(0)) == 2 and asked == [2]


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
