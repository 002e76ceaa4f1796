"""llama.cpp under `ImageGrammar.to_gbnf()`: a toy Llama in GGUF writes text that holds pictures.

llama.cpp sees text. A model may spell a picture token letter by letter, which a random one does often.
"""

import json

import numpy as np
import pytest

from dyntok import VisualVocab
from dyntok.llm import ImageGrammar, parse_text

EOS, WIDTH, HEADS = 1, 64, 2


def write_model(path, tokens, vocab):
    """A Llama of one block with random weights."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(str(path), "llama")
    for add, value in (
        (writer.add_context_length, 512),
        (writer.add_embedding_length, WIDTH),
        (writer.add_block_count, 1),
        (writer.add_feed_forward_length, WIDTH),
        (writer.add_head_count, HEADS),
        (writer.add_layer_norm_rms_eps, 1e-5),
        (writer.add_rope_dimension_count, WIDTH // HEADS),
        (writer.add_vocab_size, len(tokens)),
        (writer.add_tokenizer_model, "gpt2"),
        (writer.add_tokenizer_pre, "default"),
        (writer.add_token_list, tokens),
        (writer.add_token_merges, ["a b"]),
        (writer.add_eos_token_id, EOS),
    ):
        add(value)
    special = gguf.TokenType.CONTROL
    visual = {*vocab.tokens.values(), EOS}
    writer.add_token_types([special if id in visual else gguf.TokenType.NORMAL for id in range(len(tokens))])
    random = np.random.default_rng(0)
    shapes = {"token_embd": (len(tokens), WIDTH), "output": (len(tokens), WIDTH), "output_norm": (WIDTH,)}
    shapes |= {f"blk.0.{name}": (WIDTH, WIDTH) for name in ("attn_q", "attn_k", "attn_v", "attn_output")}
    shapes |= {f"blk.0.{name}": (WIDTH, WIDTH) for name in ("ffn_gate", "ffn_up", "ffn_down")}
    shapes |= {f"blk.0.{name}": (WIDTH,) for name in ("attn_norm", "ffn_norm")}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["lattice", "map", "positions"])
def test_a_toy_llama_writes_pictures(layout, tmp_path):
    llama = pytest.importorskip("xllamacpp")
    words = ["<unk>", "</s>", *"abcdefghijklmnopqrstuvwxyz0123456789:/ <|>"]
    vocab = VisualVocab.after(
        len(words), size=300, layout=layout, grid=(4, 5), patches=20 if layout == "positions" else 0
    )
    tokens = [*(word.replace(" ", "Ġ") for word in words), *vocab.tokens]
    write_model(tmp_path / "toy.gguf", tokens, vocab)
    params = llama.CommonParams()
    params.model.path = str(tmp_path / "toy.gguf")
    params.n_ctx, params.n_parallel, params.warmup = 512, 1, False
    params.special = True  # pictures are special tokens, and belong to the text
    params.cpuparams.n_threads = 1
    server = llama.Server(params)
    grammar = ImageGrammar(vocab, max_tokens=(7, 3), min_tokens=(7, 3), min_images=2, max_images=2, text=False, eos=EOS)
    for seed in range(3):
        asked = {"prompt": [5, 6, 7], "n_predict": 450, "grammar": grammar.to_gbnf()}
        answer = server.handle_completions(asked | {"seed": seed, "temperature": 1.0})
        answer = json.loads(answer) if isinstance(answer, str) else answer
        text = answer["choices"][0]["text"].removesuffix("</s>")
        assert [(part.kind, len(part.codes)) for part in parse_text(text, vocab)] == [("image", 7), ("image", 3)]
