"""The forms of transformers around the processor: batches of chats, pictures in any form, padding and truncation."""

import base64
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

transformers = pytest.importorskip("transformers")
from support.processors import made  # noqa: E402

from dyntok.errors import CodeError, ConfigError  # noqa: E402
from dyntok.llm import VisualProcessor, parse_ids  # noqa: E402


def user(*content):
    return {"role": "user", "content": list(content)}


@pytest.fixture
def processor(tokenizer):
    return made(tokenizer, budget=4)


def test_pictures_in_every_form_of_a_chat(processor, photos, tmp_path):
    file = io.BytesIO()
    Image.fromarray(photos[0]).save(file, "PNG")
    (tmp_path / "a cat.png").write_bytes(file.getvalue())
    text = base64.b64encode(file.getvalue()).decode()
    link = f"data:image/png;base64,{text}"
    forms = [
        {"type": "image", "image": photos[0]},
        {"type": "image", "image": link},
        {"type": "image", "path": str(tmp_path / "a cat.png")},
        {"type": "image", "url": (tmp_path / "a cat.png").as_uri()},
        {"type": "image", "url": link},
        {"type": "image", "base64": text},
        {"type": "image_url", "image_url": {"url": link}},
        {"type": "image_url", "image_url": link},
    ]
    rows = [processor.apply_chat_template([user(form)])["input_ids"].tolist() for form in forms]
    assert rows == [rows[0]] * len(forms) and len(rows[0][0]) > 6


@pytest.mark.parametrize(
    "part, message",
    [
        ({"type": "image", "url": "https://example.org/cat.png"}, "dyntok downloads nothing by itself"),
        ({"type": "image", "base64": "?"}, "no base64"),
        ({"type": "image", "url": "ftp://example.org/cat.png"}, "expected a data URI, file://, http://"),
        ({"type": "image", "url": "data:image/png,abc"}, "a data URI begins with"),
        ({"type": "image"}, "expected text, image with image, path, url or base64"),
    ],
    ids=str,
)
def test_other_pictures_are_refused(part, message, processor):
    with pytest.raises(CodeError, match=message):
        processor.apply_chat_template([user(part)])


@pytest.mark.parametrize("form", ["image", "path", "pathlib", "url", "image_url"])
def test_a_server_refuses_its_own_files(form, tokenizer, photos, tmp_path):
    path = tmp_path / "secret.png"
    Image.fromarray(photos[0]).save(path)
    part = {
        "image": {"type": "image", "image": str(path)},
        "path": {"type": "image", "path": str(path)},
        "pathlib": {"type": "image", "image": path},
        "url": {"type": "image", "url": path.as_uri()},
        "image_url": {"type": "image_url", "image_url": {"url": path.as_uri()}},
    }[form]
    trusting, server = made(tokenizer, budget=4), made(tokenizer, budget=4, local_paths=False)
    assert len(trusting.apply_chat_template([user(part)])["input_ids"][0]) > 6
    with pytest.raises(CodeError, match="made with local_paths=False"):
        server.apply_chat_template([user(part)])
    data = base64.b64encode(path.read_bytes()).decode()
    for other in ({"type": "image", "base64": data}, {"type": "image", "image": photos[0]}):
        assert len(server.apply_chat_template([user(other)])["input_ids"][0]) > 6


def test_a_batch_of_conversations(processor, photos):
    chats = [
        [user({"type": "image", "image": photos[0]}), {"role": "assistant", "content": "a cat"}],
        [{"role": "user", "content": "what?"}, {"role": "assistant", "content": None}],
    ]
    inputs = processor.apply_chat_template(chats, return_dict=True, tokenize=True, return_tensors="pt")
    for i, chat in enumerate(chats):
        alone = processor.apply_chat_template(chat)
        seen = inputs["attention_mask"][i] == 1
        for name in ("input_ids", "labels"):
            assert torch.equal(inputs[name][i][seen], alone[name][0])
    with pytest.raises(ConfigError, match="always True"):
        processor.apply_chat_template(chats, tokenize=False)


