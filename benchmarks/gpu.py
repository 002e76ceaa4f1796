"""Check and time everything on one GPU, in about ten minutes.

    python benchmarks/gpu.py [--device cuda] [--output benchmarks/results/gpu]    writes gpu.md and gpu.json
    python benchmarks/gpu.py --device cpu --small                                 the same program on a small scale

Sections: every operation against its reference in float32 and bf16, with its time beside PyTorch's and beside the
roofline of the GPU; images/s of `encode_tensor` and a training step of `tiny` and of the preset `lavit`; which images
have other codes in other batches, and images/s, with and without `batch_invariant`; PyTorch's ragged attention beside
ours. A section that fails is reported, and the program ends with exit code 1.
"""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from roofline import RATES, operations
from timing import device_name, environment, seconds
from torch import Tensor

import dyntok
import dyntok_kernels as ops
from dyntok.model.selector import straight_through
from dyntok.precision import DTYPES
from dyntok.ragged import cu_seqlens_from_mask
from kernels import CASES, Setting, measure, peak

FLOAT32_RATES = {"A100": 19.5e12, "H100": 67e12, "H200": 67e12}  # flop/s without TF32, as the vendor states them
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Scale:
    """How much is computed: images of a batch of operations, of `encode`, of a training step and of all batch sizes."""

    kernels: int = 64
    encode: int = 256
    training: int = 64
    invariance: int = 64
    batch_sizes: tuple[int, ...] = (1, 2, 7, 16, 64)
    small: bool = False


SMALL = Scale(kernels=2, encode=2, training=2, invariance=4, batch_sizes=(1, 2, 4), small=True)


def check_kernels(device: str, scale: Scale) -> list[Row]:
    rows = []
    for dtype in ("fp32",) if scale.small else ("fp32", "bf16"):
        setting = Setting(device, scale.kernels, DTYPES[dtype])
        for name in CASES:
            torch.manual_seed(0)
            found = measure(name, setting)
            predicted = predicted_ms(name, scale.kernels, device_name(device), dtype)
            rows.append(
                {
                    "operation": name, "dtype": dtype, "off": f"{found['off']:.1e}",
                    "ms": found["ours_ms"], "PyTorch, ms": found["pytorch_ms"], "ratio": found["ratio"],
                    "roofline, ms": predicted, "of it": None if predicted is None else predicted / found["ours_ms"],
                    "peak, MB": found["ours_peak_mb"],
                }
            )  # fmt: skip
    return rows


def predicted_ms(name: str, images: int, gpu: str, dtype: str) -> float | None:
    """Returns the roofline's time; None for a GPU without known rates."""
    known = [model for model in RATES if model in gpu]
    if not known:
        return None
    work, _ = operations(images)[name.replace("attention,", "varlen_attention,")]
    flops, moved = RATES[known[0]]
    narrow = dtype != "fp32" and name not in ("nearest_code", "codebook_stats")  # these compute in float32 always
    rate, factor = (flops, 1) if narrow else (FLOAT32_RATES[known[0]], 2)
    return 1e3 * max(work.flops / rate, factor * work.bytes / moved)


