"""Measure what the image grammar costs per step in each engine, in one process: one request, one picture.

python benchmarks/engines.py [--layout lattice] [--codes 8192] [--output benchmarks/results/engines.jsonl]

A step is: which ids may come next, and then one more id. Not here: the model, and copying the mask to a device.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from timing import append, environment

from dyntok.errors import ConfigError
from dyntok.llm import GrammarMask, ImageGrammar
from dyntok.llm.serving import RequestGrammar
from dyntok.vocab import VisualVocab

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from support.engines import LLGuidance, Outlines, Spelled, XGrammar  # noqa: E402
from support.grammars import EOS  # noqa: E402

TEXT = 32_000


class Host:
    """What the plug-ins of vLLM's first interface and of SGLang do for a request."""

    def __init__(self, grammar: ImageGrammar) -> None:
        self.rules, self.written = RequestGrammar(grammar, [], 10_000), []
        self.scores = torch.zeros(grammar.vocab_size)

    def fill(self) -> None:
        self.rules.constrain(self.written, self.scores)

    def step(self, id: int) -> None:
        self.written.append(id)


class Device:
    """What `ImageLogitsProcessor` and the plug-in of vLLM's second interface do, for a batch of one."""

    def __init__(self, grammar: ImageGrammar) -> None:
        self.mask = GrammarMask(grammar)
        self.state, self.scores = self.mask.start(1), torch.zeros(1, grammar.vocab_size)

    def fill(self) -> None:
        self.mask.constrain(self.scores, self.state)

    def step(self, id: int) -> None:
        self.state = self.mask.step(self.state, torch.tensor([id]))


ENGINES: dict[str, Callable[[ImageGrammar], Any]] = {
    "dyntok, ids on the host": Host,
    "dyntok, tensors": Device,
    "xgrammar, to_xgrammar()": XGrammar,
    "llguidance, to_lark()": LLGuidance,
    "xgrammar, to_gbnf()": Spelled,
    "outlines-core, to_regex()": Outlines,
}


def walk(grammar: ImageGrammar) -> list[int]:
    """Returns the ids of one picture, which ends only where it must."""
    draw, state, ids = random.Random(0), grammar.start(), []
    while True:
        choices = [id for low, high in grammar.allowed(state) for id in (low, high - 1, draw.randrange(low, high))]
        id = draw.choice([id for id in choices if id != grammar.vocab.image_end] or choices)
        if id == EOS:
            return ids
        ids.append(id)
        state = grammar.step(state, id)


def timed(make: Callable[[], Any], ids: list[int], limit: float) -> dict[str, float]:
    """Returns the seconds until the first step, and the median and longest step in milliseconds, within a limit."""
    start = time.perf_counter()
    engine = make()
    engine.fill()
    ready, steps = time.perf_counter() - start, []
    for id in ids:
        before = time.perf_counter()
        engine.step(id)
        engine.fill()
        steps.append((time.perf_counter() - before) * 1e3)
        if time.perf_counter() - start - ready > limit:
            break
    return {
        "start_s": round(ready, 2),
        "steps": len(steps),
        "ms": round(median(steps), 3),
        "longest_ms": round(max(steps), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layout", default="lattice", choices=["map", "lattice"])
    parser.add_argument("--codes", type=int, default=8192)
    parser.add_argument("--length", type=int, default=96, help="codes of the picture at most")
    parser.add_argument("--limit", type=float, default=60, help="seconds for the steps of an engine")
    parser.add_argument("--skip", nargs="*", default=[], help="names of engines")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    vocab = VisualVocab.after(TEXT, size=options.codes, layout=options.layout, grid=(16, 16))
    grammar = ImageGrammar(vocab, max_tokens=options.length, min_images=1, max_images=1, text=False, eos=EOS)
    ids = walk(grammar)
    rows: dict[str, Any] = {}
    for name, engine in ENGINES.items():
        if name in options.skip:
            continue
        try:
            rows[name] = timed(partial(engine, grammar), ids, options.limit)
        except (ConfigError, ModuleNotFoundError) as error:
            rows[name] = str(error)
        print(name, json.dumps(rows[name]), flush=True)
    row = {"layout": options.layout, "text": TEXT, "codes": options.codes, "steps": len(ids), "engines": rows}
    append(options.output, {**environment(), **row})


if __name__ == "__main__":
    main()
