"""What ties a tokenizer to its weights: fingerprint, precision, saving, loading, the hub. `DynamicVisualTokenizer` inherits it.

Not here: files and formats (`checkpoint.py`, `hub.py`), LaVIT's released files (`lavit.py`).
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from huggingface_hub import ModelHubMixin
from torch import Tensor, nn

from dyntok.checkpoint import format as checkpoint
from dyntok.checkpoint import hub
from dyntok.checkpoint.hub import Origin
from dyntok.config import TokenizerConfig
from dyntok.errors import CheckpointError, ConfigError
from dyntok.model.codebook import Codebook
from dyntok.model.selector import Selector

if TYPE_CHECKING:
    from dyntok.lavit.diffusion import DiffusionDecoder
    from dyntok.tokenizer import DynamicVisualTokenizer

HALF = (torch.float16, torch.bfloat16)
M = TypeVar("M", bound=nn.Module)

_ZERO_BUFFER = "k_bias"  # of timm's EVA: not stored, always zero


class LateParts(Protocol):
    """Fetches parts of a tokenizer when they are first needed."""

    def fetch(self, name: str, tokenizer: "DynamicVisualTokenizer") -> tuple[dict[str, Any], nn.Module]:
        """Sections of the configuration that change, and the part: "decoder", "highres_decoder" or "understanding"."""
        ...

    def painter(self, folder: str, device: torch.device, dtype: torch.dtype) -> "DiffusionDecoder":
        """The diffusion model in that folder."""
        ...


class Persistent(
    nn.Module, ModelHubMixin, library_name="dyntok", tags=["image-tokenizer"], model_card_template=checkpoint.MODEL_CARD
):
    """A module with a `config: TokenizerConfig`, made by calling its class with one."""

    config: TokenizerConfig
    device: torch.device
    dtype: torch.dtype

    def __init__(self) -> None:
        super().__init__()
        self.origin: Origin | None = None  # where it was loaded from
        self.late_parts: LateParts | None = None  # of parts that are fetched when they are first needed
        self.card: str | None = None  # a model card that must stay with the weights, for the licence it names
        self._fingerprint: tuple[list, str] | None = None  # of which state, and the hash

    @property
    def fingerprint(self) -> str:
        """Hash of configuration and weights of everything that makes codes: whatever stores codes stores it beside them.

        Kept until weights change in any way that PyTorch notices; writing through `.data` is not one.
        """
        tensors = [
            tensor for name, tensor in self.state_dict().items() if not name.startswith(checkpoint.READING_PARTS)
        ]
        state = [(t.data_ptr(), t.dtype, t._version) for t in tensors if not t.is_inference()]
        if self._fingerprint is None or self._fingerprint[0] != state or len(state) < len(tensors):
            self._fingerprint = state, checkpoint.fingerprint(self.config, self.state_dict())
        return self._fingerprint[1]

    def _apply(self, *args, **kwargs) -> "Persistent":
        self._fingerprint = None  # moving to another dtype and back changes values, but no version
        return super()._apply(*args, **kwargs)

    def in_precision(self, dtype: torch.dtype) -> "Persistent":
        """Weights as `dtype`; where that is a half, selector, codebook and all LayerNorms stay float32 and the rest runs under autocast.

        So that rounding decides as little as possible. It still decides some: codes of a half-precision tokenizer are not promised to be
        those of its float32 form. `.to(dtype)` casts everything.
        """
        return cast(self, dtype)

    @contextmanager
    def inference(self) -> Iterator[None]:
        """Without gradients, in evaluation mode and, with half-precision weights, under autocast while it lasts."""
        training = [part for part in self.modules() if part.training]
        for part in training:
            part.training = False
        half = self.dtype in HALF
        try:
            with torch.no_grad(), torch.autocast(self.device.type, self.dtype if half else None, enabled=half):
                yield
        finally:
            for part in training:
                part.training = True

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        *,
        dtype: torch.dtype | None = None,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **push_options,
    ) -> str | None:
        """Write `config.json`, `model.safetensors` and, where there is none, a short model card into a folder.

        dtype: of the stored weights. Codes are defined on what is stored: rounding to half precision makes another tokenizer.
        push_to_hub: send the folder's checkpoint to the hub as `repo_id` (default: the folder's name); options as in `push_to_hub`.

        A diffusion model that lies beside the tokenizer on this machine is copied, too. Of LaVIT's released files only the parts that were
        fetched so far are written (`dyntok import-lavit` writes all); their licence stays in the card.

        Returns the address of the hub's commit, if there is one. Raises `CheckpointError`.
        """
        if push_options and not push_to_hub:
            raise TypeError(f"save_pretrained got {', '.join(push_options)}, which only push_to_hub=True has a use for")
        folder = Path(save_directory)
        checkpoint.save(folder, self.config, self.state_dict(), dtype=dtype)
        if self.card is not None:
            (folder / "README.md").write_text(self.card, encoding="utf-8")
        elif not (folder / "README.md").exists():
            self.generate_model_card().save(folder / "README.md")
        painters = self._copy_painters(folder)
        return (
            hub.upload(folder, repo_id or folder.absolute().name, painters=painters, **push_options)
            if push_to_hub
            else None
        )

    def _copy_painters(self, folder: Path) -> list[str]:
        """Folders of diffusion models that are now below `folder`."""
        decoders = [
            decoder for decoder in (self.config.decoder, self.config.highres_decoder) if decoder and decoder.conditions
        ]
        names = [decoder.conditions.folder for decoder in decoders]
        beside = self.origin.path if self.origin is not None and self.late_parts is None else None
        try:
            for name in names:
                if beside is not None and (beside / name).is_dir() and beside != folder.absolute():
                    shutil.copytree(beside / name, folder / name, dirs_exist_ok=True)
        except (OSError, shutil.Error) as error:
            raise CheckpointError(f"can't copy the diffusion model to {folder}: {error}") from error
        return [name for name in names if (folder / name).is_dir()]

    def push_to_hub(self, repo_id: str, *, dtype: torch.dtype | None = None, **options) -> str:
        """Send the tokenizer to the hub with a short model card; to send your own card, use `save_pretrained(..., push_to_hub=True)`.

        options: private, token, branch, create_pr, commit_message. Returns the commit's address. Raises `CheckpointError`.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, dtype=dtype)
            return hub.upload(Path(folder), repo_id, painters=self._copy_painters(Path(folder)), **options)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike,
        *,
        revision: str | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
        force_download: bool = False,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> "DynamicVisualTokenizer":
        """From a folder or a hub repository, in evaluation mode. Raises `CheckpointError` on anything that does not fit.

        dtype: see `in_precision`.
        """
        origin = Origin(name_or_path, revision, local_files_only, token, cache_dir, force_download)
        folder, origin = origin.resolve()
        config, state = checkpoint.load(folder)
        try:
            tokenizer = new_on_meta(lambda: cls(config))
        except ConfigError as error:
            raise CheckpointError(
                f"no tokenizer can be made from {folder / checkpoint.CONFIG_NAME}: {error}"
            ) from error
        fill(tokenizer, state)
        tokenizer.origin, tokenizer.card = origin, checkpoint.licensed_card(folder)
        return tokenizer.in_precision(dtype).to(device).eval()


