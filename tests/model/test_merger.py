"""The merger's paths against a dense masked form, its meaning (who sees whom), and LaVIT's own numbers."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from dyntok.config import MergerConfig
from dyntok.errors import ConfigError
from dyntok.image import to_pixels
from dyntok.model.merger import LAVIT_EPS, Merger
from dyntok.model.selector import straight_through
from dyntok.ragged import cu_seqlens_from_mask
from dyntok_kernels import reference

PATCHES, WIDTH, HEADS, DEPTH = 12, 24, 3, 2


class CountedOperations(TorchDispatchMode):
    """Counts what reaches the device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def first(*lengths):
    """A keep mask of the first so many patches of every image."""
    return torch.arange(PATCHES) < torch.tensor(lengths)[:, None]


MASKS = {
    "one kept": torch.eye(PATCHES, dtype=torch.bool)[[0, 5, PATCHES - 1]],
    "all kept": first(PATCHES, PATCHES),
    "lengths 1 and N": first(1, PATCHES),
    "single image": torch.arange(PATCHES)[None] % 3 == 1,
    "equal lengths": torch.stack([torch.arange(PATCHES) % 3 == rest for rest in range(3)]),
    "ragged": torch.stack([torch.arange(PATCHES) % step < 2 for step in (2, 3, 5, 7)]) & ~first(1, 0, 1, 0),
}

each_mask = pytest.mark.parametrize("keep", MASKS.values(), ids=MASKS)


def new_merger(dtype=torch.float64, **options):
    """With weights that make attention far from uniform and biases far from zero."""
    torch.manual_seed(1)
    merger = Merger(WIDTH, MergerConfig(depth=DEPTH, num_heads=HEADS, mlp_ratio=2.0, **options))
    with torch.no_grad():
        for parameter in merger.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return merger.to(dtype)


