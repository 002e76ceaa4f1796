"""Patch features from any timm model, through its public interface.

Weights come from timm's hub, from a local file, or later from the checkpoint that holds this backbone. Not here:
training.
"""

from pathlib import Path

from einops import rearrange
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from dyntok.config import BackboneConfig
from dyntok.errors import CheckpointError, ConfigError


class Backbone(nn.Module):
    """A timm model, cut after one of its layers.

    Attributes: embed_dim D; patch_size in pixels; any_grid, whether it takes images of other shapes than the square of
    `img_size` (timm's dynamic_img_size); grid (rows, columns) of that square.

    Raises `ConfigError` where timm has no such model or the model gives no intermediate features.
    """

    def __init__(self, config: BackboneConfig, img_size: int, *, pretrained: bool = False) -> None:
        super().__init__()
        import timm  # here, because it takes a second and `import dyntok` should not

        try:
            model = timm.create_model(config.name, pretrained=pretrained, num_classes=0, **config.kwargs)
        except OSError as error:  # of the hub's client
            raise CheckpointError(
                f"can't fetch the weights of {config.name}: {error}; give a safetensors file of them"
            ) from error
        except (
            RuntimeError,
            TypeError,
            AssertionError,
            ValueError,
            ArithmeticError,
            LookupError,
            AttributeError,
        ) as error:
            raise ConfigError(f"timm can't make the backbone {config.name!r} with {config.kwargs}: {error}") from error
        embed = getattr(model, "patch_embed", None)
        size = getattr(embed, "img_size", None)
        if size is not None and tuple(size) != (img_size, img_size) and getattr(embed, "strict_img_size", True):
            raise ConfigError(
                f"image.img_size is {img_size}, but {config.name} takes {size[0]} x {size[1]}; "
                f"set backbone.kwargs.img_size to {img_size}"
            )
        info = getattr(model, "feature_info", None)
        if not hasattr(model, "forward_intermediates") or not info:
            raise ConfigError(
                f"the timm model {config.name!r} gives no intermediate features; choose one with forward_intermediates"
            )
        layers = list(info)
        try:
            layer = layers[config.layer]
        except IndexError:
            raise ConfigError(f"backbone.layer is {config.layer}, but {config.name} has {len(layers)} layers") from None
        self.layer = config.layer % len(layers)
        self.norm = config.norm
        self.frozen = config.frozen
        self.embed_dim: int = layer["num_chs"]
        self.patch_size: int = layer["reduction"]
        rows = -(-img_size // self.patch_size)
        self.grid = (rows, rows)
        self.any_grid: bool = config.kwargs.get("dynamic_img_size") is True
        if hasattr(model, "prune_intermediate_layers"):
            model.prune_intermediate_layers([self.layer], prune_norm=not config.norm, prune_head=True)
        self.model = model
        if self.frozen:
            self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "Backbone":
        """Keeps a frozen backbone in evaluation mode: its batch statistics belong to its weights."""
        return super().train(mode and not self.frozen)

    def grid_of(self, pixels: Tensor) -> tuple[int, int]:
        """Returns the grid (rows, columns) of images [B, 3, H, W]; a patch that the border cuts counts."""
        return -(-pixels.shape[2] // self.patch_size), -(-pixels.shape[3] // self.patch_size)

    def forward(self, pixels: Tensor) -> Tensor:
        """Returns features [B, N, D] for normalized pixels [B, 3, H, W], in raster order and without class tokens.

        Raises `ConfigError` where the model's feature map is not the grid that its stride promises for this image size.
        """
        (features,) = self.model.forward_intermediates(
            pixels, indices=[self.layer], norm=self.norm, output_fmt="NCHW", intermediates_only=True
        )
        grid = self.grid_of(pixels)
        if tuple(features.shape[2:]) != grid:
            got, expected = (" x ".join(map(str, sides)) for sides in (features.shape[2:], grid))
            raise ConfigError(
                f"the backbone gives {got} patches instead of {expected}; "
                f"choose image sides divisible by {self.patch_size}"
            )
        return rearrange(features, "b d rows cols -> b (rows cols) d")

    def load_weights(self, path: str | Path) -> None:
        """Fill the model from a safetensors file in timm's own naming; see `load_timm_weights`."""
        load_timm_weights(self.model, path)


def load_timm_weights(model: nn.Module, path: str | Path) -> None:
    """Fill a timm model from a safetensors file in timm's own naming. What the model lacks (later layers, a head) is
    left out.

    Raises `CheckpointError` where the file can't be read, lacks a tensor, or has one of another shape.
    """
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"can't read the backbone's weights {path}: {error}; expected a safetensors file"
        ) from error
    wanted = model.state_dict()
    missing = [name for name in wanted if name not in state and not name.endswith("num_batches_tracked")]
    misshaped = [name for name in wanted if name in state and state[name].shape != wanted[name].shape]
    if missing or misshaped:
        names = ", ".join((missing + misshaped)[:5])
        raise CheckpointError(
            f"{path} does not fit the model: {len(missing)} tensors missing, {len(misshaped)} of another shape "
            f"(first: {names})"
        )
    model.load_state_dict({name: state[name] for name in wanted if name in state}, strict=False)
