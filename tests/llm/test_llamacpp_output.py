"""A Llama with picture tokens in GGUF gives in llama.cpp what it gives in transformers."""

import json

import pytest
import torch

transformers = pytest.importorskip("transformers")
from dyntok import VisualVocab  # noqa: E402
from dyntok.llm import extend_model  # noqa: E402

BOS, EOS, WIDTH, HEADS, MIDDLE, LAYERS, EPS = 0, 1, 64, 2, 96, 2, 1e-5
WORDS = ["<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz"]
VOCAB = VisualVocab.after(len(WORDS), size=300, patches=20)


def small_llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=WIDTH,
        intermediate_size=MIDDLE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        rms_norm_eps=EPS,
        max_position_embeddings=256,
        initializer_range=0.2,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    extend_model(model, VOCAB)
    return model


def interleaved(weight):
    """llama.cpp rotates pairs of neighbors, transformers the two halves of a head."""
    half = WIDTH // HEADS // 2
    return weight.reshape(HEADS, 2, half, -1).transpose(1, 2).reshape(weight.shape)


NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.layers": "blk",
}


def write_gguf(path, model):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(str(path), "llama")
    tokens = [*WORDS, *VOCAB.tokens]
    writer.add_context_length(256)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(MIDDLE)
    writer.add_head_count(HEADS)
    writer.add_layer_norm_rms_eps(EPS)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_rope_freq_base(model.config.rope_parameters["rope_theta"])
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    special = {*VOCAB.tokens.values(), BOS, EOS}
    kinds = gguf.TokenType
    writer.add_token_types([kinds.CONTROL if id in special else kinds.NORMAL for id in range(len(tokens))])
    for name, weight in model.state_dict().items():
        if ".q_proj" in name or ".k_proj" in name:
            weight = interleaved(weight)
        for old, new in NAMES.items():
            name = name.replace(old, new)
        writer.add_tensor(name, weight.float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.slow
def test_llama_cpp_writes_what_transformers_writes(tmp_path):
    llama = pytest.importorskip("xllamacpp")
    model = small_llama()
    write_gguf(tmp_path / "small.gguf", model)
    params = llama.CommonParams()
    params.model.path = str(tmp_path / "small.gguf")
    params.n_ctx, params.n_parallel, params.warmup = 256, 1, False
    params.cpuparams.n_threads = 1
    server = llama.Server(params)
    picture = VOCAB.to_ids([7, 250, 3, 90], positions=[0, 6, 13, 19]).tolist()
    for prompt in ([5, 9, 20], [*picture, 4], [8, *picture, 11, VOCAB.image_start]):
        with torch.no_grad():
            row = model.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False, eos_token_id=None)
            scores = model(row).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        asked = {"prompt": prompt, "n_predict": 40, "temperature": 0.0, "ignore_eos": True, "logprobs": 1}
        answer = server.handle_completions(asked | {"return_tokens": True})
        answer = json.loads(answer) if isinstance(answer, str) else answer
        steps = answer["choices"][0]["logprobs"]["content"]
        assert [step["id"] for step in steps] == row[0, len(prompt) :].tolist()
        found = torch.tensor([step["logprob"] for step in steps])
        torch.testing.assert_close(found, scores.max(-1).values, atol=0.02, rtol=0)
        assert any(VOCAB.is_visual(step["id"]) for step in steps)
