"""Training data: folders, tars, the split, batches that depend on seed and step alone, and unreadable images."""

import hashlib
import io
import logging
import tarfile

import pytest
import torch
from PIL import Image
from support.tars import jpeg, write_tar

from dyntok.config import ImageConfig
from dyntok.errors import DataError
from dyntok.training.crops import Crops
from dyntok.training.data import TrainingImages
from dyntok.training.sources import ImageSample, digest_of, find_samples, is_validation, take_inventory

CONFIG = ImageConfig(img_size=16)


@pytest.fixture
def folder(tmp_path, photos):
    """Eleven readable images in two classes and above them."""
    for i, photo in enumerate(photos * 2):
        path = tmp_path / "images" / ("", "cats", "dogs")[i % 3] / f"{i:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(photo, 40 + i))
    (tmp_path / "images" / "notes.txt").write_text("no image")
    (tmp_path / "images" / "folder.jpg").mkdir()
    return tmp_path / "images"


def batches(samples, steps, batch_size=4, **options):
    data = TrainingImages(samples, Crops(CONFIG, batch_size, **{"seed": 3, "min_crop": 0.7, **options}))
    return torch.stack([data[step] for step in steps])


def test_folder_keys_and_labels(folder):
    samples = find_samples([folder])
    assert [sample.key for sample in samples] == [
        "00", "03", "06", "09", "cats/01", "cats/04", "cats/07", "cats/10", "dogs/02", "dogs/05", "dogs/08", "dogs/11",
    ]  # fmt: skip
    assert {sample.key: sample.label for sample in samples}["cats/10"] == "cats"
    assert samples[0].label is None
    assert samples[0].read() == (folder / "00.jpg").read_bytes()


def test_single_file(folder):
    (sample,) = find_samples([folder / "cats" / "01.jpg"])
    assert (sample.key, sample.label) == ("01", None)


def test_tar_keys_labels_and_bytes(tmp_path, photos):
    first, second = jpeg(photos[0]), jpeg(photos[1])
    path = write_tar(
        tmp_path / "a.tar",
        [
            ("0.cls.txt", b"7\n"),
            ("0.jpg", first),
            ("deep/er/x.y.txt", b"?"),
            ("deep/er/b.JPEG", second),
            ("deep/er/b.cls", b"cat"),
            ("c.png", first),
        ],  # fmt: skip
    )
    samples = find_samples([tmp_path])  # a folder of tars
    assert samples == find_samples([path])
    assert [(sample.key, sample.label) for sample in samples] == [("0", "7"), ("deep/er/b", "cat"), ("c", None)]
    assert [sample.read() for sample in samples] == [first, second, first]


def test_split_is_one_twentieth_by_the_hash_of_the_key():
    keys = [f"photo-{i}" for i in range(4000)]
    expected = {key for key in keys if int(hashlib.sha256(key.encode()).hexdigest(), 16) % 20 == 0}
    assert {key for key in keys if is_validation(key)} == expected
    assert 150 < len(expected) < 250
    is_validation("caf\udce9")  # a file name that is not UTF-8


def test_splits_partition(tmp_path, photos):
    write_tar(tmp_path / "a.tar", [(f"{i:03d}.jpg", b"not read here") for i in range(200)])
    keys = {
        split: [sample.key for sample in find_samples([tmp_path], split)] for split in ("all", "train", "validation")
    }
    assert sorted(keys["train"] + keys["validation"]) == keys["all"]
    assert keys["validation"] == [key for key in keys["all"] if is_validation(key)] and keys["validation"]