def test_a_batch_feature(processor, photos):
    inputs = processor(["a cat <image>", "a"], photos[0])
    assert isinstance(inputs, transformers.BatchFeature)
    assert inputs.to("cpu").input_ids.shape == inputs["labels"].shape
    assert processor("a cat", return_tensors="np").input_ids.dtype == "int64"
    rows = processor(["a cat", "a"], padding=False, return_tensors=None)["input_ids"]
    assert len(rows[0]) > len(rows[1])


def test_padding_and_truncation_cut_no_picture(processor, photos):
    whole = processor("a cat <image> what?", photos[0])["input_ids"][0]
    start = int((whole == processor.vocab.image_start).nonzero()[0])
    for most in range(1, len(whole) + 1):
        (row,) = processor("a cat <image> what?", photos[0], truncation=True, max_length=most)["input_ids"]
        expected = start if start < most < start + 6 else most
        assert torch.equal(row, whole[:expected])
        assert {segment.kind for segment in parse_ids(row, processor.vocab)} <= {"text", "image"}
    padded = processor("a", padding="max_length", max_length=7)
    assert padded["attention_mask"].sum() < 7 == padded["labels"].shape[1]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"padding": "most"}, "padding is 'most'"),
        ({"truncation": True}, "max_length is needed"),
        ({"max_length": 0}, "max_length is 0"),
        ({"return_tensors": "tf"}, "return_tensors is 'tf'"),
    ],
    ids=str,
)
def test_options_that_do_not_fit_are_refused(options, message, processor):
    with pytest.raises(ConfigError, match=message):
        processor("a", **options)


def test_addresses_of_files_and_columns_that_are_empty(processor, photos, tmp_path):
    """Some models have addresses under `image`; a table has all columns in each of its rows."""
    Image.fromarray(photos[0]).save(tmp_path / "a cat.png")
    wanted = processor.apply_chat_template([user({"type": "image", "image": photos[0]})])["input_ids"]
    for part in (
        {"type": "image", "image": (tmp_path / "a cat.png").as_uri()},
        {"type": "image", "image": None, "path": str(tmp_path / "a cat.png"), "text": None},
    ):
        assert torch.equal(processor.apply_chat_template([user(part)])["input_ids"], wanted)


@pytest.mark.parametrize(
    "messages",
    [
        {"role": "user", "content": "x"},
        "x",
        None,
        ["x"],
        [{"content": "x"}],
        [{"role": "user", "content": 5}],
        [{"role": "user", "content": ["x"]}],
        [user({"type": "text"})],
        [user({"type": "text", "text": 5})],
        [user({"type": "image", "base64": 5})],
        [user({"type": "image", "url": 5})],
        [user({"type": "image_url", "image_url": {}})],
    ],
    ids=str,
)
def test_messages_of_another_form_are_errors_of_ours(messages, processor):
    with pytest.raises(CodeError):
        processor.apply_chat_template(messages)


def test_options_may_be_numbers_of_numpy(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    made(tokenizer, budget=np.int64(5)).save_pretrained("~/mine")
    assert json.loads((tmp_path / "mine" / "processor_config.json").read_text())["budget"] == 5
    assert VisualProcessor.from_pretrained(tmp_path / "mine").policy["budget"] == 5
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_what_a_server_fetches_may_be_a_file(tokenizer, photos, tmp_path):
    """Its own function may keep pictures in a cache; only the chat must not name files."""
    Image.fromarray(photos[0]).save(tmp_path / "cached.png")
    server = made(tokenizer, budget=4, local_paths=False, fetch=lambda address: tmp_path / "cached.png")
    part = {"type": "image", "url": "https://example.org/cat.png"}
    assert len(server.apply_chat_template([user(part)])["input_ids"][0]) > 6


def test_conversations_in_an_array(processor):
    chats = np.empty(2, object)
    chats[:] = [np.array([{"role": "user", "content": text}]) for text in ("a cat", "a")]
    assert len(processor.apply_chat_template(chats)["input_ids"]) == 2
