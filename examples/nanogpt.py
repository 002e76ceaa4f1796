"""Codes in a training loop of your own: a memory map of ids, a small GPT in plain PyTorch, and pictures that it writes.

dyntok batch photos/ codes/
python examples/nanogpt.py codes/ --steps 2000 -o pictures/
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import dyntok
from dyntok.batch import write_memmap
from dyntok.llm import GrammarMask, ImageGrammar, parse_ids


class GPT(nn.Module):
    def __init__(self, vocab_size: int, block: int, width: int = 192, depth: int = 4, heads: int = 6) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(vocab_size, width), nn.Embedding(block, width)
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, depth, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, vocab_size, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:  # [B, L] -> [B, L, V]
        hidden = self.embed(ids) + self.place.weight[: ids.shape[1]]
        past = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        return self.head(self.blocks(hidden, mask=past, is_causal=True))


def batches(ids: np.ndarray, block: int, size: int):
    while True:
        starts = np.random.randint(0, len(ids) - block, size)
        yield torch.from_numpy(np.stack([ids[start : start + block + 1] for start in starts]).astype(np.int64))


@torch.no_grad()
def write(model: GPT, grammar: ImageGrammar, block: int, count: int) -> torch.Tensor:
    """Pictures that always decode: the grammar's mask lies over every step."""
    mask, ids = GrammarMask(grammar), torch.full((count, 1), grammar.vocab.image_start)
    state = mask.scan(ids)
    while ids.shape[1] < block and bool(state.inside.any()):
        scores = mask.constrain(model(ids)[:, -1], state, room=block - ids.shape[1])
        ids = torch.cat([ids, scores.softmax(-1).multinomial(1)], 1)
        state = mask.step(state, ids[:, -1])
    return ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("codes")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--block", type=int, default=256)
    parser.add_argument("-o", "--output", type=Path, default=Path("pictures"))
    args = parser.parse_args()
    tok = dyntok.load()
    vocab = dyntok.VisualVocab.of(tok, after=1, layout="none")  # id 0 ends a document
    args.output.mkdir(exist_ok=True)
    write_memmap(args.codes, args.output / "train.bin", vocab, eod=0)
    ids = np.memmap(args.output / "train.bin", dtype=vocab.dtype, mode="r")
    model = GPT(vocab.vocab_size, args.block)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-4)
    for step, batch in zip(range(args.steps), batches(ids, args.block, 8), strict=False):
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step}: loss {loss:.3f}")
    grammar = ImageGrammar(vocab, max_tokens=min(96, args.block - 2), max_images=1, eos=0)
    for number, row in enumerate(write(model.eval(), grammar, args.block, count=2)):
        (image, *_) = [segment for segment in parse_ids(row, vocab) if segment.kind == "image"]
        tok.decode(image.encoding)[0].save(args.output / f"{number}.png")


if __name__ == "__main__":
    main()
