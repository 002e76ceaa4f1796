"""Counts what an input holds besides the images that are read: files of other kinds, and hidden ones."""

from collections.abc import Mapping

from dyntok.batch.inputs.names import suffix_of
from dyntok.names import is_hidden

HIDDEN, NO_SUFFIX, OTHER = "hidden", "without a suffix", "other"
_MAX_LABELS = 50  # a hostile archive must not fill the records with suffixes


class LeftOut(dict[str, int]):
    """Counts files that were left out, by suffix."""

    def count(self, path: str) -> None:
        self.add(HIDDEN if is_hidden(path) else suffix_of(path) or NO_SUFFIX)

    def add(self, label: str, number: int = 1) -> None:
        label = label if label in self or len(self) < _MAX_LABELS else OTHER
        self[label] = self.get(label, 0) + number

    def merge(self, counts: Mapping[str, int]) -> None:
        for label, number in counts.items():
            self.add(label, number)

    def __str__(self) -> str:
        """Returns the counts as text, such as "12 .txt, 3 .mp4"; the largest come first."""
        ordered = sorted(self.items(), key=lambda pair: (-pair[1], pair[0]))
        return ", ".join(f"{number:,} {label}" for label, number in ordered)
