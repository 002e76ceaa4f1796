"""Small vocabularies in every layout, and random grammars over them."""

from hypothesis import strategies as st

from dyntok import VisualVocab
from dyntok.llm import ImageGrammar
from dyntok.llm.grammar import UNLIMITED

EOS = 2
VOCABS = [
    VisualVocab.after(4, size=2),
    VisualVocab.after(4, size=2, patches=3),
    VisualVocab(size=2, offset=6, image_start=1, image_end=9),
    VisualVocab(size=2, offset=0, image_start=8, image_end=5),
    VisualVocab.after(4, size=2, layout="map", grid=(1, 5)),  # two blocks, the second with one patch
    VisualVocab.after(4, size=2, layout="map", grid=(3, 2)),
    VisualVocab.after(4, size=2, layout="map", sides=2),
    VisualVocab.after(4, size=2, layout="lattice", grid=(2, 2)),
    VisualVocab.after(4, size=2, layout="lattice", sides=2),
    VisualVocab.after(4, size=2, patches=4, sides=2),
    VisualVocab.after(4, size=2, layout="none", grid=(2, 2)),
]
LAYOUTS = [f"{vocab.layout}-{vocab.grid or vocab.sides}-{vocab.offset}" for vocab in VOCABS]


@st.composite
def grammars(draw, vocab=None):
    vocab = vocab or draw(st.sampled_from(VOCABS))
    most = [draw(st.integers(1, 3)) for _ in range(draw(st.integers(1, 3)))]
    least = [draw(st.integers(1, min(most))) for _ in range(draw(st.integers(1, 3)))]
    low = draw(st.integers(0, 2))
    high = draw(st.sampled_from([UNLIMITED, low, low + 1]))
    text = draw(st.booleans())
    eos = EOS if EOS not in vocab.tokens.values() else 4
    size = draw(st.sampled_from([None, vocab.vocab_size + 2]))
    grid = draw(st.sampled_from([None, (2, 2)])) if vocab.sides else None
    return ImageGrammar(vocab, tuple(most), tuple(least), low, high, text, eos, size, grid)
