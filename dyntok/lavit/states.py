"""LaVIT's released tensors under the names that our parts give them."""

from torch import Tensor

from dyntok.lavit.sizes import prompt_layers
from dyntok.lavit.weights import ReleasedWeights

_BLOCK = {"norm0": "self_norm", "norm1": "cross_norm", "norm2": "mlp_norm", "mlp.fc1": "mlp.0", "mlp.fc2": "mlp.2"}
_MERGER_BLOCK = _BLOCK | {
    "token_causal_attn.qkv": "self_qkv",
    "token_causal_attn.proj": "self_proj",
    "token_cross_attn.query": "cross_query",
    "token_cross_attn.proj": "cross_proj",
}
_DECODER_BLOCK = _BLOCK | {
    "self_attn.qkv": "self_qkv",
    "self_attn.proj": "self_proj",
    "cross_attn.query": "cross_query",
    "cross_attn.proj": "cross_proj",
}
_SELECTOR = {
    "in_conv.0": "norm",
    "in_conv.1": "in_proj",
    "out_conv.0": "hidden1",
    "out_conv.2": "hidden2",
    "out_conv.4": "head",
}
_DECODER = {
    "in_proj": "in_proj",
    "norm": "head.0",
    "decode_task_layer.0": "head.1",
    "decode_task_layer.2": "head.3",
}


def backbone_state(weights: ReleasedWeights) -> dict[str, Tensor]:
    """Returns the tensors in timm's naming, which is the released one. The final norm and the head are not used."""
    weights.used |= {name for name in weights.tensors if name.startswith(("norm.", "head."))}
    return {name: weights.take(name) for name in weights.tensors if name not in weights.used}


def encoder_state(weights: ReleasedWeights) -> dict[str, Tensor]:
    """Returns the tensors of selector, merger, projection and codebook."""
    return {
        **weights.renamed("token_predictor.", _SELECTOR, "selector."),
        **_merger_state(weights, to="merger."),
        **weights.renamed("encode_task_layer.", {"0": "0", "2": "2"}, "projection."),
        "codebook.embedding": weights.take("quantize.embedding.weight"),
    }


def understanding_state(weights: ReleasedWeights) -> dict[str, Tensor]:
    """Returns the tensors of the understanding path."""
    return _merger_state(weights, to="merger.") | weights.renamed("", {"vit_proj": "proj"})


def decoder_state(weights: ReleasedWeights) -> dict[str, Tensor]:
    """Returns the tensors of a decoder and of its conditioning."""
    state = weights.renamed("", _DECODER)
    state |= {"rank_embed": weights.take("pos_embed")[0], "query_embed": weights.take("query_embed")[0]}
    for i in range(weights.depth("blocks.")):
        state |= weights.renamed(f"blocks.{i}.", _DECODER_BLOCK, f"blocks.{i}.")
        for kind in ("weight", "bias"):
            names = [f"blocks.{i}.cross_attn.{which}.{kind}" for which in ("key", "value")]
            state[f"blocks.{i}.cross_kv.{kind}"] = weights.joined(*names)
    return state | _conditioning_state(weights)


def _conditioning_state(weights: ReleasedWeights) -> dict[str, Tensor]:
    layers = prompt_layers(weights)
    state = weights.renamed("", {layer: f"proj.{i}" for i, layer in enumerate(layers)}, "conditions.")
    if len(layers) > 1:
        state |= weights.renamed("unet_attnpool.", {"q_proj": "query", "c_proj": "out"}, "conditions.pool.")
        state["conditions.pool.pos_embed"] = weights.take("unet_attnpool.positional_embedding")
        for kind in ("weight", "bias"):
            names = [f"unet_attnpool.{which}_proj.{kind}" for which in ("k", "v")]
            state[f"conditions.pool.kv.{kind}"] = weights.joined(*names)
    return state


def _merger_state(weights: ReleasedWeights, to: str) -> dict[str, Tensor]:
    state = weights.renamed("causal_encoder.", {"ln_vision": "context_norm", "norm": "norm"}, to)
    depth = weights.depth("causal_encoder.blocks.")
    for i in range(depth):
        state |= weights.renamed(f"causal_encoder.blocks.{i}.", _MERGER_BLOCK, f"{to}blocks.{i}.")
    for kind in ("weight", "bias"):
        layers = [f"causal_encoder.blocks.{i}.token_cross_attn" for i in range(depth)]
        names = [f"{layer}.{which}.{kind}" for layer in layers for which in ("key", "value")]
        state[f"{to}context_kv.{kind}"] = weights.joined(*names)
    return state
