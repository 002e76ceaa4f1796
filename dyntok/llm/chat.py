"""Conversations through a chat template, with pictures; and which part of them a model learns: the assistant's turns.

The template writes marks in place of pictures and around the assistant's contents. The marks tell where those came to
stand, and are then replaced or removed.
"""

import base64
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import count
from typing import Any
from urllib.parse import unquote

from dyntok.errors import CodeError
from dyntok.image import ImageSource
from dyntok.llm.packing import IGNORED
from dyntok.structure import brief
from dyntok.validation import counted

Message = Mapping[str, Any]
Fetch = Callable[[str], ImageSource]  # an http address to a picture
_REASONING = "reasoning_content"  # where messages have their thoughts apart from the content
_OPENING, _CLOSING = re.compile(r"<think>\n*"), re.compile(r"</think>\n*")
_OPENING_AT_END = re.compile(r"<think>\n*\Z")


@dataclass(frozen=True)
class ImagePlace:
    """The place of a picture in a content."""


@dataclass(frozen=True)
class Rendered:
    """A conversation as text.

    turns: where the assistant's contents begin and end in it; None where the template changed them, or where the
        assistant calls tools
    """

    text: str
    turns: list[tuple[int, int]] | None


def flatten_messages(
    messages: Sequence[Message], images: list[ImageSource], *, local_paths: bool = True, fetch: Fetch | None = None
) -> list[dict[str, Any]]:
    """Returns messages whose contents are lists of texts and `ImagePlace`s, and appends their pictures to `images`.

    local_paths: whether pictures may be paths and file:// addresses
    fetch: gets pictures of http addresses; None: such addresses are refused

    Raises `CodeError` on messages, contents, parts and pictures of another form.
    """
    if isinstance(messages, str) or not isinstance(messages, Iterable):
        raise CodeError(f"a conversation is {brief(messages)}, expected a list of messages")
    messages = list(messages)
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise CodeError(f'a message is {brief(message)}, expected {{"role": ..., "content": ...}}')
    sources = _Sources(local_paths, fetch)
    return [{**message, "content": _flat(message.get("content") or [], images, sources)} for message in messages]


def _flat(content: Any, images: list[ImageSource], sources: "_Sources") -> list[str | ImagePlace]:
    if isinstance(content, str):
        return [content]
    if not isinstance(content, Sequence):
        raise CodeError(f"a content is {brief(content)}, expected text or a list of parts")
    parts: list[str | ImagePlace] = []
    for part in content:
        if not isinstance(part, Mapping):
            raise CodeError(f"a part of a message is {brief(part)}, expected a mapping with its type")
        part = {name: value for name, value in part.items() if value is not None}  # tables fill all columns
        if part.get("type") == "text" and isinstance(part.get("text"), str):
            parts.append(part["text"])
        else:
            images.append(sources.picture(part))
            parts.append(ImagePlace())
    return parts


@dataclass(frozen=True)
class _Sources:
    """Where the pictures of a chat may come from."""

    local_paths: bool
    fetch: Fetch | None

    def picture(self, part: Mapping[str, Any]) -> ImageSource:
        """Returns the picture of a part, in any of the forms that chats have."""
        kind = part.get("type")
        if kind == "image_url" and "image_url" in part:
            link = part["image_url"]
            return self._linked(link.get("url") if isinstance(link, Mapping) else link)
        if kind == "image":
            for name in ("image", "path"):
                if name in part:
                    source = part[name]
                    is_link = isinstance(source, str) and source.startswith(("data:", "file://", "http://", "https://"))
                    return self._linked(source) if is_link else self._allowed(source)
            if "url" in part:
                return self._linked(part["url"])
            if "base64" in part:
                return _decoded(part["base64"])
        raise CodeError(
            f"a part of a message is {kind!r} with {', '.join(part)}; "
            "expected text, image with image, path, url or base64, or image_url"
        )

    def _allowed(self, source: ImageSource) -> ImageSource:
        if not self.local_paths and isinstance(source, str | os.PathLike):
            raise CodeError(
                f"a picture is the local file {str(source)[:60]!r}, and this processor was made with "
                "local_paths=False; give the picture's bytes, or a data URI"
            )
        return source

    def _linked(self, address: str) -> ImageSource:
        if not isinstance(address, str):
            raise CodeError(f"the address of a picture is {brief(address)}, expected text")
        if address.startswith("data:"):
            head, _, data = address.partition(",")
            if not head.endswith(";base64"):
                raise CodeError(f"a data URI begins with {head[:60]!r}, expected data:image/...;base64,...")
            return _decoded(data)
        if address.startswith("file://"):
            return self._allowed(unquote(address.removeprefix("file://")))
        if not address.startswith(("http://", "https://")):
            raise CodeError(f"a picture is at {address[:60]!r}, expected a data URI, file://, http:// or https://")
        if self.fetch is None:
            raise CodeError(
                f"a picture is at {address[:60]!r}, and dyntok downloads nothing by itself; make the processor with "
                "fetch=dyntok.llm.fetch_image to allow it, or give the picture itself, a path or a data URI"
            )
        return self.fetch(address)


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (TypeError, ValueError) as error:
        raise CodeError(f"a picture of a message is no base64: {error}") from error


