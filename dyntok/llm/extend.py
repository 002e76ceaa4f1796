"""Room for pictures in a language model: tokens in its tokenizer, rows in its embedding and head.

Works with tokenizers and models of transformers as they are passed in; `tokenizers` is imported when a tokenizer is
extended.
"""

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dyntok.errors import CodeError, ConfigError, MissingDependencyError
from dyntok.structure import brief
from dyntok.vocab import VisualVocab


def extend_tokenizer(tokenizer: Any, vocab: VisualVocab) -> int:
    """Adds every token of `vocab` that the tokenizer does not have, each as one token; returns how many those were.

    >>> vocab = VisualVocab.after(len(tokenizer), size=tok.config.codebook.size)
    >>> extend_tokenizer(tokenizer, vocab)

    The tokenizer saves, reloads and pushes as before. Adding the same tokens again does nothing.

    Raises `CodeError` where a token would get another id than `vocab` says, or a token of these names is there already
    with another id: nothing was added then; and `ConfigError` for a tokenizer that takes no new tokens (the
    mistral-common backend).
    """
    try:
        from tokenizers import AddedToken
    except ModuleNotFoundError as error:
        raise MissingDependencyError.of("tokenizers", "transformers") from error

    known = tokenizer.get_vocab()
    wanted = vocab.tokens
    taken = {token: known[token] for token, id in wanted.items() if known.get(token, id) != id}
    if taken:
        raise CodeError(
            f"the tokenizer has {brief(taken)} already, the vocabulary expects {brief({t: wanted[t] for t in taken})}"
        )
    new = {token: id for token, id in wanted.items() if token not in known}
    first = max(known.values(), default=-1) + 1
    if list(new.values()) != list(range(first, first + len(new))):
        raise CodeError(
            f"the tokenizer's next id is {first}, "
            f"and the new tokens of the vocabulary have {brief(list(new.values()))}; "
            f"expected ids without a gap from there: VisualVocab.after({first}, size={vocab.size})"
        )
    # A special token is a list entry to tokenizers written in Python, which they go through for each one that is added.
    special = getattr(tokenizer, "is_fast", False)
    try:
        tokenizer.add_tokens(
            [AddedToken(token, special=special, normalized=False) for token in new], special_tokens=special
        )
    except NotImplementedError as error:
        name = type(tokenizer).__name__
        raise ConfigError(
            f"{name} takes no new tokens ({error}); load the model's tokenizer.json instead, as TokenizersBackend"
        ) from error
    return len(new)


def extend_model(
    model: Any, vocab: VisualVocab, *, init: Literal["mean"] | Tensor = "mean", pad_to_multiple_of: int | None = None
) -> None:
    """Gives embedding and head of a causal language model rows for every id of `vocab`, tied or not; in place.

    init: "mean", every new row is the mean of the old ones; or the codebook, float [K, C] (`tok.codebook.embedding`):
        the rows of codes lie around that mean as the codebook's vectors do, projected at random and spread as the old
        rows are, so that near codes start near
    pad_to_multiple_of: of the number of rows. Rows that the vocabulary had left over as padding are used first; none is
    taken away.

    Rows below the visual ids stay as they are, bit for bit. Raises `ConfigError` where the codebook has not K rows, or
    the model has no embedding that can grow.
    """
    if (
        isinstance(init, Tensor)
        and (init.dim() != 2 or len(init) != vocab.size)
        or not isinstance(init, Tensor)
        and init != "mean"
    ):
        got = list(init.shape) if isinstance(init, Tensor) else repr(init)
        raise ConfigError(f"init is {got}, expected 'mean' or the codebook's vectors [{vocab.size}, C]")
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(embedding, nn.Embedding):
        raise ConfigError(
            f"the model's embedding is {type(embedding).__name__}, expected nn.Embedding with rows that can be added"
        )
    visual = torch.tensor(sorted(vocab.tokens.values()))
    old = min(int(visual.min()), len(embedding.weight))  # what lies behind is padding, or visual already
    tables = [embedding.weight.detach()[:old].clone()]
    if head is not None and head.weight is not embedding.weight:
        tables.append(head.weight.detach()[:old].clone())
    rows = max(vocab.vocab_size, len(embedding.weight))
    model.resize_token_embeddings(rows, pad_to_multiple_of=pad_to_multiple_of, mean_resizing=False)
    weights = [model.get_input_embeddings().weight, *[model.get_output_embeddings().weight] * (len(tables) - 1)]
    for weight, table in zip(weights, tables, strict=True):
        _fill(weight, table, vocab, visual.to(weight.device), init)
    bias = getattr(model.get_output_embeddings(), "bias", None)
    if bias is not None:
        with torch.no_grad():
            bias[visual.to(bias.device)] = bias[:old].mean()


@torch.no_grad()
def _fill(weight: Tensor, old: Tensor, vocab: VisualVocab, visual: Tensor, init: Literal["mean"] | Tensor) -> None:
    old = old.float()
    mean = old.mean(0)
    weight[visual] = mean.to(weight.dtype)
    if isinstance(init, Tensor):
        vectors = init.detach().to(old.device, torch.float32)
        vectors = vectors - vectors.mean(0)
        near = vectors @ _projection(vectors.shape[1], old.shape[1]).to(old.device)
        near *= (old - mean).square().mean().sqrt() / near.square().mean().sqrt().clamp(min=1e-12)
        weight[vocab.offset : vocab.position_offset] = (mean + near).to(weight.dtype)


def _projection(rows: int, columns: int) -> Tensor:
    """Random [rows, columns], the same every time: what keeps distances on average."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) / math.sqrt(columns)
