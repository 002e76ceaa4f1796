"""Check every operation of `dyntok_kernels`, then time it against its naive reference and plain PyTorch, on any device.

    python benchmarks/kernels.py [--device cuda] [--dtype bf16] [--only NAME...]
                                 [--output benchmarks/results/kernels.jsonl]

Every picture keeps another number of patches, 85 of 256 on average; with `--equal` all keep 85. `merger` is the whole
merger at LaVIT's size, packed, against eager dense masked attention over all 256 rows (each block with its own keys and
values, the formula of LaVIT's released code) and against masked scaled_dot_product_attention. `rate` compares matrix
products with this machine's own peak. Peak memory is what an operation allocates (on a CPU: the growth of the process,
as Linux counts it).
"""

import argparse
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from timing import append, device_name, environment, seconds
from torch import Tensor, nn

import dyntok
import dyntok_kernels as ops
from dyntok.model.merger import LAVIT_EPS, build_merger
from dyntok.precision import DTYPES
from dyntok_kernels import reference

N, KEPT, D, HEADS, K, C = 256, 85, 1408, 16, 16384, 32


@dataclass(frozen=True)
class Setting:
    """Where and on what an operation runs. equal: every picture keeps the same number of patches."""

    device: str
    images: int
    dtype: torch.dtype = torch.float32
    equal: bool = False

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=self.dtype)

    def keep(self) -> Tensor:
        """A third of all patches; of every picture where they are equal, else from an eighth to a half of it."""
        rank = torch.rand(self.images, N, device=self.device).argsort(1).argsort(1)
        if self.equal:
            return rank < KEPT
        shares = torch.linspace(-1, 1, self.images, device=self.device)[:, None]
        return rank < (KEPT * (1 + 0.5 * shares)).long()


@dataclass(frozen=True)
class Case:
    """An operation on tensors of its own, the naive reference of its first `rows` rows, and the obvious PyTorch way."""

    ours: Callable[[], Tensor]
    reference: Callable[[], Tensor]
    plain: Callable[[], Tensor]
    tolerance: float  # relative, in float32; of integers the share that may differ
    rows: int | None = None


