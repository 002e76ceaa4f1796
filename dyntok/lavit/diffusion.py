"""LaVIT's conditioning to pictures, by the U-Net, VAE and DDIM scheduler of its released folders.

diffusers' own classes run them. Importing this file does not import diffusers (extra `diffusion`); loading a
`DiffusionDecoder` does. Weights are read from safetensors or, as released, from a torch pickle of tensors alone.
Not here: how the conditioning is made from codes, and image files (`image.py`).
"""

import math
import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from dyntok.errors import CheckpointError, ConfigError, MissingDependencyError
from dyntok.lavit.diffusion_files import INDEX, UNCOND, load_network, load_part, load_uncond
from dyntok.precision import HALF
from dyntok.structure import require

LAVIT_SIZES = ((1024, 1024), (896, 1152), (832, 1216), (768, 1344), (1216, 832), (1152, 896))  # (height, width)

FILES = (
    "unet/*",
    "vae/*",
    "scheduler/*",
    "uncond_embeddings.safetensors",
)  # of a saved diffusion model, below its folder

_TIME_IDS = 6  # numbers per image: original size, crop, target size
_DTYPES = (*HALF, torch.float32, torch.float64)


class DiffusionDecoder:
    """U-Net, VAE and DDIM scheduler of one of LaVIT's released folders: conditions in, pictures out.

    There are two styles. The 512 px one is conditioned on embeddings alone, and its unconditional embedding is stored;
    the 1024 px one (as SDXL) also wants a pooled embedding and the size of the picture, and its unconditional
    embeddings are zeros.
    """

    def __init__(self, unet: Any, vae: Any, scheduler: Any, uncond_embeddings: Tensor | None = None) -> None:
        """Takes diffusers' `UNet2DConditionModel`, `AutoencoderKL` and `DDIMScheduler`.

        uncond_embeddings: float [L, E], for a U-Net without a pooled embedding.

        Both networks are put into evaluation mode; a half-precision VAE with `force_upcast` becomes float32. Raises
        `ConfigError` on parts that do not fit together.
        """
        _check_parts(unet.config, vae.config)
        if vae.config.force_upcast and vae.dtype in HALF:
            vae = vae.float()  # its activations overflow float16: pictures would be black
        self.unet, self.vae, self.scheduler = unet.eval(), vae.eval(), scheduler
        self.uncond_embeddings = None if self.wants_pooled else uncond_embeddings
        width = unet.config.cross_attention_dim
        fits = self.wants_pooled or (
            _is_float(uncond_embeddings, 2) and len(uncond_embeddings) >= 1 and uncond_embeddings.shape[1] == width
        )
        require(fits, f"the unconditional embedding is {_kind(uncond_embeddings)}, expected floats [L, {width}]")

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike,
        *,
        pickles: bool = False,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> "DiffusionDecoder":
        """Returns the model in a folder with `unet`, `vae` and `scheduler`; nothing is downloaded.

        A U-Net without a pooled embedding also needs `uncond_embeddings.safetensors` in the folder.

        pickles: also read weights and the unconditional embedding from torch pickles, as released. They are read only
            from what a user named as LaVIT's, and no code in them runs.
        dtype: of the networks. A VAE with `force_upcast` is float32 where that is a half-precision one.

        Raises `CheckpointError` on a file that is missing, damaged, refused or does not fit, `MissingDependencyError`
        without diffusers.
        """
        require(dtype in _DTYPES, f"dtype is {dtype!r}, expected one of {', '.join(map(str, _DTYPES))}")
        try:
            from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
        except ImportError as error:
            raise MissingDependencyError.of("diffusers", "diffusion") from error
        folder = Path(folder)
        unet = load_network(UNet2DConditionModel, folder / "unet", dtype, pickles)
        vae = load_network(AutoencoderKL, folder / "vae", dtype, pickles)
        if (
            vae.config.force_upcast and dtype in HALF
        ):  # once more, because numbers too large for a half are infinite by now
            vae = load_network(AutoencoderKL, folder / "vae", torch.float32, pickles)
        scheduler = load_part(DDIMScheduler, folder / "scheduler")
        uncond = None if unet.config.addition_embed_type else load_uncond(folder, pickles)
        try:
            decoder = cls(unet, vae, scheduler, uncond)
        except ConfigError as error:
            raise CheckpointError(f"what is in {folder} does not fit together: {error}") from error
        decoder.unet.to(device)
        decoder.vae.to(device)
        return decoder

    def save(self, folder: str | os.PathLike) -> None:
        """Writes what `load` reads, as safetensors only; other files in the folder stay. Raises `CheckpointError`."""
        folder = Path(folder)
        try:
            for name, network in (("unet", self.unet), ("vae", self.vae)):
                (folder / name).mkdir(parents=True, exist_ok=True)
                network.save_pretrained(folder / name, max_shard_size="1TB")
                (folder / name / INDEX).unlink(missing_ok=True)  # a reader would prefer the shards it lists
            self.scheduler.save_pretrained(folder / "scheduler")
            if self.uncond_embeddings is not None:
                save_file(
                    {UNCOND: self.uncond_embeddings.contiguous()},
                    folder / f"{UNCOND}.safetensors",
                    metadata={"format": "pt"},
                )
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"can't write the diffusion model to {folder}: {error}") from error

    @property
    def wants_pooled(self) -> bool:
        """Returns whether this is the 1024 px style: with a pooled embedding, as SDXL."""
        return self.unet.config.addition_embed_type == "text_time"

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Returns the possible (height, width) of pictures, the default first.

        With a pooled embedding: LaVIT's six sizes, scaled from 1024 to the U-Net's own size and rounded to whole latent
        pixels (of small U-Nets some may coincide; each is listed once). Without: the U-Net's own size, square.
        """
        sizes = LAVIT_SIZES if self.wants_pooled else LAVIT_SIZES[:1]
        latent = (tuple(max(1, round(side * self.unet.config.sample_size / 1024)) for side in size) for size in sizes)
        return tuple(dict.fromkeys((height * self._scale, width * self._scale) for height, width in latent))

    @property
    def _scale(self) -> int:
        """Pixels along the side of one latent pixel."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @torch.no_grad()
    def __call__(
        self,
        embeddings: Tensor,
        pooled: Tensor | None = None,
        *,
        size: tuple[int, int] | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        generator: torch.Generator | None = None,
        batch_size: int = 1,
    ) -> Tensor:
        """Makes float32 pixels [B, 3, H, W] in [0, 1], on the CPU, of prompt embeddings.

        embeddings: float [B, N, E]. pooled: float [B, P], where the U-Net needs it.

        `size` is one of `sizes`. With a pooled embedding `steps` is 50 and `guidance` 5.0, as in LaVIT; without, 25
        and 3.0, our choice. A guidance of 1 or less leaves the unconditional half of the work out. `batch_size` images
        are made at a time: it bounds the memory and does not change the pictures, because the only noise is that of
        the start, drawn image by image on the generator's device (without one, from PyTorch's global generator on the
        CPU). Raises `ConfigError` on an argument that does not fit.
        """
        steps = (50 if self.wants_pooled else 25) if steps is None else steps
        guidance = (5.0 if self.wants_pooled else 3.0) if guidance is None else guidance
        size = self.sizes[0] if size is None else size
        self._check_options(size, steps, guidance, generator, batch_size)
        self._check_conditions(embeddings, pooled, guided=guidance > 1)
        pixels = torch.empty(len(embeddings), 3, *size, dtype=torch.float32)
        for first in range(0, len(embeddings), batch_size):
            rows = slice(first, first + batch_size)
            latents = self._noise(len(embeddings[rows]), size, generator)
            conditions = self._conditions(
                embeddings[rows], None if pooled is None else pooled[rows], size, guided=guidance > 1
            )
            pixels[rows] = self._decode(self._denoise(latents, conditions, steps, guidance))
        return pixels

    def _noise(self, count: int, size: tuple[int, int], generator: torch.Generator | None) -> Tensor:
        """Returns noise, float32 [B, C, h, w] on the U-Net's device."""
        shape = (1, self.unet.config.in_channels, *(side // self._scale for side in size))
        device = "cpu" if generator is None else generator.device
        noise = [torch.randn(shape, generator=generator, device=device, dtype=torch.float32) for _ in range(count)]
        return torch.cat(noise).to(self.unet.device)

    def _conditions(
        self, embeddings: Tensor, pooled: Tensor | None, size: tuple[int, int], *, guided: bool
    ) -> dict[str, Any]:
        """Returns keyword arguments of the U-Net. Guided: twice the rows, the unconditional ones first."""
        like = {"device": self.unet.device, "dtype": self.unet.dtype}
        wanted = embeddings.to(**like)  # [B, N, E]
        if pooled is not None:
            pooled = pooled.to(**like)
            if guided:
                wanted, pooled = (torch.cat([torch.zeros_like(rows), rows]) for rows in (wanted, pooled))
            # float32, in which every size is exact
            time_ids = torch.tensor([[*size, 0, 0, *size]], device=like["device"], dtype=torch.float32).expand(
                len(wanted), _TIME_IDS
            )
            return {"encoder_hidden_states": wanted, "added_cond_kwargs": {"text_embeds": pooled, "time_ids": time_ids}}
        if not guided:
            return {"encoder_hidden_states": wanted}
        missing = wanted.shape[1] - len(self.uncond_embeddings)
        plain = F.pad(self.uncond_embeddings.to(**like), (0, 0, 0, missing)).expand_as(wanted)
        mask = torch.ones(2, *wanted.shape[:2], dtype=torch.bool, device=like["device"])  # [2, B, N]
        mask[0, :, wanted.shape[1] - missing :] = False
        return {"encoder_hidden_states": torch.cat([plain, wanted]), "encoder_attention_mask": mask.flatten(0, 1)}

    def _denoise(self, latents: Tensor, conditions: dict[str, Any], steps: int, guidance: float) -> Tensor:
        """Returns clean latents, float32 [B, C, h, w], for noise.

        The latents stay float32 even in a half-precision U-Net, so that small steps add up.
        """
        scheduler = type(self.scheduler).from_config(
            self.scheduler.config
        )  # it keeps state: a fresh one for every call
        scheduler.set_timesteps(steps)
        latents = latents * scheduler.init_noise_sigma
        for time in scheduler.timesteps.tolist():
            inputs = latents.repeat(2, 1, 1, 1) if guidance > 1 else latents
            noise = self.unet(inputs.to(self.unet.dtype), time, **conditions, return_dict=False)[0].float()
            if guidance > 1:
                plain, wanted = noise.chunk(2)
                noise = plain + guidance * (wanted - plain)
            latents = scheduler.step(noise, time, latents, eta=0.0, return_dict=False)[0]
        return latents

    def _decode(self, latents: Tensor) -> Tensor:
        """Returns pixels, float32 [B, 3, H, W] in [0, 1] on the CPU, for latents [B, C, h, w]."""
        pixels = self.vae.decode((latents / self.vae.config.scaling_factor).to(self.vae.dtype), return_dict=False)[0]
        return (pixels.float() / 2 + 0.5).clamp(0, 1).cpu()

    def _check_options(self, size: Any, steps: Any, guidance: Any, generator: Any, batch_size: Any) -> None:
        known = isinstance(size, tuple) and size in self.sizes and all(map(_is_whole, size))
        require(known, f"size is {size!r}, expected (height, width), one of {', '.join(map(str, self.sizes))}")
        most = self.scheduler.config.num_train_timesteps - self.scheduler.config.steps_offset
        require(
            _is_whole(steps) and 1 <= steps <= most, f"steps is {steps!r}, expected a whole number from 1 to {most}"
        )
        number = isinstance(guidance, int | float) and not isinstance(guidance, bool) and math.isfinite(guidance)
        require(number, f"guidance is {guidance!r}, expected a finite number; 1 or less switches it off")
        many = _is_whole(batch_size) and batch_size >= 1
        require(many, f"batch_size is {batch_size!r}, expected a whole number of at least 1: the images made at a time")
        one = generator is None or isinstance(generator, torch.Generator)
        require(
            one,
            f"generator is of type {type(generator).__name__}, expected one torch.Generator for all images, or None",
        )

    def _check_conditions(self, embeddings: Any, pooled: Any, *, guided: bool) -> None:
        width = self.unet.config.cross_attention_dim
        fits = _is_float(embeddings, 3) and embeddings.shape[1] >= 1 and embeddings.shape[2] == width
        require(fits, f"embeddings are {_kind(embeddings)}, expected floats [B, N, {width}] for this U-Net")
        count, rows, _ = embeddings.shape
        if self.wants_pooled:
            config = self.unet.config
            width = config.projection_class_embeddings_input_dim - _TIME_IDS * config.addition_time_embed_dim
            fits = _is_float(pooled, 2) and pooled.shape == (count, width)
            require(
                fits,
                f"pooled is {_kind(pooled)}, expected floats [{count}, {width}] for this U-Net, a row for each image",
            )
        else:
            require(
                pooled is None, f"pooled is {_kind(pooled)}, but this U-Net takes no pooled embedding: leave it out"
            )
            least = len(self.uncond_embeddings) if guided else 1
            advice = f"expected at least the {least} of the unconditional embedding, or guidance=1 to do without it"
            require(rows >= least, f"embeddings have {rows} rows per image, {advice}")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_float(value: Any, axes: int) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() == axes


def _kind(value: Any) -> str:
    return (
        f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
        if isinstance(value, Tensor)
        else type(value).__name__
    )


def _check_parts(unet: Any, vae: Any) -> None:
    """Configurations of a U-Net and a VAE. Raises `ConfigError` unless they are of LaVIT's kind and fit together."""
    kind = unet.addition_embed_type
    require(kind in (None, "text_time"), f"the U-Net's addition_embed_type is {kind!r}, expected null or 'text_time'")
    sdxl = ("projection_class_embeddings_input_dim", "addition_time_embed_dim") if kind else ()
    for name in ("sample_size", "cross_attention_dim", *sdxl):
        require(
            _is_whole(unet[name]) and unet[name] >= 1,
            f"the U-Net's {name} is {unet[name]!r}, expected a positive whole number",
        )
    channels = (unet.in_channels, unet.out_channels, vae.latent_channels)
    require(
        len(set(channels)) == 1,
        f"U-Net input, U-Net output and VAE have {channels} latent channels, expected the same number",
    )
    require(vae.out_channels == 3, f"the VAE makes {vae.out_channels} channels, expected 3")
