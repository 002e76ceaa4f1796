"""What the plug-in costs in vLLM: equal requests to two engines with one small Llama, one of them with `dyntok.json`.

    python benchmarks/serving.py --requests 16

The engines take turns. Every picture is read back before anything is printed.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from timing import append, environment

import dyntok
from dyntok.llm import parse_ids

TEXT, EOS = 32000, 2


def save(folder: Path, vocab: dyntok.VisualVocab, layers: int, width: int, longest: int) -> None:
    """Writes a Llama with random weights that has the ids of pictures."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = dict(
        hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers, num_attention_heads=width // 64
    )
    config = LlamaConfig(vocab_size=vocab.vocab_size, eos_token_id=EOS, max_position_embeddings=longest, **shape)
    LlamaForCausalLM(config).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=16, help="requests at once")
    parser.add_argument("--tokens", type=int, default=256, help="ids that each request writes")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM, SamplingParams
    from vllm import __version__ as version

    vocab, longest = dyntok.VisualVocab.of(dyntok.load(), after=TEXT), options.tokens + 64
    pictures = {"dyntok_text": 0, "dyntok_min_images": 1000, "dyntok_max_tokens": 96}
    params = SamplingParams(
        max_tokens=options.tokens, temperature=1.0, seed=0, ignore_eos=True, detokenize=False, extra_args=pictures
    )
    prompts: Any = [{"prompt_token_ids": [5, 6, 7 + number]} for number in range(options.requests)]
    times: dict[str, list[float]] = {"without": [], "with": []}
    with tempfile.TemporaryDirectory() as place:
        engines = {}
        for name in times:
            folder = Path(place) / name
            save(folder, vocab, options.layers, options.width, longest)
            if name == "with":
                vocab.save_pretrained(folder)
            engines[name] = LLM(
                str(folder), skip_tokenizer_init=True, dtype="float32", max_model_len=longest, enforce_eager=True
            )
        for turn in range(options.rounds + 1):  # the first one warms up
            for name, engine in engines.items():
                start = time.perf_counter()
                answers = engine.generate(prompts, params, use_tqdm=False)
                took = time.perf_counter() - start
                written = [list(answer.outputs[0].token_ids) for answer in answers]
                if {len(ids) for ids in written} != {options.tokens}:
                    raise SystemExit("a request ended early; no figures")
                kinds = {segment.kind for ids in written for segment in parse_ids(ids, vocab)}
                if name == "with" and not kinds <= {"image", "text"}:
                    raise SystemExit(f"a picture can't be read: {kinds}; no figures")
                if turn:
                    times[name].append(took / options.tokens * 1e3)
    step = {name: round(median(some), 3) for name, some in times.items()}
    spread = {name: [round(min(some), 3), round(max(some), 3)] for name, some in times.items()}
    row = {"vllm": version, "requests": options.requests, "tokens": options.tokens, "layers": options.layers}
    row |= {
        "width": options.width,
        "step_ms": step,
        "spread_ms": spread,
        "ratio": round(step["with"] / step["without"], 2),
    }
    print(json.dumps(row))
    append(options.output, {**environment(), **row})


if __name__ == "__main__":
    main()