def features_for(keep, dtype=torch.float64):
    return (
        torch.randn(*keep.shape, WIDTH, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        .to(dtype)
        .requires_grad_()
    )


def dense_masked(merger, features, keep, gate_self=None, gate_cross=None, eps=0.0):
    """The merger as the paper writes it: all N rows of every image, absent keys masked, kept rows picked in the end.

    gate_self, gate_cross: [B, N], how much each patch counts as kept, for keys of the self- and of the cross-attention.
    """
    ones = torch.ones(keep.shape[1], keep.shape[1], dtype=features.dtype)
    itself = torch.eye(keep.shape[1], dtype=features.dtype) * (~keep)[:, None]  # a dropped patch sees itself, too
    kept = keep.to(features.dtype)
    self_weight = (kept if gate_self is None else gate_self)[:, None] * ones.tril() + itself
    cross_weight = (1 - (kept if gate_cross is None else gate_cross))[:, None] * ones

    def heads(x):
        return x.unflatten(-1, (merger.num_heads, -1)).transpose(1, 2)

    def attend(q, k, v, weight):
        return reference.masked_attention(heads(q), heads(k), heads(v), weight, eps).transpose(1, 2).flatten(2)

    context = merger.context_norm(features)
    kv = [
        F.linear(context, *pair)
        for pair in zip(*(p.chunk(2 * len(merger.blocks)) for p in merger.context_kv.parameters()), strict=True)
    ]
    x = features
    for i, block in enumerate(merger.blocks):
        q, k, v = block.self_qkv(block.self_norm(x)).chunk(3, dim=-1)
        x = x + block.self_proj(attend(q, k, v, self_weight))
        x = x + block.cross_proj(attend(block.cross_query(block.cross_norm(x)), kv[2 * i], kv[2 * i + 1], cross_weight))
        x = x + block.mlp(block.mlp_norm(x))
    return merger.norm(x)[keep]


def with_gradients(merger, out, *inputs):
    """The output and the gradients of one loss with respect to the inputs and all parameters of the merger."""
    towards = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(out)
    return out, *torch.autograd.grad((out * towards).sum(), [*inputs, *merger.parameters()])


def agree(got, expected, tolerance=1e-10):
    for a, b in zip(got, expected, strict=True):
        assert_close(a, b, atol=tolerance * max(1.0, float(b.detach().abs().max())), rtol=0)


# Agreement with the dense masked form.


@each_mask
def test_packed_agrees_with_the_dense_masked_form(keep):
    merger, features = new_merger(), features_for(keep)
    got = with_gradients(merger, merger(features, keep), features)
    agree(got, with_gradients(merger, dense_masked(merger, features, keep), features))
    assert got[0].shape == (int(keep.sum()), WIDTH)


@each_mask
def test_exact_agrees_with_the_released_formula_in_dense_form(keep):
    merger, features = new_merger(), features_for(keep)
    got = with_gradients(merger, merger(features, keep, exact=True), features)
    agree(got, with_gradients(merger, dense_masked(merger, features, keep, eps=LAVIT_EPS), features))


@each_mask
def test_gated_agrees_with_the_dense_masked_form_and_so_does_the_gate_gradient(keep):
    """Except for one part, which packing gives up on purpose, and which the dense form leaves out here by `detach`.

    In the dense form the gate of a dropped patch also is the weight of its key in the self-attention. That weight is 0,
    yet has a
    gradient: what would change if the patch began to be seen. It needs the dropped patch's own row in every block, and
    not computing these rows is the whole point. A dropped patch's gate therefore has its gradient from the
    cross-attention alone.
    """
    merger, features = new_merger(), features_for(keep)
    gate = keep.double().requires_grad_()
    got = with_gradients(merger, merger(features, keep, gate), features, gate)
    detached = torch.where(keep, gate, gate.detach())
    agree(got, with_gradients(merger, dense_masked(merger, features, keep, detached, gate), features, gate))

    full = with_gradients(merger, dense_masked(merger, features, keep, gate, gate), features, gate)
    difference = (got[2] - full[2]).abs()
    assert difference[keep].max() < 1e-10  # the gates of kept patches have all of theirs
    # a dropped patch after the last kept one is seen by nobody, kept or not
    seen = ~keep & (keep.flip(1).cumsum(1).flip(1) > 0)
    assert (difference[seen] > 1e-6).all()
    assert not (~keep & ~seen).any() or difference[~keep & ~seen].max() < 1e-10


@each_mask
def test_the_exact_gate_gradient_is_that_of_the_full_dense_form(keep):
    merger, features = new_merger(), features_for(keep)
    gate = keep.double().requires_grad_()
    got = with_gradients(merger, merger(features, keep, gate, exact=True), features, gate)
    agree(got, with_gradients(merger, dense_masked(merger, features, keep, gate, gate, LAVIT_EPS), features, gate))


@each_mask
@pytest.mark.parametrize("gated", [False, True], ids=["packed", "gated"])
def test_float32_error_is_at_most_twice_that_of_the_dense_form(keep, gated):
    def run(form, dtype):
        merger, features = new_merger(dtype), features_for(keep, dtype)
        gate = keep.to(dtype).requires_grad_()
        out, *gradients = form(merger, features, gate)
        return out.double(), torch.cat([g.double().flatten() for g in gradients])

    def fast(merger, features, gate):
        inputs = (features, gate) if gated else (features,)
        return with_gradients(merger, merger(features, keep, gate if gated else None), *inputs)

    def slow(merger, features, gate):
        inputs = (features, gate) if gated else (features,)
        gates = (torch.where(keep, gate, gate.detach()), gate) if gated else ()
        return with_gradients(merger, dense_masked(merger, features, keep, *gates), *inputs)

    for got, own, truth in zip(
        run(fast, torch.float32), run(slow, torch.float32), run(slow, torch.float64), strict=True
    ):
        assert (got - truth).norm() <= 2 * (own - truth).norm()


def test_the_gated_form_takes_as_many_operations_for_many_images_as_for_few():
    """Forward and backward: a loop over images would start hundreds of operations for each of them."""

    def operations(keep):
        merger, features, gate = new_merger(), features_for(keep), keep.double().requires_grad_()
        with CountedOperations() as counted:
            with_gradients(merger, merger(features, keep, gate), features, gate)
        return counted.count

    few, many = (MASKS["ragged"].repeat(n, 1) for n in (1, 16))
    assert operations(few) == operations(many)


def test_gate_values_change_nothing():
    keep = MASKS["ragged"]
    merger, features = new_merger(), features_for(keep)
    assert_close(merger(features, keep, keep.double()), merger(features, keep), atol=1e-10, rtol=0)


@pytest.mark.parametrize("mode", ["packed", "gated", "exact"])
def test_an_image_does_not_depend_on_its_batch_mates(mode):
    keep = MASKS["ragged"]
    merger, features = new_merger(), features_for(keep)

    def merge(features, keep):
        return merger(features, keep, keep.double() if mode == "gated" else None, exact=mode == "exact")

    alone = [merge(features[i : i + 1], keep[i : i + 1]) for i in range(len(keep))]
    assert_close(merge(features, keep), torch.cat(alone), atol=1e-12, rtol=0)


def test_the_reconstruction_alone_gives_every_patch_of_the_selector_a_gradient(tokenizer, photos):
    tokenizer.double()
    pixels = torch.stack([to_pixels(photo, tokenizer.config.image) for photo in photos[:3]]).double()
    features = tokenizer.backbone(pixels)
    log_probs = tokenizer.selector(features, tokenizer.grid).detach().requires_grad_()
    keep, gate = straight_through(log_probs)
    assert (keep.any(1) & ~keep.all(1)).all()

    def gradient(merged):
        rows = F.normalize(tokenizer.projection(merged), dim=-1)
        decoded = tokenizer.decoder(rows, cu_seqlens_from_mask(keep), keep.nonzero()[:, 1])
        loss = (tokenizer.pixel_head(decoded, tokenizer.grid) - pixels).square().mean()
        return torch.autograd.grad(loss, log_probs, retain_graph=True)[0]

    got = gradient(tokenizer.merger(features, keep, gate))
    assert (got != 0).all()
    agree(
        [got], [gradient(dense_masked(tokenizer.merger, features, keep, torch.where(keep, gate, gate.detach()), gate))]
    )


# Who sees whom.


def test_all_kept_gives_the_average_of_all_values():
    keep = MASKS["all kept"]
    merger, features = new_merger(), features_for(keep)
    block = merger.blocks[0]
    with torch.no_grad():  # one block, of which the cross-attention alone is left
        for layer in (block.self_proj, block.mlp[-1]):
            layer.weight.zero_(), layer.bias.zero_()
        merger.blocks = merger.blocks[:1]
        merger.context_kv.weight = torch.nn.Parameter(merger.context_kv.weight[: 2 * WIDTH])
        merger.context_kv.bias = torch.nn.Parameter(merger.context_kv.bias[: 2 * WIDTH])
    values = merger.context_kv(merger.context_norm(features))[..., WIDTH:]
    expected = merger.norm(features + block.cross_proj(values.mean(1, keepdim=True)))
    assert_close(merger(features, keep), expected.flatten(0, 1), atol=1e-12, rtol=0)


def without_cross_attention(merger):
    with torch.no_grad():
        for block in merger.blocks:
            block.cross_proj.weight.zero_()
    return merger


def test_a_dropped_patch_is_seen_through_the_context_alone():
    keep = MASKS["ragged"]
    features = features_for(keep).detach()
    changed = torch.where(keep[..., None], features, features + torch.randn_like(features))
    merger = new_merger()
    before, after = merger(features, keep), merger(changed, keep)
    assert ((before - after).abs().amax(1) > 1e-6)[: int(keep[0].sum())].all()
    merger = without_cross_attention(merger)
    assert torch.equal(merger(features, keep), merger(changed, keep))
    inputs = features.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(merger(inputs, keep).square().sum(), inputs)
    assert (gradient[~keep] == 0).all() and (gradient[keep] != 0).any(-1).all()


def test_the_context_is_the_normalised_features():
    """So a dropped patch that is only shifted and scaled changes nothing, up to the normalisation's epsilon."""
    keep = MASKS["ragged"]
    merger, features = new_merger(), features_for(keep).detach()
    changed = torch.where(keep[..., None], features, 3 * features + 5)
    assert_close(merger(features, keep), merger(changed, keep), atol=1e-3, rtol=0)
    changed = torch.where(keep[..., None], features, features * torch.linspace(1, 3, WIDTH).double())
    assert (merger(features, keep) - merger(changed, keep)).abs().max() > 1e-2


@pytest.mark.parametrize("gated", [False, True], ids=["packed", "gated"])
def test_kept_tokens_see_earlier_ones_and_never_later_ones(gated):
    keep = torch.arange(PATCHES)[None] % 2 == 0
    merger, features = new_merger(), features_for(keep).detach()
    gate = keep.double() if gated else None
    before = merger(features, keep, gate)
    for rank, patch in enumerate(keep[0].nonzero()[:, 0].tolist()):
        changed = features.clone()
        changed[0, patch] += 1 + torch.randn(WIDTH, dtype=torch.float64)
        difference = (merger(changed, keep, gate) - before).abs().amax(1)
        assert (difference[:rank] < 1e-12).all() and (difference[rank:] > 1e-6).all()


def test_dropped_patches_are_seen_from_everywhere():
    keep = torch.arange(PATCHES)[None] < PATCHES // 2
    merger, features = new_merger(), features_for(keep).detach()
    changed = features.clone()
    changed[0, -1] += torch.randn(WIDTH, dtype=torch.float64)
    assert ((merger(changed, keep) - merger(features, keep)).abs().amax(1) > 1e-6).all()


def test_where_all_are_kept_later_ones_are_seen_through_the_average_alone():
    keep = MASKS["all kept"][:1]
    merger, features = new_merger(), features_for(keep).detach()
    changed = features.clone()
    changed[0, -1] += torch.randn(WIDTH, dtype=torch.float64)
    difference = (merger(changed, keep) - merger(features, keep)).abs().amax(1)
    assert (difference > 1e-6).all()
    merger = without_cross_attention(merger)
    difference = (merger(changed, keep) - merger(features, keep)).abs().amax(1)
    assert (difference[:-1] < 1e-12).all() and difference[-1] > 1e-6


# Ends of the range.


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_depth_zero_passes_kept_features_on():
    keep = MASKS["ragged"]
    merger = Merger(WIDTH, MergerConfig(depth=0, num_heads=HEADS, mlp_ratio=2.0, norm=False)).double()
    features = features_for(keep)
    for options in ({}, {"exact": True}, {"gate": keep.double()}):
        assert torch.equal(merger(features, keep, **options), features[keep])


def test_a_batch_of_no_images():
    merger, none = new_merger(), torch.empty(0, PATCHES, dtype=torch.bool)
    for options in ({}, {"gate": none.double()}, {"exact": True}):
        assert merger(torch.empty(0, PATCHES, WIDTH, dtype=torch.float64), none, **options).shape == (0, WIDTH)


def test_a_small_start_is_near_the_identity():
    keep = MASKS["ragged"]
    features = features_for(keep)
    for scale, near in ((0.0, 1e-12), (1e-3, 1e-2)):
        merger = Merger(
            WIDTH, MergerConfig(depth=DEPTH, num_heads=HEADS, mlp_ratio=2.0, norm=False, init_scale=scale)
        ).double()
        assert (merger(features, keep) - features[keep]).abs().max() < near


def test_heads_must_divide_the_width():
    with pytest.raises(ConfigError, match="merger.num_heads is 5, expected a divisor of its width 24"):
        Merger(WIDTH, MergerConfig(depth=DEPTH, num_heads=5, mlp_ratio=2.0))


def test_bounds_of_a_mask():
    bounds = cu_seqlens_from_mask(MASKS["lengths 1 and N"])
    assert bounds.dtype == torch.int32 and bounds.tolist() == [0, 1, 1 + PATCHES]
