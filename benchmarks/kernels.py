"""Check every operation of `dyntok_kernels`, then time it against its naive reference and plain PyTorch, on any device.

    python benchmarks/kernels.py [--device cuda] [--only NAME...] [--output benchmarks/results/kernels.jsonl]

`merger` is the whole merger at LaVIT's size, packed, against eager dense masked attention over all 256 rows (each block
with its own keys and values, the formula of LaVIT's released code) and against masked scaled_dot_product_attention.
`rate` compares matrix products with this machine's own peak. Peak memory is what an operation allocates (on a CPU: the
growth of the process, as Linux counts it).
"""

import argparse
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from timing import append, environment, seconds
from torch import Tensor, nn

import dyntok
import dyntok_kernels as ops
from dyntok.model.merger import LAVIT_EPS, build_merger
from dyntok_kernels import reference

N, KEPT, D, HEADS, K, C = 256, 85, 1408, 16, 16384, 32


def bounds(count: int, images: int, device: str) -> Tensor:
    return torch.arange(images + 1, dtype=torch.int32, device=device) * count


def third(images: int, device: str) -> Tensor:
    return torch.rand(images, N, device=device).argsort(1).argsort(1) < KEPT


@dataclass(frozen=True)
class Case:
    """An operation on tensors of its own, the naive reference of its first `rows` rows, and the obvious PyTorch way."""

    ours: Callable[[], Tensor]
    reference: Callable[[], Tensor]
    plain: Callable[[], Tensor]
    tolerance: float  # relative; of integers the share that may differ
    rows: int | None = None


