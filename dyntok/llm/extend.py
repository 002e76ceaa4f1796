"""Room for pictures in a language model: tokens in its tokenizer, rows in its embedding and head.

Works with tokenizers and models of transformers as they are passed in; `tokenizers` is imported when a tokenizer is
extended.
"""

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dyntok.errors import CodeError, ConfigError, MissingDependencyError
from dyntok.ids import IdRange
from dyntok.layout import MAX_SIDE, map_digits
from dyntok.structure import brief, require_methods, require_type
from dyntok.vocab import VisualVocab


def extend_tokenizer(tokenizer: Any, vocab: VisualVocab) -> int:
    """Adds every token of `vocab` that the tokenizer does not have, each as one token; returns how many those were.

    >>> vocab = VisualVocab.of(tok, after=len(tokenizer))
    >>> extend_tokenizer(tokenizer, vocab)

    The tokenizer saves, reloads and pushes as before. Adding the same tokens again does nothing.

    Visual tokens are special tokens: `tokenizer.decode(ids, skip_special_tokens=True)` returns the text without its
    images. To keep the images, use `parse_ids(ids, vocab)`, or `parse_text` on `tokenizer.decode(ids)`.

    Raises `CodeError` where a token would get another id than `vocab` says, or a token of these names is there already
    with another id: nothing was added then; and `ConfigError` for a tokenizer that takes no new tokens (the
    mistral-common backend).
    """
    try:
        from tokenizers import AddedToken
    except ModuleNotFoundError as error:
        raise MissingDependencyError.of("tokenizers", "transformers") from error

    require_methods("tokenizer", tokenizer, ["get_vocab", "add_tokens"], "a tokenizer of transformers")
    require_type("vocab", vocab, VisualVocab, "a VisualVocab")
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
    """Gives the embedding and head of a causal language model rows for every id of `vocab`, tied or not; in place.

    init: "mean" sets the rows of codes to the mean of the text rows. The codebook, float [K, C]
        (`tok.codebook.embedding`), places them around that mean as the codebook's vectors lie, projected at random and
        spread as the text rows are, so that near codes start near. The rows of map values, positions and sides always
        start apart: they lie around the mean as sines and cosines of counts, rows and columns do.
    pad_to_multiple_of: the number of rows becomes a multiple of this. Rows that the model had as padding are used
        first; none is removed.

    Only new rows are filled. Text rows and the visual rows of an earlier call stay as they are, bit for bit, so an
    extended and trained model can be extended again. `model.config.dyntok_rows` records the rows that are filled, and
    `save_pretrained` saves it. Without that record, a model that has a row for every visual id counts as extended.

    Raises `ConfigError` where the codebook has not K rows, or the model has no embedding that can grow.
    """
    require_methods("model", model, ["get_input_embeddings"], "a causal language model of transformers")
    require_type("vocab", vocab, VisualVocab, "a VisualVocab")
    if isinstance(init, Tensor):
        known = init.dim() == 2 and len(init) == vocab.size
    else:
        known = isinstance(init, str) and init == "mean"
    if not known:
        got = list(init.shape) if isinstance(init, Tensor) else brief(init)
        raise ConfigError(f"init is {got}, expected 'mean' or the codebook's vectors [{vocab.size}, C]")
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(embedding, nn.Embedding):
        raise ConfigError(
            f"the model's embedding is {type(embedding).__name__}, expected nn.Embedding with rows that can be added"
        )
    visual = torch.tensor(sorted(vocab.tokens.values()), device="cpu")
    old = min(int(visual.min()), len(embedding.weight))  # the rows after these are padding, or visual already
    new = visual[visual >= _filled_rows(model, vocab, len(embedding.weight))]
    tables = [embedding.weight.detach()[:old].clone()]
    if head is not None and head.weight is not embedding.weight:
        tables.append(head.weight.detach()[:old].clone())
    rows = max(vocab.vocab_size, len(embedding.weight))
    device = embedding.weight.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):  # transformers draws rows that are replaced
        model.resize_token_embeddings(rows, pad_to_multiple_of=pad_to_multiple_of, mean_resizing=False)
    weights = [model.get_input_embeddings().weight, *[model.get_output_embeddings().weight] * (len(tables) - 1)]
    for weight, table in zip(weights, tables, strict=True):
        _fill(weight, table, vocab, new.to(weight.device), init)
    bias = getattr(model.get_output_embeddings(), "bias", None)
    if bias is not None:
        with torch.no_grad():
            bias[new.to(bias.device)] = bias[:old].mean()
    model.config.dyntok_rows = max(vocab.vocab_size, getattr(model.config, "dyntok_rows", 0))


def _filled_rows(model: Any, vocab: VisualVocab, rows: int) -> int:
    """Returns the number of rows, from the first, that hold text or visual tokens already."""
    recorded = getattr(model.config, "dyntok_rows", None)
    if recorded is None:
        return rows if rows >= vocab.vocab_size else 0
    return min(recorded, rows)


@torch.no_grad()
def _fill(weight: Tensor, old: Tensor, vocab: VisualVocab, new: Tensor, init: Literal["mean"] | Tensor) -> None:
    """Fills the new rows of one table: around the mean of the old ones where something tells them apart, else at it."""
    old = old.float()
    weight[new] = old.mean(0).to(weight.dtype)
    for seed, part in enumerate(vocab.ranges):
        vectors = init if part.kind == "code" else _sinusoids(_coordinates(part, vocab))
        rows = new[(new >= part.offset) & (new < part.stop)]
        if isinstance(vectors, Tensor) and len(rows):
            weight[rows] = _around(old, vectors, seed)[rows - part.offset].to(weight.dtype)


def _around(old: Tensor, vectors: Tensor, seed: int) -> Tensor:
    """Returns rows [n, D] around the mean of the old ones, as far apart as those, that lie as `vectors` [n, C] do."""
    vectors = vectors.detach().to(old.device, torch.float32)
    vectors = vectors - vectors.mean(0)
    near = vectors @ _projection(vectors.shape[1], old.shape[1], seed).to(old.device)
    spread = (old - old.mean(0)).square().mean().sqrt() / near.square().mean().sqrt().clamp(min=1e-12)
    return old.mean(0) + near * spread


def _coordinates(part: IdRange, vocab: VisualVocab) -> Tensor:
    """Returns what the numbers of a range say: the counts of map values, row and column of positions, or a side."""
    numbers = torch.arange(part.first, part.first + part.size, device="cpu")
    if part.kind == "map":
        return map_digits()
    if part.kind == "position":
        columns = vocab.grid[1] if vocab.grid else math.isqrt(part.size)
        return torch.stack([numbers // columns, numbers % columns], 1)
    return numbers[:, None]


def _sinusoids(coordinates: Tensor) -> Tensor:
    """Returns sines and cosines of coordinates [n, d] at eight frequencies: [n, 16 d]."""
    frequencies = MAX_SIDE ** -torch.linspace(0, 1, 8, dtype=torch.float32, device="cpu")
    angles = (coordinates[..., None] * frequencies).flatten(1)
    return torch.cat([angles.sin(), angles.cos()], 1)


def _projection(rows: int, columns: int, seed: int) -> Tensor:
    """Returns a random matrix [rows, columns], always the same for a seed, that keeps distances on average."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float32, device="cpu") / math.sqrt(columns)
