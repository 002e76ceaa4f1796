"""Engines for structured output, each with an `ImageGrammar` in its own words.

An engine says which ids may come next and takes one more id. Those over ids know two ids beyond the grammar's
vocabulary, which are never allowed.
"""

import numpy as np
import torch
from support.grammars import EOS

from dyntok.llm import ImageGrammar


def spelling(grammar: ImageGrammar) -> list[str]:
    """Every id's token as text."""
    known = {id: token for token, id in grammar.vocab.tokens.items()}
    words = {id: f"w{id}" for id in range(grammar.vocab_size)} | {EOS: "</s>"}
    return [known.get(id, words.get(id, f"unused{id}")) for id in range(grammar.vocab_size + 2)]


class XGrammar:
    def __init__(self, grammar: ImageGrammar, text: str | None = None, words: list[str] | None = None) -> None:
        import xgrammar

        words = words or spelling(grammar)
        info = xgrammar.TokenizerInfo(words, xgrammar.VocabType.RAW, vocab_size=len(words), stop_token_ids=[EOS])
        rules = xgrammar.Grammar.from_ebnf(text or grammar.to_xgrammar())
        self.matcher = xgrammar.GrammarMatcher(
            xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False).compile_grammar(rules)
        )
        self.mask = xgrammar.allocate_token_bitmask(1, len(words))

    def fill(self) -> None:
        self.matcher.fill_next_token_bitmask(self.mask)

    def allowed(self) -> list[int]:
        self.fill()
        bits = (self.mask[0][:, None] >> torch.arange(32)) & 1
        return bits.flatten().nonzero()[:, 0].tolist()

    def step(self, id: int) -> None:
        assert self.matcher.accept_token(id)


class Spelled(XGrammar):
    """llama.cpp's grammar over text, which xgrammar reads, too."""

    def __init__(self, grammar: ImageGrammar) -> None:
        super().__init__(grammar, grammar.to_gbnf(), spelling(grammar)[: grammar.vocab_size])


class LLGuidance:
    def __init__(self, grammar: ImageGrammar) -> None:
        from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

        class Words:
            eos_token_id, bos_token_id = EOS, None
            tokens = [word.encode() for word in spelling(grammar)]
            special_token_ids = sorted(grammar.vocab.tokens.values())

            def __call__(self, text: str) -> list[int]:
                return []

        tokenizer = LLTokenizer(TokenizerWrapper(Words()), n_vocab=grammar.vocab_size + 2)
        self.size, self.matcher = grammar.vocab_size + 2, LLMatcher(tokenizer, grammar.to_lark())

    def fill(self) -> bytes:
        return self.matcher.compute_bitmask()

    def allowed(self) -> list[int]:
        bits = np.unpackbits(np.frombuffer(self.fill(), np.uint8), bitorder="little")
        assert not self.matcher.is_error(), self.matcher.get_error()
        return bits[: self.size].nonzero()[0].tolist()

    def step(self, id: int) -> None:
        assert self.matcher.consume_token(id), self.matcher.get_error()


class Outlines:
    def __init__(self, grammar: ImageGrammar) -> None:
        from outlines_core import Guide, Index, Vocabulary

        words = {word: [id] for id, word in enumerate(spelling(grammar)[: grammar.vocab_size]) if id != EOS}
        self.guide = Guide(Index(grammar.to_regex(), Vocabulary(EOS, words)))

    def fill(self) -> list[int]:
        return self.guide.get_tokens()

    def allowed(self) -> list[int]:
        return sorted(self.fill())

    def step(self, id: int) -> None:
        self.guide.advance(id, return_tokens=False)