def damaged(path, content):
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    "kind", ["garbage", "empty", "cut inside an image", "cut inside a header", "damaged header", "compressed"]
)
def test_broken_tar(tmp_path, photos, kind):
    whole = write_tar(tmp_path / "whole.tar", [(f"{i}.jpg", jpeg(photos[i])) for i in range(3)]).read_bytes()
    second = 512 + -(-len(jpeg(photos[0])) // 512) * 512
    assert whole[second : second + 5] == b"1.jpg"
    content = {
        "garbage": b"this is no tar" * 100,
        "empty": b"",
        "cut inside an image": whole[: second + 700],
        "cut inside a header": whole[: second + 100],
        "damaged header": whole[:second] + b"\xff" * 512 + whole[second + 512 :],
        "compressed": b"\x1f\x8b" + whole[2:],
    }[kind]
    path = damaged(tmp_path / "broken.tar", content)
    (tmp_path / "whole.tar").rename(tmp_path / "other.tar")
    inventory = take_inventory([tmp_path])  # the intact tar is used, and the images before the damage
    intact = [sample for sample in inventory.samples if sample.path != str(path)]
    assert len(intact) == 3 and len(inventory.samples) - len(intact) in (0, 1, 2)
    (problem,) = inventory.problems
    assert "broken.tar" in problem and "expected an intact, uncompressed webdataset tar" in problem
    if kind in ("garbage", "empty", "compressed"):
        with pytest.raises(DataError, match=r"broken\.tar.*uncompressed webdataset tar"):
            find_samples([path])


def test_links_are_followed_once_and_what_is_left_out_is_counted(folder, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "x.JPG").write_bytes((folder / "00.jpg").read_bytes())
    (folder / "linked").symlink_to(outside)
    (outside / "back").symlink_to(folder)
    (folder / ".ipynb_checkpoints").mkdir()
    (folder / "._x.jpg").write_bytes(b"")
    inventory = take_inventory([folder])
    assert len(inventory.samples) == 13 and "linked/x" in [sample.key for sample in inventory.samples]
    assert inventory.left_out == {".txt": 1, "hidden": 2}
    assert inventory.report()[-1] == "left out: 2 hidden, 1 .txt"


def test_links_in_a_tar_lead_to_the_bytes(tmp_path, photos):
    content = jpeg(photos[0])
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        member = tarfile.TarInfo("0.jpg")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo("1.jpg")
        link.type, link.linkname = tarfile.LNKTYPE, "0.jpg"
        tar.addfile(link)
        for name, target in {"others": "b/..", "a/2.jpg": "../others/1.jpg", "3.jpg": "../0.jpg", "o": "o"}.items():
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.SYMTYPE, target
            tar.addfile(link)
    inventory = take_inventory([tmp_path])
    assert {sample.key: sample.read() for sample in inventory.samples} == dict.fromkeys(("0", "1", "a/2"), content)
    assert inventory.problems == [f"3.jpg in {tmp_path}/a.tar is a link to nothing or no ordinary file"]


def test_tars_in_one_file_and_repeated_keys(tmp_path, photos):
    content = jpeg(photos[0])
    parts = [write_tar(tmp_path / f"{i}.tar", [(f"{i}.jpg", content), ("x.jpg", content)]).read_bytes() for i in (0, 1)]
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "a.tar").write_bytes(b"".join(parts))
    inventory = take_inventory([tmp_path / "whole"])
    assert [sample.key for sample in inventory.samples] == ["0", "x", "1"] and not inventory.problems
    assert all(sample.read() == content for sample in inventory.samples)
    assert inventory.report() == ["left out: 1 further images of a key that has one"]


def test_names_with_several_dots(tmp_path, photos):
    """As in `dyntok batch`, the key ends at the first dot, and the suffix is what follows the last one."""
    a, b, mask = (jpeg(photos[i]) for i in range(3))
    members = [
        ("d.e/a.b.jpg", a),
        ("b.mask.png", mask),
        ("b.jpg", b),
        ("b.x.txt", b"?"),
        ("c.1.jpg", b),
        ("c.2.JPG", a),
    ]
    inventory = take_inventory([write_tar(tmp_path / "a.tar", members)])
    assert {sample.key: sample.read() for sample in inventory.samples} == {"d.e/a": a, "b": b, "c": b}
    assert inventory.report() == ["left out: 2 further images of a key that has one, 1 .txt"]


@pytest.mark.parametrize("name", ["missing", "notes.txt", "a.tar.gz", "nothing"])
def test_nothing_to_work_on(tmp_path, name):
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "a.tar.gz").write_bytes(b"\x1f\x8b")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataError, match=name):
        find_samples([tmp_path / name])


def test_no_image_of_the_split(tmp_path):
    write_tar(tmp_path / "a.tar", [("photo-1.jpg", b"")])
    split = "train" if is_validation("photo-1") else "validation"
    with pytest.raises(DataError, match=split):
        find_samples([tmp_path], split)


def test_batches_follow_from_seed_and_step_alone(folder):
    samples = find_samples([folder])
    forward = batches(samples, range(6))
    backward = batches(samples, range(5, -1, -1)).flip(0)
    assert torch.equal(forward, backward)
    assert forward.shape == (6, 4, 3, 16, 16) and forward.dtype == torch.float32
    assert not torch.equal(forward, batches(samples, range(6), seed=4))
    flat = forward.flatten(0, 1).flatten(1)  # 24 draws of 12 images: no crop appears twice
    assert len(flat.unique(dim=0)) == 24


