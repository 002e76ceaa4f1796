"""The epoch of an iterable data set, shared with persistent worker processes."""

from typing import Any

import torch
from torch.utils.data import IterableDataset

from dyntok.structure import require_integer


class EpochDataset(IterableDataset):
    """A data set whose order depends on an epoch. The number is in shared memory, where all workers see it.

    Raises `ConfigError` where an epoch is not an int of 0 or more.
    """

    def __init__(self, epoch: int = 0) -> None:
        self._epoch = torch.zeros(1, dtype=torch.long, device="cpu").share_memory_()
        self.epoch = epoch

    @property
    def epoch(self) -> int:
        """Returns the epoch of the next iteration."""
        return int(self._epoch)

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        require_integer("epoch", epoch, 0)
        self._epoch[0] = int(epoch)

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch of the next iteration, also in worker processes that a loader has already."""
        self.epoch = epoch

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._epoch.share_memory_()  # pickle makes a copy in memory of its own
