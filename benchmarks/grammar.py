"""Measure what the image grammar adds to a generation step, against a copy of the logits (150,000 ids, batch 64).

python benchmarks/grammar.py [--output benchmarks/results/grammar.jsonl]
"""

import argparse
import json
from pathlib import Path

import torch
from timing import append, environment, seconds

from dyntok.llm import GrammarMask, ImageGrammar
from dyntok.vocab import VisualVocab

VOCABULARY, BATCH, CODES = 150_000, 64, 16_384


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    vocab = VisualVocab.after(VOCABULARY - CODES - 2, size=CODES)
    mask = GrammarMask(ImageGrammar(vocab, max_tokens=256, eos=2))
    scores = torch.randn(BATCH, VOCABULARY)
    ids = torch.full((BATCH,), vocab.offset + 7)
    inside = mask.step(mask.start(BATCH), torch.full((BATCH,), vocab.image_start))

    def step() -> torch.Tensor:
        return mask.constrain(scores, mask.step(inside, ids))

    compiled = torch.compile(step, fullgraph=True)  # refuses what would wait for the host
    found = step()
    if not torch.equal(found, compiled()) or found.isfinite().sum() != BATCH * (CODES + 1):
        raise SystemExit("the step allows something else than codes and the end: no timing of a wrong result")
    timed = {
        name: seconds(work, 15)[0] * 1e3
        for name, work in (("step", step), ("compiled", compiled), ("copy", scores.clone))
    }
    ratios = {f"{name}_ratio": round(timed[name] / timed["copy"], 2) for name in ("step", "compiled")}
    row = {
        "vocabulary": VOCABULARY,
        "batch": BATCH,
        "ms": {name: round(value, 2) for name, value in timed.items()},
        **ratios,
    }
    print(json.dumps(row))
    append(options.output, {**environment(), **row})


if __name__ == "__main__":
    main()
