"""Compare ways to write which patches an image keeps: counts or patterns, header first or interleaved.

    DYNTOK_DATA=... python benchmarks/layouts.py [--train 1000] [--test 100] [--steps 250] [--refine 1] [--output FILE]

Counts: a token for each block of 4 x 4 patches, one of 625, as in the layout "map". Patterns: a token from a dictionary
of the most frequent 4 x 4 patterns of freely chosen patches; every block takes the nearest entry, and the picture is
encoded with these patches. The test part is the validation part, which training has not seen.

With `--refine`, counts are also written with the codes of `encode(refine=)`, to see whether these are harder to learn.

A small language model learns each form: 2 layers of width 128, on codes given as their codebook vectors. The grammar
says which kind of token comes next, so the nats are those of the tokens alone. The first line of results says how often
a dictionary of each size holds all patterns of a picture.
"""

import argparse
import json
import os
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from timing import append, environment
from torch import Tensor, nn
from torch.nn import functional as F

import dyntok
from dyntok.chunks import batched
from dyntok.image import to_pixels
from dyntok.layout import MAP_VALUES, counts_to_map, mask_to_counts
from dyntok.training.metrics import psnr
from dyntok.training.sources import find_samples, spread

SIZE = 225  # entries of the dictionary
BATCH, WIDTH, LONGEST = 16, 128, 288
BITS = 2 ** np.arange(16)
Sequences = list[tuple[Tensor, Tensor]]  # ids, and whether each is a code


def blocks(masks: Tensor) -> Tensor:
    """Keep masks, bool [B, 256] of a 16 x 16 grid -> the patches of each block, bool [B, 16, 16]."""
    return masks.view(-1, 4, 4, 4, 4).transpose(2, 3).reshape(len(masks), 16, 16)


def pattern_numbers(masks: Tensor) -> np.ndarray:
    """Returns the pattern of each block as a number below 65,536, int [B, 16]."""
    return blocks(masks).numpy().astype(np.int64) @ BITS


def snap(masks: Tensor, dictionary: Tensor) -> tuple[Tensor, Tensor]:
    """Returns masks whose blocks are the nearest entries of the dictionary, bool [D, 16], and these entries [B, 16]."""
    entries = (blocks(masks)[:, :, None] != dictionary).sum(-1).argmin(-1)
    entries[:, 0] = torch.where(
        (entries == entries[:, :1]).all(1) & ~dictionary[entries[:, 0]].any(1), 1, entries[:, 0]
    )
    snapped = dictionary[entries].view(-1, 4, 4, 4, 4).transpose(2, 3).reshape(len(masks), 256)
    return snapped, entries


def encode(
    tok: dyntok.DynamicVisualTokenizer, pixels: Tensor, masks: Tensor | None = None, **options
) -> dyntok.Encoding:
    if masks is None:
        return tok.encode_tensor(pixels, **options)
    pairs = zip(pixels.split(64), masks.split(64), strict=True)
    return dyntok.Encoding.cat([tok.encode_tensor(some, keep_mask=mask) for some, mask in pairs])


def quality(tok: dyntok.DynamicVisualTokenizer, encoding: dyntok.Encoding, pixels: Tensor) -> float:
    std, mean = (torch.tensor(values).view(3, 1, 1) for values in (tok.config.image.std, tok.config.image.mean))
    pairs = zip(batched(encoding, 32), pixels.split(32), strict=True)
    found = [
        psnr(
            (tok.decode_to_pixels(dyntok.Encoding.cat(some)) * std + mean).clamp(0, 1), (part * std + mean).clamp(0, 1)
        )
        for some, part in pairs
    ]
    return float(torch.cat([torch.as_tensor(each) for each in found]).mean())


