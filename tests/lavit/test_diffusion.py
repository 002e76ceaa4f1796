"""The diffusion decoder at toy size, saved as LaVIT released it, against a DDIM loop written out by hand."""

import functools
import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from dyntok.errors import CheckpointError, ConfigError
from dyntok.lavit.diffusion import LAVIT_SIZES, DiffusionDecoder

diffusers = pytest.importorskip("diffusers")
from support.diffusion_files import POOLED, ROWS, SCHEDULE, SDXL, STORED, UNET, WIDTH, vae_of, write_release  # noqa: E402

load = functools.partial(DiffusionDecoder.load, pickles=True)


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    return write_release(tmp_path_factory.mktemp("pixel_decoding"))


@pytest.fixture
def copied(release, tmp_path):
    return shutil.copytree(release, tmp_path / "copy")


@pytest.fixture(scope="module")
def decoder(release):
    return load(release)


@pytest.fixture(scope="module")
def sdxl_decoder(tmp_path_factory):
    return load(write_release(tmp_path_factory.mktemp("highres_pixel_decoding"), sdxl=True))


def edit_json(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def seeded(number=5):
    return torch.Generator().manual_seed(number)


def conditions(count=3):
    generator = seeded(1)
    return torch.randn(count, ROWS, WIDTH, generator=generator), torch.randn(count, POOLED, generator=generator)


def paint_by_hand(decoder, shape, steps, predict):
    """DDIM as in the paper, without added noise, from seeded latents [B, 4, h, w].

    `predict` gives the noise in them at a time.
    """
    generator = seeded()
    latents = torch.stack([torch.randn(shape[1:], generator=generator) for _ in range(shape[0])])
    alphas = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2).cumprod(0)
    stride = 1000 // steps
    for time in (1 + i * stride for i in reversed(range(steps))):
        noise, now, then = predict(latents, time), alphas[time], alphas[max(time - stride, 0)]
        clean = (latents - (1 - now).sqrt() * noise) / now.sqrt()
        latents = then.sqrt() * clean + (1 - then).sqrt() * noise
    return (decoder.vae.decode(latents / decoder.vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)


def calls_of(decoder, *args, **options):
    """The keyword arguments of every call of the U-Net, and its latents' shape."""
    calls = []
    hook = decoder.unet.register_forward_pre_hook(
        lambda _, given, named: calls.append((given[0].shape, named)), with_kwargs=True
    )
    try:
        decoder(*args, **options)
    finally:
        hook.remove()
    return calls


def test_the_released_layout_loads_and_makes_pictures(decoder, release):
    assert (release / "unet" / "diffusion_pytorch_model.bin").is_file()
    assert not decoder.wants_pooled and decoder.sizes == ((8, 8),)
    pixels = decoder(conditions()[0], steps=2, generator=seeded())
    assert pixels.shape == (3, 3, 8, 8) and pixels.dtype == torch.float32
    assert pixels.min() >= 0 and pixels.max() <= 1 and pixels.std() > 0.01
    assert decoder(conditions()[0][:0], steps=2).shape == (0, 3, 8, 8)


def test_a_seed_gives_the_same_pictures_in_any_order_of_calls(decoder):
    embeddings = conditions()[0]
    first = decoder(embeddings, steps=2, generator=seeded())
    assert not torch.equal(first, decoder(embeddings, steps=3, generator=seeded(6)))
    assert torch.equal(first, decoder(embeddings, steps=2, generator=seeded()))
    torch.manual_seed(5)
    assert torch.equal(first, decoder(embeddings, steps=2))


@pytest.mark.parametrize("guidance", [1, 3.0])
def test_the_batch_size_does_not_change_the_pictures(decoder, sdxl_decoder, guidance):
    embeddings, pooled = conditions()
    for paint, given, size in ((decoder, (embeddings,), None), (sdxl_decoder, (embeddings, pooled), (26, 38))):
        options = dict(size=size, steps=2, guidance=guidance)
        one, two, three = (paint(*given, **options, generator=seeded(), batch_size=count) for count in (1, 2, 3))
        assert (one[0] - one[1]).abs().max() > 0.05
        assert torch.allclose(one, three, atol=1e-5) and torch.allclose(two, three, atol=1e-5)


@torch.no_grad()
def test_without_guidance_only_the_conditions_are_computed(decoder):
    embeddings, _ = conditions()
    by_hand = paint_by_hand(
        decoder, (3, 4, 4, 4), 4, lambda latents, time: decoder.unet(latents, time, embeddings).sample
    )
    for guidance in (1, 0.5):
        assert torch.allclose(
            decoder(embeddings, steps=4, guidance=guidance, generator=seeded(), batch_size=3), by_hand, atol=1e-5
        )
    calls = calls_of(decoder, embeddings, steps=4, guidance=1, batch_size=3)
    assert [shape[0] for shape, _ in calls] == [3] * 4
    assert all("encoder_attention_mask" not in named for _, named in calls)


@torch.no_grad()
def test_guidance_uses_the_padded_unconditional_embedding_and_its_mask(decoder, release):
    embeddings, _ = conditions()
    stored = torch.load(release / "uncond_embeddings.bin", weights_only=True)
    padded = torch.cat([stored, torch.zeros(1, ROWS - STORED, WIDTH)], dim=1).expand(3, -1, -1)
    mask = torch.tensor([[True] * STORED + [False] * (ROWS - STORED)]).expand(3, -1)

    def by_hand(**options):
        def predict(latents, time):
            plain = decoder.unet(latents, time, padded, **options).sample
            wanted = decoder.unet(latents, time, embeddings).sample
            return plain + 3 * (wanted - plain)

        return paint_by_hand(decoder, (3, 4, 4, 4), 4, predict)

    got = decoder(embeddings, steps=4, guidance=3, generator=seeded(), batch_size=3)
    assert torch.allclose(got, by_hand(encoder_attention_mask=mask), atol=1e-5)
    assert (got - by_hand()).abs().max() > 1e-3  # left out, the mask would be missed
    (shape, named), *_ = calls_of(decoder, embeddings, steps=1, batch_size=3)  # guidance is on by default
    assert shape[0] == 6 and torch.equal(named["encoder_hidden_states"], torch.cat([padded, embeddings]))
    assert torch.equal(named["encoder_attention_mask"], torch.cat([mask, torch.ones_like(mask)]))
    (_, named), *_ = calls_of(decoder, embeddings[:, :STORED], steps=1)  # no rows to pad
    assert named["encoder_attention_mask"].all() and torch.equal(named["encoder_hidden_states"][0], stored[0])


def test_the_large_style_is_given_sizes_and_zeros(sdxl_decoder):
    embeddings, pooled = conditions()
    assert sdxl_decoder.wants_pooled and sdxl_decoder.uncond_embeddings is None
    calls = calls_of(sdxl_decoder, embeddings, pooled, size=(24, 42), steps=2, batch_size=2)
    assert [shape for shape, _ in calls] == [(4, 4, 12, 21)] * 2 + [(2, 4, 12, 21)] * 2
    for rows, (_, named) in zip((embeddings[:2], embeddings[2:]), (calls[0], calls[-1]), strict=True):
        assert torch.equal(named["encoder_hidden_states"], torch.cat([torch.zeros_like(rows), rows]))
        assert named["added_cond_kwargs"]["time_ids"].tolist() == [[24, 42, 0, 0, 24, 42]] * 2 * len(rows)
        assert named.get("encoder_attention_mask") is None
    assert torch.equal(calls[0][1]["added_cond_kwargs"]["text_embeds"], torch.cat([torch.zeros(2, POOLED), pooled[:2]]))
    (shape, named), *_ = calls_of(sdxl_decoder, embeddings[:1], pooled[:1], steps=1, guidance=1)
    assert shape == (1, 4, 16, 16) and torch.equal(named["added_cond_kwargs"]["text_embeds"], pooled[:1])


@torch.no_grad()
def test_the_large_style_follows_the_formula(sdxl_decoder):
    embeddings, pooled = conditions(2)
    times = torch.tensor([[26.0, 38, 0, 0, 26, 38]]).expand(2, -1)

    def predict(latents, time):
        given = [(factor * embeddings, {"text_embeds": factor * pooled, "time_ids": times}) for factor in (0, 1)]
        plain, wanted = (
            sdxl_decoder.unet(latents, time, rows, added_cond_kwargs=added).sample for rows, added in given
        )
        return plain + 5 * (wanted - plain)

    by_hand = paint_by_hand(sdxl_decoder, (2, 4, 13, 19), 2, predict)
    got = sdxl_decoder(embeddings, pooled, size=(26, 38), steps=2, generator=seeded(), batch_size=2)
    assert torch.allclose(got, by_hand, atol=1e-5)


def test_all_six_sizes_can_be_made(sdxl_decoder):
    embeddings, pooled = conditions(1)
    assert sdxl_decoder.sizes == ((32, 32), (28, 36), (26, 38), (24, 42), (38, 26), (36, 28))
    for size in sdxl_decoder.sizes:
        assert sdxl_decoder(embeddings, pooled, size=size, steps=1).shape == (1, 3, *size)


def test_sizes_follow_the_networks():
    def sizes(side, channels, **unet):
        network = diffusers.UNet2DConditionModel(**{**UNET, "sample_size": side, **unet})
        return DiffusionDecoder(
            network, vae_of(*channels), diffusers.DDIMScheduler(**SCHEDULE), torch.zeros(STORED, WIDTH)
        ).sizes

    assert sizes(128, (4, 4, 4, 4), **SDXL) == LAVIT_SIZES and sizes(64, (4, 4, 4, 4)) == ((512, 512),)
    assert sizes(4, (4, 4), **SDXL) == ((8, 8), (6, 10), (10, 6))  # coarse: each once


@pytest.mark.parametrize("style", ["", "sdxl_"])
def test_what_was_saved_makes_the_same_pictures_and_is_no_pickle(style, tmp_path, request):
    decoder = request.getfixturevalue(f"{style}decoder")
    decoder.save(tmp_path / "a" / "copy")  # folders are made
    files = {str(path.relative_to(tmp_path / "a" / "copy")) for path in tmp_path.rglob("*.*") if path.is_file()}
    weights = {
        f"{name}/{file}" for name in ("unet", "vae") for file in ("config.json", "diffusion_pytorch_model.safetensors")
    }
    assert files - {"uncond_embeddings.safetensors"} == {*weights, "scheduler/scheduler_config.json"}
    assert ("uncond_embeddings.safetensors" in files) == (not decoder.wants_pooled)
    assert json.loads((tmp_path / "a" / "copy" / "unet" / "config.json").read_text())["_name_or_path"] == ""
    embeddings, pooled = conditions()
    given = (embeddings, pooled) if decoder.wants_pooled else (embeddings,)
    again = load(tmp_path / "a" / "copy")
    assert torch.equal(again(*given, steps=2, generator=seeded()), decoder(*given, steps=2, generator=seeded()))


def test_saving_replaces_shards_and_says_where_it_can_not(decoder, copied, tmp_path):
    (other := diffusers.UNet2DConditionModel(**UNET, sample_size=4)).save_pretrained(
        copied / "unet", max_shard_size="20KB"
    )
    assert (copied / "unet" / "diffusion_pytorch_model.safetensors.index.json").is_file()
    assert torch.equal(load(copied).unet.conv_in.weight, other.conv_in.weight)
    decoder.save(copied)
    assert torch.equal(load(copied).unet.conv_in.weight, decoder.unet.conv_in.weight)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="can't write the diffusion model to .*file"):
        decoder.save(tmp_path / "file")


