"""Predict times of the operations at LaVIT's size on GPUs: the larger of arithmetic and memory traffic. Needs no GPU.

    python benchmarks/roofline.py    prints the table of kernels/README.md, predicted times in microseconds

Peak rates are the vendors' (dense, bf16; A100 SXM 80 GB, H100 SXM, H200 SXM). A third of 256 patches is kept. Only
bytes that must move once are counted. Launches, partly filled blocks and cache misses are not, so these are lower
bounds and not measurements.
"""

from dataclasses import dataclass

RATES = {"A100": (312e12, 2.04e12), "H100": (989e12, 3.35e12), "H200": (989e12, 4.8e12)}  # flop/s, bytes/s
N, KEPT, D, HEADS, WIDTH, K, C = 256, 85, 1408, 16, 88, 16384, 32
BYTES = 2


@dataclass(frozen=True)
class Work:
    """Floating-point operations and bytes of one way to do something."""

    flops: float
    bytes: float

    def seconds(self, rate: tuple[float, float]) -> float:
        return max(self.flops / rate[0], self.bytes / rate[1])


def attention(queries: int, keys: int, images: int, *, causal: bool = False, scores: bool = False) -> Work:
    """scores: the dense way writes scores, masks them, and reads them again."""
    flops = 4 * images * queries * keys * D * (0.5 if causal else 1)
    moved = images * (2 * queries + 2 * keys) * D * BYTES
    return Work(flops, moved + (4 * images * HEADS * queries * keys * BYTES if scores else 0))


def operations(images: int) -> dict[str, tuple[Work, Work]]:
    """name: (packed or fused, the dense PyTorch way)"""
    kept, dropped, patches = images * KEPT, images * (N - KEPT), images * N
    search = 2 * kept * K * C
    stats = kept * C * BYTES + K * (C + 1) * 4
    rows = 2 * kept * D * BYTES
    similar = 2 * images * (N - KEPT) * KEPT * D
    return {
        "varlen_attention, among kept": (
            attention(KEPT, KEPT, images, causal=True),
            attention(N, N, images, scores=True),
        ),
        "varlen_attention, to dropped": (attention(KEPT, N - KEPT, images), attention(N, N, images, scores=True)),
        "nearest_code": (
            Work(search, kept * (C * BYTES + 8) + K * C * BYTES),
            Work(search, kept * K * 3 * BYTES + K * C * BYTES),
        ),
        "compact": (Work(0, patches + 4 * patches), Work(0, 2 * patches + 8 * patches)),
        "gather_rows": (Work(kept * D, rows + N * D * BYTES), Work(kept * D, 2 * rows + N * D * BYTES)),
        "scatter_rows": (
            Work(patches * D, (kept + patches + N) * D * BYTES),
            Work(patches * D, (kept + 3 * patches) * D * BYTES),
        ),
        "codebook_stats": (Work(kept * C, stats), Work(2 * kept * K * C, kept * K * BYTES + stats)),
        "merge_similar": (
            Work(similar + 2 * images * KEPT * (N - KEPT) * D, (2 * patches + kept + dropped) * D * BYTES),
            Work(2 * images * N * N * D, 2 * patches * D * BYTES + 3 * images * N * N * BYTES),
        ),
    }


def main() -> None:
    print(
        "| operation | images | Gflop | MB | "
        + " | ".join(RATES)
        + " | dense: Gflop | MB | "
        + " | ".join(RATES)
        + " |"
    )
    print("|---" * (6 + 2 * len(RATES)) + "|")
    for images in (64, 256):
        for name, ways in operations(images).items():
            cells = [name, images]
            for work in ways:
                cells += [f"{work.flops / 1e9:,.2f}", f"{work.bytes / 1e6:,.1f}"]
                cells += [f"{work.seconds(rate) * 1e6:,.1f}" for rate in RATES.values()]
            print("| " + " | ".join(map(str, cells)) + " |")


if __name__ == "__main__":
    main()