def attention(device: str, images: int, causal: bool) -> Case:
    keys = KEPT if causal else N - KEPT
    q, k, v = (torch.randn(images * n, HEADS, D // HEADS, device=device) for n in (KEPT, keys, keys))
    cu = bounds(KEPT, images, device), bounds(keys, images, device)
    weight = torch.ones(images, KEPT, keys, device=device)
    weight = weight.tril() if causal else weight
    dense = [x.unflatten(0, (images, -1)).transpose(1, 2) for x in (q, k, v)]
    return Case(
        lambda: ops.varlen_attention(q, k, v, *cu, causal=causal),
        lambda: reference.masked_attention(*dense, weight).transpose(1, 2).flatten(0, 1),
        lambda: F.scaled_dot_product_attention(*dense, attn_mask=weight[:, None] > 0).transpose(1, 2).flatten(0, 1),
        1e-4,
    )


def nearest_code(device: str, images: int) -> Case:
    z, codebook = (
        F.normalize(torch.randn(8192, C, device=device), dim=-1),
        F.normalize(torch.randn(K, C, device=device), dim=-1),
    )

    def squared_distances() -> Tensor:
        return (z.square().sum(1, keepdim=True) + codebook.square().sum(1) - 2 * z @ codebook.T).argmin(1)

    # the reference takes T x K x C numbers
    return Case(
        lambda: ops.nearest_code(z, codebook),
        lambda: reference.nearest_code(z[:64], codebook),
        squared_distances,
        1e-3,
        64,
    )


def compact(device: str, images: int) -> Case:
    keep = third(images, device)
    plain = lambda: keep.flatten().nonzero()[:, 0]  # noqa: E731
    return Case(lambda: ops.compact(keep)[0][: images * KEPT].long(), plain, plain, 0)


def gather_rows(device: str, images: int) -> Case:
    x, embed, keep = torch.randn(images, N, D, device=device), torch.randn(N, D, device=device), third(images, device)
    index = ops.compact(keep)[0][: images * KEPT]
    flat = x.flatten(0, 1)
    return Case(
        lambda: ops.gather_rows(flat, index, embed),
        lambda: reference.gather_rows(flat, index, embed),
        lambda: (x + embed)[keep],
        1e-6,
    )


def scatter_rows(device: str, images: int) -> Case:
    rows, base, keep = (
        torch.randn(images * KEPT, D, device=device),
        torch.randn(N, D, device=device),
        third(images, device),
    )
    index, total = ops.compact(keep)[0][: images * KEPT], images * N

    def plain() -> Tensor:
        out = torch.zeros(images, N, D, device=device)
        out[keep] = rows
        return (out + base).flatten(0, 1)

    ours = lambda: ops.scatter_rows(rows, index, base, total=total)  # noqa: E731
    return Case(ours, lambda: reference.scatter_rows(rows, index, base, total), plain, 1e-6)


def codebook_stats(device: str, images: int) -> Case:
    z, codes = torch.randn(images * KEPT, C, device=device), torch.randint(0, K, (images * KEPT,), device=device)
    plain = lambda: torch.zeros(K, C, device=device).index_add_(0, codes, z)  # noqa: E731
    return Case(
        lambda: ops.codebook_stats(z, codes, K)[1], lambda: reference.codebook_stats(z, codes, K)[1], plain, 1e-5
    )


def merge_similar(device: str, images: int) -> Case:
    x, keep, weights = (
        torch.randn(images, N, D, device=device),
        third(images, device),
        torch.ones(images, N, device=device),
    )

    def plain() -> Tensor:
        """Dense, image by image."""
        merged = []
        for patches, kept in zip(F.normalize(x, dim=-1), keep, strict=True):
            owner = (patches @ patches[kept].T).argmax(1)
            owner[kept] = torch.arange(KEPT, device=device)
            merged.append(F.one_hot(owner, KEPT).to(x.dtype).T)
        return torch.cat([m @ p / m.sum(1, keepdim=True) for m, p in zip(merged, x, strict=True)])

    ours = lambda: ops.merge_similar(x, keep, weights, total=images * KEPT)[0]  # noqa: E731
    return Case(ours, lambda: reference.merge_similar(x, keep, weights)[0], plain, 1e-4)


CASES = {
    "attention, among kept": lambda device, images: attention(device, images, True),
    "attention, to dropped": lambda device, images: attention(device, images, False),
    "nearest_code": nearest_code, "compact": compact, "gather_rows": gather_rows, "scatter_rows": scatter_rows,
    "codebook_stats": codebook_stats, "merge_similar": merge_similar,
}  # fmt: skip


class DenseMerger(nn.Module):
    """Over all rows, by the weights of a packed merger; every block makes its own keys and values."""

    def __init__(self, merger: nn.Module, keep: Tensor, attend: Callable) -> None:
        super().__init__()
        self.merger, self.attend, self.keep = merger, attend, keep
        depth, heads = len(merger.blocks), merger.num_heads
        self.kv = [
            (w.contiguous(), b) for w, b in zip(*(p.chunk(depth) for p in merger.context_kv.parameters()), strict=True)
        ]
        patches = keep.shape[1]
        causal = torch.ones(patches, patches, device=keep.device).tril()
        own = torch.eye(patches, device=keep.device) * (~keep).float()[:, None]
        self.among, self.across = keep.float()[:, None] * causal + own, (~keep).float()[:, None].expand(-1, patches, -1)
        self.split = lambda x: x.unflatten(-1, (heads, -1)).transpose(1, 2)

    def forward(self, features: Tensor) -> Tensor:
        x, context = features, self.merger.context_norm(features)
        for block, (weight, bias) in zip(self.merger.blocks, self.kv, strict=True):
            q, k, v = (self.split(part) for part in block.self_qkv(block.self_norm(x)).chunk(3, -1))
            x = x + block.self_proj(self.attend(q, k, v, self.among).transpose(1, 2).flatten(-2))
            k, v = (self.split(part) for part in F.linear(context, weight, bias).chunk(2, -1))
            q = self.split(block.cross_query(block.cross_norm(x)))
            x = x + block.cross_proj(self.attend(q, k, v, self.across).transpose(1, 2).flatten(-2))
            x = x + block.mlp(block.mlp_norm(x))
        return self.merger.norm(x)[self.keep]


def merger(device: str, images: int) -> dict:
    torch.manual_seed(0)
    config = dyntok.TokenizerConfig.preset("lavit")
    network = build_merger(D, config.merger).to(device).eval()
    features, keep = torch.randn(images, N, D, device=device), third(images, device)
    formula = DenseMerger(network, keep, lambda q, k, v, w: reference.masked_attention(q, k, v, w, LAVIT_EPS))
    sdpa = DenseMerger(
        network, keep, lambda q, k, v, w: F.scaled_dot_product_attention(q, k, v, attn_mask=w[:, None] > 0)
    )
    ways = {
        "packed": lambda: network(features, keep),
        "dense, formula": lambda: formula(features),
        "dense, sdpa": lambda: sdpa(features),
    }
    results = {name: way() for name, way in ways.items()}
    for name, result in results.items():
        off = float((result - results["packed"]).norm() / result.norm())
        if off > 1e-3:
            raise SystemExit(f"merger: packed and {name} differ by {off:.2g}: no timing of a wrong result")
    times = {name: seconds(way, 3)[0] for name, way in ways.items()}
    return {
        "seconds": times,
        "ratio": {name: t / times["packed"] for name, t in times.items()},
        "flops": merger_flops(images),
    }


def merger_flops(images: int) -> float:
    """Of the packed merger's matrix products, attention left out."""
    hidden = int(4.3637 * D)
    return 12 * 2 * images * (KEPT * (6 * D * D + 2 * D * hidden) + (N - KEPT) * 2 * D * D)


def rate(device: str, images: int) -> dict:
    """Returns flop/s of one large product, and of products of the mergers of `lavit` and `tiny` for one image."""
    found = {}
    products = {
        "4096 cubed": (4096, 4096, 4096),
        "lavit, 85 rows": (KEPT, D, D),
        "lavit, 340 rows": (4 * KEPT, D, D),
        "tiny, 85 rows": (85, 192, 192),
        "tiny, 256 rows": (256, 576, 192),
    }
    for name, (m, n, k) in products.items():
        a, b = torch.randn(m, k, device=device), torch.randn(n, k, device=device)
        repeats = max(1, int(4e9 / (2 * m * n * k)))
        found[name] = (
            2 * m * n * k * repeats / seconds(lambda a=a, b=b, r=repeats: [a @ b.T for _ in range(r)], 3)[0] / 1e9
        )
    return {"gflop_per_s": {name: round(value, 1) for name, value in found.items()}}


def check(name: str, ours: Tensor, expected: Tensor, tolerance: float) -> None:
    wrong = (
        (ours != expected).float().mean() if ours.dtype == torch.long else (ours - expected).norm() / expected.norm()
    )
    off = float(wrong)
    if off > tolerance:
        raise SystemExit(f"{name}: off by {off:.2g}, at most {tolerance} is right: no timing of a wrong result")


def wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def peak(device: str, work: Callable) -> float:
    """MB beyond what was there."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak so far
    before = _status("VmRSS")
    work()
    return _status("VmHWM") - before


def _status(name: str) -> float:
    return float(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--images", type=int, default=0, help="per batch (default: 64 on a GPU, 4 on a CPU)")
    parser.add_argument("--only", nargs="+", choices=[*CASES, "merger", "rate"], default=[*CASES, "merger", "rate"])
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    images = options.images or (4 if options.device == "cpu" else 64)
    torch.manual_seed(0)
    for name in options.only:
        row = {"what": name, "device": options.device, "images": images}
        if name in ("merger", "rate"):
            row |= {"merger": merger, "rate": rate}[name](options.device, images)
        else:
            case = CASES[name](options.device, images)
            result = case.ours()
            check(f"{name} against its reference", result[: case.rows], case.reference(), case.tolerance)
            check(f"{name} against PyTorch", result, case.plain(), case.tolerance)
            for key, work, repeats in (
                ("ours", case.ours, 7),
                ("pytorch", case.plain, 7),
                ("reference", case.reference, 1),
            ):
                median, spread = seconds(lambda work=work: (work(), wait(options.device)), repeats)
                row |= {
                    f"{key}_ms": 1e3 * median,
                    f"{key}_spread_ms": 1e3 * spread,
                    f"{key}_peak_mb": peak(options.device, work),
                }
            row |= {"ratio": row["pytorch_ms"] / row["ours_ms"], "reference_rows": case.rows or "all"}
        print(json.dumps(row), flush=True)
        append(options.output, {**environment(), **row})


if __name__ == "__main__":
    main()
