"""`Encoding`: the codes of a batch of images, packed one after another because every image has its own length.

Codes are codebook indices; ids of an LLM's vocabulary are in `vocab.py`. This file knows neither codebook nor weights,
so `decode` is what checks that every code is below K.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from dyntok.device import check_device
from dyntok.errors import CodeError, FingerprintError, ImageError
from dyntok.original import Original
from dyntok.ragged import cu_seqlens_from_lengths, image_of_token, join_rows, pad_rows, split_rows
from dyntok.structure import brief, require_type
from dyntok.validation import (
    as_list,
    check_computed,
    check_packed,
    check_tensor,
    counted,
    failure_pairs,
    grid_pairs,
    integer_rows,
    integers,
    json_rows,
    refuse,
    row_indices,
)

_KEYS = ("codes", "positions", "grids", "fingerprint", "failures", "source_index", "originals")


@dataclass(frozen=True, eq=False, repr=False)
class Encoding:
    """The codes of B images, T tokens in all.

    Tokens are in raster order: positions strictly increase within an image.

    packed_codes      int64 [T]     codebook indices, image after image
    packed_positions  int64 [T]     the patch of each code, 0 to rows * columns - 1; None if only the codes are known
    cu_seqlens        int32 [B+1]   image i owns tokens cu_seqlens[i] to cu_seqlens[i+1] - 1, from 1 to rows * columns
    grids             int64 [B, 2]  rows and columns of patches
    fingerprint       the tokenizer that made the codes; None if it is unknown
    failures          (input index, error) of every input that could not be encoded
    source_index      int64 [B]     the input that each row came from; default: all inputs without a failure, in order
    margins           float32 [B, 2]  of `encode(..., margins=True)`, else None: the shares of codes and of keep
                                      decisions so close that another machine may decide otherwise; not in `to_dict`
    originals         an `Original` per image: size, crop box and fit; None if they are unknown, as for tensors

    All tensors are on one device. They are checked on construction, and a mismatch raises `CodeError`. Use `pack` to
    make an Encoding from lists.

    `encode` does not wait for a GPU. Where the numbers of an image are not finite there, its codes are -1, and
    `ImageError` is raised by `codes`, `positions`, `padded`, `keep_mask`, `cat`, `to("cpu")` and all that uses these.

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
    source_index: Tensor = None  # type: ignore[assignment]  # __post_init__ replaces None
    margins: Tensor | None = None
    originals: tuple[Original, ...] | None = None

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
        source: Tensor = self.source_index
        check_tensor(source, "source_index", torch.int64, 1, self.device)
        if len(source) != len(self):
            raise CodeError(f"{counted(len(self), 'image')} have {len(source)} source indices, expected one for each")
        refuse(source < 0, lambda i: f"source_index of image {i} is {source[i]}, expected 0 or more")
        if self.margins is not None:
            check_tensor(self.margins, "margins", torch.float32, 2, self.device)
            if self.margins.shape != (len(self), 2):
                raise CodeError(f"margins has shape {list(self.margins.shape)}, expected [{len(self)}, 2]")
        if self.originals is not None:
            object.__setattr__(
                self, "originals", tuple(as_list(self.originals, "originals", "an Original for each image"))
            )
            if len(self.originals) != len(self) or not all(isinstance(each, Original) for each in self.originals):
                raise CodeError(f"originals is {brief(self.originals)}, expected an Original for each image, or None")

    @classmethod
    def pack(
        cls,
        codes: Iterable[Tensor | Sequence[int]],
        positions: Iterable[Tensor | Sequence[int]] | None,
        grids: Tensor | Sequence[Sequence[int]] | Sequence[int],
        fingerprint: str | None = None,
        failures: Iterable[tuple[int, ImageError]] = (),
        source_index: Tensor | Sequence[int] | None = None,
        originals: Iterable[Original] | None = None,
    ) -> "Encoding":
        """Build an Encoding from one list or integer tensor per image.

        grids: a (rows, columns) pair per image, or one pair for all.
        """
        rows = integer_rows(codes, "codes")
        lengths = [len(row) for row in rows]
        if sum(lengths) > torch.iinfo(torch.int32).max:
            raise CodeError(
                f"{sum(lengths)} tokens are too many for one Encoding (cu_seqlens is int32); encode in smaller batches"
            )
        packed_positions, device = None, rows[0].device if rows else torch.device("cpu")
        if positions is not None:
            position_rows = integer_rows(positions, "positions")
            if [len(row) for row in position_rows] != lengths:
                found = brief([len(row) for row in position_rows])
                raise CodeError(f"codes have lengths {brief(lengths)} and positions {found}, expected equal ones")
            packed_positions = join_rows(position_rows, device)
        fields: dict[str, Any] = {"originals": originals}
        if source_index is not None:
            fields["source_index"] = integers(source_index, "source_index").to(device)
        return cls(
            join_rows(rows, device),
            packed_positions,
            cu_seqlens_from_lengths(torch.tensor(lengths, dtype=torch.long, device=device)),
            grid_pairs(grids, len(rows)).to(device),
            fingerprint,
            failure_pairs(failures),
            **fields,
        )

    @classmethod
    def cat(cls, encodings: Iterable["Encoding"], *, renumber: bool = True) -> "Encoding":
        """Join batches, one after another.

        renumber: count `source_index` and `failures` as if all inputs had been given at once. Without it they stay
            unchanged, which suits rows selected from one batch.

        Raises `FingerprintError` if the codes come from different tokenizers, and `CodeError` if only some batches have
        positions or if they are on different devices.
        """
        parts = as_list(encodings, "encodings", "several of them, as a list")
        if wrong := [part for part in parts if not isinstance(part, cls)]:
            raise CodeError(f"Encoding.cat got {brief(wrong[0])}, expected encodings")
        if not parts:
            raise CodeError("Encoding.cat got no encodings, expected at least one")
        prints = sorted({str(p.fingerprint) for p in parts})
        if len(prints) > 1:
            raise FingerprintError(
                f"can't join codes of different tokenizers ({', '.join(prints)}); encode all images with one"
            )
        devices = sorted({str(p.device) for p in parts})
        if len(devices) > 1:
            raise CodeError(f"encodings are on {' and '.join(devices)}; move them to one device with .to() first")
        filled = [p for p in parts if len(p)] or parts[:1]
        positions = [p.packed_positions for p in filled if p.packed_positions is not None]
        if 0 < len(positions) < len(filled):
            bare = len(filled) - len(positions)
            raise CodeError(f"{bare} of {len(filled)} encodings have no positions; give all of them positions or none")
        margins = [p.margins for p in parts if p.margins is not None]
        originals = [p.originals for p in filled if p.originals is not None]
        offset, failures, source = 0, [], []
        for part in parts:
            failures += [(index + offset, error) for index, error in part.failures]
            part._check_computed()
            source.append(part.source_index + offset)
            if renumber:
                offset += 1 + max([-1, *part.source_index.tolist(), *(index for index, _ in part.failures)])
        return cls(
            torch.cat([p.packed_codes for p in parts]),
            torch.cat(positions) if positions else None,
            cu_seqlens_from_lengths(torch.cat([p.lengths for p in parts])),
            torch.cat([p.grids for p in parts]),
            parts[0].fingerprint,
            tuple(failures),
            torch.cat(source),
            torch.cat(margins) if len(margins) == len(parts) else None,
            tuple(chain.from_iterable(originals)) if len(originals) == len(filled) else None,
        )

    @property
    def device(self) -> torch.device:
        return self.packed_codes.device

    @property
    def num_tokens(self) -> int:
        """Returns the number of tokens of all images together, T."""
        return len(self.packed_codes)

    @property
    def lengths(self) -> Tensor:
        """Returns the number of tokens of each image, int64 [B]."""
        return self.cu_seqlens.diff().long()

    @property
    def codes(self) -> list[Tensor]:
        """Returns the codes of each image, int64 [T_i]; views, not copies."""
        self._check_computed()
        return split_rows(self.packed_codes, self.cu_seqlens)

    @property
    def positions(self) -> list[Tensor] | None:
        """Returns the positions of each image, int64 [T_i]; views, not copies. None if the positions are unknown."""
        self._check_computed()
        return None if self.packed_positions is None else split_rows(self.packed_positions, self.cu_seqlens)

    def __len__(self) -> int:
        return len(self.grids)

    def __iter__(self) -> Iterator["Encoding"]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: int | slice | Sequence[int] | Sequence[bool] | Tensor) -> "Encoding":
        """Select images by index, slice, list or tensor of indices, or mask of B bools. An int gives a batch of one.

        The result keeps `source_index` but not `failures`, which belong to the whole batch. Raises `IndexError` if an
        image does not exist.
        """
        rows = row_indices(index, len(self))
        chosen = torch.tensor(rows, dtype=torch.long, device=self.device)
        starts, ends = self.cu_seqlens[chosen], self.cu_seqlens[chosen + 1]
        if rows and rows == list(range(rows[0], rows[-1] + 1)):
            tokens: Any = slice(int(starts[0]), int(ends[-1]))
        else:
            pieces = zip(starts.tolist(), ends.tolist(), strict=True)
            tokens = join_rows([torch.arange(start, end, device="cpu") for start, end in pieces], self.device)
        return unchecked(
            packed_codes=self.packed_codes[tokens],
            packed_positions=None if self.packed_positions is None else self.packed_positions[tokens],
            cu_seqlens=cu_seqlens_from_lengths(ends - starts),
            grids=self.grids[chosen],
            fingerprint=self.fingerprint,
            failures=(),
            source_index=self.source_index[chosen],
            margins=None if self.margins is None else self.margins[chosen],
            originals=None if self.originals is None else tuple(self.originals[row] for row in rows),
        )

    def padded(self, fill: int = -1) -> tuple[Tensor, Tensor]:
        """Returns the codes as int64 [B, Tmax], with `fill` after each image's last code, and their mask.

        The mask is bool [B, Tmax] and True where there is a code.
        """
        self._check_computed()
        return pad_rows(self.packed_codes, self.cu_seqlens, fill)

    def padded_positions(self, fill: int = -1) -> tuple[Tensor, Tensor]:
        """Returns the positions in the form of `padded`. Raises `CodeError` if they are unknown."""
        return pad_rows(self._known_positions("padded_positions()"), self.cu_seqlens, fill)

    def keep_mask(self) -> Tensor:
        """Returns which patches were kept, bool [B, N] with N = rows * columns.

        Raises `CodeError` if the images have different grids or the positions are unknown.
        """
        positions = self._known_positions("keep_mask()")
        grids = self.grids.unique(dim=0).tolist()
        if len(grids) > 1:
            raise CodeError(f"keep_mask() needs equal grids, got {brief(grids)}; call it on one image at a time")
        mask = torch.zeros(len(self), grids[0][0] * grids[0][1] if grids else 0, dtype=torch.bool, device=self.device)
        mask[image_of_token(self.cu_seqlens, self.num_tokens), positions] = True
        return mask

    def to(self, device: torch.device | str) -> "Encoding":
        """Returns the batch with all tensors on `device`: itself if they are there already.

        Raises `ConfigError` where there is no such device.
        """
        require_type("device", device, (str, int, torch.device), "a device such as 'cpu'; codes are always int64")
        try:
            moved = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in vars(self).items()}
        except (RuntimeError, AssertionError, ImportError, TypeError):
            check_device(device)  # a device that does not exist
            raise
        if all(moved[name] is value for name, value in vars(self).items()):
            return self
        result = unchecked(**moved)
        if result.device.type == "cpu":
            result._check_computed()
        return result

    def __eq__(self, other: object) -> bool:
        """Compare codes, positions, grids and fingerprint.

        Failures, source_index, margins, originals and device do not count.
        """
        if not isinstance(other, Encoding):
            return NotImplemented
        return (
            self.fingerprint == other.fingerprint
            and _equal(self.cu_seqlens, other.cu_seqlens)
            and _equal(self.grids, other.grids)
            and _equal(self.packed_codes, other.packed_codes)
            and _equal(self.packed_positions, other.packed_positions)
        )

    def __repr__(self) -> str:
        facts = [counted(len(self), "image"), counted(self.num_tokens, "token")]
        if len(self):
            low, high = int(self.lengths.min()), int(self.lengths.max())
            facts[1] += f" ({low} each)" if low == high else f" ({low} to {high} each)"
            grids = self.grids.unique(dim=0).tolist()
            facts.append(f"grid {grids[0][0]}x{grids[0][1]}" if len(grids) == 1 else f"{len(grids)} different grids")
        facts.append("no positions" if self.packed_positions is None else "with positions")
        if self.fingerprint is not None:
            facts.append(f"fingerprint {self.fingerprint}")
        if self.failures:
            facts.append(counted(len(self.failures), "failure"))
        if self.device.type != "cpu":
            facts.append(f"device {self.device}")
        return f"Encoding({', '.join(facts)})"

    def to_dict(self) -> dict[str, Any]:
        """Returns lists, ints and strings only, ready for JSON. `from_dict` is the inverse.

        An error becomes its message.
        """
        positions = self.positions
        return {
            "codes": [row.tolist() for row in self.codes],
            "positions": None if positions is None else [row.tolist() for row in positions],
            "grids": self.grids.tolist(),
            "fingerprint": self.fingerprint,
            "failures": [[index, str(error)] for index, error in self.failures],
            "source_index": self.source_index.tolist(),
            "originals": None if self.originals is None else [original.to_dict() for original in self.originals],
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Encoding":
        """Build an Encoding from untrusted JSON: everything is checked, and a mismatch raises `CodeError`.

        The keys `codes` and `grids` are required; the other keys of `to_dict` are optional.
        """
        if not isinstance(values, dict) or not {"codes", "grids"} <= set(values) <= set(_KEYS):
            got = type(values).__name__
            if isinstance(values, dict):
                unknown = sorted(map(str, set(values) - set(_KEYS)))
                got = brief(unknown or sorted(values))
            raise CodeError(f"expected a mapping with codes and grids, and at most {', '.join(_KEYS)}; got {got}")
        failures = values.get("failures", [])
        for pair in failures if isinstance(failures, list) else [failures]:
            if not (isinstance(pair, list) and len(pair) == 2 and isinstance(pair[1], str)):
                raise CodeError(f"failures holds {brief(pair)}, expected [input index, message]")
        positions, source = values.get("positions"), values.get("source_index")
        originals = values.get("originals")
        if not isinstance(originals, list | None):
            raise CodeError(f"originals is {brief(originals)}, expected a list of mappings, or null")
        return cls.pack(
            json_rows(values["codes"], "codes"),
            None if positions is None else json_rows(positions, "positions"),
            json_rows(values["grids"], "grids"),
            values.get("fingerprint"),
            tuple((index, ImageError(message)) for index, message in failures),
            None if source is None else json_rows([source], "source_index")[0],
            None if originals is None else [Original.from_dict(original) for original in originals],
        )

    def _check_computed(self) -> None:
        check_computed(self.packed_codes, self.cu_seqlens, self.source_index)

    def _known_positions(self, caller: str) -> Tensor:
        self._check_computed()
        if self.packed_positions is None:
            raise CodeError(f"{caller} needs positions, but these codes have none")
        return self.packed_positions


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one.cpu(), other.cpu())


def unchecked(**fields: Any) -> Encoding:
    """Returns an Encoding of fields that are known to fit, all of them: every check would wait for the device."""
    enc = object.__new__(Encoding)
    for name, value in fields.items():
        object.__setattr__(enc, name, value)
    return enc
