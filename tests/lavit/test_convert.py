"""LaVIT's released files through `dyntok.load`: the numbers of its networks, what is read when, conversion."""

import dataclasses
import json
import pickle
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from support.lavit_files import write_release

import dyntok
from dyntok import CheckpointError, CodeError, ConfigError
from dyntok.cli.main import main
from dyntok.image import to_pixels
from dyntok.lavit.config import LavitConfig
from dyntok.lavit.release import FILES
from dyntok.lavit.sizes import Sizes, encoder_config
from dyntok.lavit.weights import ReleasedWeights

TOLERANCE = 1e-4  # relative
ENCODER = FILES["encoder"]


@pytest.fixture(scope="module")
def release(parity, tmp_path_factory):
    return write_release(parity, tmp_path_factory.mktemp("release"))


@pytest.fixture(scope="module")
def shared(release, parity):
    """Loaded once; not to be changed."""
    return dyntok.load(release, config=parity.config)


@pytest.fixture
def tokenizer(release, parity):
    return dyntok.load(release, config=parity.config)


# The numbers.


@torch.no_grad()
def test_backbone_and_selector(shared, parity):
    features = shared.backbone(parity["io/pixels"])
    assert parity.error("io/backbone_features", features) < TOLERANCE
    assert parity.error("io/selector_log_probs", shared.selector(features)) < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("exact", [False, True], ids=["packed", "exact"])
def test_codes_are_equal_and_every_stage_agrees(shared, parity, exact):
    enc = shared.encode_tensor(parity["io/pixels"], lavit_softmax=exact)
    assert torch.equal(enc.packed_codes, parity["io/codes"]) and torch.equal(enc.keep_mask(), parity["io/keep_mask"])
    assert torch.equal(enc.lengths, parity["io/token_counts"])
    merged = shared.features_tensor(parity["io/pixels"], lavit_softmax=exact).tokens
    assert parity.error("io/merged_features", merged) < TOLERANCE
    assert parity.error("io/task_layer_output", shared.projection(merged)) < TOLERANCE
    assert torch.equal(shared.codebook.lookup(enc.packed_codes), parity["io/quantized"])


@pytest.mark.parametrize("exact", [False, True], ids=["packed", "exact"])
def test_understanding_path(shared, parity, exact):
    features = shared.features_tensor(parity["io/pixels"], path="understanding", lavit_softmax=exact)
    assert parity.error("io/continuous_features", features.tokens) < TOLERANCE
    assert (
        torch.equal(features.lengths, parity["io/token_counts"])
        and features.tokens.shape[1] == parity.config["llm_dim"]
    )


def test_conditions_of_both_decoders(shared, parity):
    enc = shared.encode_tensor(parity["io/pixels"])
    embeddings, pooled = shared.decode_to_conditioning(enc)
    assert parity.error("io/decoder_lowres", embeddings) < TOLERANCE and pooled is None
    embeddings, pooled = shared.decode_to_conditioning(enc, highres=True)
    assert parity.error("io/decoder_highres_prompt", embeddings) < TOLERANCE
    assert parity.error("io/decoder_highres_pooled", pooled) < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("exact", [False, True], ids=["packed", "exact"])
@pytest.mark.parametrize("masks", ["all_kept", "one_kept", "mixed"])
def test_merger_under_given_masks(shared, parity, masks, exact):
    merged = shared.merger(parity["io/backbone_features"], parity[f"merger/{masks}/keep_mask"], exact=exact)
    assert parity.error(f"merger/{masks}/merged_features", merged) < TOLERANCE


@torch.no_grad()
def test_peaky_logits_need_the_exact_mode(tokenizer, parity):
    for block in tokenizer.merger.blocks:
        block.self_qkv.weight[: parity.config["dim"]] *= 6
        block.cross_query.weight *= 6
    features, keep = parity["io/backbone_features"], parity["io/keep_mask"]
    assert parity.error("merger/peaky/merged_features", tokenizer.merger(features, keep, exact=True)) < TOLERANCE
    assert parity.error("merger/peaky/merged_features", tokenizer.merger(features, keep)) > 10 * TOLERANCE


