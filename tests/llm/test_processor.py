"""Text and pictures through a processor, chat templates, and prefixes of embeddings, with real (small) models."""

import dataclasses

import numpy as np
import pytest
import torch
from torch.testing import assert_close

transformers = pytest.importorskip("transformers")
from support.any_grid import any_grid_tokenizer  # noqa: E402
from support.processors import bpe, made  # noqa: E402

import dyntok  # noqa: E402
from dyntok.errors import CodeError, ConfigError  # noqa: E402
from dyntok.llm import VisualPrefix, VisualProcessor, extend_tokenizer, parse_ids  # noqa: E402
from dyntok.vocab import VisualVocab  # noqa: E402

SMALL = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8
)


LAYOUTS = [("none", None), ("positions", None), ("map", None), ("lattice", None), ("map", True), ("lattice", True)]


@pytest.mark.parametrize(("layout", "any_grid"), LAYOUTS)
def test_pictures_stand_where_the_text_says_and_come_back(layout, any_grid, tokenizer, photos):
    processor = made(tokenizer, layout, any_grid)
    places = layout if layout in ("map", "lattice") else None
    encoding = tokenizer.encode(photos[:3], places=places)
    inputs = processor(text=["a cat <image> what is it?", "<image><image>"], images=photos[:3])
    images = [s for row in inputs["input_ids"] for s in parse_ids(row, processor.vocab) if s.kind != "text"]
    assert [s.codes for s in images] == [tuple(row.tolist()) for row in encoding.codes]
    if layout != "none":
        assert [s.positions for s in images] == [tuple(row.tolist()) for row in encoding.positions]
    text = [
        id
        for id in inputs["input_ids"][0].tolist()
        if not processor.vocab.is_visual(id) and id != processor.tokenizer.pad_token_id
    ]
    assert processor.tokenizer.decode(text) == "a cat  what is it?"
    assert torch.equal(inputs["labels"] == -100, inputs["attention_mask"] == 0)
    assert torch.equal(
        inputs["labels"][inputs["attention_mask"] == 1], inputs["input_ids"][inputs["attention_mask"] == 1]
    )
    nested = processor(text=["a cat <image> what is it?", "<image><image>"], images=[photos[:1], photos[1:3]])
    assert all(torch.equal(nested[name], inputs[name]) for name in inputs)
    wanted = tokenizer.decode(encoding if layout != "none" else [row.tolist() for row in encoding.codes])
    found = [image for row in processor.decode_images(inputs["input_ids"]) for image in row]
    assert [np.asarray(image).tolist() for image in found] == [np.asarray(image).tolist() for image in wanted]


def test_pictures_of_any_shape(small_config, photos):
    """Each picture brings its own grid, also with sides that 4 does not divide, and is painted on it."""
    visual = any_grid_tokenizer(small_config)
    processor = made(visual, layout=None)
    assert processor.vocab.sides == 128 and processor.vocab.layout == "map"
    encoding = visual.encode(photos[:3])
    assert len(set(map(tuple, encoding.grids.tolist()))) > 1 and (encoding.grids % 4).any()
    inputs = processor(["<image> <image>", "<image>"], photos[:3])
    found = [image for row in processor.decode_images(inputs["input_ids"]) for image in row]
    for image, wanted in zip(found, visual.decode(encoding), strict=True):
        assert np.array_equal(np.asarray(image), np.asarray(wanted))


@pytest.mark.parametrize(
    "options", [{"max_patches": 128}, {"size": (96, 64), "fit": "pad"}, {"fit": "squash"}], ids=str
)
def test_pictures_have_the_shape_that_is_asked_for(options, small_config, photos, tmp_path):
    visual = any_grid_tokenizer(small_config)
    processor = made(visual, "map", **options)
    processor.save_pretrained(tmp_path)
    expected = visual.encode(photos[1], places="map", **options)
    assert expected != visual.encode(photos[1], places="map")
    for one in (processor, VisualProcessor.from_pretrained(tmp_path)):
        (image,) = parse_ids(one("<image>", photos[1])["input_ids"][0].tolist(), one.vocab)
        assert image.encoding == expected
    with pytest.raises(ConfigError, match="max_patches is 9, expected"):
        made(visual, "map", max_patches=9)
    with pytest.raises(ConfigError, match="max_patches=128 and size=64 were both given"):
        made(visual, "map", max_patches=128, size=64)