def new_on_meta(make: Callable[[], M]) -> M:
    """A module without memory or initial values, for `fill`; with both where the meta device would lose what it computes."""
    try:
        with torch.device("meta"):
            module = make()
    except (
        ConfigError,
        RuntimeError,
    ):  # of networks that need values while they are made; else the same error comes again
        return make()
    stored = set(module.state_dict())
    computed = [name for name, _ in module.named_buffers() if name not in stored and not name.endswith(_ZERO_BUFFER)]
    return make() if computed else module


def fill(module: nn.Module, state: Mapping[str, Tensor], **advice: str) -> None:
    """Give a module of `new_on_meta` its tensors, without a copy. Raises `CheckpointError` where they do not fit."""
    checkpoint.check_state_dict(module, state, **advice)
    module.load_state_dict(state, assign=True)
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            if buffer.is_meta and name == _ZERO_BUFFER:
                setattr(part, name, torch.zeros_like(buffer, device="cpu"))


def cast(module: M, dtype: torch.dtype) -> M:
    """See `Persistent.in_precision`."""
    if dtype not in HALF:
        return module.to(dtype)
    exempt = [part for part in module.modules() if isinstance(part, Selector | Codebook | nn.LayerNorm)]
    kept = {id(tensor) for part in exempt for tensor in (*part.parameters(), *part.buffers())}

    def convert(tensor: Tensor) -> Tensor:
        return tensor.to(torch.float32 if id(tensor) in kept else dtype) if tensor.is_floating_point() else tensor

    return module._apply(convert)