# One image's worth of edge cases.


@pytest.mark.parametrize("exact", [False, True], ids=["packed", "exact"])
def test_all_patches_and_one_patch(tokenizer, parity, exact):
    everything = tokenizer.encode_tensor(parity["io/pixels"], budget=1.0, lavit_softmax=exact)
    assert everything.lengths.tolist() == [25] * 5
    with torch.no_grad():
        tokenizer.selector.head.bias[1] += 100  # nothing would be kept
    one = tokenizer.encode_tensor(parity["io/pixels"], lavit_softmax=exact)
    assert torch.equal(one.packed_positions, parity["io/selector_log_probs"][..., 0].argmax(1))


def test_sampling_follows_the_probabilities_from_a_seed(shared, parity):
    def masks(seed):
        return shared.encode_tensor(parity["io/pixels"], sample=torch.Generator().manual_seed(seed)).keep_mask()

    assert torch.equal(masks(1), masks(1)) and not torch.equal(masks(1), masks(2))
    kept = torch.stack([masks(seed) for seed in range(120)]).double().mean(0)
    wanted = parity["io/selector_log_probs"][..., 0].exp().double()
    assert float((kept - wanted).abs().mean()) < 0.05 and float((kept - wanted).abs().max()) < 0.25


def test_the_decoder_does_not_use_positions(shared, parity):
    enc = shared.encode_tensor(parity["io/pixels"])
    without = dataclasses.replace(enc, packed_positions=None)
    assert torch.equal(shared.decode_to_features(enc), shared.decode_to_features(without))
    codes, positions = ([row.tolist() for row in rows] for rows in (enc.codes, enc.positions))
    assert torch.equal(shared.decode_to_features(codes), shared.decode_to_features(enc))
    with pytest.raises(CodeError, match="positions were given, but this decoder uses only the order of codes"):
        shared.decode_to_features(codes, positions=positions)


def test_pictures_are_prepared_as_lavit_does(shared, photos):
    config = dyntok.TokenizerConfig.preset("lavit").image
    assert shared.config.image == dataclasses.replace(config, img_size=70)
    assert (config.img_size, config.resize) == (224, "squash")
    assert config.mean == (0.48145466, 0.4578275, 0.40821073) and config.std == (0.26862954, 0.26130258, 0.27577711)
    enc = shared.encode(photos)
    assert enc == dyntok.Encoding.cat([shared.encode(photo) for photo in photos])


def test_ids_of_the_fixture_in_lavits_layout(shared, parity):
    vocab = dyntok.VisualVocab.lavit()
    ids = vocab.to_ids(shared.encode_tensor(parity["io/pixels"])[0].packed_codes)
    assert ids[0] == 32000 and ids[-1] == 32001
    assert torch.equal(ids[1:-1] - 32002, parity["io/codes"][: len(ids) - 2])


# What is read, and when.


def test_other_parts_are_read_when_needed(parity, tmp_path):
    folder = write_release(parity, tmp_path, files={name: FILES[name] for name in ("backbone", "encoder")})
    tokenizer = dyntok.load(folder, config=parity.config)
    enc, fingerprint = tokenizer.encode_tensor(parity["io/pixels"]), tokenizer.fingerprint
    assert torch.equal(enc.packed_codes, parity["io/codes"]) and tokenizer.config.decoder is None
    for call, part in (
        (lambda: tokenizer.decode(enc), "decoder"),
        (lambda: tokenizer.decode_to_features(enc, highres=True), "highres_decoder"),
        (lambda: tokenizer.features_tensor(parity["io/pixels"], path="understanding"), "understanding"),
    ):
        with pytest.raises(CheckpointError, match=f"has no {FILES[part]}"):
            call()
    write_release(parity, tmp_path, files={"decoder": FILES["decoder"]})
    assert parity.error("io/decoder_lowres", tokenizer.decode_to_conditioning(enc)[0]) < TOLERANCE
    assert tokenizer.config.decoder.depth == 2 and tokenizer.fingerprint == fingerprint
    with pytest.raises(CheckpointError, match="has no folder pixel_decoding"):
        tokenizer.decode(enc)


