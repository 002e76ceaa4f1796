"""What several test files share: photographs, a small untrained tokenizer, and values of LaVIT's networks."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from skimage import data
from support.device import DEVICE  # before anything imports a kernel

from dyntok.config import BackboneConfig, CodebookConfig, DecoderConfig, ImageConfig, MergerConfig, TokenizerConfig
from dyntok.image import to_pixels
from dyntok.tokenizer import DynamicVisualTokenizer

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture(autouse=True)
def seed():
    """Every test starts from the same state of the global generator, whichever tests ran before."""
    torch.manual_seed(0)


@pytest.fixture
def on_device():
    """Makes tensors on the device that is tested. On a GPU the kernels are compiled, on a CPU interpreted."""
    with torch.device(DEVICE):
        yield DEVICE


@pytest.fixture(scope="session")
def photos():
    """Real photographs, uint8 [H, W, 3], of several shapes."""
    images = [data.astronaut(), data.coffee(), data.cat(), data.rocket()]
    return [*images, images[0][:, 100:300].copy(), images[1][150:300].copy()]


@pytest.fixture(scope="session")
def small_config():
    """64 pixels, 64 patches, width 48, 256 codes of dimension 8: quick, and with every part that `tiny` has."""
    return TokenizerConfig(
        image=ImageConfig(img_size=64),
        backbone=BackboneConfig(
            name="vit_tiny_patch16_224",
            kwargs=dict(
                img_size=64, patch_size=8, embed_dim=48, depth=1, num_heads=3, class_token=False, global_pool="avg"
            ),
            frozen=False,
        ),
        merger=MergerConfig(depth=1, num_heads=3, mlp_ratio=2.0, norm=False),
        codebook=CodebookConfig(size=256, dim=8, projection="linear"),
        decoder=DecoderConfig(
            depth=1, num_heads=3, mlp_ratio=2.0, placement="grid", conv=True, head="none", pixels=True
        ),
    )


def _untrained(config, photos):
    torch.manual_seed(0)
    tokenizer = DynamicVisualTokenizer(config).eval()
    pixels = torch.stack([to_pixels(photo, config.image) for photo in photos])
    with torch.no_grad():
        head = tokenizer.selector.head
        head.weight.mul_(30)
        keep, drop = tokenizer.selector(tokenizer.backbone(pixels)).unbind(-1)
        head.bias[0] -= (keep - drop).median()
    return tokenizer


@pytest.fixture
def tokenizer(small_config, photos):
    """An untrained tokenizer in evaluation mode, with the same weights every time.

    Its selector keeps about half of the photographs' patches.
    """
    return _untrained(small_config, photos)


@pytest.fixture(scope="session")
def checkpoint_folder(small_config, photos, tmp_path_factory):
    """That tokenizer, saved."""
    folder = tmp_path_factory.mktemp("checkpoint")
    _untrained(small_config, photos).save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Parity:
    """Weights and intermediate values of LaVIT's own networks at a small size, with random weights."""

    tensors: dict[str, torch.Tensor]
    config: dict[str, int]

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def weights(self, prefix: str, renamed: dict[str, str]) -> dict[str, torch.Tensor]:
        """Returns all tensors under a prefix, without it; every key of `renamed` is replaced by its value."""
        found = {}
        for name, tensor in self.tensors.items():
            if name.startswith(prefix):
                name = name.removeprefix(prefix)
                for old, new in renamed.items():
                    name = name.replace(old, new)
                found[name] = tensor
        return found

    def error(self, name: str, got: torch.Tensor) -> float:
        """Relative: norm of the difference over norm."""
        assert got.shape == self[name].shape
        return float((got.detach() - self[name]).norm() / self[name].norm())


@pytest.fixture(scope="session")
def parity():
    with safe_open(FIXTURES / "lavit_parity_a.safetensors", "pt") as file:
        return Parity({name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["config"]))  # noqa: SIM118


@pytest.fixture(scope="session")
def values(tmp_path_factory, photos, small_config):
    """The recipe of a small training run, as YAML gives it."""
    from support.small_run import write_recipe  # here, because it loads what only training needs

    return write_recipe(tmp_path_factory.mktemp("photos"), photos, small_config)


@pytest.fixture(scope="session")
def undisturbed(values, tmp_path_factory):
    """The folder of that run from beginning to end; not to be changed."""
    from support.small_run import trainer

    folder = tmp_path_factory.mktemp("undisturbed") / "a" / "run"  # folders are made
    trainer(values, folder).run()
    return folder
