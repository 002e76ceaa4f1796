"""LaVIT's files and options that are wrong: each refused with an error that names what does not fit."""

import pickle
import shutil

import pytest
import torch
from support.hostile import Hostile
from support.lavit_files import write_release

import dyntok
from dyntok import CheckpointError, CodeError, ConfigError
from dyntok.lavit.convert import convert
from dyntok.lavit.release import FILES

ENCODER = FILES["encoder"]


@pytest.fixture(scope="module")
def release(parity, tmp_path_factory):
    return write_release(parity, tmp_path_factory.mktemp("release"))


@pytest.fixture(scope="module")
def shared(release, parity):
    """Loaded once; not to be changed."""
    return dyntok.load(release, config=parity.config)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"head": 4}, "config has 'head', expected for LaVIT's files some of heads, vit_heads"),
        ({"heads": "4"}, "config's heads is '4', expected a positive whole number"),
        ({"dim": 64}, r"config says dim: 64, but .*eva_vitg_psz14\.bin has 48; leave dim out or correct it"),
        ({"codebook": 16384}, r"config says codebook: 16384, but .*tokenizer_encoder\.bin has 256"),
    ],
    ids=str,
)
def test_a_config_that_is_not_that_of_the_files(release, parity, change, message):
    with pytest.raises(ConfigError, match=message):
        dyntok.load(release, config=parity.config | change)


def test_head_counts_that_do_not_divide_the_width(release):
    with pytest.raises(ConfigError, match="merger.num_heads is 14, expected a divisor of its width 48"):
        dyntok.load(release, config={"heads": 14, "vit_heads": 4})


@pytest.mark.parametrize(
    "part, key", [("encoder", "token_predictor.out_conv.2.bias"), ("backbone", "blocks.1.norm2.weight")]
)
def test_missing_and_unexpected_tensors_are_named(parity, tmp_path, part, key):
    def without(name, tensors):
        return {k: v for k, v in tensors.items() if (name, k) != (part, key)}

    def with_more(name, tensors):
        return tensors | ({"surprise.weight": torch.zeros(2)} if name == part else {})

    with pytest.raises(CheckpointError, match=key.replace(".", r"\.")):
        dyntok.load(write_release(parity, tmp_path / "less", without), config=parity.config)
    with pytest.raises(CheckpointError, match=r"surprise\.weight"):
        dyntok.load(write_release(parity, tmp_path / "more", with_more), config=parity.config)


def test_a_decoder_of_another_shape_is_named(parity, tmp_path):
    def shorter(name, tensors):
        return tensors | ({"query_embed": tensors["query_embed"][:, :-1]} if name == "decoder" else {})

    tokenizer = dyntok.load(write_release(parity, tmp_path, shorter), config=parity.config)
    with pytest.raises(CheckpointError, match=r"tokenizer_decoder\.bin: .*query_embed"):
        tokenizer.decode_to_features(tokenizer.encode_tensor(parity["io/pixels"]))
    assert tokenizer.decoder is None


def test_hostile_and_damaged_pickles_are_refused(release, parity, tmp_path):
    folder, target = tmp_path / "release", tmp_path / "was-here"
    shutil.copytree(release, folder)
    whole = (folder / ENCODER).read_bytes()
    torch.save({"quantize.embedding.weight": torch.zeros(2, 2), "x": Hostile(target)}, folder / ENCODER)
    contents = [
        (folder / ENCODER).read_bytes(),
        pickle.dumps(Hostile(target), protocol=2),
        whole[: len(whole) // 2],
        b"",
        b"no pickle",
    ]
    for content in contents:
        (folder / ENCODER).write_bytes(content)
        with pytest.raises(CheckpointError, match="is damaged or holds more than tensors") as caught:
            dyntok.load(folder, config=parity.config)
        assert "weights_only" not in str(caught.value)
    assert not target.exists()
    torch.save([torch.zeros(2)], folder / ENCODER)
    with pytest.raises(CheckpointError, match="holds list, expected a mapping of names to tensors"):
        dyntok.load(folder, config=parity.config)


def test_a_folder_that_is_neither(tmp_path):
    with pytest.raises(CheckpointError, match=f"has no {FILES['backbone']}"):
        dyntok.load(tmp_path, config={"heads": 4})
    with pytest.raises(CheckpointError, match="has no config.json"):
        dyntok.load(tmp_path)


def test_unknown_path_and_part(shared, parity):
    with pytest.raises(ConfigError, match="path is 'llm', expected 'codes' or 'understanding'"):
        shared.features_tensor(parity["io/pixels"], path="llm")
    with pytest.raises(ConfigError, match="there is no part unet"):
        convert("nowhere", "nowhere", parts=["unet"])


def test_positions_are_refused_by_decode_too(shared):
    with pytest.raises(CodeError, match="this decoder uses only the order of codes"):
        shared.decode([[1, 2]], positions=[[0, 3]])


@pytest.mark.parametrize(
    "part, key, value, message",
    [
        (
            "encoder",
            "quantize.embedding.weight",
            torch.zeros(256, 8, dtype=torch.int64),
            "quantize.embedding.weight is torch.int64",
        ),
        (
            "encoder",
            "quantize.embedding.weight",
            torch.empty(256, 8, device="meta"),
            "quantize.embedding.weight is torch.float32 on meta",
        ),
        ("backbone", "pos_embed", torch.zeros(26, 48), r"pos_embed has the shape \[26, 48\], expected 3 dimensions"),
        (
            "encoder",
            "causal_encoder.blocks.0.token_cross_attn.key.weight",
            torch.zeros(48, 40),
            "have different shapes",
        ),
    ],
    ids=["integers", "meta", "dimensions", "widths"],
)
def test_tensors_of_another_kind_are_named(parity, tmp_path, part, key, value, message):
    folder = write_release(parity, tmp_path, lambda name, tensors: tensors | ({key: value} if name == part else {}))
    with pytest.raises(CheckpointError, match=message):
        dyntok.load(folder, config=parity.config)


def test_the_file_that_is_wrong_is_named(parity, tmp_path):
    def without(name, tensors):
        return {k: v for k, v in tensors.items() if k != "blocks.1.norm2.weight" or name != "backbone"}

    with pytest.raises(
        CheckpointError, match=r"eva_vitg_psz14\.bin: .*blocks\.1\.norm2\.weight.*Check heads and vit_heads"
    ):
        dyntok.load(write_release(parity, tmp_path, without), config=parity.config)


def test_imports_that_make_no_sense(release, parity, tmp_path):
    with pytest.raises(ConfigError, match="pixels were requested without a decoder; add decoder or highres_decoder"):
        convert(release, tmp_path, parts=["pixels"], config=parity.config)
    with pytest.raises(ConfigError, match="holds released files, which would hide the new checkpoint"):
        convert(release, release, config=parity.config)
    with pytest.raises(ConfigError, match="name their folder or repository"):
        dyntok.load(config=parity.config)
