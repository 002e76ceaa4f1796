"""Whether a language model keeps the packed documents of a row apart: measured, because architectures differ."""

from typing import Any

import torch
from torch import Tensor

from dyntok.errors import ConfigError
from dyntok.llm.packing import PackedRow
from dyntok.llm.rows import RowInputs, collate_rows
from dyntok.structure import require_integer, require_methods

_LENGTH = 12  # tokens in a document
_ROUNDING = 1e-5  # of kernels that sum masked values in another order


@torch.no_grad()
def document_leak(model: Any, *, mask: torch.dtype | None = None, batch_size: int = 2) -> float:
    """Returns how much a document's logits change with its neighbor in the row, relative to the largest logit.

    The document is measured after two different neighbors, in every row of a batch. 0: documents stay apart, in any
    dtype.

    mask: dtype of the float mask, for models that are to be trained with `PackedDataset(mask=...)`
    batch_size: rows of the batch. Flash attention of transformers keeps documents apart in a batch of one row alone,
        which is what `flatten_rows` makes

    Raises `ConfigError` where the model can't compute such rows.
    """
    require_methods("model", model, ["get_input_embeddings"], "a language model of transformers")
    require_integer("batch_size", batch_size, 1)
    size = len(model.get_input_embeddings().weight)
    generator = torch.Generator("cpu").manual_seed(0)
    first, second, own = torch.randint(0, size, (3, _LENGTH), generator=generator, device="cpu")
    training = [part for part in model.modules() if part.training]
    model.eval()
    try:
        # the document keeps its place in the batch, so that rounding is the same both times
        one, other = (
            _logits(model, [[neighbors[i % 2], own] for i in range(batch_size)], mask)[:, _LENGTH:]
            for neighbors in ((first, second), (second, first))
        )
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"{type(model).__name__} does not take packed rows ({error}); give it one document per row"
        ) from error
    finally:
        for part in training:
            part.training = True
    return (one - other).abs().max().item() / max(one.abs().max().item(), 1e-12)


def check_packing(model: Any, *, mask: torch.dtype | None = None, batch_size: int = 2) -> None:
    """Raises `ConfigError` where the documents of a packed row see each other in this model.

    mask, batch_size: see `document_leak`; batch_size=1 is for loaders with `collate_fn=flatten_rows`
    """
    leak = document_leak(model, mask=mask, batch_size=batch_size)
    if not leak <= _ROUNDING:
        way = "give it one document per row" if mask is not None else "try mask=torch.float32, or one document per row"
        if mask is None and batch_size > 1 and document_leak(model, batch_size=1) <= _ROUNDING:
            way = (
                "batches of one row keep them apart: use DataLoader(..., collate_fn=flatten_rows), and "
                "check_packing(model, batch_size=1)"
            )
        raise ConfigError(
            f"{type(model).__name__} lets packed documents see each other (logits change by {leak:.2g} of the largest)"
            f"; {way}"
        )


def _logits(model: Any, rows: list[list[Tensor]], mask: torch.dtype | None) -> Tensor:
    """Returns the logits [B, L, V] of rows, each of them the ids of its documents."""
    batch = collate_rows([RowInputs.of(_packed(documents), mask) for documents in rows])
    device = model.get_input_embeddings().weight.device
    inputs = {name: value.to(device) for name, value in batch.items() if name not in ("labels", "use_cache")}
    return model(**inputs, use_cache=False).logits.float()


def _packed(documents: list[Tensor]) -> PackedRow:
    ids = torch.cat(documents)
    return PackedRow(
        input_ids=ids,
        labels=ids,
        position_ids=torch.cat([torch.arange(len(document), device="cpu") for document in documents]),
        document=torch.cat([torch.full_like(document, i) for i, document in enumerate(documents)]),
    )
