"""Whether a language model keeps the packed documents of a row apart: measured, because architectures differ."""

from typing import Any

import torch
from torch import Tensor

from dyntok.errors import ConfigError
from dyntok.llm.packing import PackedRow
from dyntok.llm.rows import RowInputs
from dyntok.structure import require_methods

_LENGTH = 12  # tokens in a document
_ROUNDING = 1e-5  # of kernels that sum masked values in another order


@torch.no_grad()
def document_leak(model: Any, *, mask: torch.dtype | None = None) -> float:
    """Returns how much a document's logits change with its neighbor in the row, relative to the largest logit.

    The document is measured after two different neighbors. 0: documents stay apart, in any dtype.

    mask: dtype of the float mask, for models that are to be trained with `PackedDataset(mask=...)`

    Raises `ConfigError` where the model can't compute such rows.
    """
    require_methods("model", model, ["get_input_embeddings"], "a language model of transformers")
    size = len(model.get_input_embeddings().weight)
    generator = torch.Generator("cpu").manual_seed(0)
    first, second, own = torch.randint(0, size, (3, _LENGTH), generator=generator, device="cpu")
    training = [part for part in model.modules() if part.training]
    model.eval()
    try:
        one, other = (_logits(model, [neighbor, own], mask)[_LENGTH:] for neighbor in (first, second))
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"{type(model).__name__} does not take packed rows ({error}); give it one document per row"
        ) from error
    finally:
        for part in training:
            part.training = True
    return (one - other).abs().max().item() / max(one.abs().max().item(), 1e-12)


def check_packing(model: Any, *, mask: torch.dtype | None = None) -> None:
    """Raises `ConfigError` where the documents of a packed row see each other in this model; see `document_leak`."""
    leak = document_leak(model, mask=mask)
    if not leak <= _ROUNDING:
        way = "give it one document per row" if mask is not None else "try mask=torch.float32, or one document per row"
        raise ConfigError(
            f"{type(model).__name__} lets packed documents see each other (logits change by {leak:.2g} of the largest)"
            f"; {way}"
        )


def _logits(model: Any, documents: list[Tensor], mask: torch.dtype | None) -> Tensor:
    ids = torch.cat(documents)
    row = PackedRow(
        input_ids=ids,
        labels=ids,
        position_ids=torch.cat([torch.arange(len(document), device="cpu") for document in documents]),
        document=torch.cat([torch.full_like(document, i) for i, document in enumerate(documents)]),
    )
    device = model.get_input_embeddings().weight.device
    inputs = {name: value[None].to(device) for name, value in RowInputs.of(row, mask).items() if name != "labels"}
    return model(**inputs, use_cache=False).logits[0].float()
