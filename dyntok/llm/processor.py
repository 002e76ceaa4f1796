"""Text and pictures in, ids out, and back: the processor of a model that writes pictures, in the shape that
transformers' users know.

Needs torch alone; `tokenizer` is one of transformers, extended by `extend_tokenizer`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dyntok.encoding import Encoding
from dyntok.errors import CodeError, ConfigError
from dyntok.image import ImageSource, is_single
from dyntok.llm.packing import IGNORED
from dyntok.llm.parsing import parse_ids
from dyntok.policy import KeepOptions
from dyntok.tokenizer import DynamicVisualTokenizer
from dyntok.validation import counted
from dyntok.vocab import VisualVocab

PLACEHOLDER = "<image>"


class VisualProcessor:
    """Puts the codes of pictures where the text has a placeholder.

    tokenizer    of the language model, with a token for every id of `vocab` (`extend_tokenizer`)
    visual       the tokenizer of pictures
    placeholder  what stands for a picture in a text
    policy       how many tokens a picture gets: `budget`, `threshold`, `max_tokens` of `DynamicVisualTokenizer.encode`

    >>> processor = VisualProcessor(tokenizer, dyntok.load(), vocab, max_tokens=96)
    >>> inputs = processor(text=["A photo: <image> What is it?"], images=[photo])
    >>> rows = model.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"])
    >>> pictures = processor.decode_images(rows)

    Raises `ConfigError` where the vocabulary is of another size than the codebook, or the tokenizer lacks its tokens.
    """

    def __init__(
        self,
        tokenizer: Any,
        visual: DynamicVisualTokenizer,
        vocab: VisualVocab,
        *,
        placeholder: str = PLACEHOLDER,
        budget: int | float | None = None,
        threshold: float | None = None,
        max_tokens: int | None = None,
    ) -> None:
        if vocab.size != visual.config.codebook.size:
            raise ConfigError(
                f"the vocabulary has {vocab.size} codes and the tokenizer {visual.config.codebook.size}, "
                "expected as many"
            )
        known = tokenizer.get_vocab()
        if missing := [token for token, id in vocab.tokens.items() if known.get(token) != id]:
            raise ConfigError(
                f"the tokenizer has no token {missing[0]} with its id; call extend_tokenizer(tokenizer, vocab) first"
            )
        self.tokenizer, self.visual, self.vocab, self.placeholder = tokenizer, visual, vocab, placeholder
        self.policy: KeepOptions = {"budget": budget, "threshold": threshold, "max_tokens": max_tokens}

    def __call__(
        self,
        text: str | Sequence[str],
        images: ImageSource | Sequence[ImageSource] | Sequence[Sequence[ImageSource]] | None = None,
        *,
        padding: bool = True,
        add_special_tokens: bool = True,
    ) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask`, `labels` (-100 in the padding), int64 [B, L] each; padded on the tokenizer's
        side.

        images: in the order of the placeholders; one, a list over all texts, or a list for each text. Text that spells
            codes, as a model wrote them before, is read as such.

        Raises `CodeError` where texts have more or fewer placeholders than there are images, `ImageError` on a bad
        image, `ConfigError` where rows of different lengths are not padded, or can't be: the tokenizer has no pad
        token.
        """
        texts = [text] if isinstance(text, str) else list(text)
        written = iter(self._written(images, [self._count(one) for one in texts]))
        pieces = [one.split(self.placeholder) for one in texts]
        full = [
            "".join(piece + (next(written) if i + 1 < len(parts) else "") for i, piece in enumerate(parts))
            for parts in pieces
        ]
        rows = [self.tokenizer.encode(one, add_special_tokens=add_special_tokens) for one in full]
        longest = max(map(len, rows), default=0)
        ragged = any(len(row) < longest for row in rows)
        pad = self.tokenizer.pad_token_id
        if ragged and (not padding or pad is None):
            why = "padding is off" if not padding else "the tokenizer has no pad token; set tokenizer.pad_token"
            raise ConfigError(f"the rows have {min(map(len, rows))} to {longest} ids, and {why}")
        left = self.tokenizer.padding_side == "left"

        def padded(values: list[list[int]], fill: int) -> Tensor:
            blanks = [[fill] * (longest - len(row)) for row in values]
            return torch.tensor(
                [blank + row if left else row + blank for row, blank in zip(values, blanks, strict=True)],
                dtype=torch.long,
            )

        masks = [[1] * len(row) for row in rows]
        return {
            "input_ids": padded(rows, pad or 0),
            "attention_mask": padded(masks, 0),
            "labels": padded(rows, IGNORED),
        }

    def apply_chat_template(self, messages: Sequence[dict[str, Any]], **options: Any) -> dict[str, Tensor]:
        """One conversation through the tokenizer's own chat template, and then as a call.

        messages: `{"role": ..., "content": ...}`, where content is text or a list of `{"type": "text", "text": ...}`
            and `{"type": "image", "image": ...}`. options: those of the tokenizer's `apply_chat_template`, such as
            add_generation_prompt.

        Raises `CodeError` on a content of another type, and what a call raises.
        """
        images: list[ImageSource] = []
        plain = [{**message, "content": self._flat(message["content"], images)} for message in messages]
        text = self.tokenizer.apply_chat_template(plain, **{**options, "tokenize": False})
        return self(text, images, add_special_tokens=False)  # the template writes them

    def decode_images(
        self, ids: Tensor | Sequence[Sequence[int]], *, truncated: bool = False
    ) -> list[list[Image.Image]]:
        """Returns the pictures in every row of ids, such as `generate` gives.

        truncated: include the pictures that the end of a row cut off
        """
        kinds = ("image", "truncated") if truncated else ("image",)
        segments = [[s for s in parse_ids(row, self.vocab) if s.kind in kinds and self._fits(s.codes)] for row in ids]
        flat = [segment for row in segments for segment in row]
        with_places = [segment.positions is not None for segment in flat]
        # with and without positions, since an Encoding has them for all of its images or for none
        pictures: dict[int, Image.Image] = {}
        for places in (True, False):
            chosen = [i for i, has in enumerate(with_places) if has == places]
            if chosen:
                codes = [list(flat[i].codes) for i in chosen]
                positions = [list(flat[i].positions) for i in chosen] if places else None
                pictures |= zip(
                    chosen, self.visual.decode(Encoding.pack(codes, positions, self.visual.grid)), strict=True
                )
        ordered = iter(pictures[i] for i in range(len(flat)))
        return [[next(ordered) for _ in row] for row in segments]

    def _fits(self, codes: tuple[int, ...]) -> bool:
        return 0 < len(codes) <= self.visual.grid[0] * self.visual.grid[1]

    def _count(self, text: str) -> int:
        return text.count(self.placeholder)

    def _written(self, images: Any, wanted: list[int]) -> list[str]:
        """Every image as text, in order."""
        if images is None:
            images = []
        elif is_single(images):
            images = [images]
        images = list(images)
        if images and not is_single(images[0]):
            counts = [len(row) for row in images]
            if counts != wanted:
                raise CodeError(
                    f"the texts contain {wanted} {self.placeholder} placeholders, but {counts} images were given"
                )
            images = [image for row in images for image in row]
        if len(images) != sum(wanted):
            places = f"{sum(wanted)} {self.placeholder} placeholder{'' if sum(wanted) == 1 else 's'}"
            raise CodeError(
                f"texts contain {places}, but {counted(len(images), 'image')} "
                f"{'was' if len(images) == 1 else 'were'} given"
            )
        if not images:
            return []
        encoding = self.visual.encode(images, **self.policy)
        positions = encoding.positions if self.vocab.patches else [None] * len(encoding)
        return [
            self.vocab.to_text(codes, positions=place) for codes, place in zip(encoding.codes, positions, strict=True)
        ]

    def _flat(self, content: Any, images: list[ImageSource]) -> str:
        if isinstance(content, str):
            return content
        parts = []
        for part in content:
            if part.get("type") == "text":
                parts.append(part["text"])
            elif part.get("type") == "image" and "image" in part:
                images.append(part["image"])
                parts.append(self.placeholder)
            else:
                raise CodeError(
                    f"a part of a message is {part.get('type')!r} with {', '.join(part)}; "
                    "expected text, or image with image"
                )
        return "".join(parts)
