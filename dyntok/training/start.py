"""The linear start: before the first step the whole network is a PCA codec, and learning only has to improve on it.

Patch embedding = principal components of training patches (partly whitened), bottleneck = the first C-1 of them and a constant (so that
an l2-normalised vector still tells a strong patch from a weak one), decoder and pixel head = the inverse. Residual branches start small
(`init_scale`, timm's `init_values`).
"""

import torch
from torch import Tensor, nn

from dyntok.errors import ConfigError
from dyntok.tokenizer import DynamicVisualTokenizer

_CONSTANT = 2.5  # of the bottleneck, in units of the kept components' root mean square


@torch.no_grad()
def linear_start(tokenizer: DynamicVisualTokenizer, pixels: Tensor) -> None:
    """Initialise from normalised training pixels [B, 3, H, W].

    Raises `ConfigError` where the tokenizer has no linear patch embedding of width 3 p^2 (or less), linear projection, grid decoder of the
    same width and pixel head.
    """
    embed = getattr(getattr(tokenizer.backbone.model, "patch_embed", None), "proj", None)
    decoder, head, projection = tokenizer.decoder, tokenizer.pixel_head, tokenizer.projection
    if not isinstance(embed, nn.Conv2d) or not isinstance(projection, nn.Linear) or head is None or decoder.placement != "grid":
        raise ConfigError("linear_start needs a ViT backbone, codebook.projection 'linear', decoder.placement 'grid' and decoder.pixels")
    p, width = tokenizer.backbone.patch_size, tokenizer.backbone.embed_dim
    if width > 3 * p * p or decoder.in_proj.out_features != width:
        raise ConfigError(f"linear_start needs a width of at most {3 * p * p} (3 x patch {p} squared), the same in the decoder, not {width}")
    patches = nn.functional.unfold(pixels, p, stride=p).transpose(1, 2).flatten(0, 1)  # [n, 3 p p]
    mean = patches.mean(0)
    variances, vectors = torch.linalg.eigh(torch.cov((patches - mean).T))
    variances, vectors = variances.flip(0)[:width].clamp(min=1e-8), vectors.flip(1)[:, :width]
    scale = variances**0.25  # partly whitened: coordinate i has the standard deviation variances[i] ** 0.25
    embed.weight.copy_((vectors / scale).T.view_as(embed.weight))
    embed.bias.copy_(-(vectors / scale).T @ mean)

    components = projection.out_features - 1
    constant = _CONSTANT * variances[:components].sum().sqrt()
    projection.weight.zero_()
    projection.weight[:components, :components] = torch.diag(scale[:components])
    projection.bias.zero_()
    projection.bias[-1] = constant
    coordinates = (patches - mean) @ vectors[:, :components]
    shrink = constant / (coordinates.square().sum(1) + constant**2).sqrt()  # what normalising does to the constant
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