def sequences(encoding: dyntok.Encoding, header: Tensor, offset: int, interleaved: bool) -> Sequences:
    """Returns each image as ids: header tokens [B, 16] from `offset`, and codes."""
    block_of = (torch.arange(256) // 64) * 4 + torch.arange(256) % 16 // 4
    found = []
    for codes, positions, values in zip(encoding.codes, encoding.positions or (), header, strict=True):
        ids = torch.cat([values + offset, codes])
        if interleaved:  # a token of the header before the codes of its block
            ids = ids[torch.cat([torch.arange(16) * 2, block_of[positions] * 2 + 1]).argsort(stable=True)]
        found.append((ids, ids < offset))
    return found


class SmallModel(nn.Module):
    """Predicts the next id; scores of codes are products with their codebook vectors."""

    vectors: Tensor

    def __init__(self, vectors: Tensor, others: int, frequencies: Tensor) -> None:
        super().__init__()
        self.register_buffer("vectors", vectors)
        self.code_in, self.code_out = nn.Linear(vectors.shape[1], WIDTH), nn.Linear(WIDTH, vectors.shape[1])
        self.embed, self.place = nn.Embedding(others + 1, WIDTH), nn.Embedding(LONGEST, WIDTH)  # the last one: start
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, 0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.other_out = nn.Linear(WIDTH, others)
        self.code_bias = nn.Parameter(((frequencies + 1) / (frequencies + 1).sum()).log())

    def forward(self, ids: Tensor, is_code: Tensor, stride: int = 1) -> tuple[Tensor, Tensor]:
        """Returns the nats of all header tokens and of all codes of a batch: ids [B, L], -1 after the end.

        stride: score only every so many codes, and count them as often.
        """
        codes = len(self.vectors)
        inner = ids[:, :-1]
        begun = torch.cat([torch.full_like(ids[:, :1], codes + self.other_out.out_features), inner], 1)
        coded = torch.cat([torch.zeros_like(is_code[:, :1]), is_code[:, :-1]], 1)
        hidden = self.embed((begun - codes).clamp(min=0))
        vectors = self.code_in(F.embedding(begun.clamp(0, codes - 1), self.vectors))
        hidden = torch.where(coded[..., None], vectors, hidden) + self.place.weight[: ids.shape[1]]
        past = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        hidden = self.blocks(hidden, mask=past, is_causal=True)
        other, code = ~is_code & (ids >= 0), is_code
        header = F.cross_entropy(self.other_out(hidden[other]), ids[other] - codes, reduction="sum")
        rows, wanted = hidden[code][::stride], ids[code][::stride]
        scores = self.code_out(rows) @ self.vectors.T + self.code_bias
        return header, stride * F.cross_entropy(scores, wanted, reduction="sum")


def collate(rows: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    pad = nn.utils.rnn.pad_sequence
    return pad([ids for ids, _ in rows], True, -1), pad([is_code for _, is_code in rows], True, False)


def learn(train: Sequences, test: Sequences, vectors: Tensor, others: int, steps: int) -> tuple[float, float]:
    """Returns the nats per test image of a model trained on `train`: of the header, and of the codes."""
    torch.manual_seed(0)
    codes = torch.cat([ids[is_code] for ids, is_code in train])
    model = SmallModel(vectors, others, torch.bincount(codes, minlength=len(vectors)).float())
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(steps):
        ids, is_code = collate([train[i] for i in torch.randint(len(train), (BATCH,)).tolist()])
        loss = sum(model(ids, is_code, stride=4)) / (ids >= 0).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        nats = [model(*collate(rows)) for rows in batched(test, BATCH)]
    return tuple(float(torch.stack(each).sum()) / len(test) for each in zip(*nats, strict=True))


def coverage(train: Tensor, test: Tensor) -> dict[str, float]:
    """Returns how many patterns the training masks have, and which share of the test pictures dictionaries hold."""
    ranked = [number for number, _ in Counter(pattern_numbers(train).flatten().tolist()).most_common()]
    wanted, sizes = pattern_numbers(test), (64, 128, SIZE, MAP_VALUES, len(ranked))
    return {
        "patterns": len(ranked),
        **{f"held by {size}": float(np.isin(wanted, ranked[:size]).all(1).mean()) for size in sizes},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--train", type=int, default=1000)
    parser.add_argument("--test", type=int, default=100)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--refine", type=int, default=0)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    tok, data = dyntok.load(options.model), Path(os.environ["DYNTOK_DATA"])
    config = tok.image_config(fit="crop")
    pixels = [
        torch.stack(
            [to_pixels(sample.read(), config) for sample in spread(find_samples([data / "photos"], part), count)]
        )
        for part, count in (("train", options.train), ("validation", options.test))
    ]
    counted = [encode(tok, some, places="map") for some in pixels]
    free = [encode(tok, some, places="free").keep_mask() for some in pixels]
    common = Counter(pattern_numbers(free[0]).flatten().tolist()).most_common(SIZE)
    dictionary = torch.from_numpy(np.array([number for number, _ in common])[:, None] & BITS != 0)
    snapped = [snap(masks, dictionary) for masks in free]
    patterned = [encode(tok, some, masks) for some, (masks, _) in zip(pixels, snapped, strict=True)]
    what = {"model": tok.name, "fingerprint": tok.fingerprint, "train": options.train, "test": options.test}
    masks = {"free": free, "canonical": [encoding.keep_mask() for encoding in counted]}
    for name, (train, test) in masks.items():
        report({**what, "masks": name, **coverage(train, test)}, options.output)
    counts = [counts_to_map(mask_to_counts(encoding.keep_mask(), (16, 16)), (16, 16)) for encoding in counted]
    forms = {"counts": (counted, counts), "patterns": (patterned, [entries for _, entries in snapped])}
    if options.refine:
        refined = [encode(tok, some, places="map", refine=options.refine) for some in pixels]
        forms[f"counts, refine={options.refine}"] = (refined, counts)
    vectors = tok.codebook.embedding.detach().float()
    for form, (encodings, headers) in forms.items():
        others, painted = (SIZE if form == "patterns" else MAP_VALUES), quality(tok, encodings[1], pixels[1])
        for interleaved in (False, True):
            began = time.process_time()
            rows = [
                sequences(encoding, header, len(vectors), interleaved)
                for encoding, header in zip(encodings, headers, strict=True)
            ]
            header, codes = learn(*rows, vectors, others, options.steps)
            result = {"form": form, "order": "interleaved" if interleaved else "header first", "values": others,
                      "steps": options.steps, "tokens": float(encodings[1].lengths.float().mean()), "psnr": painted,
                      "header_nats": header, "code_nats": codes, "nats": header + codes,
                      "cpu_s": round(time.process_time() - began)}  # fmt: skip
            report({**what, **result}, options.output)


def report(row: dict, output: Path | None) -> None:
    print(json.dumps(row), flush=True)
    append(output, {**environment(), **row})


if __name__ == "__main__":
    main()
