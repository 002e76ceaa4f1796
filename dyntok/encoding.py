"""`Encoding`: the codes of a batch of images, packed one after another because every image has its own length.

Codes here are codebook indices; ids of an LLM's vocabulary are in `vocab.py`. Nothing here knows the codebook or the weights:
whether a code is below K is checked where it is decoded.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dyntok.errors import CodeError, FingerprintError, ImageError
from dyntok.ragged import (
    brief,
    check_packed,
    check_tensor,
    counted,
    failure_pairs,
    grid_pairs,
    image_of_token,
    integer_rows,
    integers,
    json_rows,
    refuse,
    row_indices,
)

_KEYS = ("codes", "positions", "grids", "fingerprint", "failures", "source_index")


@dataclass(frozen=True, eq=False, repr=False)
class Encoding:
    """B images, T tokens in all. Raster order is a promise: positions strictly increase inside an image.

    packed_codes      int64 [T]     codebook indices, image after image
    packed_positions  int64 [T]     the patch each code came from, 0 to rows * columns - 1; None where an LLM wrote the codes alone
    cu_seqlens        int32 [B+1]   image i owns tokens cu_seqlens[i] to cu_seqlens[i+1]; at least one, at most rows * columns
    grids             int64 [B, 2]  rows and columns of patches
    fingerprint       which tokenizer wrote the codes, None where that is unknown
    failures          (input index, error) of every input that could not be encoded
    source_index      int64 [B]     which input each row came from; by default, in order, the inputs that are not among the failures

    All tensors live on one device and are checked here; anything that does not fit raises `CodeError`. `pack` makes one from lists.

    >>> enc = Encoding.pack([[7, 1], [4]], [[0, 3], [2]], (2, 2))
    >>> enc
    Encoding(2 images, 3 tokens (1 to 2 each), grid 2x2, with positions)
    >>> enc[0].packed_codes
    tensor([7, 1])
    """

    packed_codes: Tensor
    packed_positions: Tensor | None
    cu_seqlens: Tensor
    grids: Tensor
    fingerprint: str | None = None
    failures: tuple[tuple[int, ImageError], ...] = ()
    source_index: Tensor | None = None

    def __post_init__(self) -> None:
        check_tensor(self.packed_codes, "packed_codes", torch.int64, 1)
        if self.packed_positions is not None:
            check_tensor(self.packed_positions, "packed_positions", torch.int64, 1, self.device)
        check_tensor(self.cu_seqlens, "cu_seqlens", torch.int32, 1, self.device)
        check_tensor(self.grids, "grids", torch.int64, 2, self.device)
        check_packed(self.packed_codes, self.packed_positions, self.cu_seqlens, self.grids)
        if self.fingerprint is not None and not isinstance(self.fingerprint, str):
            raise CodeError(f"fingerprint is {type(self.fingerprint).__name__}, expected a string or None")
        object.__setattr__(self, "failures", failure_pairs(self.failures))
        if self.source_index is None:
            failed = {index for index, _ in self.failures}
            rest = [i for i in range(len(self) + len(failed)) if i not in failed]
            object.__setattr__(self, "source_index", torch.tensor(rest, dtype=torch.long, device=self.device))
        source = self.source_index
        check_tensor(source, "source_index", torch.int64, 1, self.device)
        if len(source) != len(self):
            raise CodeError(f"{counted(len(self), 'image')} have {len(source)} source indices, expected one for each")
        refuse(source < 0, lambda i: f"source_index of image {i} is {source[i]}, expected 0 or more")

    @classmethod
    def pack(
        cls,
        codes: Iterable[Tensor | Sequence[int]],
        positions: Iterable[Tensor | Sequence[int]] | None,
        grids: Tensor | Sequence[Sequence[int]] | Sequence[int],
        fingerprint: str | None = None,
        failures: Iterable[tuple[int, ImageError]] = (),
        source_index: Tensor | Sequence[int] | None = None,
    ) -> "Encoding":
        """From one list or integer tensor per image. `grids` holds a (rows, columns) pair per image, or one pair for all."""
        rows = integer_rows(codes, "codes")
        lengths = [len(r) for r in rows]
        if sum(lengths) > torch.iinfo(torch.int32).max:
            raise CodeError(
                f"{sum(lengths)} tokens are too many for one Encoding (cu_seqlens is int32); encode in smaller batches"
            )
        packed_positions, device = None, rows[0].device if rows else None
        if positions is not None:
            places = integer_rows(positions, "positions")
            if [len(p) for p in places] != lengths:
                raise CodeError(
                    f"codes have lengths {brief(lengths)} and positions {brief([len(p) for p in places])}, expected equal ones"
                )
            packed_positions = _join(places, device)
        return cls(
            _join(rows, device),
            packed_positions,
            _bounds(torch.tensor(lengths, dtype=torch.long, device=device)),
            grid_pairs(grids, len(rows)).to(device),
            fingerprint,
            failure_pairs(failures),
            None if source_index is None else integers(source_index, "source_index").to(device),
        )

    @classmethod
    def cat(cls, encodings: Iterable["Encoding"], *, renumber: bool = True) -> "Encoding":
        """One batch after another.

        With `renumber`, `source_index` and `failures` count as though all inputs had been given at once, one batch's inputs
        after the other's; without it they stay as they are, which suits rows picked from one batch.
        Raises `FingerprintError` when the codes come from different tokenizers, `CodeError` when only some have positions.
        """
        parts = list(encodings)
        if not parts:
            raise CodeError("Encoding.cat got no encodings, expected at least one")
        prints = sorted({str(p.fingerprint) for p in parts})
        if len(prints) > 1:
            raise FingerprintError(
                f"can't join codes of different tokenizers ({', '.join(prints)}); encode all images with one"
            )
        devices = sorted({str(p.device) for p in parts})
        if len(devices) > 1:
            raise CodeError(f"encodings lie on {' and '.join(devices)}; move them to one device with .to() first")
        filled = [p for p in parts if len(p)] or parts[:1]
        bare = sum(p.packed_positions is None for p in filled)
        if 0 < bare < len(filled):
            raise CodeError(f"{bare} of {len(filled)} encodings have no positions; give all of them positions or none")
        offset, failures, source = 0, [], []
        for part in parts:
            failures += [(index + offset, error) for index, error in part.failures]
            source.append(part.source_index + offset)
            if renumber:
                offset += 1 + max([-1, *part.source_index.tolist(), *(index for index, _ in part.failures)])
        return cls(
            torch.cat([p.packed_codes for p in parts]),
            None if bare else torch.cat([p.packed_positions for p in filled]),
            _bounds(torch.cat([p.lengths for p in parts])),
            torch.cat([p.grids for p in parts]),
            parts[0].fingerprint,
            tuple(failures),
            torch.cat(source),
        )

    @property
    def device(self) -> torch.device:
        return self.packed_codes.device

    @property
    def num_tokens(self) -> int:
        """T, over all images."""
        return len(self.packed_codes)

    @property
    def lengths(self) -> Tensor:
        """Tokens per image, int64 [B]."""
        return self.cu_seqlens.diff().long()

    @property
    def codes(self) -> list[Tensor]:
        """One int64 [T_i] per image; views, not copies."""
        return self._split(self.packed_codes)

    @property
    def positions(self) -> list[Tensor] | None:
        """One int64 [T_i] per image; views, not copies. None where the positions are unknown."""
        return None if self.packed_positions is None else self._split(self.packed_positions)

    def __len__(self) -> int:
        return len(self.grids)

    def __iter__(self) -> Iterator["Encoding"]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: int | slice | Sequence[int] | Sequence[bool] | Tensor) -> "Encoding":
        """Rows by index (an int gives an Encoding of one image), slice, list or tensor of indices, or mask of B bools.

        `failures` belong to the whole batch and are not carried over; `source_index` is. IndexError where a row does not exist.
        """
        rows = row_indices(index, len(self))
        chosen = torch.tensor(rows, dtype=torch.long, device=self.device)
        starts, ends = self.cu_seqlens[chosen], self.cu_seqlens[chosen + 1]
        if rows and rows == list(range(rows[0], rows[-1] + 1)):
            tokens: Any = slice(int(starts[0]), int(ends[-1]))
        else:
            pieces = zip(starts.tolist(), ends.tolist(), strict=True)
            tokens = _join([torch.arange(start, end) for start, end in pieces], self.device)
        return _unchecked(
            packed_codes=self.packed_codes[tokens],
            packed_positions=None if self.packed_positions is None else self.packed_positions[tokens],
            cu_seqlens=_bounds(ends - starts),
            grids=self.grids[chosen],
            fingerprint=self.fingerprint,
            failures=(),
            source_index=self.source_index[chosen],
        )

    def padded(self, fill: int = -1) -> tuple[Tensor, Tensor]:
        """Codes, int64 [B, Tmax], with `fill` after the end of each image; and a mask, bool [B, Tmax], True where there is a code."""
        return self._pad(self.packed_codes, fill)

    def padded_positions(self, fill: int = -1) -> tuple[Tensor, Tensor]:
        """Positions and mask, in the form of `padded`. `CodeError` where the positions are unknown."""
        return self._pad(self._known_positions("padded_positions()"), fill)

    def keep_mask(self) -> Tensor:
        """Which patches were kept, bool [B, N] with N = rows * columns. `CodeError` when grids differ or positions are unknown."""
        positions = self._known_positions("keep_mask()")
        grids = self.grids.unique(dim=0).tolist()
        if len(grids) > 1:
            raise CodeError(f"keep_mask() needs equal grids, these are {brief(grids)}; ask for one image at a time")
        mask = torch.zeros(len(self), grids[0][0] * grids[0][1] if grids else 0, dtype=torch.bool, device=self.device)
        mask[image_of_token(self.cu_seqlens, self.num_tokens), positions] = True
        return mask

    def to(self, device: torch.device | str) -> "Encoding":
        """All tensors on `device`; self where they are there already."""
        moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in vars(self).items()}
        return self if all(moved[name] is value for name, value in vars(self).items()) else _unchecked(**moved)

    def __eq__(self, other: object) -> bool:
        """Codes, positions, grids and fingerprint agree exactly; failures, source_index and device do not count."""
        if not isinstance(other, Encoding):
            return NotImplemented
        if self.fingerprint != other.fingerprint or (self.packed_positions is None) != (other.packed_positions is None):
            return False
        names = ["cu_seqlens", "grids", "packed_codes"] + ["packed_positions"] * (self.packed_positions is not None)
        return all(torch.equal(getattr(self, name).cpu(), getattr(other, name).cpu()) for name in names)

    def __repr__(self) -> str:
        facts = [counted(len(self), "image"), counted(self.num_tokens, "token")]
        if len(self):
            low, high = int(self.lengths.min()), int(self.lengths.max())
            facts[1] += f" ({low} each)" if low == high else f" ({low} to {high} each)"
            grids = self.grids.unique(dim=0).tolist()
            facts.append(f"grid {grids[0][0]}x{grids[0][1]}" if len(grids) == 1 else f"{len(grids)} different grids")
        facts.append("no positions" if self.packed_positions is None else "with positions")
        facts += [f"fingerprint {self.fingerprint}"] * (self.fingerprint is not None)
        facts += [counted(len(self.failures), "failure")] * bool(self.failures)
        facts += [f"device {self.device}"] * (self.device.type != "cpu")
        return f"Encoding({', '.join(facts)})"

    def to_dict(self) -> dict[str, Any]:
        """Lists, ints and strings only, ready for JSON; `from_dict` is its inverse. An error becomes its message."""
        return {
            "codes": [c.tolist() for c in self.codes],
            "positions": None if self.positions is None else [p.tolist() for p in self.positions],
            "grids": self.grids.tolist(),
            "fingerprint": self.fingerprint,
            "failures": [[index, str(error)] for index, error in self.failures],
            "source_index": self.source_index.tolist(),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Encoding":
        """From a stranger's JSON: everything is checked, and whatever does not fit raises `CodeError`.

        `codes` and `grids` must be there, the other keys of `to_dict` may be missing.
        """
        if not isinstance(values, dict) or not {"codes", "grids"} <= set(values) <= set(_KEYS):
            got = brief(sorted(map(str, values))) if isinstance(values, dict) else type(values).__name__
            raise CodeError(f"expected a mapping with codes and grids, and at most {', '.join(_KEYS)}; got {got}")
        failures = values.get("failures", [])
        for pair in failures if isinstance(failures, list) else [failures]:
            if not (isinstance(pair, list) and len(pair) == 2 and isinstance(pair[1], str)):
                raise CodeError(f"failures holds {brief(pair)}, expected [input index, message]")
        positions, source = values.get("positions"), values.get("source_index")
        return cls.pack(
            json_rows(values["codes"], "codes"),
            None if positions is None else json_rows(positions, "positions"),
            json_rows(values["grids"], "grids"),
            values.get("fingerprint"),
            tuple((index, ImageError(message)) for index, message in failures),
            None if source is None else json_rows([source], "source_index")[0],
        )

    def _known_positions(self, wanted_by: str) -> Tensor:
        if self.packed_positions is None:
            raise CodeError(f"{wanted_by} needs positions, and these codes came without them")
        return self.packed_positions

    def _split(self, packed: Tensor) -> list[Tensor]:
        return list(packed.split(self.lengths.tolist())) if len(self) else []

    def _pad(self, packed: Tensor, fill: int) -> tuple[Tensor, Tensor]:
        longest = int(self.lengths.max()) if len(self) else 0
        mask = torch.arange(longest, device=self.device) < self.lengths[:, None]  # [B, Tmax]
        padded = torch.full(mask.shape, fill, dtype=torch.long, device=self.device)
        padded[mask] = packed
        return padded, mask


def _unchecked(**fields: Any) -> Encoding:
    # Parts of a checked Encoding are valid, and checking again would wait for the device each time.
    enc = object.__new__(Encoding)
    for name, value in fields.items():
        object.__setattr__(enc, name, value)
    return enc


def _join(pieces: list[Tensor], device: torch.device | None) -> Tensor:
    return torch.cat([p.to(device) for p in pieces]) if pieces else torch.empty(0, dtype=torch.long, device=device)


def _bounds(lengths: Tensor) -> Tensor:
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
