"""Triton kernels and their launchers: one file per operation. Imported where a GPU is used, never before.

Every launcher takes tensors of one device, makes its outputs there, reads nothing back to the host, and has block sizes from a small
pure function, so that `kernels/gate.py` compiles what is launched.
"""
