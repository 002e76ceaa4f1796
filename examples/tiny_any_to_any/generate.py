"""What the trained model knows of held-out photographs: figures, and a page with captions for pictures and pictures for
captions.

    python examples/tiny_any_to_any/generate.py runs/any_to_any [--judge WEIGHTS]

It writes figures.json and report.html there. `--judge` names the weights of a MobileNetV2 (timm, safetensors), which
compares written pictures with photographs.
"""

import argparse
import base64
import html
import io
import json
import math
import random
from collections import Counter
from pathlib import Path

import data
import model as llm
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.functional import to_tensor

from dyntok.llm import ImageCodes, ImageGrammar, ImageLogitsProcessor, parse_ids
from dyntok.training.classifier import Classifier, load_classifier
from dyntok.training.recipe import Teacher

CANDIDATES, BATCH, SHOWN = 10, 64, 12
SETTINGS = {
    "greedy": {}, "temperature 1": {"do_sample": True}, "temperature 1.5": {"do_sample": True, "temperature": 1.5},
    "top-p 0.9": {"do_sample": True, "top_p": 0.9}, "top-k 50": {"do_sample": True, "top_k": 50},
}  # fmt: skip


class Evaluation:
    """Held-out documents and the model's losses on them."""

    def __init__(self, folder: Path) -> None:
        self.model, self.tokenizer, self.vocab, self.visual = llm.load(folder)
        self.documents = list(data.documents(folder / data.CODES, "validation"))
        self.train = list(data.documents(folder / data.CODES, "train"))
        self.longest = max(
            len(self.image(document)) for document in self.train
        )  # ids of an image, grid and map included

    def text(self, document) -> list[int]:
        (words,) = (s for s in document.segments if isinstance(s, str))
        return self.tokenizer.encode(words, add_special_tokens=False)

    def image(self, document) -> list[int]:
        (image,) = (s for s in document.segments if isinstance(s, ImageCodes))
        return image.to_ids(self.vocab)

    @torch.no_grad()
    def losses(self, pairs: list[tuple[list[int], list[int]]]) -> list[float]:
        """Returns for each (context, target) the sum of losses in nats over the target without its first token."""
        found = []
        for start in range(0, len(pairs), BATCH):
            rows = [[self.tokenizer.bos_token_id, *before, *judged] for before, judged in pairs[start : start + BATCH]]
            ids = torch.full((len(rows), max(map(len, rows))), self.tokenizer.pad_token_id)
            labels = torch.full_like(ids, -100)
            for i, (row, (before, judged)) in enumerate(zip(rows, pairs[start : start + BATCH], strict=True)):
                ids[i, : len(row)] = torch.tensor(row)
                first = 1 + len(before) + (judged[0] == self.vocab.image_start)
                labels[i, first : len(row)] = ids[i, first : len(row)]
            found += llm.token_losses(self.model, ids, labels).sum(1).tolist()
        return found

    def per_token(self, pairs: list[tuple[list[int], list[int]]]) -> float:
        tokens = sum(len(judged) - (judged[0] == self.vocab.image_start) for _, judged in pairs)
        return sum(self.losses(pairs)) / tokens

    def unigram(self, part) -> float:
        """Nats per token of held-out documents by the frequencies of the training part (plus one)."""

        def tokens(document) -> list[int]:
            ids = part(document)
            return ids[1:] if ids[0] == self.vocab.image_start else ids

        counts = Counter(id for document in self.train for id in tokens(document))
        size = self.vocab.size + self.vocab.map.size + 1 if part == self.image else data.TEXT_TOKENS
        total = sum(counts.values()) + size
        held_out = [id for document in self.documents for id in tokens(document)]
        return -sum(math.log((counts[id] + 1) / total) for id in held_out) / len(held_out)

    def modality_losses(self) -> dict[str, dict[str, float]]:
        """Each modality behind the other, right and of another photograph."""
        others = self.documents[1:] + self.documents[:1]
        figures = {}
        for name, before, judged in (("image", self.text, self.image), ("text", self.image, self.text)):
            figures[name] = {
                "right": self.per_token([(before(d), judged(d)) for d in self.documents]),
                "shuffled": self.per_token(
                    [(before(o), judged(d)) for o, d in zip(others, self.documents, strict=True)]
                ),
                "unigram": self.unigram(judged),
            }
        return figures

    def groups(self) -> Tensor:
        """Ten held-out pictures for each one, itself first: their numbers, [B, 10]."""
        draw, everyone = random.Random(0), range(len(self.documents))
        return torch.tensor([[i, *draw.sample([j for j in everyone if j != i], CANDIDATES - 1)] for i in everyone])

    def matching(self) -> dict[str, float]:
        """How often, among ten pictures, a caption's own gains the most likelihood by it."""
        alone, groups = torch.tensor(self.losses([([], self.image(d)) for d in self.documents])), self.groups()
        pairs = [
            (self.text(self.documents[group[0]]), self.image(self.documents[j])) for group in groups for j in group
        ]
        gain = alone[groups] - torch.tensor(self.losses(pairs)).view(-1, CANDIDATES)
        return {"images": len(groups), **share(int((gain.argmax(1) == 0).sum()), len(groups))}

    def recognition(self, weights: Path) -> dict[str, float]:
        """How often a network finds, among ten photographs, the one whose caption a written picture followed.

        Photographs are decoded from their own codes. The features are centered, so that what all pictures share does
        not count.
        """
        overlay = {"pretrained_cfg_overlay": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}}
        network = Teacher("mobilenetv2_100", weights=str(weights), kwargs={"pad_type": "same", **overlay})
        judge = Classifier(load_classifier(network), [])
        torch.manual_seed(0)
        written = [
            parse_ids(row, self.vocab)[0].encoding
            for start in range(0, len(self.documents), BATCH)
            for row in self.pictures(self.documents[start : start + BATCH], True, SETTINGS["top-p 0.9"])
        ]
        own = [self.vocab.to_encoding([self.image(document)]) for document in self.documents]
        made, real = (
            F.normalize(features - features.mean(0), dim=-1)
            for features in (
                torch.cat([judge(to_tensor(self.visual.decode(picture)[0])[None])[0] for picture in pictures])
                for pictures in (written, own)
            )
        )
        groups = self.groups()
        likeness = (made[:, None] * real[groups]).sum(-1)
        return {"images": len(groups), **share(int((likeness.argmax(1) == 0).sum()), len(groups))}

    @torch.no_grad()
    def pictures(self, documents: list, grammar: bool, options: dict) -> Tensor:
        """Ids written behind captions and an image start, [B, L]; captions are padded on the left."""
        prompts = [[self.tokenizer.bos_token_id, *self.text(d), self.vocab.image_start] for d in documents]
        longest = max(map(len, prompts))
        ids = torch.full((len(prompts), longest), self.tokenizer.pad_token_id)
        for row, prompt in zip(ids, prompts, strict=True):
            row[longest - len(prompt) :] = torch.tensor(prompt)
        new = self.longest
        rules = ImageGrammar(self.vocab, max_tokens=data.MAX_TOKENS, eos=self.tokenizer.eos_token_id, max_images=1)
        processors = [ImageLogitsProcessor(rules, longest, new)] if grammar else []
        ids = ids.to(llm.DEVICE)
        rows = self.model.generate(
            ids,
            attention_mask=(ids != self.tokenizer.pad_token_id).long(),
            max_new_tokens=new,
            logits_processor=processors,
            pad_token_id=self.tokenizer.pad_token_id,
            **options,
        )
        return rows[:, longest - 1 :].cpu()

    def share_of_images(self, grammar: bool, count: int) -> dict[str, dict[str, float]]:
        """Generations that begin with one whole image, by sampling setting."""
        torch.manual_seed(0)
        each, found = -(-count // len(SETTINGS)), {}
        for name, options in SETTINGS.items():
            documents = (self.documents * (each // len(self.documents) + 1))[:each]
            good = 0
            for start in range(0, each, BATCH):
                for row in self.pictures(documents[start : start + BATCH], grammar, options):
                    segments = parse_ids(row, self.vocab)
                    good += segments[0].kind == "image" and len(segments[0].codes) <= data.MAX_TOKENS
            found[name] = {"generations": each, **share(good, each)}
        return found

    @torch.no_grad()
    def caption(self, document) -> str:
        prompt = torch.tensor([[self.tokenizer.bos_token_id, *self.image(document)]], device=llm.DEVICE)
        rules = ImageGrammar(self.vocab, max_tokens=data.MAX_TOKENS, eos=self.tokenizer.eos_token_id, max_images=0)
        ids = self.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=30,
            pad_token_id=self.tokenizer.pad_token_id,
            num_beams=3,
            logits_processor=[ImageLogitsProcessor(rules, prompt.shape[1])],
        )
        return self.tokenizer.decode(ids[0, prompt.shape[1] :], skip_special_tokens=True).strip()

    def page(self) -> str:
        torch.manual_seed(1)
        shown = self.documents[:: max(1, len(self.documents) // SHOWN)][:SHOWN]
        written = self.pictures(shown, True, {"do_sample": True, "temperature": 0.9})
        rows = []
        for document, ids in zip(shown, written, strict=True):
            (painted,) = self.visual.decode(parse_ids(ids, self.vocab)[0].encoding)
            (real,) = self.visual.decode(self.vocab.to_encoding([self.image(document)]))
            (words,) = (s for s in document.segments if isinstance(s, str))
            cells = [_picture(real), html.escape(self.caption(document)), html.escape(words), _picture(painted)]
            rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
        head = (
            "<tr><th>picture (its codes)</th><th>caption written for it</th>"
            "<th>its own caption</th><th>picture written for that</th></tr>"
        )
        style = "<style>body{font:16px sans-serif}td,th{padding:8px;max-width:20em}</style>"
        return (
            f"<!doctype html><meta charset=utf-8><title>any to any</title>{style}<table>{head}{''.join(rows)}</table>\n"
        )


def share(right: int, count: int) -> dict[str, float]:
    """With Wilson's 95 % interval."""
    z, p = 1.96, right / count
    middle, half = p + z * z / (2 * count), z * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    low, high = ((middle + sign * half) / (1 + z * z / count) for sign in (-1, 1))
    return {"share": round(p, 4), "low": round(low, 4), "high": round(high, 4)}


def _picture(image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f'<img width=128 src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what train.py wrote")
    parser.add_argument(
        "--generations", type=int, default=1000, help="with the grammar, and as many without (default: %(default)s)"
    )
    parser.add_argument("--judge", type=Path, help="weights of a MobileNetV2 that recognizes written pictures")
    options = parser.parse_args()
    evaluation = Evaluation(options.folder)
    steps = {
        "losses": evaluation.modality_losses,
        "matching": evaluation.matching,
        "with grammar": lambda: evaluation.share_of_images(True, options.generations),
        "without grammar": lambda: evaluation.share_of_images(False, options.generations),
    }
    if options.judge:
        steps["recognition"] = lambda: evaluation.recognition(options.judge)
    figures = {}
    for name, step in steps.items():
        figures[name] = step()
        print(json.dumps({name: figures[name]}), flush=True)
        (options.folder / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    (options.folder / "report.html").write_text(evaluation.page(), encoding="utf-8")


if __name__ == "__main__":
    main()
