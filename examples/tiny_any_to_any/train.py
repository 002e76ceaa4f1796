"""Trains a small Llama on captions and image codes, one next-token objective, both orders.

    python examples/tiny_any_to_any/train.py --data $DYNTOK_DATA/captioned -o runs/any_to_any

Killed? The same command goes on. Photographs are encoded first (once); then come about 5 million tokens.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import data
import model as llm
import torch
from torch import Tensor
from torch.utils.data import DataLoader

import dyntok
from dyntok.llm import PackedDataset, Packer, in_drawn_order
from dyntok.training.state import write_state

ROW, BATCH, STEPS, WARMUP, PEAK = 256, 8, 2600, 100, 1.5e-3


def rows(path: Path, tokenizer, vocab: dyntok.VisualVocab, split: str) -> PackedDataset:
    def documents(epoch: int) -> Iterator:
        return (in_drawn_order(document, epoch=epoch) for document in data.documents(path, split, epoch))

    def packer() -> Packer:
        special = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id}
        return Packer(ROW, vocab, lambda text: tokenizer.encode(text, add_special_tokens=False), **special)

    return PackedDataset(documents, packer)


def batches(dataset: PackedDataset, epoch: int, done: int) -> Iterator[tuple[int, int, dict[str, Tensor]]]:
    """(epoch, number in it, batch), from batch number `done` of an epoch on, without end; shuffled anew in each."""
    while True:
        dataset.set_epoch(epoch)
        packed = list(dataset)
        order = torch.randperm(len(packed), generator=torch.Generator().manual_seed(epoch)).tolist()
        loader = DataLoader([packed[i] for i in order], batch_size=BATCH, drop_last=True)
        for number, batch in enumerate(loader):
            if number >= done:
                yield epoch, number, batch
        epoch, done = epoch + 1, 0


def by_modality(losses: Tensor, labels: Tensor, vocab: dyntok.VisualVocab) -> tuple[float, float, int, int]:
    """Sum of losses over text and over image tokens (map and end included), and how many there are."""
    targets = labels[:, 1:]
    image = (targets >= vocab.offset) | (targets == vocab.image_end)
    text = (targets >= 0) & ~image
    losses = losses.cpu()
    return float(losses[text].sum()), float(losses[image].sum()), int(text.sum()), int(image.sum())


@torch.no_grad()
def validate(model, dataset: PackedDataset, vocab: dyntok.VisualVocab) -> dict[str, float]:
    dataset.set_epoch(0)
    totals = torch.zeros(4, dtype=torch.double)
    for batch in DataLoader(dataset, batch_size=BATCH):
        totals += torch.tensor(by_modality(llm.token_losses(model, **batch), batch["labels"], vocab))
    return {
        "validation_text": round(float(totals[0] / totals[2]), 4),
        "validation_image": round(float(totals[1] / totals[3]), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, required=True, help="folder of webdataset tars: KEY.jpg, KEY.captions.json"
    )
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args()
    path = data.prepare(options.data, options.output)
    torch.manual_seed(0)
    model, tokenizer, vocab = llm.new(options.output, dyntok.load())
    decayed = [p for p in model.parameters() if p.dim() > 1]
    groups = [
        {"params": decayed, "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    step, begin, done = 0, 0, 0
    state_path, log_path = options.output / "state.pt", options.output / "log.jsonl"
    if state_path.exists():
        state = torch.load(state_path, weights_only=True, map_location="cpu")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, begin, done = state["step"], state["epoch"], state["number"] + 1
    training, validation = (rows(path, tokenizer, vocab, split) for split in ("train", "validation"))
    sums, begun = torch.zeros(4, dtype=torch.double), time.perf_counter()
    for epoch, number, batch in batches(training, begin, done):
        if step >= options.steps:
            break
        rate = PEAK * min((step + 1) / WARMUP, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / options.steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        losses = llm.token_losses(model, **batch)
        counted = (batch["labels"][:, 1:] >= 0).sum()
        (losses.sum() / counted).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        sums += torch.tensor(by_modality(losses.detach(), batch["labels"], vocab))
        if step % 50 == 0 or step == options.steps:
            line = {
                "step": step,
                "epoch": epoch,
                "text": round(float(sums[0] / sums[2]), 4),
                "image": round(float(sums[1] / sums[3]), 4),
                "tokens_per_s": round(float(sums[2:].sum()) / (time.perf_counter() - begun)),
            }
            if step % 250 == 0 or step == options.steps:
                line |= validate(model, validation, vocab)
            write_state(
                state_path,
                {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "step": step,
                    "epoch": epoch,
                    "number": number,
                },
            )
            with open(log_path, "a") as log:
                log.write(json.dumps(line) + "\n")
            print(json.dumps(line), flush=True)
            sums, begun = torch.zeros(4, dtype=torch.double), time.perf_counter()
    model.save_pretrained(options.output / "model")
    tokenizer.save_pretrained(options.output / "model")
    vocab.save_pretrained(options.output / "model")


if __name__ == "__main__":
    main()
