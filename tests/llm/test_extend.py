"""Visual tokens in real (small) models and tokenizers of transformers, and generation under the grammar."""

import pytest
import torch
from torch.testing import assert_close

transformers = pytest.importorskip("transformers")
from tokenizers import Tokenizer, models, pre_tokenizers, trainers  # noqa: E402

from dyntok.errors import CodeError, ConfigError  # noqa: E402
from dyntok.llm import ImageGrammar, ImageLogitsProcessor, extend_model, extend_tokenizer, parse_ids, parse_text  # noqa: E402
from dyntok.vocab import VisualVocab  # noqa: E402

SMALL = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8
)
MODELS = {
    "llama": lambda n: transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=n, **SMALL)),
    "qwen": lambda n: transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(vocab_size=n, tie_word_embeddings=True, **SMALL)
    ),
    "mistral": lambda n: transformers.MistralForCausalLM(transformers.MistralConfig(vocab_size=n, **SMALL)),
    "gemma": lambda n: transformers.GemmaForCausalLM(transformers.GemmaConfig(vocab_size=n, **SMALL)),
    "gpt2": lambda n: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=n, n_embd=32, n_layer=2, n_head=4, n_positions=128)
    ),
}
SIZE = 64


@pytest.fixture
def tokenizer():
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel()
    bpe.train_from_iterator(
        ["a photograph of a cat on a red chair"] * 9, trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>"])
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>")


@pytest.fixture
def vocab(tokenizer):
    return VisualVocab.after(len(tokenizer), size=SIZE)


def test_the_random_numbers_of_a_program_stay(tokenizer, vocab):
    model = MODELS["llama"](len(tokenizer))
    before = torch.get_rng_state()
    extend_model(model, vocab)
    assert torch.equal(torch.get_rng_state(), before)


def test_every_code_is_one_token(tokenizer, vocab, tmp_path):
    plain = tokenizer.encode("a red cat")
    assert extend_tokenizer(tokenizer, vocab) == SIZE + 2
    assert extend_tokenizer(tokenizer, vocab) == 0
    tokenizer.save_pretrained(tmp_path)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    codes = torch.tensor([5, 0, 63])
    for tok in (tokenizer, again):
        assert tok.encode("a red cat") == plain
        assert tok.encode(vocab.to_text(codes), add_special_tokens=False) == vocab.to_ids(codes).tolist()
        (image,) = [s for s in parse_text(tok.decode(vocab.to_ids(codes)), vocab) if s.kind == "image"]
        assert image.codes == (5, 0, 63)


def test_a_tokenizer_written_in_python(tmp_path):
    """Another backend than `tokenizers`."""
    tokenizer = transformers.ByT5Tokenizer()
    vocab, plain = VisualVocab.after(len(tokenizer), size=SIZE), tokenizer.encode("a red cat")
    assert not tokenizer.is_fast and extend_tokenizer(tokenizer, vocab) == SIZE + 2
    tokenizer.save_pretrained(tmp_path)
    for tok in (tokenizer, transformers.ByT5Tokenizer.from_pretrained(tmp_path)):
        assert tok.encode("a red cat") == plain
        assert tok.encode(vocab.to_text([5, 0, 63]), add_special_tokens=False) == vocab.to_ids([5, 0, 63]).tolist()


def test_as_many_tokens_as_lavit_has(tokenizer):
    vocab = VisualVocab.after(len(tokenizer), size=16_384)
    assert extend_tokenizer(tokenizer, vocab) == 16_386
    codes = torch.randint(0, 16_384, (50,))
    assert tokenizer.encode(vocab.to_text(codes), add_special_tokens=False) == vocab.to_ids(codes).tolist()


def test_a_tokenizer_that_does_not_fit(tokenizer, vocab):
    before = tokenizer.get_vocab()
    with pytest.raises(CodeError, match="expected ids without a gap"):
        extend_tokenizer(tokenizer, VisualVocab.after(len(tokenizer) + 5, size=SIZE))
    assert tokenizer.get_vocab() == before
    tokenizer.add_tokens(["<|image|>", "<|/image|>"])
    with pytest.raises(CodeError, match="has .* already"):
        extend_tokenizer(tokenizer, VisualVocab.after(len(tokenizer), size=SIZE))


@pytest.mark.parametrize("name", MODELS)
def test_models_grow_save_reload_and_write_pictures(name, tmp_path):
    old = 200
    model = MODELS[name](old).eval()
    vocab = VisualVocab.after(old, size=SIZE)
    ids = torch.randint(3, old, (2, 7))
    with torch.no_grad():
        before = model(ids).logits
    extend_model(model, vocab)
    assert model.config.vocab_size == vocab.vocab_size == old + SIZE + 2
    with torch.no_grad():
        assert_close(model(ids).logits[..., :old], before)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    picture = vocab.to_ids([3, 1, 4])[None]
    with torch.no_grad():
        assert_close(again(picture).logits, model(picture).logits)
    grammar = ImageGrammar(vocab, max_tokens=8, min_tokens=2, min_images=1, max_images=1, text=False, eos=(2,))
    processor = ImageLogitsProcessor(grammar, prompt_length=7, max_new_tokens=20)
    for options in ({}, {"do_sample": True, "temperature": 3.0}, {"num_beams": 3}, {"guidance_scale": 3.0}):
        torch.manual_seed(0)
        rows = again.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=20,
            logits_processor=[processor],
            eos_token_id=2,
            pad_token_id=0,
            **options,
        )
        for row in rows[:, 7:]:
            images = [s for s in parse_ids(row, vocab) if s.kind != "text"]
            assert [s.kind for s in images] == ["image"] and 2 <= len(images[0].codes) <= 8
    extend_model(again, VisualVocab.after(old, size=SIZE))  # once more changes no size
    assert again.config.vocab_size == vocab.vocab_size
    with torch.no_grad():
        wanted = again(ids).logits[..., : vocab.vocab_size]
        extend_model(again, VisualVocab.after(old, size=SIZE, patches=16))  # and once more, with positions
        assert again.config.vocab_size == vocab.vocab_size + 16
        assert_close(again(ids).logits[..., : vocab.vocab_size], wanted)