def attention(setting: Setting, causal: bool) -> Case:
    """PyTorch's way and the reference work on rows padded to the longest picture."""
    keep = setting.keep()
    of_queries, of_keys = keep.sum(1), (keep if causal else ~keep).sum(1)
    counts = of_queries, of_keys, of_keys
    masks = [torch.arange(int(n.max()), device=setting.device) < n[:, None] for n in counts]  # [B, longest]
    packed = [setting.randn(int(n.sum()), HEADS, D // HEADS) for n in counts]
    dense = []
    for rows, mask in zip(packed, masks, strict=True):
        padded = rows.new_zeros(*mask.shape, *rows.shape[1:])
        padded[mask] = rows
        dense.append(padded.transpose(1, 2))
    cu = [F.pad(n.cumsum(0), (1, 0)).to(torch.int32) for n in counts[:2]]
    weight = masks[1][:, None].float().expand(-1, masks[0].shape[1], -1)
    weight = weight.tril() if causal else weight
    allowed, rows = weight[:, None] > 0, masks[0]
    return Case(
        lambda: ops.varlen_attention(*packed, *cu, causal=causal),
        lambda: reference.masked_attention(*(x.float() for x in dense), weight).transpose(1, 2)[rows],
        lambda: F.scaled_dot_product_attention(*dense, attn_mask=allowed).transpose(1, 2)[rows],
        1e-4,
    )


def nearest_code(setting: Setting) -> Case:
    """In float32 always, as the tokenizer searches."""
    device = setting.device
    z, codebook = (F.normalize(torch.randn(count, C, device=device), dim=-1) for count in (setting.images * KEPT, K))

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


def compact(setting: Setting) -> Case:
    keep = setting.keep()
    total = int(keep.sum())
    plain = lambda: keep.flatten().nonzero()[:, 0]  # noqa: E731
    return Case(lambda: ops.compact(keep)[0][:total].long(), plain, plain, 0)


def gather_rows(setting: Setting) -> Case:
    x, embed, keep = setting.randn(setting.images, N, D), setting.randn(N, D), setting.keep()
    index = ops.compact(keep)[0][: int(keep.sum())]
    flat = x.flatten(0, 1)
    return Case(
        lambda: ops.gather_rows(flat, index, embed),
        lambda: reference.gather_rows(flat, index, embed),
        lambda: (x + embed)[keep],
        1e-6,
    )


def scatter_rows(setting: Setting) -> Case:
    keep, base = setting.keep(), setting.randn(N, D)
    count, total = int(keep.sum()), setting.images * N
    rows, index = setting.randn(count, D), ops.compact(keep)[0][:count]

    def plain() -> Tensor:
        out = rows.new_zeros(setting.images, N, D)
        out[keep] = rows
        return (out + base).flatten(0, 1)

    ours = lambda: ops.scatter_rows(rows, index, base, total=total)  # noqa: E731
    return Case(ours, lambda: reference.scatter_rows(rows, index, base, total), plain, 1e-6)


def codebook_stats(setting: Setting) -> Case:
    z, device = torch.randn(setting.images * KEPT, C, device=setting.device), setting.device
    codes = torch.randint(0, K, (len(z),), device=device)
    plain = lambda: torch.zeros(K, C, device=device).index_add_(0, codes, z)  # noqa: E731
    return Case(
        lambda: ops.codebook_stats(z, codes, K)[1], lambda: reference.codebook_stats(z, codes, K)[1], plain, 1e-5
    )


def merge_similar(setting: Setting) -> Case:
    x, keep = setting.randn(setting.images, N, D), setting.keep()
    weights = torch.ones(setting.images, N, device=setting.device)
    total = int(keep.sum())

    def plain() -> Tensor:
        """Dense, image by image."""
        merged = []
        for patches, kept in zip(F.normalize(x.float(), dim=-1), keep, strict=True):
            owner = (patches @ patches[kept].T).argmax(1)
            count = int(kept.sum())
            owner[kept] = torch.arange(count, device=x.device)
            merged.append(F.one_hot(owner, count).to(x.dtype).T)
        return torch.cat([m @ p / m.sum(1, keepdim=True) for m, p in zip(merged, x, strict=True)])

    ours = lambda: ops.merge_similar(x, keep, weights, total=total)[0]  # noqa: E731
    return Case(ours, lambda: reference.merge_similar(x.float(), keep, weights)[0], plain, 1e-4)


CASES = {
    "attention, among kept": lambda setting: attention(setting, True),
    "attention, to dropped": lambda setting: attention(setting, False),
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


def merger(setting: Setting) -> dict:
    torch.manual_seed(0)
    config = dyntok.TokenizerConfig.preset("lavit")
    network = build_merger(D, config.merger).to(setting.device).eval()
    features, keep = torch.randn(setting.images, N, D, device=setting.device), setting.keep()
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
    times = {name: seconds(way, 3, setting.device)[0] for name, way in ways.items()}
    return {
        "seconds": times,
        "ratio": {name: t / times["packed"] for name, t in times.items()},
        "flops": merger_flops(setting.images),
    }


def merger_flops(images: int) -> float:
    """Of the packed merger's matrix products, attention left out."""
    hidden = int(4.3637 * D)
    return 12 * 2 * images * (KEPT * (6 * D * D + 2 * D * hidden) + (N - KEPT) * 2 * D * D)


def rate(setting: Setting) -> dict:
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
        a, b = setting.randn(m, k), setting.randn(n, k)
        repeats = max(1, int(4e9 / (2 * m * n * k)))
        work = lambda a=a, b=b, r=repeats: [a @ b.T for _ in range(r)]  # noqa: E731
        found[name] = 2 * m * n * k * repeats / seconds(work, 3, setting.device)[0] / 1e9
    return {"gflop_per_s": {name: round(value, 1) for name, value in found.items()}}


def check(name: str, ours: Tensor, expected: Tensor, tolerance: float) -> float:
    """Returns by how much a result is off. Ends the program where that is too much."""
    if ours.dtype == torch.long:
        off = float((ours != expected).float().mean())
    else:
        off = float((ours.float() - expected.float()).norm() / expected.float().norm())
        tolerance = max(tolerance, 2 * torch.finfo(ours.dtype).eps)
    if not off <= tolerance:  # NaN, too
        raise SystemExit(f"{name}: off by {off:.2g}, at most {tolerance} is right: no timing of a wrong result")
    return off


def measure(name: str, setting: Setting) -> dict:
    """Check one operation, then time it."""
    case = CASES[name](setting)
    result = case.ours()
    off = check(f"{name} against its reference", result[: case.rows], case.reference(), case.tolerance)
    check(f"{name} against PyTorch", result, case.plain(), case.tolerance)
    row: dict = {"off": off, "reference_rows": case.rows or "all"}
    for key, work, repeats in (("ours", case.ours, 7), ("pytorch", case.plain, 7), ("reference", case.reference, 1)):
        median, spread = seconds(work, repeats, setting.device)
        row |= {f"{key}_ms": 1e3 * median, f"{key}_spread_ms": 1e3 * spread}
        row[f"{key}_peak_mb"] = peak(setting.device, work)
    return row | {"ratio": row["pytorch_ms"] / row["ours_ms"]}


def peak(device: str, work: Callable) -> float:
    """MB beyond what was there."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
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
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of rows and heads (default: %(default)s)")
    parser.add_argument("--images", type=int, default=0, help="per batch (default: 64 on a GPU, 4 on a CPU)")
    parser.add_argument("--equal", action="store_true", help="every picture keeps 85 patches")
    parser.add_argument("--only", nargs="+", choices=[*CASES, "merger", "rate"], default=[*CASES, "merger", "rate"])
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    images = options.images or (4 if options.device == "cpu" else 64)
    setting = Setting(options.device, images, DTYPES[options.dtype], options.equal)
    torch.manual_seed(0)
    for name in options.only:
        row = {"what": name, "device": options.device, "device_name": device_name(options.device), "images": images}
        row |= {"dtype": options.dtype, "equal": options.equal}
        row |= {"merger": merger, "rate": rate}[name](setting) if name in ("merger", "rate") else measure(name, setting)
        print(json.dumps(row), flush=True)
        append(options.output, {**environment(), **row})


if __name__ == "__main__":
    main()