def test_padding_is_on_the_tokenizers_side(tokenizer, photos):
    processor = made(tokenizer, budget=5)
    processor.tokenizer.padding_side = "left"
    inputs = processor(["a", "a cat on a red chair"])
    assert (
        inputs["attention_mask"][0].tolist() == sorted(inputs["attention_mask"][0].tolist())
        and inputs["labels"][0, 0] == -100
    )
    assert len(processor("<image>", photos[0])["input_ids"][0]) == 7
    with pytest.raises(ConfigError, match="padding is off"):
        processor(["a", "a cat on a red chair"], padding=False)
    processor.tokenizer.pad_token = None
    with pytest.raises(ConfigError, match="no pad token"):
        processor(["a", "a cat on a red chair"])


def test_what_does_not_fit_is_told(tokenizer, photos):
    processor = made(tokenizer)
    for text, images, message in (
        ("<image>", None, "texts contain 1 <image> placeholder, but 0 images were given"),
        (["a", "<image>"], photos[:2], "texts contain 1 <image> placeholder, but 2 images were given"),
        (["<image>", "<image>"], [photos[:2], []], r"\[1, 1\] <image> placeholders, but \[2, 0\] images were given"),
    ):
        with pytest.raises(CodeError, match=message):
            processor(text, images)
    with pytest.raises(dyntok.ImageError):
        processor("<image>", b"broken")
    with pytest.raises(ConfigError, match="extend_tokenizer"):
        VisualProcessor(bpe(), tokenizer, processor.vocab)
    with pytest.raises(ConfigError, match="the vocabulary has 9 codes, but the tokenizer has 256"):
        VisualProcessor(processor.tokenizer, tokenizer, VisualVocab.after(400, size=9))


@pytest.mark.parametrize("layout", ["none", "positions"])
def test_pictures_that_are_cut_off_or_too_long(layout, tokenizer):
    processor = made(tokenizer, layout)
    vocab = processor.vocab
    ids = vocab.to_ids([1, 2, 3], positions=[0, 4, 9] if layout == "positions" else None)
    cut = ids[None, :-1]
    assert processor.decode_images(cut) == [[]] and len(processor.decode_images(cut, truncated=True)[0]) == 1
    long = torch.tensor(
        [[vocab.image_start, *[vocab.offset] * 65, vocab.image_end, vocab.image_start, vocab.image_end]]
    )
    assert processor.decode_images(long) == [[]]  # more codes than patches, and none at all


def test_chat_templates(tokenizer, photos):
    processor = made(tokenizer, budget=4)
    content = [{"type": "image", "image": photos[0]}, {"type": "text", "text": "what is it?"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "a cat"}]
    inputs = processor.apply_chat_template(messages, add_generation_prompt=True)
    codes = tokenizer.encode(photos[0], budget=4).codes[0]
    text = f"user: {processor.vocab.to_text(codes)}what is it?\nassistant: a cat\nassistant:"
    assert inputs["input_ids"].tolist() == [processor.tokenizer.encode(text, add_special_tokens=False)]
    with pytest.raises(CodeError, match="'video'"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "video"}]}])


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("template", [None, CHATML], ids=["plain", "chatml"])
def test_only_the_turns_of_the_assistant_are_learned(template, tokenizer, photos):
    """With the token that ends a turn, with pictures that the assistant painted, and where the template strips."""
    processor = made(tokenizer, budget=4)
    text = processor.tokenizer
    text.chat_template = template or text.chat_template
    painted = [{"type": "text", "text": "here: "}, {"type": "image", "image": photos[0]}]
    messages = [
        {"role": "user", "content": "paint a cat"},
        {"role": "assistant", "content": painted},
        {"role": "user", "content": "what is it?"},
        {"role": "assistant", "content": " a cat"},
    ]
    inputs = processor.apply_chat_template(messages)
    ids, labels = inputs["input_ids"][0], inputs["labels"][0]
    learned = labels != -100
    assert torch.equal(labels[learned], ids[learned])
    picture = processor.vocab.to_text(tokenizer.encode(photos[0], budget=4))[0]
    end = "<|im_end|>" if template else "\n"
    written = text.decode(ids[learned])
    first = f"here: {picture}"
    assert written.startswith(first) and "a cat" in written and "paint" not in written and "what" not in written
    assert text.decode(ids[learned])[len(first)] == end[0]
    text.chat_template = (
        "{% for m in messages %}{{ m.content | upper | replace('<MARK0:PICTURE>', '<mark0:picture>') }}\n{% endfor %}"
    )
    assert "labels" not in processor.apply_chat_template(messages[:1] + messages[3:])


LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
TALK = [
    {"role": "user", "content": "what is it?"},
    {"role": "assistant", "content": "a cat"},
    {"role": "user", "content": "and?"},
    {"role": "assistant", "content": " a dog"},
]


def ending(tokenizer, template):
    """A processor whose turns end with a special token, as those of most models."""
    processor = made(tokenizer, budget=4)
    processor.tokenizer.add_special_tokens({"eos_token": "</s>"})
    processor.tokenizer.chat_template = template
    return processor


def learned_words(processor, messages):
    inputs = processor.apply_chat_template(messages)
    written = processor.tokenizer.decode(inputs["input_ids"][0][inputs["labels"][0] != -100])
    return written.replace("</s>", " </s> ").split()


@pytest.mark.parametrize("template", [LLAMA2, LLAMA2.replace("' ' + eos_token", "eos_token")], ids=["space", "none"])
def test_a_turn_is_learned_to_the_token_that_ends_it(template, tokenizer):
    """Also where the template writes whitespace before it, as that of Llama 2 does."""
    assert learned_words(ending(tokenizer, template), TALK) == ["a", "cat", "</s>", "a", "dog", "</s>"]


def test_pictures_after_a_turn_do_not_end_it(tokenizer, photos):
    processor = ending(tokenizer, "{% for m in messages %}{{ m.content }}\n{% endfor %}")
    picture = {"role": "user", "content": [{"type": "image", "image": photos[0]}]}
    inputs = processor.apply_chat_template([*TALK[:2], picture])
    learned = inputs["input_ids"][0][inputs["labels"][0] != -100]
    assert processor.tokenizer.decode(learned).strip() == "a cat" and processor.vocab.image_start not in learned


CALL = {"type": "function", "function": {"name": "look", "arguments": {}}}
TOOLS = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% if m.tool_calls %}<call>{{ m.tool_calls[0].function.name }}</call>{% endif %}{{ eos_token }}\n{% endfor %}"
)


def test_no_turn_is_learned_in_part(tokenizer):
    """What a template writes after a content belongs to the turn, and can't be found."""
    processor = ending(tokenizer, TOOLS)
    for calls in (None, []):
        assert learned_words(processor, [TALK[0], {**TALK[1], "tool_calls": calls}]) == ["a", "cat", "</s>"]
    assert "labels" not in processor.apply_chat_template([TALK[0], {**TALK[1], "tool_calls": [CALL]}])
    processor.tokenizer.chat_template = TOOLS.replace("{{ eos_token }}", "!{{ eos_token }}")
    assert "labels" not in processor.apply_chat_template(TALK)


QWEN3 = """
{%- for m in messages %}
    {%- if m.role == "assistant" %}
        {%- set thought, answer = m.reasoning_content or "", m.content %}
        {%- if "</think>" in answer %}
            {%- set thought = answer.split("</think>")[0].rstrip("\\n").split("<think>")[-1].lstrip("\\n") %}
            {%- set answer = answer.split("</think>")[-1].lstrip("\\n") %}
        {%- endif %}
        {{- "<|im_start|>assistant\\n" }}
        {%- if loop.last %}{{- "<think>\\n" + thought.strip("\\n") + "\\n</think>\\n\\n" }}{%- endif %}
        {{- answer + "<|im_end|>\\n" }}
    {%- else %}
        {{- "<|im_start|>" + m.role + "\\n" + m.content + "<|im_end|>\\n" }}
    {%- endif %}
{%- endfor %}"""


