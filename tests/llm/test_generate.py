"""`generate` of transformers under a grammar: prompts with left padding, caches, beams, each prompt with its limits."""

import pytest
import torch

transformers = pytest.importorskip("transformers")
from dyntok.llm import ImageGrammar, ImageLogitsProcessor, parse_ids  # noqa: E402
from dyntok.vocab import VisualVocab  # noqa: E402

EOS, PAD = 1, 0
VOCAB = VisualVocab.after(20, size=30, layout="map", sides=4)  # images of any grid up to 4 x 4
SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, head_dim=16)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cache_implementation": "static"},
        {"num_beams": 3},
        {"do_sample": True, "temperature": 2.0},
        {"guidance_scale": 3.0},
        {"guidance_scale": 3.0, "num_beams": 2},
    ],
    ids=["greedy", "static cache", "beams", "sampling", "guidance", "guidance with beams"],
)
def test_prompts_of_different_lengths_each_with_its_limits(options):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=VOCAB.vocab_size, max_position_embeddings=128, **SIZES)
    model = transformers.LlamaForCausalLM(config).eval()
    prompts = [[5, 6, 7, 8], [9]]
    longest = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (longest - len(prompt)) + prompt for prompt in prompts])
    exact = [{"max_tokens": 6, "min_tokens": 6, "grid": (3, 4)}, {"max_tokens": (4, 2), "min_tokens": (4, 2)}]
    grammars = [
        ImageGrammar(VOCAB, **limits, min_images=count, max_images=count, text=False, eos=EOS)
        for count, limits in enumerate(exact, start=1)
    ]
    rows = model.generate(
        ids,
        attention_mask=(ids != PAD).long(),
        max_new_tokens=60,
        logits_processor=[ImageLogitsProcessor(grammars, longest, 60)],
        eos_token_id=EOS,
        pad_token_id=PAD,
        **options,
    )
    first, second = ([s for s in parse_ids(row[longest:], VOCAB) if s.kind != "text"] for row in rows)
    assert [(image.kind, image.grid, len(image.codes)) for image in first] == [("image", (3, 4), 6)]
    assert [(image.kind, len(image.codes)) for image in second] == [("image", 4), ("image", 2)]
