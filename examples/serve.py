"""Pictures from prompts with vLLM: one batch, every picture decodes, each request with its own limits.

    python examples/serve.py model/ "a red chair" "two dogs" -o pictures/

`model/` is what `finetune.py` writes. Over HTTP (`vllm serve model/`) the limits are the field `vllm_xargs`.
"""

import argparse
from pathlib import Path

from vllm import LLM, SamplingParams

import dyntok
from dyntok.llm import parse_ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("prompts", nargs="+")
    parser.add_argument("--max-tokens", type=int, default=96, help="codes in a picture, at most")
    parser.add_argument("-o", "--output", type=Path, default=Path("pictures"))
    args = parser.parse_args()

    tok, vocab = dyntok.load(), dyntok.VisualVocab.from_pretrained(args.model)
    # named here as well, so that vLLM tells the plug-in every id in time
    engine = LLM(args.model, logits_processors=["dyntok.llm.vllm_plugin:VllmImageGrammar"])
    limits = {"dyntok_max_tokens": args.max_tokens, "dyntok_min_images": 1, "dyntok_max_images": 1, "dyntok_text": 0}
    most = 2 * args.max_tokens + 64  # with positions or a map
    answers = engine.generate(args.prompts, SamplingParams(max_tokens=most, extra_args=limits))
    args.output.mkdir(exist_ok=True)
    for number, answer in enumerate(answers):
        segments = parse_ids(list(answer.outputs[0].token_ids), vocab)
        (image,) = [segment for segment in segments if segment.kind == "image"]
        tok.decode(image.encoding)[0].save(args.output / f"{number}.png")
        print(f"{args.output / f'{number}.png'}: {len(image.codes)} codes")


if __name__ == "__main__":
    main()
