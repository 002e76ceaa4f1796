"""A toy-sized diffusion model in the layout of LaVIT's released folders."""

import diffusers
import torch

WIDTH, POOLED = 24, 20  # of the embeddings and of the pooled one
ROWS, STORED = 7, 3  # per image and of the unconditional embedding
UNET = dict(
    layers_per_block=1, cross_attention_dim=WIDTH, attention_head_dim=2, block_out_channels=(8, 16), norm_num_groups=4
)
UNET |= dict(
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D")
)
SDXL = dict(
    addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=POOLED + 6 * 4
)
SCHEDULE = dict(
    beta_schedule="scaled_linear",
    beta_start=85e-5,
    beta_end=12e-3,
    clip_sample=False,
    set_alpha_to_one=False,
    steps_offset=1,
)


def vae_of(*channels, **options):
    blocks = dict(
        down_block_types=["DownEncoderBlock2D"] * len(channels), up_block_types=["UpDecoderBlock2D"] * len(channels)
    )
    return diffusers.AutoencoderKL(block_out_channels=channels, norm_num_groups=4, **blocks, **options)


def write_release(folder, *, sdxl=False, vae=None, **unet):
    """A folder as released: the U-Net a torch pickle, and for the 512 px style the unconditional embedding another."""
    torch.manual_seed(0)
    size = {"sample_size": 16, **SDXL} if sdxl else {"sample_size": 4}
    network = diffusers.UNet2DConditionModel(**{**UNET, **size, **unet})
    for name, weights in network.named_parameters():
        if "attn2" in name or "add_embedding" in name:
            weights.data.mul_(4)  # so that conditions show in the pictures
    network.save_pretrained(folder / "unet", safe_serialization=False)
    vae_of(8, 16, **(vae or {})).save_pretrained(folder / "vae")
    diffusers.DDIMScheduler(**SCHEDULE).save_pretrained(folder / "scheduler")
    if not sdxl:
        torch.save(torch.randn(1, STORED, WIDTH), folder / "uncond_embeddings.bin")
    return folder