def test_every_pass_shows_every_image_once(folder):
    data = TrainingImages(find_samples([folder]), Crops(CONFIG, 5, seed=0, min_crop=1.0))
    seen = []
    data._image = lambda epoch, place, original=data._image: seen.append((epoch, place)) or original(epoch, place)
    for step in range(12):
        data[step]
    assert seen == [divmod(place, 12) for place in range(60)]
    permutations = {
        tuple(torch.randperm(12, generator=torch.Generator().manual_seed(epoch)).tolist()) for epoch in range(5)
    }
    assert len(permutations) == 5


def test_ranks_partition_the_global_batch(folder):
    samples = find_samples([folder])
    whole = batches(samples, range(4), batch_size=6)
    parts = [batches(samples, range(4), batch_size=2, rank=rank, world=3) for rank in range(3)]
    for rank, part in enumerate(parts):
        assert torch.equal(part, whole[:, rank::3])


def test_crops_stay_inside_and_keep_the_aspect_ratio(tmp_path):
    # red grows with x and green with y at the same slope: a square crop shows the same slope on both axes
    ramp = torch.zeros(40, 120, 3, dtype=torch.uint8)
    ramp[..., 0], ramp[..., 1] = torch.arange(120) * 2, torch.arange(40)[:, None] * 2
    Image.fromarray(ramp.numpy()).save(tmp_path / "ramp.png")
    pixels = (batches(find_samples([tmp_path]), range(8)).flatten(0, 1) + 1) * 127.5
    across = (pixels[:, 0, 8, 12] - pixels[:, 0, 8, 4]).abs()
    down = pixels[:, 1, 12, 8] - pixels[:, 1, 4, 8]
    assert (across - down).abs().max() <= 2
    assert down.min() > 8 * 2 * 0.7 * 40 / 16 - 2 and down.max() < 8 * 2 * 40 / 16 + 2
    mirrored = (pixels[:, 0, 8, 12] < pixels[:, 0, 8, 4]).float().mean()
    assert 0.2 < mirrored < 0.8


def test_worker_processes_give_the_same_batches(folder):
    (folder / "00.jpg").write_bytes(b"broken")
    data = TrainingImages(find_samples([folder]), Crops(CONFIG, 4, seed=3, min_crop=0.7))
    loader = torch.utils.data.DataLoader(data, batch_size=None, sampler=range(2, 8), num_workers=2)
    got = torch.stack(list(loader))
    assert data.unreadable == [0]  # counted in the workers, known here
    assert torch.equal(got, batches(data.samples, range(2, 8)))


def test_a_broken_image_is_replaced_by_the_next_of_the_permutation(folder, caplog):
    samples = find_samples([folder])
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3 * 1_000_003)).tolist()
    broken = [order[5], order[6]]  # two in a row
    (folder / f"{samples[broken[0]].key}.jpg").write_bytes(b"\xff\xd8 not a photograph")
    (folder / f"{samples[broken[1]].key}.jpg").unlink()
    data = TrainingImages(samples, Crops(CONFIG, 1, seed=3, min_crop=1.0))
    with caplog.at_level(logging.WARNING, "dyntok"):
        got = [data[step] for step in range(24)]  # two passes: still one warning for each
    assert sorted(data.unreadable) == sorted(broken)
    assert [record.message.split(":")[0] for record in caplog.records] == [
        f"left out {samples[index].key} of {samples[index].path}, unreadable image number {i + 1}"
        for i, index in enumerate(broken)
    ]
    replacement = TrainingImages([samples[order[7]]], Crops(CONFIG, 1, seed=3, min_crop=1.0))[0]
    for place in (5, 6):
        assert torch.equal(got[place], replacement) or torch.equal(got[place], replacement.flip(-1))


def test_a_tar_that_lost_its_end_after_indexing(tmp_path, photos):
    path = write_tar(tmp_path / "a.tar", [(f"{i}.jpg", jpeg(photos[i])) for i in range(3)])
    samples = find_samples([path])
    with open(path, "r+b") as file:
        file.truncate(samples[2].offset + 100)
    data = TrainingImages(samples, Crops(CONFIG, 3, seed=0, min_crop=0.8))
    assert data[0].isfinite().all() and data.unreadable == [2]


def test_all_images_gone(tmp_path):
    samples = [ImageSample(str(i), str(tmp_path / f"{i}.jpg")) for i in range(200)]
    data = TrainingImages(samples, Crops(CONFIG, 1, seed=0, min_crop=0.8))
    with pytest.raises(DataError, match="100 images in a row"):
        data.batch(0)
    assert isinstance(data[0], DataError) and "100 images in a row" in str(data[0])


def test_digest_tells_keys_and_order_apart():
    digests = {digest_of(keys) for keys in (["a", "b", "c"], ["c", "b", "a"], ["a", "b"], ["ab", "c"])}
    assert len(digests) == 4 and digest_of(("a", "b", "c")) in digests
