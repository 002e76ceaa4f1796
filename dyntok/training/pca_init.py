"""Initializes a tokenizer as a linear (PCA) codec, which training then improves.

The patch embedding computes the principal components of training patches, partly whitened. The bottleneck keeps the
first C-1 of them and a constant, so that an l2-normalized vector still carries the patch's magnitude. Decoder and
pixel head are the inverse. Residual branches start small (`init_scale`, timm's `init_values`).
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from dyntok.errors import ConfigError
from dyntok.tokenizer import DynamicVisualTokenizer

_CONSTANT = 2.5  # of the bottleneck, in units of the kept components' root mean square
_POSITION = 0.15  # standard deviation of the position embedding's coordinates


@torch.no_grad()
def pca_init(tokenizer: DynamicVisualTokenizer, batches: Iterable[Tensor]) -> None:
    """Initializes from batches of normalized training pixels [B, 3, H, W].

    Raises `ConfigError` if a part is not linear at the start (norms and MLP heads are not), if widths do not fit, or if
    there are too few patches.
    """
    embed = getattr(getattr(tokenizer.backbone.model, "patch_embed", None), "proj", None)
    decoder, head, projection, config = tokenizer.decoder, tokenizer.pixel_head, tokenizer.projection, tokenizer.config
    linear = isinstance(embed, nn.Conv2d) and head is not None and decoder.placement == "grid"
    if (
        not linear
        or not isinstance(projection, nn.Linear)
        or config.backbone.norm
        or config.merger.norm
        or config.decoder.head != "none"
    ):
        raise ConfigError(
            "pca_init needs a ViT backbone with norm: false, merger.norm: false, codebook.projection: linear, and a "
            "decoder with placement: grid, head: none and pixels: true"
        )
    p, width = tokenizer.backbone.patch_size, tokenizer.backbone.embed_dim
    if (
        not projection.out_features - 1 <= width <= 3 * p * p
        or projection.out_features < 2
        or decoder.in_proj.out_features != width
    ):
        raise ConfigError(
            f"the tokenizer has width {width}, {decoder.in_proj.out_features} in the decoder, "
            f"{projection.out_features} in codes; pca_init expects one width of at most {3 * p * p} (3 x patch {p} "
            "squared), and codes of dimension 2 to width + 1"
        )
    unfolded = [nn.functional.unfold(batch, p, stride=p).transpose(1, 2).flatten(0, 1) for batch in batches]
    patches = torch.cat(unfolded)  # [n, 3 p p]
    if len(patches) < width:
        raise ConfigError(
            f"pca_init got {len(patches)} patches for {width} components; give at least {width} (a larger batch_size)"
        )
    mean = patches.mean(0)
    variances, vectors = torch.linalg.eigh(torch.cov((patches - mean).T))
    variances, vectors = variances.flip(0)[:width].clamp(min=1e-8), vectors.flip(1)[:, :width]
    scale = variances**0.25  # partly whitened: coordinate i has the standard deviation variances[i] ** 0.25
    embed.weight.copy_((vectors / scale).T.view_as(embed.weight))
    embed.bias.copy_(-(vectors / scale).T @ mean)

    components = projection.out_features - 1
    position = getattr(tokenizer.backbone.model, "pos_embed", None)
    if position is not None:
        # only in coordinates that the bottleneck drops: all blocks see them, and the codes get no noise from them
        position.normal_(std=_POSITION)[..., :components] = 0
    constant = _CONSTANT * variances[:components].sum().sqrt()
    projection.weight.zero_()
    projection.weight[:components, :components] = torch.diag(scale[:components])
    projection.bias.zero_()
    projection.bias[-1] = constant
    coordinates = (patches - mean) @ vectors[:, :components]
    shrink = (
        constant / (coordinates.square().sum(1) + constant**2).sqrt()
    )  # the factor by which normalizing changes the constant
    back = constant / shrink.mean()
    decoder.in_proj.weight.zero_()
    decoder.in_proj.weight[:components, :components] = torch.diag(back / scale[:components])
    decoder.in_proj.bias.zero_()
    decoder.query_embed.mul_(0.1)

    center = slice(p // 2, p // 2 + p)
    head.proj.weight.zero_()
    head.proj.weight.view(3, 2 * p, 2 * p, width)[:, center, center] = (vectors * scale).view(3, p, p, width)
    head.proj.bias.zero_()
    head.proj.bias.view(3, 2 * p, 2 * p)[:, center, center] = mean.view(3, p, p)