def test_the_unconditional_embedding_may_have_several_forms(release, copied):
    file = copied / "uncond_embeddings.bin"
    stored = torch.load(file, weights_only=True)[0]
    torch.save(stored, file)  # without the batch dimension
    assert torch.equal(load(copied).uncond_embeddings, stored)
    file.unlink()
    with pytest.raises(CheckpointError, match="holds no uncond_embeddings.bin, which this U-Net needs"):
        load(copied)
    save_file({"uncond_embeddings": stored}, file.with_suffix(".safetensors"))
    assert torch.equal(load(copied).uncond_embeddings, stored)


def test_half_precision_networks_and_a_vae_that_must_not_be(tmp_path):
    for upcast in (True, False):
        folder = write_release(tmp_path / str(upcast), vae={"force_upcast": upcast})
        vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae")
        vae.decoder.conv_in.weight.data.mul_(2e5)  # beyond float16; the norm after it takes the factor out again
        vae.half().save_pretrained(folder / "vae")
        decoder = load(folder, dtype=torch.float16)
        assert decoder.unet.dtype == torch.float16 and decoder.vae.dtype == (torch.float32 if upcast else torch.float16)
        pixels = decoder(conditions()[0], steps=2, generator=seeded())
        assert pixels.dtype == torch.float32 and pixels.isfinite().all() == upcast
        assert (
            DiffusionDecoder(decoder.unet, vae, decoder.scheduler, decoder.uncond_embeddings).vae.dtype
            == decoder.vae.dtype
        )


