"""The device of tests with the marker `gpu`. On a CPU, Triton's interpreter runs the kernels."""

import os

DEVICE = os.environ.get("DYNTOK_TEST_DEVICE", "cpu")
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read where a kernel is decorated: before anything imports one
else:  # what older versions of PyTorch want for deterministic products
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
