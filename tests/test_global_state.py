"""Nothing outside the package changes: Python, PyTorch and Pillow are the same after every public call."""

import copy
import json
import locale
import os
import random
import signal
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from torch.nn.modules import module as torch_module

import dyntok
import dyntok.batch
import dyntok_kernels
from dyntok.cli.main import main
from dyntok.export import FixedEncoder, export
from dyntok.layout import block_capacities, lattice_positions
from dyntok.llm import Document, ImageCodes, ImageGrammar, PackedDataset, Packer, parse_ids, read_documents
from dyntok.llm.extend import _projection as random_projection
from dyntok.precision import fixed_convolutions

SIGNALS = [number for number in signal.valid_signals() if number not in (signal.SIGKILL, signal.SIGSTOP)]


def state_of_everything():
    """What a library could leave changed, by name."""
    return {
        "warnings filters": list(warnings.filters),
        "showwarning": warnings.showwarning,
        "signal handlers": [signal.getsignal(number) for number in SIGNALS],
        "working directory": os.getcwd(),
        "environment": {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"},
        "locale": locale.setlocale(locale.LC_ALL),
        "recursion limit": sys.getrecursionlimit(),
        "digits of int": sys.get_int_max_str_digits(),
        "excepthook": sys.excepthook,
        "threads": {thread.name for thread in threading.enumerate()},
        "random": random.getstate(),
        "numpy random": [str(part) for part in np.random.get_state()],
        "numpy errors": np.geterr(),
        "torch random": torch.get_rng_state().tolist(),
        "torch threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_anomaly_enabled()),
        "autocast": (
            torch.is_autocast_enabled("cpu"),
            torch.get_autocast_dtype("cpu"),
            torch.is_autocast_cache_enabled(),
        ),
        "deterministic": (torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()),
        "cudnn": (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32),
        "attention": (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()),
        "mkldnn": torch.backends.mkldnn.enabled,
        "module hooks": [
            len(hooks)
            for name, hooks in vars(torch_module).items()
            if name.startswith("_global") and hasattr(hooks, "keys")
        ],
        "Pillow": (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, ImageFile.MAXBLOCK),
        "formats of Pillow": (sorted(Image.OPEN), sorted(Image.SAVE), sorted(Image.EXTENSION)),
    }


@pytest.fixture(scope="module")
def loaded():
    """A tokenizer that was used once: first uses import modules, which may register formats."""
    Image.init()
    tokenizer = dyntok.load()
    tokenizer.decode(tokenizer.encode(dyntok.example_image()))
    return tokenizer


@pytest.fixture
def unchanged():
    """Fails a test whose call leaves something changed."""
    before = state_of_everything()
    yield
    after = state_of_everything()
    assert {name for name in before if before[name] != after[name]} == set()


def packer():
    vocab = dyntok.VisualVocab.after(300, size=256)
    return Packer(96, vocab, lambda text: list(text.encode()), bos=290, eos=291, pad=292)


CALLS = {
    "load": lambda tok, path: dyntok.load(),
    "load in half precision": lambda tok, path: dyntok.load("tiny", dtype="bf16"),
    "list_models": lambda tok, path: dyntok.list_models(),
    "example_image": lambda tok, path: dyntok.example_image(),
    "encode": lambda tok, path: tok.encode(dyntok.example_image()),
    "call": lambda tok, path: tok(dyntok.example_image(), budget=9),
    "encode a file": lambda tok, path: tok.encode(path / "photo.jpg"),
    "encode a damaged file": lambda tok, path: tok.encode(path / "damaged.jpg", errors="skip"),
    "encode by chance": lambda tok, path: tok.encode(dyntok.example_image(), sample=3),
    "encode_tensor": lambda tok, path: tok.encode_tensor(torch.zeros(1, 3, 128, 128)),
    "features": lambda tok, path: tok.features(dyntok.example_image()),
    "features_tensor": lambda tok, path: tok.features_tensor(torch.zeros(1, 3, 128, 128)),
    "decode": lambda tok, path: tok.decode([[1, 2, 3]]),
    "decode_to_pixels": lambda tok, path: tok.decode_to_pixels([[1, 2, 3]]),
    "decode_to_features": lambda tok, path: tok.decode_to_features([[1, 2, 3]]),
    "export": lambda tok, path: export(FixedEncoder(tok, 16), torch.zeros(1, 3, 128, 128)),
    "packed rows": lambda tok, path: list(packer().pack([Document("a", ("a cat", ImageCodes([1, 2])))])),
    "parsed ids": lambda tok, path: parse_ids([290, 300, 301], packer().vocab),
    "save_pretrained": lambda tok, path: tok.save_pretrained(path / "saved"),
    "fingerprint": lambda tok, path: (tok.fingerprint, repr(tok)),
    "preset": lambda tok, path: dyntok.TokenizerConfig.preset("tiny"),
    "vocabulary": lambda tok, path: dyntok.VisualVocab.lavit().to_ids([1, 2]),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_a_call_leaves_no_traces(call, loaded, tmp_path, photos, unchanged):
    Image.fromarray(photos[0]).save(tmp_path / "photo.jpg")
    (tmp_path / "damaged.jpg").write_bytes((tmp_path / "photo.jpg").read_bytes()[:4000])
    call(loaded, tmp_path)


@pytest.fixture(scope="module")
def work(photos, values, checkpoint_folder, tmp_path_factory):
    """A folder with photographs, their codes, and the recipe of a short training run."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "photos").mkdir()
    for i in range(3):
        Image.fromarray(photos[i]).save(folder / "photos" / f"{i}.jpg")
    stages = [stage | {"images": 8} for stage in values["stages"]]
    (folder / "recipe.yaml").write_text(json.dumps(values | {"stages": stages}))
    photo, codes = str(folder / "photos" / "0.jpg"), str(folder / "codes.json")
    assert main(["encode", photo, "-o", codes, "--model", str(checkpoint_folder)]) == 0
    dyntok.batch.tokenize(folder / "photos", folder / "out", model=checkpoint_folder)
    return folder


def on_dataset(model, work, path):
    column = dyntok.batch.TokenizeColumn(str(model))
    column({"image": [str(work / "photos" / "0.jpg")]})


ON_FOLDERS = {
    "demo": lambda model, work, path: ["demo", "-o", path / "demo.png", "--model", model],
    "encode": lambda model, work, path: ["encode", work / "photos" / "0.jpg", "-o", path / "x", "--model", model],
    "decode": lambda model, work, path: ["decode", work / "codes.json", "-o", path / "x.png", "--model", model],
    "show": lambda model, work, path: ["show", work / "photos" / "0.jpg", "-o", path / "x.png", "--model", model],
    "batch": lambda model, work, path: ["batch", work / "photos", path / "out", "--model", model, "--workers", 1],
    "batch --threads": lambda model, work, path: [
        *("batch", work / "photos", path / "out", "--model", model),
        *("--threads", torch.get_num_threads() + 1),
    ],
    "batch --dry-run": lambda model, work, path: [
        "batch",
        work / "photos",
        path / "out",
        "--model",
        model,
        "--dry-run",
    ],
    "inspect": lambda model, work, path: ["inspect", work / "out", "--model", model, "-o", path],
    "info": lambda model, work, path: ["info", "--model", model],
    "doctor": lambda model, work, path: ["doctor", "--model", model],
    "eval": lambda model, work, path: ["eval", work / "photos", "--model", model],
    "train": lambda model, work, path: ["train", work / "recipe.yaml", "-o", path, "--cpu"],
    "train --dry-run": lambda model, work, path: ["train", work / "recipe.yaml", "-o", path, "--cpu", "--dry-run"],
    "batch.tokenize": lambda model, work, path: dyntok.batch.tokenize(work / "photos", path / "out", model=model),
    "batch.read": lambda model, work, path: list(dyntok.batch.read(work / "out")),
    "batch.CodesDataset": lambda model, work, path: list(dyntok.batch.CodesDataset(work / "out", shuffle=True)),
    "batch.inspect": lambda model, work, path: dyntok.batch.inspect(work / "out"),
    "batch.TokenizeColumn": on_dataset,
    "batch.write_memmap": lambda model, work, path: dyntok.batch.write_memmap(
        work / "out", path / "ids.bin", dyntok.VisualVocab.after(300, size=256)
    ),
    "llm.PackedDataset": lambda model, work, path: list(
        PackedDataset(lambda epoch: read_documents(work / "out", text=None, epoch=epoch), packer)
    ),
    "llm.ImageGrammar": lambda model, work, path: ImageGrammar(packer().vocab, max_tokens=9).start(),
}


@pytest.mark.parametrize("call", ON_FOLDERS.values(), ids=ON_FOLDERS.keys())
def test_a_call_on_folders_leaves_no_traces(call, loaded, work, checkpoint_folder, tmp_path, unchanged):
    arguments = call(checkpoint_folder, work, tmp_path)
    if isinstance(arguments, list) and arguments and isinstance(arguments[0], str):
        assert main([str(argument) for argument in arguments]) == 0


@pytest.mark.parametrize(
    "fails",
    [
        lambda tok: tok.encode(b"no image"),
        lambda tok: tok.decode([[10**6]]),
        lambda tok: tok.to("cuda:99"),
        lambda tok: dyntok.load("no/such folder"),
        lambda tok: dyntok.load(device="gpu"),
    ],
    ids=["encode", "decode", "to", "load", "device"],
)
def test_an_error_leaves_no_traces(fails, loaded, unchanged):
    with pytest.raises(dyntok.DyntokError):
        fails(loaded)


def test_other_settings_stay_too(loaded):
    """Settings that a user chose survive a call, not only the defaults."""
    torch.set_num_threads(1)
    warnings.simplefilter("error", DeprecationWarning)
    before = state_of_everything()
    with torch.inference_mode(), np.errstate(all="raise"):
        loaded.encode(dyntok.example_image())
    after = state_of_everything()
    assert {name for name in before if before[name] != after[name]} == set()


def test_scikit_learn_works_after_encode(loaded):
    """It reads the patterns of all warnings filters when it starts jobs."""
    ensemble = pytest.importorskip("sklearn.ensemble")
    loaded.encode(dyntok.example_image())
    ensemble.RandomForestClassifier(2, n_jobs=1).fit(np.eye(4), [0, 1, 0, 1])


@contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def matmul_precision(precision):
    torch.set_float32_matmul_precision(precision)
    try:
        yield
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision("highest")


SETTINGS = {
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "high": lambda: matmul_precision("high"),
    "medium": lambda: matmul_precision("medium"),
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "errors of NumPy": lambda: np.errstate(all="raise"),
}


def everything(name):
    """What a freshly loaded tokenizer computes."""
    tokenizer, image = dyntok.load(name), dyntok.example_image()
    encoding = tokenizer.encode([image, image.crop((0, 0, 200, 100))], margins=True)
    vocab = dyntok.VisualVocab.of(tokenizer, 300)
    return [
        *encoding.codes,
        encoding.margins,
        *(tokenizer.encode(image, **policy).packed_codes for policy in ({"budget": 9}, {"sample": 3}, {"psnr": 20})),
        tokenizer.encode(image, budget=9, refine=1).packed_codes,
        *(torch.from_numpy(np.array(picture)) for picture in tokenizer.decode(encoding)),
        *vocab.to_encoding(vocab.to_ids(encoding)).codes,
        *dyntok_kernels.codebook_stats(torch.ones(3, 4, dtype=torch.float32), torch.tensor([0, 1, 1]), 2),
    ]


@pytest.fixture(scope="module")
def expected():
    return {name: everything(name) for name in ("tiny", "flex")}


@pytest.mark.parametrize("name", ["tiny", "flex"])
@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS.keys())
def test_settings_of_a_program_do_not_matter(setting, name, expected):
    with setting():
        found = everything(name)
    for one, other in zip(found, expected[name], strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


def test_threads_share_the_settings_that_they_change(loaded):
    """The last thread restores what the first one found."""
    image, wanted = dyntok.example_image(), loaded.encode(dyntok.example_image()).packed_codes
    with matmul_precision("medium"), ThreadPoolExecutor(4) as pool:
        encodings = list(pool.map(lambda _: loaded.encode(image), range(24)))
    assert all(torch.equal(encoding.packed_codes, wanted) for encoding in encodings)


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="this PyTorch has no such settings")
def test_a_setting_still_follows_the_one_above_it(loaded):
    """A call must not leave a value where there was none of its own."""
    torch.backends.mkldnn.matmul.fp32_precision = "none"  # of an earlier test
    try:
        torch.backends.fp32_precision = "bf16"
        loaded.encode(dyntok.example_image())
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
        torch.backends.fp32_precision = "ieee"
        assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
    finally:
        torch.backends.fp32_precision = "none"


def test_overlapping_users_of_a_setting():
    """The first of two ends before the second, as threads may."""
    cudnn, before = torch.backends.cudnn, (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic)
    first, second = fixed_convolutions(torch.device("cuda")), fixed_convolutions(torch.device("cuda"))
    cudnn.benchmark = True
    try:
        first.__enter__(), second.__enter__()
        first.__exit__(None, None, None)
        assert (cudnn.benchmark, cudnn.deterministic) == (False, True)
        second.__exit__(None, None, None)
        assert (cudnn.benchmark, cudnn.deterministic) == (True, before[1])
    finally:
        cudnn.benchmark, cudnn.deterministic = before


def test_what_changes_between_two_calls_is_set_again(loaded):
    with loaded.inference():
        loaded.train()
        with loaded.inference():
            assert not any(part.training for part in loaded.modules())
    loaded.eval()


def test_training_mode_returns_when_the_last_call_ends(loaded):
    first, second = loaded.inference(), loaded.inference()
    loaded.train()
    try:
        with ThreadPoolExecutor(1) as other:
            first.__enter__()
            other.submit(second.__enter__).result()
            first.__exit__(None, None, None)
            assert not any(part.training for part in loaded.modules())
            other.submit(second.__exit__, None, None, None).result()
        assert all(part.training for part in loaded.modules())
    finally:
        loaded.eval()


def test_half_precision_rounds_no_frequencies(loaded):
    """They are not stored, so nothing would bring them back; older versions of timm have no care of their own."""
    tokenizer = copy.deepcopy(loaded)
    tokenizer.selector.register_buffer("angles", torch.tensor([1 / 3]), persistent=False)
    tokenizer.half()
    assert tokenizer.dtype == torch.float16 and float(tokenizer.float().selector.angles) == float(torch.tensor(1 / 3))
    with torch.device("meta"):
        unmade = dyntok.DynamicVisualTokenizer(tokenizer.config)
    assert unmade.half().to_empty(device="cpu").dtype == torch.float16


def test_the_default_device_of_a_program_does_not_matter():
    """A tokenizer stays on its own device; `meta` stands in for a GPU."""
    image, loaded = dyntok.example_image(), {name: dyntok.load(name) for name in ("tiny", "flex")}
    tokenizer = loaded["tiny"]
    wanted = tokenizer.encode(image)
    lattice = dyntok.VisualVocab.after(100, 16, layout="lattice", grid=(5, 3))
    row, projection = tokenizer.codebook.embedding.new_zeros(0).long(), random_projection(3, 4, seed=0)
    torch.set_default_device("meta")
    try:
        for name, before in loaded.items():
            again = dyntok.load(name)
            assert again.fingerprint == before.fingerprint
            assert all(torch.equal(*pair) for pair in zip(again.buffers(), before.buffers(), strict=True))
        for policy in ({}, {"budget": 9}, {"sample": 3}):
            assert tokenizer.encode(image, **policy).codes[0].device.type == "cpu"
        found = tokenizer.encode(image)
        assert found.codes[0].tolist() == wanted.codes[0].tolist()
        assert [picture.size for picture in tokenizer.decode([[1, 2, 3]])] == [(128, 128)]
        assert tokenizer.features(image).lengths.tolist() == wanted.lengths.tolist()
        ids = lattice.to_ids(row.new_tensor([1, 2, 3]), positions=lattice_positions(3, (5, 3)))
        assert lattice.to_encoding([ids]).codes[0].tolist() == [1, 2, 3]
        assert block_capacities((3, 3)).tolist() == [[4, 2, 2, 1]]
        assert tokenizer.decode([]) == [] and len(lattice.to_encoding([])) == 0
        assert random_projection(3, 4, seed=0).tolist() == projection.tolist()
    finally:
        torch.set_default_device(None)