def check_attention(device: str, scale: Scale) -> list[Row]:
    """PyTorch's ragged attention beside ours, where PyTorch has it: half precision on CUDA."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return []
    if not device.startswith("cuda"):
        return []
    setting, rows = Setting(device, scale.kernels, torch.bfloat16), []
    lengths = setting.keep().sum(1)
    cu, longest = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32), int(lengths.max())
    q, k, v = (setting.randn(int(lengths.sum()), 16, 88) for _ in range(3))
    for causal in (True, False):
        window = (-1, 0) if causal else (-1, -1)

        def theirs(window: tuple[int, int] = window) -> Any:
            return varlen_attn(q, k, v, cu, cu, longest, longest, window_size=window, num_splits=1)

        ours = lambda causal=causal: ops.varlen_attention(q, k, v, cu, cu, causal=causal)  # noqa: E731
        off = float((ours().float() - theirs().float()).norm() / theirs().float().norm())
        times = [1e3 * seconds(way, 7, device)[0] for way in (ours, theirs)]
        rows.append({"attention": "causal" if causal else "full", "off": f"{off:.1e}", "ms": times[0],
                     "varlen_attn, ms": times[1], "ratio": times[1] / times[0]})  # fmt: skip
    return rows


def tokenizer_of(name: str, device: str, dtype: torch.dtype, scale: Scale) -> dyntok.DynamicVisualTokenizer:
    """Returns the bundled `tiny`, or the preset `lavit` with random weights; narrow and shallow on a small scale."""
    if name == "tiny":
        return dyntok.load("tiny", device=device, dtype=dtype)
    torch.manual_seed(0)
    config = dyntok.TokenizerConfig.preset(name)
    if scale.small:
        narrow = dataclasses.replace(config.backbone, kwargs={"embed_dim": 176, "depth": 1, "num_heads": 2})
        merger, decoder = (dataclasses.replace(part, depth=1, num_heads=2) for part in (config.merger, config.decoder))
        config = dataclasses.replace(config, backbone=narrow, merger=merger, decoder=decoder)
    return dyntok.DynamicVisualTokenizer(config).in_precision(dtype).to(device).eval()


def pixels_for(tokenizer: dyntok.DynamicVisualTokenizer, images: int) -> Tensor:
    """Crops of the example photograph, normalized, on the tokenizer's device."""
    from encode import photographs

    from dyntok.image import to_pixels

    files = photographs(min(images, 64))
    pixels = torch.stack([to_pixels(file, tokenizer.config.image) for file in files])
    return pixels.repeat(-(-images // len(files)), 1, 1, 1)[:images].to(tokenizer.device)


def time_encoding(device: str, scale: Scale) -> list[Row]:
    rows = []
    for name in ("tiny", "lavit"):
        for dtype in ("fp32",) if scale.small else ("fp32", "bf16"):
            tokenizer = tokenizer_of(name, device, DTYPES[dtype], scale)
            pixels = pixels_for(tokenizer, scale.encode)
            for option, budget in (("learned", None), ("budget 0.33", 0.33)):
                encode = lambda t=tokenizer, p=pixels, b=budget: t.encode_tensor(p, budget=b, batch_size=64)  # noqa: E731
                median, spread = seconds(encode, 3, device)
                rows.append(
                    {
                        "tokenizer": name, "dtype": dtype, "choice": option, "images/s": len(pixels) / median,
                        "spread, %": 100 * spread / median, "peak, MB": peak(device, encode),
                    }
                )  # fmt: skip
    return rows


def time_training(device: str, scale: Scale) -> list[Row]:
    rows = []
    for dtype in ("fp32",) if scale.small else ("fp32", "bf16"):
        tokenizer = tokenizer_of("tiny", device, torch.float32, scale).train()
        pixels, step = pixels_for(tokenizer, scale.training), training_step(tokenizer, DTYPES[dtype])
        median, spread = seconds(lambda s=step, p=pixels: s(p), 3, device)
        rows.append({"tokenizer": "tiny", "dtype": dtype, "batch": len(pixels), "ms": 1e3 * median,
                     "images/s": len(pixels) / median, "spread, %": 100 * spread / median,
                     "peak, MB": peak(device, lambda s=step, p=pixels: s(p))})  # fmt: skip
    return rows


def training_step(tokenizer: dyntok.DynamicVisualTokenizer, dtype: torch.dtype) -> Callable[[Tensor], None]:
    """Returns a step from pixels to the update: the squared error of the picture, and the commitment."""
    optimizer = torch.optim.AdamW(tokenizer.parameters(), 1e-5)
    decoder, head = tokenizer.require_decoder(), tokenizer.pixel_head

    def step(pixels: Tensor) -> None:
        with torch.autocast(pixels.device.type, dtype, enabled=dtype != torch.float32):
            features = tokenizer.backbone(pixels)
            keep, gate = straight_through(tokenizer.selector(features, tokenizer.grid))
            vectors = tokenizer.projection(tokenizer.merger(features, keep, gate))
            rows, _ = tokenizer.codebook.quantize(vectors)
            painted = head(decoder(rows, cu_seqlens_from_mask(keep)), tokenizer.grid)
        loss = F.mse_loss(painted.float(), pixels) + 0.1 * F.mse_loss(F.normalize(vectors.float(), dim=-1), rows)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def check_batches(device: str, scale: Scale) -> list[Row]:
    """Codes in every batch size, at other places of the batch, against those of images alone; and those of a CPU.

    With `batch_invariant` none may differ. Else those may of which a decision was close.
    """
    rows: list[Row] = []
    for dtype in ("fp32",) if scale.small else ("fp32", "bf16"):
        tokenizer = tokenizer_of("tiny", device, DTYPES[dtype], scale)
        pixels = pixels_for(tokenizer, scale.invariance)
        alone = tokenizer.encode_tensor(pixels, batch_size=1, margins=True)
        for invariant in (True, False):
            tokenizer.batch_invariant = invariant
            for size in scale.batch_sizes:
                order = torch.arange(len(pixels)).roll(size // 2 + 1)
                shuffled = pixels[order.to(pixels.device)]
                encode = lambda t=tokenizer, p=shuffled, s=size: t.encode_tensor(p, batch_size=s)  # noqa: E731
                facts = {"dtype": dtype, "batch_invariant": str(invariant), "compared with": f"batches of {size}"}
                speed = len(pixels) / seconds(encode, 1, device)[0]
                rows.append(facts | _differing(alone[order.tolist()], encode()) | {"images/s": speed})
        if dtype == "fp32":
            there = tokenizer_of("tiny", "cpu", torch.float32, scale).encode_tensor(pixels.cpu())
            facts = {"dtype": dtype, "batch_invariant": "-", "compared with": "a CPU"}
            rows.append(facts | _differing(alone, there) | {"images/s": None})
    for row in rows:
        if row["differ"] > (0 if row["batch_invariant"] == "True" else row["close"]):
            raise SystemExit(f"codes differ that should not: {row}")
    return rows


def _differing(alone: dyntok.Encoding, other: dyntok.Encoding) -> Row:
    """Returns how many images have other codes, and of how many of these a decision was close."""
    differing = [i for i, (a, b) in enumerate(zip(alone, other, strict=True)) if a != b]
    close = sum(float(alone.margins[i].sum()) > 0 for i in differing)
    return {"images": len(alone), "differ": len(differing), "close": close}


SECTIONS: dict[str, Callable[[str, Scale], list[Row]]] = {
    "Operations": check_kernels,
    "PyTorch's ragged attention": check_attention,
    "Encoding": time_encoding,
    "A training step": time_training,
    "Same image, same codes": check_batches,
}


def run(device: str, scale: Scale) -> dict[str, Any]:
    """Returns the rows of all sections, and what went wrong."""
    results: dict[str, Any] = {"sections": {}, "failed": {}}
    for title, section in SECTIONS.items():
        start = time.perf_counter()
        try:
            with torch.set_grad_enabled(section is time_training):
                results["sections"][title] = section(device, scale)
        except (Exception, SystemExit) as error:  # the other sections are worth having
            results["failed"][title] = f"{type(error).__name__}: {error}"
        print(f"{title}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
    return {"device": device, "device_name": device_name(device), **environment(), **results}


def markdown(results: dict[str, Any]) -> str:
    """Returns one table for each section."""
    lines = [f"# {results['device_name']}, PyTorch {results['torch']}, commit {results['commit']}", ""]
    for title, rows in results["sections"].items():
        if rows:
            lines += [f"## {title}", "", "| " + " | ".join(rows[0]) + " |", "|---" * len(rows[0]) + "|"]
            lines += ["| " + " | ".join(map(_cell, row.values())) + " |" for row in rows] + [""]
    lines += [f"**{title} failed:** {error}" for title, error in results["failed"].items()]
    return "\n".join(lines).rstrip() + "\n"


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:,.3g}" if isinstance(value, float) and abs(value) < 1000 else (
        f"{value:,.0f}" if isinstance(value, float) else str(value)
    )  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="sizes for a CPU, in a minute")
    parser.add_argument("--output", type=Path, help="a name without suffix (default: nothing is written)")
    options = parser.parse_args()
    results = run(options.device, SMALL if options.small else Scale())
    print(markdown(results))
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.with_suffix(".md").write_text(markdown(results), encoding="utf-8")
        options.output.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 1 if results["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
