"""Images streamed from tars: complete, disjoint between ranks, shuffled, the same after a restart."""

import logging
import tarfile
from collections import Counter
from itertools import islice

import pytest
import torch
from support.small_run import changed, log_of, run_until, trainer
from support.tars import jpeg, write_tar

from dyntok.config import ImageConfig
from dyntok.errors import DataError
from dyntok.training.crops import Crops
from dyntok.training.sources import is_validation
from dyntok.training.stream import StreamedImages, find_shards

CONFIG = ImageConfig(img_size=16)
SHARDS, EACH = 5, 8


@pytest.fixture
def folder(tmp_path, photos):
    (tmp_path / "tars").mkdir()
    for shard in range(SHARDS):
        members = [(f"{shard}-{i}.jpg", jpeg(photos[(shard + i) % len(photos)], 40 + i)) for i in range(EACH)]
        extra = [("notes.txt", b"no image"), ("._0.jpg", b"hidden")]
        write_tar(tmp_path / "tars" / f"{shard}.tar", [*members, *extra])
    return tmp_path / "tars"


def stream(folder, buffer=10, split="all", **options):
    crops = Crops(CONFIG, 4, seed=3, min_crop=0.8, **options)
    return StreamedImages(find_shards([folder]), crops, split=split, buffer=buffer)


def keys(streamed, number):
    return [sample.key for sample in islice(streamed.order(), number)]


def test_a_pass_has_every_image_once_and_the_next_another_order(folder):
    everything = {f"{shard}-{i}" for shard in range(SHARDS) for i in range(EACH)}
    one, two = (keys(stream(folder, buffer=1), 2 * len(everything))[start:][:40] for start in (0, 40))
    assert set(one) == set(two) == everything and one != two
    shuffled = keys(stream(folder, buffer=10), 4 * len(everything))
    counts = Counter(shuffled)  # but for what waits in the buffer
    assert set(counts) == everything and max(counts.values()) - min(counts.values()) <= 2
    shards = [key[0] for key in shuffled[:10]]
    assert len(set(shards)) > 1 and shuffled[:40] != one


def test_two_tars_in_one_file_and_links(folder, tmp_path, caplog):
    parts = [path.read_bytes() for path in sorted(folder.glob("*.tar"))[:2]]
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "a.tar").write_bytes(b"".join(parts))
    found = set(keys(stream(tmp_path / "whole", buffer=1), 2 * EACH))
    assert found == {f"{shard}-{i}" for shard in (0, 1) for i in range(EACH)}
    link = tarfile.TarInfo("9.jpg")
    link.type, link.linkname = tarfile.LNKTYPE, "0-0.jpg"
    with tarfile.open(folder / "0.tar", "a") as tar:
        tar.addfile(link)
    keys(stream(folder, buffer=1), SHARDS * EACH)
    assert "left out 1 images of" in caplog.text and "links" in caplog.text


def test_ranks_are_disjoint_and_complete(folder):
    parts = [keys(stream(folder, buffer=1, rank=rank, world=2), n) for rank, n in ((0, 24), (1, 16))]
    assert sorted(parts[0] + parts[1]) == sorted(f"{shard}-{i}" for shard in range(SHARDS) for i in range(EACH))
    with pytest.raises(DataError, match="5 tars for 6 processes"):
        stream(folder, rank=0, world=6)


def test_the_split_is_that_of_listed_images(folder):
    found = {split: set(keys(stream(folder, buffer=1, split=split), 40)) for split in ("train", "validation")}
    assert not found["train"] & found["validation"] and all(map(is_validation, found["validation"]))
    assert len(found["train"] | found["validation"]) == SHARDS * EACH


def test_a_streamed_run_validates_on_what_it_leaves_out(folder, values, tmp_path):
    expected = sorted(key for shard in range(SHARDS) for i in range(EACH) if is_validation(key := f"{shard}-{i}"))
    stage = {**values["stages"][0], "images": 8}
    small = changed(values, data=[str(folder)], stream=6, split="train", validate_every=2, pca_init=False)
    run = trainer({**small, "stages": [stage]}, tmp_path / "run")
    assert expected and [sample.key for sample in run.validation] == expected
    run.run()
    assert "validation_psnr" in log_of(tmp_path / "run")[-1]


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_later_start_and_other_worker_processes_give_the_same_batches(folder, workers):
    expected = list(islice(stream(folder).batches(0), 14))
    assert len({float(batch.sum()) for batch in expected}) == 14
    dataset, sampler = stream(folder).for_loader(5, 14)
    loader = torch.utils.data.DataLoader(dataset, batch_size=None, sampler=sampler, num_workers=workers)
    got = list(loader)
    assert len(got) == 9 and all(torch.equal(a, b) for a, b in zip(got, expected[5:], strict=True))


def test_damage_is_told_and_changes_no_other_batch(folder, caplog):
    before = keys(stream(folder, buffer=1), 30)
    shard = next(iter(folder.glob("2.tar")))
    content = bytearray(shard.read_bytes())
    sample = next(s for s in islice(stream(folder, buffer=1).order(), 40) if s.key == "2-3")
    content[sample.offset : sample.offset + 40] = bytes(40)  # an image that is none
    shard.write_bytes(content)
    streamed = stream(folder, buffer=1)
    with caplog.at_level(logging.WARNING, "dyntok"):
        batches = list(islice(streamed.batches(0), 10))
    assert keys(stream(folder, buffer=1), 30) == before and all(batch.shape == (4, 3, 16, 16) for batch in batches)
    assert "left out 2-3" in caplog.text and len(streamed.unreadable) == 1
    shard.write_bytes(content[: sample.offset + 10])  # and a tar that is cut off
    with caplog.at_level(logging.WARNING, "dyntok"):
        assert "2-6" not in keys(stream(folder, buffer=1), 40)
    assert f"left out the rest of {shard}" in caplog.text


def test_what_is_no_tar_is_refused(tmp_path):
    for source in (tmp_path, tmp_path / "missing", tmp_path / "missing.tar"):
        with pytest.raises(DataError, match="expected a folder of them or a .tar"):
            find_shards([source])


def test_a_streamed_run_resumes_as_if_it_had_not_stopped(folder, values, tmp_path):
    small = changed(values, data=[str(folder)], stream=6, pca_init=True)
    for stage in small["stages"]:
        stage["images"] = 4 * 6
    trainer(small, tmp_path / "whole").run()
    run_until(trainer(changed(small, save_every=4), tmp_path / "parts"), 9)
    resumed = trainer(changed(small, workers=2), tmp_path / "parts")
    assert resumed.step == 8
    resumed.run()
    assert log_of(tmp_path / "parts") == log_of(tmp_path / "whole")
    one, two = (torch.load(tmp_path / name / "state.pt", weights_only=True)["objective"] for name in ("whole", "parts"))
    assert all(torch.equal(value, two[name]) for name, value in one.items())
