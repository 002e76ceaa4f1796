"""`dyntok.load` and what a tokenizer says about itself: names, sizes, messages for common slips."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import dyntok
from dyntok import CheckpointError, CodeError, ConfigError, DyntokError, KeepPolicy
from dyntok.loading import BUNDLED

FINGERPRINT = "9c37a9e29e5dd559"  # codes of the default tokenizer that users stored rest on it
TINY = "3430ff5f2bb35b50"


@pytest.fixture(scope="module")
def flex():
    return dyntok.load("flex")


def test_a_bundled_tokenizer_is_loaded_by_name(flex, tmp_path, monkeypatch):
    (tmp_path / "flex").mkdir()
    monkeypatch.chdir(tmp_path)
    for tokenizer in (flex, dyntok.load(), dyntok.load("flex"), dyntok.load(BUNDLED)):
        assert (tokenizer.name, tokenizer.fingerprint) == ("flex", FINGERPRINT)
    assert dyntok.load("tiny").fingerprint == TINY
    with pytest.raises(CheckpointError, match="has no config.json"):
        dyntok.load("./flex")  # a path, not the name


def test_batch_invariance_is_an_option_of_both_ways_to_load():
    for make in (dyntok.load, dyntok.DynamicVisualTokenizer.from_pretrained):
        assert make(BUNDLED, batch_invariant=True).batch_invariant and not make(BUNDLED).batch_invariant


def test_list_models_names_what_load_takes(flex):
    models = dyntok.list_models()
    assert models == {
        "flex": "any shape, up to 256 patches of 8 pixels, 16384 codes",
        "tiny": "128 x 128 pixels, 8192 codes",
    }
    assert [dyntok.load(name).name for name in models] == list(models)


@pytest.mark.parametrize("name", ["tinny", "Tiny", "tiny2"])
def test_a_misspelt_name_lists_what_there_is(name):
    message = rf"no tokenizer '{name}'.*bundled tokenizers are flex, tiny\. Did you mean 'tiny'\?.*folder.*'org/name'"
    with pytest.raises(CheckpointError, match=message):
        dyntok.load(name)


def test_what_is_no_name_is_refused():
    with pytest.raises(CheckpointError, match="5 is no checkpoint; expected a folder or a name"):
        dyntok.load(5)


def test_a_name_like_no_other_lists_what_there_is_without_a_guess():
    with pytest.raises(CheckpointError, match=r"bundled tokenizers are flex, tiny\. Give one of these"):
        dyntok.load("resnet")


def test_the_example_image_is_a_photograph(flex):
    image = dyntok.example_image()
    assert isinstance(image, Image.Image) and (image.mode, image.size) == ("RGB", (256, 256))
    assert len(np.unique(np.asarray(image))) > 200 and len(flex.encode(image)) == 1


def test_a_tokenizer_says_what_it_is_in_one_line(flex, tokenizer):
    assert repr(flex) == (
        f"DynamicVisualTokenizer(flex, images of any shape, up to 256 patches, 16384 codes, fingerprint {FINGERPRINT})"
    )
    assert "\n" not in repr(tokenizer) and repr(tokenizer).startswith("DynamicVisualTokenizer(untrained, 64 x 64")


def test_sizes_have_the_usual_names(flex):
    assert len(flex) == flex.vocab_size == 16384
    assert (flex.max_tokens, flex.image_size, flex.grid) == (256, 128, (16, 16))
    codes = flex.encode(dyntok.example_image(), budget=1.0).codes[0]
    assert len(codes) == flex.max_tokens and int(codes.max()) < flex.vocab_size


def test_calling_a_tokenizer_encodes(flex):
    image = dyntok.example_image()
    assert flex(image) == flex.encode(image) and flex([image], budget=9) == flex.encode([image], budget=9)


def test_a_seed_samples_as_a_generator_with_that_seed(flex):
    image = dyntok.example_image()
    seeded = flex.encode(image, sample=7)
    assert (
        seeded == flex.encode(image, sample=torch.Generator().manual_seed(7)) == flex.encode(image, sample=np.int64(7))
    )
    assert seeded != flex.encode(image, sample=8)


def test_a_policy_replaces_its_options(flex):
    image, policy = dyntok.example_image(), KeepPolicy(budget=20)
    assert flex.encode(image, policy=policy) == flex.encode(image, budget=20)
    assert flex.features(image, policy=policy).lengths.tolist() == [20]
    with pytest.raises(ConfigError, match="policy and budget were both given"):
        flex.encode(image, policy=policy, budget=3)
    with pytest.raises(ConfigError, match="policy is dict, expected a KeepPolicy"):
        flex.encode(image, policy={"budget": 3})


def test_a_misspelt_option_is_named(flex):
    for call in (flex.encode, flex.features):
        with pytest.raises(TypeError, match="unexpected option 'bugdet'; did you mean 'budget'"):
            call(dyntok.example_image(), bugdet=3)
    with pytest.raises(TypeError, match="unexpected option 'exact'; expected some of budget"):
        flex.encode(dyntok.example_image(), exact=True)


def test_the_batch_size_does_not_change_the_codes(tokenizer, photos):
    expected = tokenizer.encode(photos)
    assert all(tokenizer.encode(photos, batch_size=size) == expected for size in (1, 4, 100))
    for size in (0, -1, 2.0, True):
        with pytest.raises(ConfigError, match="batch_size is .*, expected an int of at least 1"):
            tokenizer.encode(photos, batch_size=size)


def test_a_file_of_codes_is_named_as_one(flex, tmp_path):
    path = tmp_path / "codes.json"
    path.write_text(json.dumps(flex.encode(dyntok.example_image()).to_dict()))
    for given in (path, str(path)):
        with pytest.raises(CodeError, match=r"codes\.json.*json\.load\(open\(path\)\)\['codes'\].*`dyntok decode`"):
            flex.decode(given)
    assert len(flex.decode(json.loads(path.read_text())["codes"])) == 1  # as the message says


@pytest.mark.parametrize("device", ["gpu", "GPU0", "cuda:99", "quantum"])
def test_a_device_that_does_not_exist_is_named(flex, device):
    for attempt in (
        lambda: dyntok.load(device=device),
        lambda: dyntok.DynamicVisualTokenizer.from_pretrained(BUNDLED, device=device),
        lambda: flex.to(device),
        lambda: flex.to(device=device),
    ):
        with pytest.raises(DyntokError, match=f"no device '{device}' on this machine, expected 'cpu'"):
            attempt()


def test_a_device_called_gpu_is_corrected():
    with pytest.raises(ConfigError, match="a GPU of NVIDIA or AMD is 'cuda'"):
        dyntok.load(device="gpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_every_way_to_one_says_so(flex):
    for attempt in (lambda: flex.to("cuda"), flex.cuda, lambda: flex.cuda(0), lambda: dyntok.load(device="cuda")):
        with pytest.raises(ConfigError, match="no device 'cuda.*because PyTorch found no GPU"):
            attempt()


def test_dtypes_have_short_names():
    assert dyntok.load(dtype="bf16").dtype == torch.bfloat16 and dyntok.load(dtype=torch.float64).dtype == torch.float64
    for dtype in ("float99", "int8", torch.int64, torch.float8_e4m3fn, 16):
        with pytest.raises(ConfigError, match="expected fp32, bf16, fp16, one of their torch.dtypes, or torch.float64"):
            dyntok.load(dtype=dtype)


def test_options_of_load_are_spelled_out():
    with pytest.raises(TypeError, match="unexpected keyword argument 'revison'"):
        dyntok.load("tiny", revison="main")


def test_head_counts_need_a_name():
    with pytest.raises(ConfigError, match="config= is for LaVIT's released files; name their folder or repository"):
        dyntok.load(config={"heads": 4})
