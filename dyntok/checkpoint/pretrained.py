"""What ties a tokenizer to its weights: fingerprint, precision, saving, loading, the hub.

Not here: files and formats (`format.py`), the way to a file (`hub.py`), dispatch by name (`dyntok/loading.py`).
"""

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from typing_extensions import Self, Unpack

from dyntok.checkpoint import card, hub
from dyntok.checkpoint.assemble import check_depth, fill, new_on_meta
from dyntok.checkpoint.fingerprint import encoding_sections, fingerprint, makes_codes
from dyntok.checkpoint.format import CONFIG_NAME, load, save
from dyntok.checkpoint.hub import Origin, PushOptions
from dyntok.config import TokenizerConfig
from dyntok.device import check_device
from dyntok.errors import CheckpointError, ConfigError
from dyntok.precision import autocast, cast, dtype_named, fixed_convolutions, full_float32, settings


class PretrainedModule(nn.Module):
    """A module with a configuration, which calling its class with that configuration makes again."""

    config_class: ClassVar[type[TokenizerConfig]] = TokenizerConfig
    kind: ClassVar[str] = "dynamic"  # what config.json calls this class
    device: torch.device
    dtype: torch.dtype

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self._config = config
        self.batch_invariant = False  # computes every image alone on a GPU, too; see `dyntok.load`
        self.origin: Origin | None = None  # where it was loaded from
        self.card: str | None = None  # a model card that must stay with the weights, for the license it names
        # what it was computed from, the hash, and the tensors: kept, so that no other gets one's address in memory
        self._fingerprint: tuple[Any, str, list[torch.Tensor]] | None = None

    @property
    def config(self) -> TokenizerConfig:
        """Returns the configuration. It cannot be replaced, because codes and weights belong to it."""
        return self._config

    @config.setter
    def config(self, value: TokenizerConfig) -> None:
        raise ConfigError(
            "the configuration of a tokenizer cannot be replaced, because codes and weights belong to it; "
            f"make a new tokenizer: {type(self).__name__}(config)"
        )

    @property
    def fingerprint(self) -> str:
        """Hash of everything that makes codes: the configuration and the weights. It is stored with all codes.

        Computed again after any change that PyTorch notices; writing through `.data` is not noticed.
        """
        state = self.state_dict()
        tensors = [tensor for name, tensor in state.items() if makes_codes(name)]
        versions = [(t.data_ptr(), t.dtype, t._version) for t in tensors if not t.is_inference()]
        basis = encoding_sections(self.config), versions
        if self._fingerprint is None or self._fingerprint[0] != basis or len(versions) < len(tensors):
            self._fingerprint = basis, fingerprint(self.config, state), tensors
        return self._fingerprint[1]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_fingerprint": None}  # addresses in memory mean nothing elsewhere

    def _apply(self, *args, **kwargs) -> Self:
        self._fingerprint = None  # moving to another dtype and back changes values, but no version
        return super()._apply(*args, **kwargs)

    def to(self, *args, **kwargs) -> Self:
        """Moves and casts as in `nn.Module`. Raises `ConfigError` where PyTorch has no such device on this machine."""
        device = kwargs.get("device", args[0] if args else None)
        if isinstance(device, str | int | torch.device) and not isinstance(device, bool):
            check_device(device)
        return super().to(*args, **kwargs)

    def cuda(self, device: int | torch.device | None = None) -> Self:
        """Moves everything to a GPU. Raises `ConfigError` where this machine has none."""
        if device is None:
            return self.to("cuda")
        return self.to(f"cuda:{device}" if isinstance(device, int) else device)

    def in_precision(self, dtype: torch.dtype | str) -> Self:
        """Casts most weights to `dtype`, such as `torch.bfloat16` or "bf16", in place.

        In half precision the selector, the codebook and every LayerNorm stay float32 and the rest runs under autocast,
        so that rounding changes few decisions. It still changes some: codes in half precision are not promised to equal
        those in float32.
        """
        return cast(self, dtype_named(dtype))

    @contextmanager
    def inference(self) -> Iterator[None]:
        """Runs a block without gradients and in evaluation mode, but not in PyTorch's inference mode.

        Half-precision weights compute under autocast, float32 ones without rounding to less. With `batch_invariant` a
        GPU runs the same programs every time.
        """
        evaluation = settings(f"evaluation of {id(self)}", [(part, "training", False) for part in self.modules()])
        fixed = fixed_convolutions(self.device) if self.batch_invariant else nullcontext()
        normal = torch.inference_mode(False)  # whose tensors could not be differentiated in `refine`
        precision = autocast(self.device.type, self.dtype)
        with evaluation, normal, torch.no_grad(), precision, full_float32(self.device), fixed:
            yield

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        *,
        dtype: torch.dtype | None = None,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **push_options: Unpack[PushOptions],
    ) -> str | None:
        """Writes `config.json`, `model.safetensors` and, where there is none, a short model card into a folder.

        A file more lets AutoImageProcessor of transformers find it, as AutoModel does.

        dtype: of the stored weights. Codes are defined on what is stored: rounding to half precision makes another
            tokenizer.
        push_to_hub: send the folder's checkpoint to the hub as `repo_id` (default: the folder's name); options as in
            `push_to_hub`.

        Returns the address of the hub's commit, if there is one. Raises `CheckpointError`.
        """
        if push_options and not push_to_hub:
            raise TypeError(f"save_pretrained got {', '.join(push_options)}, which only push_to_hub=True uses")
        folder = Path(os.path.expanduser(save_directory))
        subfolders = self._save(folder, dtype)
        if not push_to_hub:
            return None
        names = hub.checkpoint_files(folder, subfolders)
        return hub.upload(folder, repo_id or folder.absolute().name, names, **push_options)

    def push_to_hub(
        self, repo_id: str, *, dtype: torch.dtype | None = None, **push_options: Unpack[PushOptions]
    ) -> str:
        """Sends the tokenizer to the hub with a short model card.

        For a card of your own use `save_pretrained(..., push_to_hub=True)`.

        push_options: private, token, branch, create_pr, commit_message.

        Returns the commit's address. Raises `CheckpointError`.
        """
        with tempfile.TemporaryDirectory() as folder:
            subfolders = self._save(Path(folder), dtype)
            return hub.upload(Path(folder), repo_id, hub.checkpoint_files(Path(folder), subfolders), **push_options)

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
        dtype: torch.dtype | str = torch.float32,
        batch_invariant: bool = False,
    ) -> Self:
        """Returns a tokenizer from a folder or a hub repository, in evaluation mode; options as in `dyntok.load`.

        Raises `CheckpointError` on files that do not fit.
        """
        origin = Origin(name_or_path, revision, local_files_only, token, cache_dir, force_download)
        tokenizer = cls.from_origin(origin, device=device, dtype=dtype)
        tokenizer.batch_invariant = batch_invariant
        return tokenizer

    @classmethod
    def from_origin(cls, origin: Origin, *, device: torch.device | str, dtype: torch.dtype | str) -> Self:
        """Does the work of `from_pretrained`."""
        device, dtype = check_device(device), dtype_named(dtype)
        folder, origin = origin.resolve()
        with torch.inference_mode(False):  # its weights could not be differentiated
            config, state = load(folder, cls.config_class, cls.kind)
            check_depth(config.backbone.kwargs, state)
            try:
                tokenizer = new_on_meta(lambda: cls(config), state)
            except ConfigError as error:
                raise CheckpointError(f"no tokenizer can be made from {folder / CONFIG_NAME}: {error}") from error
            fill(tokenizer, state)
            tokenizer.origin, tokenizer.card = origin, card.licensed_card(folder)
            return tokenizer.in_precision(dtype).to(device).eval()

    def _save(self, folder: Path, dtype: torch.dtype | None) -> Sequence[str]:
        """Writes everything into the folder and returns the names of the subfolders that belong to the checkpoint."""
        save(folder, self.config, self.state_dict(), kind=self.kind, dtype=dtype)
        card.write(folder, self.card)
        return self._save_subfolders(folder)

    def _save_subfolders(self, folder: Path) -> Sequence[str]:
        return ()
