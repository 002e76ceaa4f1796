"""Which precision a device trains in: bfloat16 only where the processor is fast at it."""

import time
from functools import cache

import torch

_SIZE = 512  # of the matrices that are multiplied to compare two dtypes
_REPEATS = 5


def supports_bf16(device: torch.device | str) -> bool:
    """Returns whether the device computes in bfloat16 at least as fast as in float32.

    Processors without the instructions emulate them, up to 100 times slower. A processor that claims to have them is
    timed on one small product, once per process.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and _cpu_is_fast_in_bf16()


@cache
def _cpu_is_fast_in_bf16() -> bool:
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    return _seconds_of_product(torch.bfloat16) <= _seconds_of_product(torch.float32)


def _seconds_of_product(dtype: torch.dtype) -> float:
    matrix = torch.ones(_SIZE, _SIZE, dtype=dtype)
    seconds = []
    for _ in range(_REPEATS + 1):  # the first one includes preparations
        start = time.perf_counter()
        matrix @ matrix
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])
