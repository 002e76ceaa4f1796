"""Predict times of the operations at LaVIT's size on GPUs: the larger of arithmetic and memory traffic. Needs no GPU.

    python benchmarks/roofline.py               prints the table of kernels/README.md, predicted times in microseconds
    python benchmarks/roofline.py --pipeline    prints the table of docs/scale.md: a whole run on an H100, per image

Peak rates are the vendors' (dense, bf16; A100 SXM 80 GB, H100 SXM, H200 SXM). A third of 256 patches is kept. Only
bytes that must move once are counted. Launches, partly filled blocks and cache misses are not, so these are lower
bounds and not measurements.

The pipeline of a run: CPU cores decode, pixels of 8 bits are copied over PCIe meanwhile, and the GPU runs backbone,
merger and code search one after the other, 64 images at once. Weights are read once for these. An operation of a block
reads its input and writes its output, which is 38 values of the network's width for each of its rows.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

import torch

import dyntok

RATES = {"A100": (312e12, 2.04e12), "H100": (989e12, 3.35e12), "H200": (989e12, 4.8e12)}  # flop/s, bytes/s
N, KEPT, D, HEADS, WIDTH, K, C = 256, 85, 1408, 16, 88, 16384, 32
BYTES = 2
IMAGES = 64  # at once, in the pipeline
COPY_RATE = 64e9  # bytes/s: PCIe 5 with 16 lanes
DECODING = {"160 px": 2 / 3925, "500 px": 20 / 3925}  # core-seconds of a JPEG file, measured; see docs/scale.md
SHARE = 0.4  # of the bound that is assumed to be reached
_BLOCK = 38  # values of width D that a block moves for each row
_CROSS = 11  # and its cross-attention, in the merger


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


def stages(tokenizer: dyntok.DynamicVisualTokenizer) -> dict[str, Work]:
    """Returns the work on the GPU for one image of the largest grid, of which a third is kept."""
    config, width, model = tokenizer.config, tokenizer.backbone.embed_dim, tokenizer.backbone.model
    patches = config.image.max_patches or tokenizer.grid[0] * tokenizer.grid[1]
    kept, rows, blocks = patches / 3, patches + model.num_prefix_tokens, len(model.blocks)
    dropped, depth, codebook = patches - kept, config.merger.depth, config.codebook
    backbone, merger, context = map(matrices, (model, tokenizer.merger, tokenizer.merger.context_kv))
    moved = _BLOCK * blocks * rows * width + backbone / IMAGES
    folded = (_BLOCK + _CROSS) * depth * kept * width + 4 * depth * dropped * width + merger / IMAGES
    among = kept**2 / 2 + kept * dropped  # pairs of a causal self-attention, and of a cross-attention
    return {
        "backbone": Work(2 * backbone * rows + 4 * blocks * rows**2 * width, moved * BYTES),
        "merger": Work(
            2 * (merger - context) * kept + 2 * context * dropped + 4 * depth * among * width, folded * BYTES
        ),
        "search": Work(2 * kept * codebook.size * codebook.dim, (kept + codebook.size / IMAGES) * codebook.dim * BYTES),
    }


def matrices(module: torch.nn.Module) -> int:
    """Returns the number of weights of linear layers and convolutions; a table of positions has three axes."""
    return sum(weight.numel() for weight in module.parameters() if weight.ndim in (2, 4))


def pipeline() -> Iterator[list[object]]:
    """Yields the rows of the table: a tokenizer in bf16 on an H100."""
    with torch.device("meta"):  # sizes alone
        lavit = dyntok.DynamicVisualTokenizer(dyntok.TokenizerConfig.preset("lavit"))
    for name, tokenizer in {"flex": dyntok.load("flex"), "tiny": dyntok.load("tiny"), "lavit": lavit}.items():
        image = tokenizer.config.image
        pixels = image.max_patches * image.patch_size**2 if image.max_patches else image.img_size**2
        copy = 3 * pixels / COPY_RATE
        gpu = {stage: work.seconds(RATES["H100"]) for stage, work in stages(tokenizer).items()}
        bound = 1 / max(copy, sum(gpu.values()))
        cores = [SHARE * bound * seconds for seconds in DECODING.values()]
        microseconds = [f"{1e6 * seconds:,.2f}" for seconds in (copy, *gpu.values())]
        yield [name, *microseconds, f"{bound:,.0f}", f"{SHARE * bound:,.0f}", *(f"{value:,.1f}" for value in cores)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pipeline", action="store_true", help="a whole run on an H100, per image")
    if parser.parse_args().pipeline:
        names = ["tokenizer", "copy, µs", "backbone, µs", "merger, µs", "search, µs", "bound, images/s"]
        names += [f"{100 * SHARE:.0f} % of it, images/s", *(f"cores for pictures of {size}" for size in DECODING)]
        print("| " + " | ".join(names) + " |\n" + "|---" * len(names) + "|")
        for row in pipeline():
            print("| " + " | ".join(map(str, row)) + " |")
        return
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
