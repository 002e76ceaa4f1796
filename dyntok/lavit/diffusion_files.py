"""The parts of a diffusion model from their folders, by diffusers' own classes.

Not here: how they make pictures (`diffusion.py`).
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from dyntok.errors import CheckpointError

WEIGHTS = "diffusion_pytorch_model"
INDEX = f"{WEIGHTS}.safetensors.index.json"
UNCOND = "uncond_embeddings"
_MAX_MESSAGE = 400  # characters of diffusers' messages, which can list every tensor of a network


def load_network(kind: Any, folder: Path, dtype: torch.dtype, pickles: bool) -> Any:
    """Returns a network of diffusers' class `kind`. Raises `CheckpointError` unless the folder has all its weights."""
    safe = not pickles or any((folder / name).is_file() for name in (f"{WEIGHTS}.safetensors", INDEX))
    network, report = load_part(kind, folder, torch_dtype=dtype, use_safetensors=safe, output_loading_info=True)
    if missing := sorted(report["missing_keys"]):  # diffusers only warns, and leaves these at random
        raise CheckpointError(
            f"the weights in {folder} lack {len(missing)} tensors that config.json asks for, such as {missing[0]}"
        )
    network.register_to_config(_name_or_path="")  # it would put this machine's path into files that are saved
    return network


def load_part(kind: Any, folder: Path, **options: Any) -> Any:
    """Returns a network or scheduler of diffusers' class `kind`. Raises `CheckpointError` where it can't be loaded."""
    if not folder.is_dir():  # else diffusers takes the path for a name on the hub
        raise CheckpointError(f"{folder} is missing, expected folders unet, vae and scheduler as diffusers saves them")
    default = torch.get_default_dtype()
    try:
        return kind.from_pretrained(str(folder), local_files_only=True, **options)
    except Exception as error:  # damaged files and odd configurations fail inside diffusers with errors of any type
        raise CheckpointError(f"can't load {kind.__name__} from {folder}: {str(error)[:_MAX_MESSAGE]}") from error
    finally:
        torch.set_default_dtype(default)  # diffusers leaves its own in place when a network can't be built


def load_uncond(folder: Path, pickles: bool) -> Tensor:
    """Returns the unconditional embedding, float [L, E], from safetensors or, with `pickles`, a torch pickle.

    Raises `CheckpointError` where it is missing, damaged or no tensor.
    """
    endings = ("safetensors", "bin") if pickles else ("safetensors",)
    files = [file for ending in endings if (file := folder / f"{UNCOND}.{ending}").is_file()]
    if not files:
        raise CheckpointError(f"{folder} holds no {UNCOND}.{endings[-1]}, which this U-Net needs")
    file = files[0]
    try:
        if file.suffix == ".safetensors":
            tensor = load_file(file)[UNCOND]
        else:
            tensor = torch.load(file, map_location="cpu", weights_only=True)
    # pickles fail with errors of any type. PyTorch's advice to load without weights_only is not passed on
    except Exception as error:
        kind = type(error).__name__
        raise CheckpointError(f"can't read {file} ({kind}), expected one tensor, pickled or as safetensors") from error
    if not isinstance(tensor, Tensor):
        raise CheckpointError(f"{file} holds a {type(tensor).__name__}, expected one tensor [L, E] or [1, L, E]")
    return tensor[0] if tensor.dim() == 3 and len(tensor) == 1 else tensor