def test_bfloat16_is_close_to_float32_and_does_not_round_a_vae_that_is_not_in_it(decoder, copied):
    loaded = load(copied, dtype=torch.bfloat16)
    assert torch.equal(loaded.vae.decoder.conv_in.weight, decoder.vae.decoder.conv_in.weight)
    edit_json(copied / "vae" / "config.json", force_upcast=False)
    brief = load(copied, dtype=torch.bfloat16)
    assert brief.unet.dtype == brief.vae.dtype == torch.bfloat16
    one, other = (paint(conditions()[0], steps=2, generator=seeded()) for paint in (brief, decoder))
    assert 0 < (one - other).abs().mean() < 0.02


@pytest.mark.parametrize(
    "options, message",
    [
        ({"size": (8, 9)}, r"size is \(8, 9\), expected \(height, width\), one of \(8, 8\)"),
        ({"size": (8.0, 8.0)}, "size is"),
        ({"steps": 0}, "steps is 0, expected a whole number from 1 to 999"),
        ({"steps": 1000}, "steps is 1000"),
        ({"guidance": float("nan")}, "guidance is nan, expected a finite number"),
        ({"guidance": "3"}, "guidance is '3'"),
        ({"batch_size": 0}, "batch_size is 0, expected a whole number of at least 1"),
        ({"generator": [seeded()]}, "generator is of type list, expected one torch.Generator"),
        ({"pooled": torch.zeros(1, POOLED)}, r"pooled is float32 \[1, 20\], but this U-Net takes no pooled embedding"),
        ({"embeddings": torch.zeros(1, ROWS, 9)}, r"embeddings are float32 \[1, 7, 9\], expected floats \[B, N, 24\]"),
        ({"embeddings": torch.zeros(1, 0, WIDTH)}, "embeddings are"),
        ({"embeddings": torch.zeros(1, ROWS, WIDTH, dtype=torch.long)}, "embeddings are int64"),
        ({"embeddings": None}, "embeddings are NoneType"),
        (
            {"embeddings": torch.zeros(1, 2, WIDTH)},
            "embeddings have 2 rows per image, expected at least the 3 .* or guidance=1",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_refused(decoder, options, message):
    with pytest.raises(ConfigError, match=message):
        decoder(**{"embeddings": conditions(1)[0], "steps": 1, **options})


def test_every_step_of_the_schedule_may_be_asked_for(decoder):
    assert (
        decoder(conditions(1)[0][:, :2], steps=1, guidance=1).isfinite().all()
    )  # fewer rows than the unconditional embedding
    schedule = diffusers.DDIMScheduler(**SCHEDULE, num_train_timesteps=3)
    short = DiffusionDecoder(decoder.unet, decoder.vae, schedule, decoder.uncond_embeddings)
    assert short(conditions(1)[0], steps=2).isfinite().all()
    with pytest.raises(ConfigError, match="steps is 3, expected a whole number from 1 to 2"):
        short(conditions(1)[0], steps=3)


@pytest.mark.parametrize(
    "pooled", [None, torch.zeros(3, 9), torch.zeros(2, POOLED), torch.zeros(POOLED), torch.zeros(3, POOLED).int()]
)
def test_a_pooled_embedding_must_fit(sdxl_decoder, pooled):
    with pytest.raises(
        ConfigError, match=r"pooled is .*, expected floats \[3, 20\] for this U-Net, a row for each image"
    ):
        sdxl_decoder(conditions()[0], pooled, steps=1)
