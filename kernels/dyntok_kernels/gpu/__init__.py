"""Triton kernels and their launchers, one file per operation. Imported only where a GPU is used.

A launcher takes tensors of one device, allocates its outputs there and reads nothing back to the host. Its block sizes
come from a small pure function, so `kernels/gate.py` compiles exactly what is launched.
"""
