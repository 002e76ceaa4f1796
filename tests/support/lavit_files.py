"""LaVIT's released files at a small size, for several test files."""

import torch

from dyntok.lavit.release import FILES


def write_release(parity, folder, change=None, files=FILES, **save_options):
    """The fixture's tensors in files as the repository has them. change: a function of (part, tensors)."""
    for part, path in files.items():
        name = path.rpartition("/")[2]
        tensors = {
            key.removeprefix(f"{name}/"): value.clone()
            for key, value in parity.tensors.items()
            if key.startswith(f"{name}/")
        }
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        torch.save(change(part, tensors) if change else tensors, folder / path, **save_options)
    return folder
