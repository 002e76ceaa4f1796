"""The linear start: before the first step the whole network is a PCA codec, and learning only has to improve on it.

Patch embedding = principal components of training patches (partly whitened), bottleneck = the first C-1 of them and a constant (so that
an l2-normalized vector still tells a strong patch from a weak one), decoder and pixel head = the inverse. Residual branches start small
(`init_scale`, timm's `init_values`).
"""

import torch
from torch import Tensor, nn

from dyntok.errors import ConfigError
from dyntok.tokenizer import DynamicVisualTokenizer

_CONSTANT = 2.5  # of the bottleneck, in units of the kept components' root mean square

_POSITION = 0.15  # standard deviation of the position embedding's coordinates


@torch.no_grad()
def pca_init(tokenizer: DynamicVisualTokenizer, pixels: Tensor) -> None:
    """Initialise from normalized training pixels [B, 3, H, W].

    Raises `ConfigError` where something between pixels and pixels is not linear at the start (a ViT's patch embedding, a linear projection,
    a grid decoder and the pixel head are, norms and MLP heads are not), where widths do not fit, and on too few patches.
    """
    embed = getattr(getattr(tokenizer.backbone.model, "patch_embed", None), "proj", None)
    decoder, head, projection, config = tokenizer.decoder, tokenizer.pixel_head, tokenizer.projection, tokenizer.config
    linear = (
        isinstance(embed, nn.Conv2d)
        and isinstance(projection, nn.Linear)
        and head is not None
        and decoder.placement == "grid"
    )
    if not linear or config.backbone.norm or config.merger.norm or config.decoder.head != "none":
        raise ConfigError(
            "pca_init needs a ViT backbone with norm: false, merger.norm: false, codebook.projection: linear, and a decoder with "
            "placement: grid, head: none and pixels: true"
        )
    p, width = tokenizer.backbone.patch_size, tokenizer.backbone.embed_dim
    if (
        not projection.out_features - 1 <= width <= 3 * p * p
        or projection.out_features < 2
        or decoder.in_proj.out_features != width
    ):
        raise ConfigError(
            f"the tokenizer has width {width}, {decoder.in_proj.out_features} in the decoder, {projection.out_features} in codes; expected "
            f"for pca_init one width of at most {3 * p * p} (3 x patch {p} squared), and codes of dimension 2 to width + 1"
        )
    patches = nn.functional.unfold(pixels, p, stride=p).transpose(1, 2).flatten(0, 1)  # [n, 3 p p]
    if len(patches) < width:
        raise ConfigError(
            f"pca_init got {len(patches)} patches for {width} components; give at least as many (a larger batch_size)"
        )
    mean = patches.mean(0)
    variances, vectors = torch.linalg.eigh(torch.cov((patches - mean).T))
    variances, vectors = variances.flip(0)[:width].clamp(min=1e-8), vectors.flip(1)[:, :width]
    scale = variances**0.25  # partly whitened: coordinate i has the standard deviation variances[i] ** 0.25
    embed.weight.copy_((vectors / scale).T.view_as(embed.weight))
    embed.bias.copy_(-(vectors / scale).T @ mean)

    components = projection.out_features - 1
    position = getattr(tokenizer.backbone.model, "pos_embed", None)
    if (
        position is not None
    ):  # in coordinates that the bottleneck does not pass on: known to all blocks, and no noise in the codes
        position.normal_(std=_POSITION)[..., :components] = 0
    constant = _CONSTANT * variances[:components].sum().sqrt()
    projection.weight.zero_()
    projection.weight[:components, :components] = torch.diag(scale[:components])
    projection.bias.zero_()
    projection.bias[-1] = constant
    coordinates = (patches - mean) @ vectors[:, :components]
    shrink = constant / (coordinates.square().sum(1) + constant**2).sqrt()  # what normalizing does to the constant
    back = constant / shrink.mean()
    decoder.in_proj.weight.zero_()
    decoder.in_proj.weight[:components, :components] = torch.diag(back / scale[:components])
    decoder.in_proj.bias.zero_()
    decoder.query_embed.mul_(0.1)

    centre = slice(p // 2, p // 2 + p)
    head.proj.weight.zero_()
    head.proj.weight.view(3, 2 * p, 2 * p, width)[:, centre, centre] = (vectors * scale).view(3, p, p, width)
    head.proj.bias.zero_()
    head.proj.bias.view(3, 2 * p, 2 * p)[:, centre, centre] = mean.view(3, p, p)