@pytest.mark.parametrize(
    "turn, learned",
    [
        ({"content": "a cat"}, "a cat"),
        ({"content": "<think>\nfur\n</think>\n\na cat"}, "<think>\nfur\n</think>\n\na cat"),
        ({"content": "a cat", "reasoning_content": "fur"}, "<think>\nfur\n</think>\n\na cat"),
    ],
    ids=["without a thought", "thought in the content", "thought apart"],
)
def test_thoughts_that_a_template_moves_or_drops(turn, learned, tokenizer, photos):
    """As in Qwen3: earlier thoughts are dropped, and the last turn gets an empty one where it has none."""
    processor = made(tokenizer, budget=4)
    processor.tokenizer.chat_template = QWEN3
    content = [{"type": "image", "image": photos[0]}, {"type": "text", "text": "what is it?"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", **turn}]
    for before in ([], messages):
        inputs = processor.apply_chat_template([*before, *messages])
        ids, labels = inputs["input_ids"][0], inputs["labels"][0]
        expected = (["a cat"] if before else []) + [learned]
        written = processor.tokenizer.decode(ids[labels != -100])
        assert written == "".join(f"{text}<" for text in expected)  # "<" begins the end of a turn here


def test_a_text_brings_no_picture(tokenizer, photos):
    """Neither the placeholder nor visual tokens in what a user types, unless the program asks for it."""
    processor = made(tokenizer, budget=4)
    picture = {"type": "image", "image": photos[0]}
    messages = [{"role": "user", "content": [picture, {"type": "text", "text": "what does <image> mean?"}]}]
    (row,) = processor.apply_chat_template(messages)["input_ids"]
    (image,) = [s for s in parse_ids(row, processor.vocab) if s.kind != "text"]
    assert image.codes == tuple(tokenizer.encode(photos[0], budget=4).codes[0].tolist())
    assert "what does <image> mean?" in processor.tokenizer.decode(row)
    spelled = processor.vocab.to_text([1, 2])
    for content in (spelled, [{"type": "text", "text": "<|image|"}, {"type": "text", "text": ">"}], "<|v:001|>"):
        with pytest.raises(CodeError, match="a text spells . visual tokens? .* visual_tokens=True"):
            processor.apply_chat_template([{"role": "user", "content": content}])
    with pytest.raises(CodeError, match="a text spells 4 visual tokens"):
        processor(f"a cat {spelled}")
    trusting = made(tokenizer, budget=4, visual_tokens=True)
    (row,) = trusting(f"a cat {spelled}")["input_ids"]
    assert [s.codes for s in parse_ids(row, trusting.vocab) if s.kind == "image"] == [(1, 2)]


def test_a_vocabulary_of_another_tokenizer(tokenizer):
    text = bpe()
    vocab = dataclasses.replace(VisualVocab.of(tokenizer, after=len(text)), fingerprint="another")
    extend_tokenizer(text, vocab)
    with pytest.raises(dyntok.FingerprintError, match="belongs to the tokenizer another"):
        VisualProcessor(text, tokenizer, vocab)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_a_prefix_is_what_each_row_alone_would_be(kind, tokenizer, photos):
    """Padding changes nothing, on either side; gradients reach the projection."""
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=100, **SMALL)).eval()
    prefix = VisualPrefix(tokenizer.backbone.embed_dim, 32, kind=kind)
    features = tokenizer.features(photos[:3])
    ids, mask = torch.randint(3, 100, (3, 6)), torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1]])
    embedded = model.get_input_embeddings()(ids)
    rows = prefix(features, embedded, mask, ids)
    assert rows.inputs_embeds.shape[1] == int((features.lengths + mask.sum(1)).max())
    assert rows.attention_mask.sum(1).tolist() == (features.lengths + mask.sum(1)).tolist()
    logits = model(**vars(rows)).logits
    left = prefix(features, embedded, mask, side="left")
    assert left.labels is None and left.attention_mask[:, -1].all()
    for i in range(3):
        alone = torch.cat([prefix.projection(features.split()[i]), embedded[i][mask[i].bool()]])[None]
        assert_close(logits[i, : alone.shape[1]], model(inputs_embeds=alone).logits[0], rtol=1e-4, atol=1e-5)
        assert_close(left.inputs_embeds[i, -alone.shape[1] :], alone[0])
        assert rows.labels[i, features.lengths[i] : alone.shape[1]].tolist() == ids[i][mask[i].bool()].tolist()
        assert (rows.labels[i, : features.lengths[i]] == -100).all()
    model(**vars(rows)).loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in prefix.parameters())
    assert model.generate(
        inputs_embeds=left.inputs_embeds, attention_mask=left.attention_mask, max_new_tokens=3
    ).shape == (3, 3)


def test_a_prefix_that_does_not_fit(tokenizer, photos):
    prefix = VisualPrefix(tokenizer.backbone.embed_dim, 32)
    with pytest.raises(CodeError, match="2 images came with text embeddings"):
        prefix(tokenizer.features(photos[:2]), torch.zeros(3, 4, 32))
    with pytest.raises(ConfigError, match="kind"):
        VisualPrefix(8, 8, kind="conv")
