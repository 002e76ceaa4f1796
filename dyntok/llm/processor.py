"""Text and pictures in, ids out, and back: the processor of a model that writes pictures, in transformers' form.

`tokenizer` is one of transformers, extended by `extend_tokenizer`. Not here: which part of a
conversation is learned (`chat.py`).
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from typing_extensions import Unpack

from dyntok.checkpoint.hub import PushOptions, upload
from dyntok.encoding import Encoding
from dyntok.errors import CodeError, ConfigError, FingerprintError
from dyntok.image import ImageSource, is_single
from dyntok.llm.chat import Fetch, Message, flatten_messages, learned_labels, render
from dyntok.llm.parsing import Segment, parse_ids
from dyntok.llm.processor_files import load_parts, save_parts
from dyntok.llm.row_batch import RowOptions, batch_of
from dyntok.policy import KeepOptions
from dyntok.structure import brief, require_methods, require_type
from dyntok.tokenizer import DynamicVisualTokenizer, Fit, Size
from dyntok.validation import counted
from dyntok.vocab import VisualVocab

PLACEHOLDER = "<image>"


class VisualProcessor:
    """Puts the ids of pictures where the text has a placeholder, in the layout of the vocabulary.

    tokenizer      of the language model, with a token for every id of `vocab` (`extend_tokenizer`)
    visual         the tokenizer of pictures
    placeholder    what stands for a picture in a text
    policy         how many tokens a picture gets: `budget`, `threshold`, `max_tokens` of
                   `DynamicVisualTokenizer.encode`
    shape          how a picture meets its grid: `fit`, `max_patches`, `size` of `encode`
    visual_tokens  whether texts may spell pictures, such as `<|image|><|v:0001|><|/image|>`, as a model wrote them
                   before. By default such texts are refused, since a user's text could bring a picture that way.
    local_paths    whether chats may name pictures on this machine, by a path or file:// address. A server that takes
                   chats from strangers needs False.
    fetch          gets the pictures of chats that are at http addresses, such as `fetch_image`. By default such
                   addresses are refused.

    >>> processor = VisualProcessor(tokenizer, tok, VisualVocab.of(tok, after=32000), max_tokens=96)
    >>> inputs = processor(text=["A photo: <image> What is it?"], images=[photo])
    >>> rows = model.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"])
    >>> pictures = processor.decode_images(rows)

    Raises `ConfigError` where the vocabulary is of another size than the codebook, or the tokenizer lacks its tokens;
    `FingerprintError` where the vocabulary belongs to another tokenizer of pictures.
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
        fit: Fit | None = None,
        max_patches: int | None = None,
        size: Size | None = None,
        visual_tokens: bool = False,
        local_paths: bool = True,
        fetch: Fetch | None = None,
    ) -> None:
        require_type("visual", visual, DynamicVisualTokenizer, "a tokenizer, as dyntok.load() returns one")
        require_type("vocab", vocab, VisualVocab, "a VisualVocab")
        require_methods("tokenizer", tokenizer, ["get_vocab"], "a tokenizer of transformers")
        if vocab.size != visual.config.codebook.size:
            raise ConfigError(
                f"the vocabulary has {vocab.size} codes, but the tokenizer has {visual.config.codebook.size}; "
                "make it for this tokenizer: VisualVocab.of(tokenizer, after=...)"
            )
        if None not in (vocab.fingerprint, visual.fingerprint) and vocab.fingerprint != visual.fingerprint:
            raise FingerprintError(
                f"the vocabulary belongs to the tokenizer {vocab.fingerprint}, expected that of {visual.fingerprint}"
            )
        known = tokenizer.get_vocab()
        if missing := [token for token, id in vocab.tokens.items() if known.get(token) != id]:
            raise ConfigError(
                f"the tokenizer has no token {missing[0]} with its id; call extend_tokenizer(tokenizer, vocab) first"
            )
        self.tokenizer, self.visual, self.vocab, self.placeholder = tokenizer, visual, vocab, placeholder
        self.visual_tokens, self.local_paths, self.fetch = visual_tokens, local_paths, fetch
        self.policy: KeepOptions = {"budget": budget, "threshold": threshold, "max_tokens": max_tokens}
        if vocab.layout in ("map", "lattice"):
            self.policy["places"] = vocab.layout
        self.shape: dict[str, Any] = {"fit": fit, "max_patches": max_patches, "size": size}
        visual.image_config(**self.shape)  # refuses now what every picture would fail at

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Writes the processor beside a language model: tokenizer, `dyntok.json`, options, pictures in `visual/`.

        `local_paths` and `fetch` are for whoever loads it to choose, and are not written.
        """
        options: dict[str, Any] = {name: self.policy.get(name) for name in ("budget", "threshold", "max_tokens")}
        options |= {"placeholder": self.placeholder, "visual_tokens": self.visual_tokens}
        options |= {name: value for name, value in self.shape.items() if value is not None}
        save_parts(folder, self.tokenizer, self.visual, self.vocab, options)

    def push_to_hub(self, repo_id: str, **push_options: Unpack[PushOptions]) -> str:
        """Sends what `save_pretrained` writes to the hub, where a language model may be already.

        push_options: private, token, branch, create_pr, commit_message.

        Returns the commit's address. Raises `CheckpointError`.
        """
        with TemporaryDirectory() as place:
            folder = Path(place)
            self.save_pretrained(folder)
            names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
            return upload(folder, repo_id, names, **push_options)

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike, **options: Any) -> "VisualProcessor":
        """Returns the processor of a folder or a hub repository.

        The tokenizer of pictures is in `visual/`, or the folder itself is its checkpoint.

        options: those of the constructor, in place of what was saved; revision, token, cache_dir, local_files_only and
            force_download of the hub; device

        Raises `CheckpointError` on missing files, `ConfigError` on other options.
        """
        tokenizer, visual, vocab, known = load_parts(name, options)
        return cls(tokenizer, visual, vocab, **known)

    def __call__(
        self,
        text: str | Sequence[str],
        images: ImageSource | Sequence[ImageSource] | Sequence[Sequence[ImageSource]] | None = None,
        *,
        add_special_tokens: bool = True,
        padding: bool | str = True,
        truncation: bool | str = False,
        max_length: int | None = None,
        return_tensors: Literal["pt", "np"] | None = "pt",
    ) -> Any:
        """Returns a `BatchFeature` of transformers with `input_ids`, `attention_mask` and `labels`, int64 [B, L] each.

        Rows are padded on the tokenizer's side; labels there are -100.

        images: in the order of the placeholders; one, a list over all texts, or a list for each text
        padding, truncation, max_length, return_tensors: see `RowOptions`; no picture is cut

        Raises `CodeError` where texts have more or fewer placeholders than there are images, and where a text spells
        visual tokens; `ImageError` on a bad image; `ConfigError` where rows of different lengths are not padded, or
        can't be: the tokenizer has no pad token.
        """
        texts = [text] if isinstance(text, str) else list(text)
        pieces = [one.split(self.placeholder) for one in texts]
        written = iter(self._written(images, [len(parts) - 1 for parts in pieces]))
        full, pictures = [], []
        for parts in pieces:
            own = [next(written) for _ in parts[1:]]
            full.append(parts[0] + "".join(picture + part for picture, part in zip(own, parts[1:], strict=True)))
            pictures.append(own)
        options = RowOptions(padding, truncation, max_length, return_tensors)
        rows = [self._encoded(*row, add_special_tokens) for row in zip(full, pictures, strict=True)]
        return batch_of(rows, rows, self.tokenizer, self.vocab, options)

    def apply_chat_template(self, messages: Sequence[Any], **options: Any) -> Any:
        """Returns conversations, written by the tokenizer's own chat template, in the form of a call.

        messages: of one conversation, or a list of such: `{"role": ..., "content": ...}`, where content is text or a
            list of `{"type": "text", "text": ...}` and `{"type": "image", "image": ...}`. Pictures may also be
            `"path"`, `"base64"`, `"url"` (a data URI, file://, or http where `fetch` is given), or an `image_url`.
            Paths and file:// are refused where `local_paths` is false.
            The placeholder in a text is text like any other.
        options: padding, truncation, max_length and return_tensors of a call, and those of the tokenizer's
            `apply_chat_template`, such as add_generation_prompt.

        Labels are the turns of the assistant, each with the token that ends it; the rest is -100. Where the template
        changes those turns so that they can't be found, the result has no labels. Nor has it labels where a turn calls
        tools (`tool_calls`), and where text stands between a content and the special token that ends the turn.

        Raises `CodeError` on a content of another type, and what a call raises.
        """
        if not all(options.pop(name, True) for name in ("tokenize", "return_dict")):
            raise ConfigError("tokenize and return_dict are always True; the tokenizer itself writes plain text")
        shape = RowOptions(**{f.name: options.pop(f.name) for f in fields(RowOptions) if f.name in options})
        if isinstance(messages, str | Mapping) or not hasattr(messages, "__len__"):
            raise CodeError(f"messages are {brief(messages)}, expected a list of them")
        several = len(messages) > 0 and not isinstance(messages[0], Mapping)
        rows, labels = [], []
        for conversation in messages if several else [messages]:
            ids, learned = self._conversation(conversation, options)
            rows.append(ids)
            labels.append(learned)
        known = None if None in labels else labels
        return batch_of(rows, known, self.tokenizer, self.vocab, shape)

    def _conversation(self, messages: Sequence[Message], options: Mapping[str, Any]) -> tuple[list[int], Any]:
        """Returns the ids of a conversation, and its labels; None where they can't be found."""
        images: list[ImageSource] = []
        plain = flatten_messages(messages, images, local_paths=self.local_paths, fetch=self.fetch)
        written = self._written(images, [len(images)])
        rendered = render(self.tokenizer, plain, written, options)
        ids = self._encoded(rendered.text, written, add_special_tokens=False)  # the template writes them
        return ids, learned_labels(self.tokenizer, ids, rendered, self.vocab.is_visual)

    def decode_images(
        self, ids: Tensor | Sequence[Sequence[int]], *, truncated: bool = False
    ) -> list[list[Image.Image]]:
        """Returns the pictures in every row of ids, such as `generate` gives.

        A picture without a grid of its own gets the tokenizer's.

        truncated: include the pictures that the end of a row cut off
        """
        kinds = ("image", "truncated") if truncated else ("image",)
        segments = [[s for s in parse_ids(row, self.vocab) if s.kind in kinds and self._fits(s)] for row in ids]
        flat = [segment for row in segments for segment in row]
        pictures: dict[int, Image.Image] = {}
        for places in (True, False):  # an Encoding has positions for all of its images or for none
            chosen = [i for i, segment in enumerate(flat) if (segment.positions is not None) == places]
            if not chosen:
                continue
            encoding = Encoding.pack(
                [flat[i].codes for i in chosen],
                [flat[i].positions for i in chosen] if places else None,
                torch.tensor([flat[i].grid or self.visual.grid for i in chosen]),
            )
            pictures |= zip(chosen, self.visual.decode(encoding), strict=True)
        ordered = iter(pictures[i] for i in range(len(flat)))
        return [[next(ordered) for _ in row] for row in segments]

    def _fits(self, segment: Segment) -> bool:
        """Returns whether the tokenizer can decode an image of this grid and length."""
        grid = segment.grid or self.visual.grid
        return 0 < len(segment.codes) <= grid[0] * grid[1] and (self.visual.any_grid or grid == self.visual.grid)

    def _encoded(self, text: str, pictures: Sequence[str], add_special_tokens: bool) -> list[int]:
        """Returns the ids of a text that contains these pictures. Raises `CodeError` where it spells others."""
        ids = self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        if not self.visual_tokens:
            written = sum(one.count("<|") for one in pictures)  # every visual token begins so
            if spelled := sum(map(self.vocab.is_visual, ids)) - written:
                raise CodeError(
                    f"a text spells {counted(spelled, 'visual token')} such as <|image|>; give pictures as images, or "
                    "make the processor with visual_tokens=True to accept such texts"
                )
        return ids

    def _written(self, images: Any, wanted: list[int]) -> list[str]:
        """Returns every image as text, in order. Raises `CodeError` unless each text has the images it wants."""
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
        return self.vocab.to_text(self.visual.encode(images, **self.policy, **self.shape))
