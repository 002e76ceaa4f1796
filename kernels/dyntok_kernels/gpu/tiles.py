"""What all kernels share: how blocks of rows are assigned to ragged images, and how a launch is described."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

_NAMES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16",
    torch.int64: "i64", torch.int32: "i32", torch.bool: "i1",
}  # fmt: skip
_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Blocks:
    """Rows of queries (or outputs) and of keys (or inputs) per program, and compilation options."""

    m: int
    n: int
    warps: int = 4
    stages: int = 1


@dataclass(frozen=True)
class Variant:
    """One compilation of a kernel as a launcher would request it: argument types in order, and constants."""

    what: str
    dtype: torch.dtype
    kernel: Callable
    types: dict[str, torch.dtype | str]  # a dtype is a pointer to it; "i32" and "fp32" are numbers
    constants: dict[str, Any]
    blocks: Blocks
    multiplies: bool = True  # matrices

    @property
    def name(self) -> str:
        return f"{self.what} {_NAMES[self.dtype]}"

    @property
    def matrix(self) -> bool:
        """Whether the code must contain the target's matrix instructions."""
        return self.multiplies and self.dtype in (torch.float16, torch.bfloat16)

    @property
    def signature(self) -> dict[str, str]:
        pointers = {n: t if isinstance(t, str) else f"*{_NAMES[t]}" for n, t in self.types.items()}
        return pointers | dict.fromkeys(self.constants, "constexpr")


def padded(width: int, least: int = 16) -> int:
    """Returns the smallest power of two of at least `width` and of at least what tl.dot accepts."""
    return max(least, triton.next_power_of_2(width))


def slots(rows: int, images: int, block: int) -> int:
    """Returns enough programs for blocks of `block` rows of a ragged batch with any lengths; see `find_block`."""
    return rows // block + images


def kernel(*numbers: str) -> Callable:
    """Returns `triton.jit` that compiles once for all values of these arguments.

    By default Triton turns a number that is 1 into a constant, and the compile gate would check another program than
    the one that runs.
    """
    return triton.jit(do_not_specialize=numbers)


@triton.jit
def dot(a, b):
    """Returns the matrix product with float32 sums; float32 factors are not rounded."""
    if _INTERPRETED:  # numpy has no bfloat16, and the interpreter would multiply its bits
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def alike_dot(a, b):
    """Returns `dot` with equal results for equal columns of b.

    On a GPU every entry is summed in the same way, but NumPy's library rounds columns differently by their place.
    """
    if _INTERPRETED:
        product = tl.dot(a.to(tl.float64), b.to(tl.float64), out_dtype=tl.float64).to(tl.float32)
    else:
        product = tl.dot(a, b, input_precision="ieee")
    return product


@triton.jit
def cast(x, dtype: tl.constexpr):
    """Returns float32 values in another floating type, rounded to the nearest."""
    if _INTERPRETED and dtype == tl.bfloat16:  # the interpreter cuts the low bits off; GPUs round, ties to even
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def find_block(cu_seqlens, images, slot, BLOCK: tl.constexpr):
    """Returns the image of a slot, the first row of its block, and the image's first row and end.

    Image i owns the slots from cu[i] // BLOCK + i on, never fewer than its blocks. If it owns more, the first row is
    past the end.
    """
    low = 0
    high = images
    while high - low > 1:  # the last image whose first slot is not past this one
        middle = (low + high) // 2
        before = tl.load(cu_seqlens + middle) // BLOCK + middle <= slot
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    start = tl.load(cu_seqlens + low)
    first = start + (slot - start // BLOCK - low) * BLOCK
    return low, first, start, tl.load(cu_seqlens + low + 1)


def check(condition: bool, told: str) -> None:
    if not condition:
        raise ValueError(told)