def render(
    tokenizer: Any, messages: Sequence[Message], pictures: Sequence[str], options: Mapping[str, Any]
) -> Rendered:
    """Returns the conversation with its pictures as text.

    messages: of `flatten_messages`. pictures: as text, in order. options: of the tokenizer's `apply_chat_template`.

    Raises `CodeError` where the template does not write every picture once.
    """
    texts = [str(part) for message in messages for part in message["content"]]
    marks = _Marks.unlike([*texts, str(options), str([message.get(_REASONING) for message in messages])])

    def write(mark: Callable[[str], str]) -> str:
        plain = []
        for message in messages:
            content = "".join(marks.picture if isinstance(part, ImagePlace) else part for part in message["content"])
            plain.append({**message, "content": content})
            if message["role"] == "assistant":
                plain[-1]["content"] = mark(content)
                if message.get(_REASONING) and mark is not str:
                    plain[-1][_REASONING] = marks.thought + message[_REASONING]
        return tokenizer.apply_chat_template(plain, **{**options, "tokenize": False})

    text = write(str)
    if text.count(marks.picture) != len(pictures):
        raise CodeError(
            f"the chat template wrote {text.count(marks.picture)} of {counted(len(pictures), 'picture')}; "
            "use another one"
        )
    without_turns = Rendered(_located(text, marks, pictures).text, None)
    if any(message["role"] == "assistant" and message.get("tool_calls") for message in messages):
        return without_turns  # templates write calls in forms of their own, where no mark would show the end
    assistants = sum(message["role"] == "assistant" for message in messages)
    for content_of in (str, str.strip):  # some templates strip contents, and marks would keep them from it
        marked = write(lambda content, of=content_of: marks.around(of(content)))  # type: ignore[misc]
        found = _located(marked, marks, pictures)
        if marks.removed(marked) == text and len(found.turns or []) == marked.count(marks.end) == assistants:
            return found
    return without_turns


@dataclass(frozen=True)
class _Marks:
    """Texts that a conversation does not contain."""

    picture: str
    begin: str
    thought: str  # after the tag that opens a thought
    end: str

    @classmethod
    def unlike(cls, texts: Sequence[str]) -> "_Marks":
        """Returns marks that none of the texts contains."""
        stem = next(stem for stem in (f"<mark{n}:" for n in count()) if not any(stem in text for text in texts))
        return cls(*(f"{stem}{name}>" for name in ("picture", "begin", "thought", "end")))

    def around(self, content: str) -> str:
        """Returns a content with marks. Templates may move its thought or drop it, so there are marks in it, too."""
        thinking = _OPENING.search(content)
        answer = [match.end() for match in _CLOSING.finditer(content)][-1:]
        places = [(0, self.begin), *((place, self.begin) for place in answer)]
        if thinking is not None:
            places.append((thinking.end(), self.thought))
        for place, mark in sorted(places, reverse=True):
            content = content[:place] + mark + content[place:]
        return content + self.end

    def removed(self, marked: str) -> str:
        """Returns a text without the marks of turns."""
        for mark in (self.begin, self.thought, self.end):
            marked = marked.replace(mark, "")
        return marked


def _located(marked: str, marks: _Marks, pictures: Sequence[str]) -> Rendered:
    """Returns the text with its pictures; each turn begins at the first mark that the template left of it."""
    names = "|".join(map(re.escape, (marks.picture, marks.begin, marks.thought, marks.end)))
    left, text, turns = iter(pictures), "", []
    start: int | None = None
    for piece in re.split(f"({names})", marked):
        if piece == marks.picture:
            text += next(left)
        elif piece == marks.begin:
            start = len(text) if start is None else start
        elif piece == marks.thought:
            opening = _OPENING_AT_END.search(text)
            start = (opening.start() if opening else len(text)) if start is None else start
        elif piece == marks.end:
            if start is not None:
                turns.append((start, len(text)))
            start = None
        else:
            text += piece
    return Rendered(text, turns)


def learned_labels(
    tokenizer: Any, ids: Sequence[int], rendered: Rendered, is_visual: Callable[[int], bool]
) -> list[int] | None:
    """Returns the ids of the assistant's turns, each with what ends it; -100 elsewhere.

    A turn ends with the first special token after its content, and the whitespace before that token belongs to it.
    Where the template writes no special token there, the token after the content ends the turn.

    is_visual: whether an id is a visual token, which is special, too, and ends no turn

    Returns None where the turns are not known, and where other text stands between a content and the special token.
    """
    if rendered.turns is None:
        return None
    text, labels = rendered.text, [IGNORED] * len(ids)

    def ids_of(length: int) -> int:
        """Returns how many ids the first characters have, without a token that goes on after them."""
        return _common(tokenizer.encode(text[:length], add_special_tokens=False), ids)

    @cache
    def is_end(id: int) -> bool:
        other = is_visual(id) or id == tokenizer.unk_token_id
        return not other and tokenizer.decode([id]) != tokenizer.decode([id], skip_special_tokens=True)

    limits = [start for start, _ in rendered.turns[1:]] + [len(text)]
    for (start, stop), limit in zip(rendered.turns, limits, strict=False):  # without turns there is a limit alone
        first, last = ids_of(start), ids_of(stop)
        end = next((place for place in range(last, ids_of(limit)) if is_end(ids[place])), None)
        if end is not None:
            after = text[stop:limit]
            if ids_of(stop + len(after) - len(after.lstrip())) != end:
                return None
            last = end
        labels[first : last + 1] = ids[first : last + 1]
    return labels


def _common(prefix: Sequence[int], ids: Sequence[int]) -> int:
    """Returns how many ids both begin with. Where a token crosses the end of a prefix, it is not among them."""
    for i, (one, other) in enumerate(zip(prefix, ids, strict=False)):
        if one != other:
            return i
    return min(len(prefix), len(ids))
