"""`ImageLogitsProcessor`: the image grammar for `generate` of transformers, which takes any callable. Nothing here
imports it.
"""

from collections.abc import Sequence

from torch import Tensor

from dyntok.llm.grammar import UNLIMITED, ImageGrammar
from dyntok.llm.mask import GrammarMask


class ImageLogitsProcessor:
    """For `generate(logits_processor=[...])` of transformers: greedy, sampling, beams, guidance, left padding, several
    prompts.

    >>> inputs = tokenizer(["A dog: "], return_tensors="pt")
    >>> only_pictures = ImageLogitsProcessor(grammar, prompt_length=inputs["input_ids"].shape[1], max_new_tokens=300)
    >>> model.generate(**inputs, max_new_tokens=300, logits_processor=[only_pictures])

    prompt_length: where generation begins; images that the prompt finished do not count
    max_new_tokens: where given, an image is ended in time and not begun where it would not fit

    It keeps nothing from step to step, so beams may be reordered and a processor may be used again for prompts of the
    same length.
    """

    def __init__(
        self, grammars: ImageGrammar | Sequence[ImageGrammar], prompt_length: int, max_new_tokens: int | None = None
    ) -> None:
        self._mask = GrammarMask(grammars)
        self._grammars, self.prompt_length, self.max_new_tokens = grammars, prompt_length, max_new_tokens

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Ids so far [R, L] and scores [R, V] to scores [R, V]."""
        if self._mask.device != scores.device:
            self._mask = GrammarMask(self._grammars, scores.device)
        room = (
            UNLIMITED if self.max_new_tokens is None else self.prompt_length + self.max_new_tokens - input_ids.shape[1]
        )
        return self._mask.constrain(scores, self._mask.scan(input_ids, self.prompt_length), room)