def test_files_of_before_memory_mapping_and_of_half_precision(parity, tmp_path):
    old = write_release(parity, tmp_path / "old", _use_new_zipfile_serialization=False)
    assert torch.equal(
        dyntok.load(old, config=parity.config).encode_tensor(parity["io/pixels"]).packed_codes, parity["io/codes"]
    )
    half = write_release(
        parity, tmp_path / "half", lambda part, tensors: {name: value.half() for name, value in tensors.items()}
    )
    tokenizer = dyntok.load(half, config=parity.config)
    assert {value.dtype for value in tokenizer.state_dict().values()} == {torch.float32}
    assert len(tokenizer.encode_tensor(parity["io/pixels"])) == 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_spares_selector_codebook_and_norms(release, parity, dtype):
    tokenizer = dyntok.load(release, config=parity.config, dtype=dtype)
    tokenizer.part("decoder")
    exempt = ("selector.", "codebook.")
    for name, value in tokenizer.state_dict().items():
        spared = name.startswith(exempt) or "norm" in name or ".head.0." in name
        assert value.dtype == (torch.float32 if spared else dtype), name
    enc = tokenizer.encode_tensor(parity["io/pixels"])
    assert (enc.keep_mask() == parity["io/keep_mask"]).double().mean() > 0.95
    features = tokenizer.decode_to_features(enc)
    assert features.isfinite().all() and features.shape == (5, 25, 56)


def test_head_counts_decide(release, parity):
    other = dyntok.load(release, config=parity.config | {"heads": 2})
    assert parity.error("io/merged_features", other.features_tensor(parity["io/pixels"]).tokens) > 10 * TOLERANCE


# An ordinary checkpoint of it.


def test_import_through_the_command_line_and_back(release, parity, shared, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["import-lavit", str(release), str(out), "--config", json.dumps(parity.config)]) == 0
    assert shared.fingerprint in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    assert (
        "LLAMA 2 Community License" in (out / "README.md").read_text()
        and str(release) not in (out / "README.md").read_text()
    )
    again = dyntok.load(out)
    enc = again.encode_tensor(parity["io/pixels"])
    assert torch.equal(enc.packed_codes, parity["io/codes"]) and again.fingerprint == shared.fingerprint
    assert enc == shared.encode_tensor(parity["io/pixels"])
    assert parity.error("io/decoder_highres_pooled", again.decode_to_conditioning(enc, highres=True)[1]) < TOLERANCE
    understanding = again.features_tensor(parity["io/pixels"], path="understanding")
    assert parity.error("io/continuous_features", understanding.tokens) < TOLERANCE


def test_import_of_some_parts_and_in_half_precision(release, parity, tmp_path, capsys):
    config = ["--config", json.dumps(parity.config)]
    assert main(["import-lavit", str(release), str(tmp_path / "codes"), *config, "--parts", "--dtype", "bf16"]) == 0
    codes = dyntok.load(tmp_path / "codes", dtype=torch.bfloat16)
    assert codes.dtype == torch.bfloat16 and codes.codebook.embedding.dtype == torch.float32
    direct = dyntok.load(release, config=parity.config, dtype=torch.bfloat16)
    assert codes.fingerprint == direct.fingerprint
    assert codes.encode_tensor(parity["io/pixels"]) == direct.encode_tensor(parity["io/pixels"])
    with pytest.raises(ConfigError, match="this tokenizer has no decoder"):
        codes.decode_to_features([[1]])
    assert main(["import-lavit", str(release), str(tmp_path / "one"), *config, "--parts", "understanding"]) == 0
    one = dyntok.load(tmp_path / "one")
    assert one.config.decoder is None and one.config.understanding_dim == parity.config["llm_dim"]
    assert main(["import-lavit", str(release), str(tmp_path / "x"), *config, "--parts", "decoder", "pixels"]) == 1
    assert "pixel_decoding" in capsys.readouterr().err


