"""Text and pictures through a processor, chat templates, and prefixes of embeddings, with real (small) models."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

transformers = pytest.importorskip("transformers")
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: E402

import dyntok  # noqa: E402
from dyntok.errors import CodeError, ConfigError  # noqa: E402
from dyntok.llm import VisualPrefix, VisualProcessor, extend_tokenizer, parse_ids  # noqa: E402
from dyntok.vocab import VisualVocab  # noqa: E402

SMALL = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8
)


def bpe():
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = ["a photograph of a cat on a red chair, what is it? <image> user: assistant:"] * 9
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", "<pad>"], initial_alphabet=alphabet)
    )
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>")
    turns = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    fast.chat_template = turns + "{% if add_generation_prompt %}assistant:{% endif %}"
    return fast


def made(visual, patches=0, **options):
    tokenizer = bpe()
    vocab = VisualVocab.after(len(tokenizer), size=visual.config.codebook.size, patches=patches)
    extend_tokenizer(tokenizer, vocab)
    return VisualProcessor(tokenizer, visual, vocab, **options)


@pytest.mark.parametrize("patches", [0, 64])
def test_pictures_stand_where_the_text_says(patches, tokenizer, photos):
    processor = made(tokenizer, patches)
    encoding = tokenizer.encode(photos[:3])
    inputs = processor(text=["a cat <image> what is it?", "<image><image>"], images=photos[:3])
    images = [s for row in inputs["input_ids"] for s in parse_ids(row, processor.vocab) if s.kind != "text"]
    assert [s.codes for s in images] == [tuple(row.tolist()) for row in encoding.codes]
    if patches:
        assert [s.positions for s in images] == [tuple(row.tolist()) for row in encoding.positions]
    text = [
        id
        for id in inputs["input_ids"][0].tolist()
        if id < processor.vocab.image_start and id != processor.tokenizer.pad_token_id
    ]
    assert processor.tokenizer.decode(text) == "a cat  what is it?"
    assert torch.equal(inputs["labels"] == -100, inputs["attention_mask"] == 0)
    assert torch.equal(
        inputs["labels"][inputs["attention_mask"] == 1], inputs["input_ids"][inputs["attention_mask"] == 1]
    )
    nested = processor(text=["a cat <image> what is it?", "<image><image>"], images=[photos[:1], photos[1:3]])
    assert all(torch.equal(nested[name], inputs[name]) for name in inputs)


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
    with pytest.raises(ConfigError, match="the vocabulary has 9 codes and the tokenizer 256"):
        VisualProcessor(processor.tokenizer, tokenizer, VisualVocab.after(400, size=9))


@pytest.mark.parametrize("patches", [0, 64])
def test_pictures_come_back(patches, tokenizer, photos):
    processor = made(tokenizer, patches)
    ids = processor(["<image> and <image>", "none"], photos[:2])["input_ids"]
    first, second = processor.decode_images(ids)
    codes = tokenizer.encode(photos[:2])
    wanted = tokenizer.decode(codes if patches else [row.tolist() for row in codes.codes])
    assert [np.asarray(image).tolist() for image in first] == [
        np.asarray(image).tolist() for image in wanted
    ] and second == []
    start = processor.vocab.image_start
    cut = torch.tensor(
        [[start, *processor.vocab.to_ids([1, 2, 3], positions=[0, 4, 9] if patches else None).tolist()[1:-1]]]
    )
    assert processor.decode_images(cut) == [[]] and len(processor.decode_images(cut, truncated=True)[0]) == 1
    long = torch.tensor(
        [[start, *[processor.vocab.offset] * 65, processor.vocab.image_end, start, processor.vocab.image_end]]
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
