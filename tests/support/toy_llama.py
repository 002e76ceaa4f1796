"""A toy Llama that writes pictures of the default tokenizer, what requests ask of it, and whether they got it."""

import pytest
import torch

import dyntok
from dyntok import VisualVocab
from dyntok.llm import extend_model, extend_tokenizer, parse_ids

LONGEST = 112  # ids, with the prompt
PROMPTS = ["a cat", "a photograph of a red chair"]
ONE, THREE = dict(min_images=1, max_images=1, text=0), dict(min_images=3, max_images=3, text=0)
WISHES = [  # limits of pictures, and how a request samples
    (dict(max_tokens=30, min_tokens=30, grid=[16, 16], **ONE), {}),
    (dict(max_tokens=30, min_tokens=30, grid=[16, 16], **ONE), {"temperature": 0.0}),
    (dict(max_tokens=[5, 9, 7], min_tokens=[5, 9, 7], grid=[8, 12], **THREE), {}),
    (dict(max_images=0), {"max_tokens": 30}),
    ({}, {"max_tokens": 40}),
    (dict(min_tokens=20, **ONE), {"max_tokens": 80}),  # the model chooses the grid, and it must fit
    (dict(min_images=50, text=0, grid=[8, 8]), {"max_tokens": 400}),  # up to the longest text of the model
]
GREEDY = 1  # the second one


def prompt_of(wish):
    return PROMPTS[wish % 2]


def save(folder):
    """Writes the model with random weights, its tokenizer and dyntok.json, as a user does."""
    transformers = pytest.importorskip("transformers")
    from support.processors import bpe

    words, tok = bpe(), dyntok.load()
    words.add_special_tokens({"eos_token": "</s>"})
    vocab = VisualVocab.of(tok, after=len(words))
    sizes = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, head_dim=32)
    ends = dict(bos_token_id=None, eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=len(words), max_position_embeddings=LONGEST, **ends, **sizes)
    llama = transformers.LlamaForCausalLM(config)
    extend_tokenizer(words, vocab)
    extend_model(llama, vocab, init=tok.codebook.embedding)
    for part in (llama, words, vocab):
        part.save_pretrained(folder)
    return folder


def images(ids, vocab):
    return [segment for segment in parse_ids(ids, vocab) if segment.kind == "image"]


def check(ids, limits, folder):
    """Fails unless ids are what a request with these limits asked for, and every picture decodes."""
    vocab, tok = VisualVocab.from_pretrained(folder), dyntok.load()
    segments, found = parse_ids(ids, vocab), images(ids, vocab)
    assert {segment.kind for segment in segments} <= {"text", "image"}, limits
    assert len(found) == limits.get("max_images", len(found)) and (found or limits.get("text", 1))
    least, most = limits.get("min_tokens"), limits.get("max_tokens")
    if least is not None and least == most:
        assert [len(image.codes) for image in found] == (least if isinstance(least, list) else [least])
    for image in found:
        rows, columns = limits.get("grid", image.encoding.grids[0].tolist())
        (picture,) = tok.decode(image.encoding)
        assert picture.size == (8 * columns, 8 * rows)
    if not limits.get("text", 1):
        assert len(segments) <= len(found) + 1 and set(ids[-1:]) <= {vocab.image_end, vocab.image_start - 1}


def written_by_transformers(folder):
    """What `generate` writes for the greedy request, with the same grammar."""
    import transformers

    from dyntok.llm import ImageGrammar, ImageLogitsProcessor

    vocab = VisualVocab.from_pretrained(folder)
    words = transformers.AutoTokenizer.from_pretrained(folder)
    llama = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    limits = {**WISHES[GREEDY][0], "grid": (16, 16), "text": False}
    grammar = ImageGrammar(vocab, eos=words.eos_token_id, vocab_size=len(words), **limits)
    prompt = words(prompt_of(GREEDY), return_tensors="pt", return_token_type_ids=False)
    length = prompt["input_ids"].shape[1]
    processors = [ImageLogitsProcessor(grammar, length, LONGEST - length)]
    ids = llama.generate(**prompt, max_new_tokens=LONGEST - length, do_sample=False, logits_processor=processors)
    return ids[0, length:].tolist()
