"""Draw the loss curves of a training run.

python benchmarks/plot_training.py runs/mine/log.jsonl benchmarks/results/mine.png feature usage perplexity
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  the backend must be chosen first


def main() -> None:
    log, picture, *names = sys.argv[1:]
    lines = [json.loads(line) for line in Path(log).read_text().splitlines()]
    names = names or ["loss"]
    figure, axes = plt.subplots(len(names), 1, figsize=(8, 2.4 * len(names)), sharex=True, squeeze=False)
    for name, axis in zip(names, axes[:, 0], strict=True):
        for stage in dict.fromkeys(line["stage"] for line in lines):
            points = [(line["images"], line[name]) for line in lines if line["stage"] == stage and name in line]
            axis.plot(*zip(*points, strict=True) if points else ([], []), label=stage)
        axis.set_ylabel(name)
        axis.grid(alpha=0.3)
    axes[0, 0].legend()
    axes[-1, 0].set_xlabel("images")
    figure.tight_layout()
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    main()
