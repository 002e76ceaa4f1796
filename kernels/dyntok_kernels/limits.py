"""The sizes that the GPU kernels take. The forms for CPUs take any."""

MAX_CODE_DIM = 64
HEAD_DIMS = range(8, 129, 8)
HEAD_DIMS_IN_WORDS = "multiples of 8 up to 128"
