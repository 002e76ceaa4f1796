"""The language model: a small Llama with room for pictures, its text tokenizer, and where both lie in a folder."""

from pathlib import Path

import torch
from data import CODES, captions, text_tokenizer
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

import dyntok
from dyntok.llm import extend_model, extend_tokenizer


def new(
    folder: Path, visual: dyntok.DynamicVisualTokenizer
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase, dyntok.VisualVocab]:
    """Untrained; code embeddings start as far from each other as the codebook's vectors are."""
    tokenizer = text_tokenizer(text for texts in captions(folder / CODES, "train").values() for text in texts)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=8,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    vocab = dyntok.VisualVocab.after(len(tokenizer), size=visual.config.codebook.size)
    extend_tokenizer(tokenizer, vocab)
    extend_model(model, vocab, init=visual.codebook.embedding)
    return model, tokenizer, vocab


def load(
    folder: Path,
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase, dyntok.VisualVocab, dyntok.DynamicVisualTokenizer]:
    """What training left in a folder."""
    visual = dyntok.load()
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    size = visual.config.codebook.size
    vocab = dyntok.VisualVocab.after(len(tokenizer) - size - 2, size=size)
    return AutoModelForCausalLM.from_pretrained(folder / "model").eval(), tokenizer, vocab, visual


def token_losses(
    model: LlamaForCausalLM, input_ids: Tensor, labels: Tensor, position_ids: Tensor | None = None
) -> Tensor:
    """Cross-entropy in nats of every token but the first, [B, L-1]; 0 where the label is -100."""
    with torch.autocast("cpu", torch.bfloat16):  # twice as fast on processors with bf16 arithmetic
        logits = model(input_ids=input_ids, position_ids=position_ids).logits[:, :-1]
    return cross_entropy(logits.flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="none").view(len(labels), -1)
