"""Make the table of a model card: quality by budget, without positions and against other masks.

    DYNTOK_DATA=... python benchmarks/table.py [--model NAME] [--limit N] [--runs NAME...] [--output FILE]

FILE, such as benchmarks/results/flex.json, keeps the runs that it already has unless they are made again; figures of
another model or limit are not mixed in.

`DYNTOK_DATA` is a folder with `photos/`, `captioned/` (webdataset tars) and
`teacher/mobilenetv2_100_imagenet.safetensors`.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import dyntok
from dyntok.training.classifier import load_classifier
from dyntok.training.evaluate import evaluate
from dyntok.training.recipe import Teacher
from dyntok.training.sources import find_samples

BUDGETS = (32, 64, 96, 128, 192)
# these weights want RGB in -1 to 1
MOBILENET = {"pad_type": "same", "pretrained_cfg_overlay": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--runs", nargs="+", metavar="NAME", help="only those runs (default: all)")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    data = Path(os.environ["DYNTOK_DATA"])
    sources = [data / "photos", data / "captioned"]
    tokenizer = dyntok.load(options.model)
    classifier = load_classifier(
        Teacher(
            "mobilenetv2_100", weights=str(data / "teacher" / "mobilenetv2_100_imagenet.safetensors"), kwargs=MOBILENET
        )
    )
    validation = find_samples(sources, "validation")
    runs = {
        "learned": {
            "probe_samples": find_samples(sources, "train"),
            "probe_prefix": "imagenette-",
        },
        "learned, without positions": {"positions": False},
        "random": {"selection": "random"},
        "even": {"selection": "even"},
        **{f"budget {budget}": {"policy": {"budget": budget}} for budget in BUDGETS},
        "all patches": {"policy": {"budget": 1.0}},
    }
    what = {"fingerprint": tokenizer.fingerprint, "limit": options.limit}
    reports = kept_runs(options.output, what)
    for name in options.runs or runs:
        report = evaluate(tokenizer, validation, teacher=classifier, limit=options.limit, **runs[name])
        reports[name] = report.to_dict()
        teacher = report.teacher
        print(
            f"{name:<28}{report.images:5} images {report.tokens.mean:6.1f} +- {report.tokens.std:4.1f} tokens",
            f"{report.psnr:6.2f} dB SSIM {report.ssim:.3f} accuracy {teacher.accuracy_reconstructions:.1%}",
            f"(originals {teacher.accuracy_originals:.1%})",
            flush=True,
        )
        if name == "learned":
            print(report.table(), flush=True)
        if options.output:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text(json.dumps({**what, "runs": reports}, indent=1) + "\n")


def kept_runs(output: Path | None, what: dict[str, Any]) -> dict[str, Any]:
    """Those that the output holds of the same model and limit; without a limit it was all images."""
    kept = json.loads(output.read_text()) if output and output.exists() else {}
    return kept["runs"] if kept and what == {name: kept.get(name) for name in what} else {}


if __name__ == "__main__":
    main()