def test_near_codes_start_near():
    model, vocab = MODELS["llama"](200), VisualVocab.after(200, size=SIZE)
    codebook = torch.nn.functional.normalize(torch.randn(SIZE, 16), dim=-1)
    codebook[1] = codebook[0] + 0.01
    old = model.get_input_embeddings().weight.detach().clone()
    extend_model(model, vocab, init=codebook)
    rows = model.get_input_embeddings().weight.detach()
    assert torch.equal(rows[:200], old)
    visual = rows[vocab.offset : vocab.offset + SIZE]
    distance = torch.cdist(visual, visual)
    assert distance[0, 1] < 0.2 * distance[0, 2:].min()
    assert_close(visual.std(), old.std(), rtol=0.2, atol=0)


@pytest.mark.parametrize(
    "options",
    [dict(layout="map", grid=(16, 16)), dict(layout="map", sides=128), dict(patches=256, grid=(16, 16))],
    ids=["map", "any-grid", "positions"],
)
@pytest.mark.parametrize("name", ["llama", "qwen", "gpt2"])
def test_tokens_of_places_start_apart(name, options):
    """No two rows are alike, similar places lie nearer than others, and all are spread as the text rows are."""
    model, vocab = MODELS[name](200), VisualVocab.after(200, SIZE, **options)
    extend_model(model, vocab)
    for layer in {model.get_input_embeddings(), model.get_output_embeddings()}:
        rows = layer.weight.detach()
        for part in vocab.ranges[1:]:
            own = rows[part.offset : part.stop]
            assert torch.pdist(own).min() > 0.01 * rows[:200].std()
            assert_close(own.std(), rows[:200].std(), rtol=0.3, atol=0)
        first = rows[vocab.ranges[1].offset :]
        assert (first[0] - first[1]).norm() < (first[0] - first[12]).norm()


def test_a_codebook_of_another_size_is_refused():
    with pytest.raises(ConfigError, match=r"init is \[3, 4\], expected 'mean' or the codebook's vectors \[64, C\]"):
        extend_model(MODELS["llama"](200), VisualVocab.after(200, size=SIZE), init=torch.randn(3, 4))


def test_padded_vocabularies_keep_their_padding():
    model, vocab = MODELS["qwen"](256), VisualVocab.after(200, size=SIZE)
    extend_model(model, vocab, pad_to_multiple_of=64)
    assert (
        len(model.get_input_embeddings().weight) == 320
        and model.get_output_embeddings().weight is model.get_input_embeddings().weight
    )


@pytest.mark.parametrize("name", ["llama", "qwen", "gpt2"])
def test_extending_a_trained_model_again_changes_no_trained_row(name, tmp_path):
    model, vocab = MODELS[name](200), VisualVocab.after(200, size=SIZE)
    extend_model(model, vocab, pad_to_multiple_of=64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    for init in ("mean", torch.randn(SIZE, 16)):
        extend_model(again, vocab, init=init, pad_to_multiple_of=64)
        for layer in ("get_input_embeddings", "get_output_embeddings"):
            assert torch.equal(getattr(again, layer)().weight, getattr(model, layer)().weight)
    extend_model(again, VisualVocab.after(200, size=SIZE, patches=16))
    rows, trained = again.get_input_embeddings().weight, model.get_input_embeddings().weight
    assert torch.equal(rows[: vocab.vocab_size], trained[: vocab.vocab_size])
    assert not torch.equal(rows[vocab.vocab_size :], trained[vocab.vocab_size : len(rows)])


def test_a_model_without_a_record_that_has_all_rows_stays_as_it_is():
    model, vocab = MODELS["llama"](200 + SIZE + 2), VisualVocab.after(200, size=SIZE)
    before = model.get_input_embeddings().weight.detach().clone()
    extend_model(model, vocab)
    assert torch.equal(model.get_input_embeddings().weight, before)


def test_skipped_special_tokens_are_images_and_parsing_keeps_them(tokenizer, vocab):
    extend_tokenizer(tokenizer, vocab)
    text = tokenizer.encode("a red cat")
    ids = [*text, *vocab.to_ids([5, 0, 63]).tolist()]
    assert tokenizer.decode(ids, skip_special_tokens=True) == tokenizer.decode(text)
    for segments in (parse_ids(ids, vocab), parse_text(tokenizer.decode(ids), vocab)):
        assert [s.codes for s in segments if s.kind == "image"] == [(5, 0, 63)]