def test_the_preset_is_what_the_released_sizes_give():
    """The configuration read off files of the released sizes, on the meta device."""
    preset = dyntok.TokenizerConfig.preset("lavit")
    wide, hidden = 1408, 6144
    shapes = {
        "pos_embed": (1, 257, wide),
        "patch_embed.proj.weight": (wide, 3, 14, 14),
        "blocks.0.mlp.fc1.weight": (hidden, wide),
    }
    backbone = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    backbone |= {f"blocks.{i}.norm1.weight": torch.empty(wide, device="meta") for i in range(40)}
    encoder = {f"causal_encoder.blocks.{i}.mlp.fc1.weight": torch.empty(hidden, wide, device="meta") for i in range(12)}
    encoder["quantize.embedding.weight"] = torch.empty(16384, 32, device="meta")
    found = encoder_config(ReleasedWeights(None, backbone), ReleasedWeights(None, encoder), Sizes())
    assert (
        found.to_dict()
        == LavitConfig(
            preset.image, preset.backbone, preset.selector, preset.merger, preset.codebook, decoder=None
        ).to_dict()
    )


def test_a_uniform_average_where_every_patch_is_kept(shared, parity):
    """LaVIT's formula weights all values equally where no key is allowed; computed by hand for the first block."""
    features = parity["io/backbone_features"][:1]
    merger, block = shared.merger, shared.merger.blocks[0]
    with torch.no_grad():
        context = F.linear(merger.context_norm(features), merger.context_kv.weight, merger.context_kv.bias)
        value = context[..., 48:96].mean(1)  # of the first block: keys, then values
        q, k, v = block.self_qkv(block.self_norm(features)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = features + block.self_proj(attended)
        x = x + block.cross_proj(value)
        x = x + block.mlp(block.mlp_norm(x))
        captured = {}
        hook = merger.blocks[1].register_forward_pre_hook(lambda _, args: captured.update(x=args[0]))
        merger(features, torch.ones(1, 25, dtype=torch.bool))
        hook.remove()
    assert torch.allclose(captured["x"], x[0], atol=1e-4)


def test_a_folder_is_found_again_from_elsewhere(parity, release, tmp_path, monkeypatch):
    shutil.copytree(release, tmp_path / "r")
    monkeypatch.chdir(tmp_path)
    tokenizer = dyntok.load("r", config=parity.config)
    monkeypatch.chdir("/")
    assert tokenizer.part("decoder") is tokenizer.decoder


def test_the_token_is_not_shown_or_stored(release, parity):
    tokenizer = dyntok.load(release, config=parity.config, token="hf_secret")
    assert "hf_secret" not in repr(tokenizer.origin) and b"hf_secret" not in pickle.dumps(tokenizer.origin)


def test_the_license_stays_with_the_weights(tokenizer, tmp_path):
    for i in range(2):
        tokenizer.save_pretrained(tmp_path / str(i))
        assert "LLAMA 2 Community License" in (tmp_path / str(i) / "README.md").read_text()
        tokenizer = dyntok.load(tmp_path / str(i))


def test_pictures_are_prepared_pixel_by_pixel(shared, photos):
    """Against the preparation of `lavit.md`, written out."""
    image = Image.fromarray(photos[0])
    resized = np.asarray(image.resize((70, 70), Image.Resampling.BICUBIC), dtype=np.float64) / 255
    expected = (resized - [0.48145466, 0.4578275, 0.40821073]) / [0.26862954, 0.26130258, 0.27577711]
    assert np.abs(to_pixels(image, shared.config.image).permute(1, 2, 0).numpy() - expected).max() < 1e-5
