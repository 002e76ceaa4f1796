"""Ragged inputs of kernels."""

import torch


def bounds(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def similar_case(images, patches, width, dtype):
    keep = torch.rand(images, patches) < 0.35
    keep[:, 0] = True
    if images > 1:
        keep[1] = True
    return torch.randn(images, patches, width).to(dtype), keep, 0.5 + torch.rand(images, patches)
