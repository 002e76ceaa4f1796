"""Samples and a small tokenizer for tests of evaluations."""

import io
import tarfile

import skimage.data
import torch
from PIL import Image

from dyntok import DynamicVisualTokenizer, TokenizerConfig
from dyntok.training.sources import find_samples

TENCH, SPRINGER, CHURCH = "n01440764", "n02102040", "n03028079"  # ImageNet classes 0, 217, 497
PHOTOGRAPHS = {
    "astronaut": TENCH,
    "coffee": SPRINGER,
    "chelsea": CHURCH,
    "rocket": TENCH,
    "camera": SPRINGER,
    "colorwheel": "buildings",
}
VIT = dict(img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2, class_token=False, global_pool="avg")


def small_tokenizer(img_size=32, backbone=VIT, **decoder):
    config = {
        "image": {"img_size": img_size},
        "backbone": {"name": "vit_tiny_patch16_224", "kwargs": backbone},
        "merger": {"depth": 1, "num_heads": 2, "mlp_ratio": 2.0},
        "codebook": {"size": 64, "dim": 8, "projection": "linear"},
        "decoder": {"depth": 1, "num_heads": 2, "mlp_ratio": 2.0, **decoder},
    }
    torch.manual_seed(0)
    tokenizer = DynamicVisualTokenizer(TokenizerConfig.from_dict(config)).eval()
    with torch.no_grad():
        tokenizer.selector.head.bias.zero_()  # else an untrained selector keeps every patch
        tokenizer.selector.head.weight.mul_(20)
    return tokenizer


def pixel_tokenizer():
    """Its decoder makes pixels."""
    return small_tokenizer(placement="grid", conv=True, head="none", pixels=True)


def jpeg(name, box=None):
    image = Image.fromarray(getattr(skimage.data, name)()).convert("RGB").resize((96, 80), box=box)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def write_tar(path, files):
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def labelled_photographs(folder):
    """Six photographs in a webdataset tar, keys pic-0 to pic-5, with labels."""
    files = {}
    for i, (name, label) in enumerate(PHOTOGRAPHS.items()):
        files[f"pic-{i}.jpg"] = jpeg(name)
        files[f"pic-{i}.cls.txt"] = label.encode()
    return find_samples([write_tar(folder / "pics.tar", files)])


def labelled_crops(root):
    """24 crops of two photographs, the photograph's name as label, in a folder of folders."""
    for name in ("coffee", "rocket"):
        (root / name).mkdir()
        for i in range(12):
            (root / name / f"{i:02}.jpg").write_bytes(jpeg(name, (10 * i, 5 * i, 10 * i + 260, 5 * i + 220)))
    return find_samples([root])
