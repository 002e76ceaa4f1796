"""The decoder with positions, without, and in batches of both; the pixel head; LaVIT's own numbers."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from dyntok.config import DecoderConfig
from dyntok.errors import ConfigError
from dyntok.layout import bayer_pattern
from dyntok.model.decoder import Decoder, guessed_positions
from dyntok.model.pixel_head import PixelHead
from dyntok.policy import KeepPolicy

GRID, PATCHES, CODE_DIM, WIDTH = (3, 5), 15, 8, 24

RELEASED_NAMES = {
    "pos_embed": "rank_embed",
    "norm0.": "self_norm.",
    "norm1.": "cross_norm.",
    "norm2.": "mlp_norm.",
    "self_attn.": "self_",
    "cross_attn.": "cross_",
    "mlp.fc1.": "mlp.0.",
    "mlp.fc2.": "mlp.2.",
    "decode_task_layer.0.": "head.1.",
    "decode_task_layer.2.": "head.3.",
}


def new_decoder(placement="grid", **options):
    torch.manual_seed(1)
    options = {"depth": 2, "conv": placement == "grid", "head": "none"} | options
    decoder = Decoder(
        GRID, CODE_DIM, WIDTH, DecoderConfig(num_heads=3, mlp_ratio=2.0, placement=placement, **options)
    ).double()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return decoder


def bounds(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def vectors_for(lengths):
    return torch.randn(sum(lengths), CODE_DIM, dtype=torch.float64)


def same(a, b, tolerance=1e-12):
    assert_close(a, b, atol=tolerance, rtol=0)


def differ(a, b):
    return (a - b).abs().amax((-1, -2)) > 1e-6


# Places of tokens whose positions are unknown.


def places_of(length, grid, dithered):
    return guessed_positions(bounds([length]), length, grid, dithered)


@pytest.mark.parametrize("grid", [(1, 1), (1, 2), (3, 5), (8, 8), (16, 16)])
@pytest.mark.parametrize("dithered", [False, True])
def test_guessed_positions_increase_and_fill_the_picture(grid, dithered):
    patches = grid[0] * grid[1]
    for length in range(1, patches + 1):
        positions = places_of(length, grid, dithered)
        assert positions.dtype == torch.long and len(positions) == length
        assert positions[0] >= 0 and positions[-1] < patches and (positions.diff() > 0).all()
        gaps = positions.diff()
        if not dithered:
            assert length == 1 or gaps.max() - gaps.min() <= 1  # as evenly as whole numbers allow
            assert (
                abs(int(positions[0]) - (patches - 1 - int(positions[-1]))) <= 1
            )  # and as far from the start as from the end
    assert places_of(patches, grid, dithered).tolist() == list(range(patches))


def test_guessed_positions_by_hand():
    assert places_of(1, (3, 5), False).tolist() == [7]
    assert places_of(3, (3, 5), False).tolist() == [2, 7, 12]
    assert places_of(2, (2, 2), False).tolist() == [1, 3]
    assert (
        places_of(64, (16, 16), True).tolist()
        == KeepPolicy(budget=64)(bayer_log_probs((16, 16))).nonzero()[:, 1].tolist()
    )


def bayer_log_probs(grid):
    """Of a selector that knows nothing of a picture but its dither."""
    score = bayer_pattern(grid)[None]
    return torch.log_softmax(torch.stack([score, -score], dim=-1), dim=-1)


# Tokens on the grid.


@pytest.mark.parametrize("dithered", [False, True])
def test_tokens_without_positions_go_where_they_are_guessed(dithered):
    decoder, lengths = new_decoder(), [4, 1, 15]
    decoder.dithered = dithered
    vectors = vectors_for(lengths)
    got = decoder(vectors, bounds(lengths))
    assert got.shape == (3, PATCHES, WIDTH)
    guessed = guessed_positions(bounds(lengths), 20, GRID, dithered)
    assert differ(decoder(vectors, bounds(lengths), guessed), got).all()  # the blocks know which positions are guesses
    with torch.no_grad():
        decoder.placed_embed[0] = decoder.placed_embed[1]
    same(decoder(vectors, bounds(lengths), guessed), got)


def test_positions_none_and_minus_one_mean_the_same():
    decoder, lengths = new_decoder(), [4, 1, 15]
    vectors = vectors_for(lengths)
    same(decoder(vectors, bounds(lengths)), decoder(vectors, bounds(lengths), torch.full((20,), -1)))


def test_positions_may_be_unknown_for_some_images():
    decoder, lengths = new_decoder(), [4, 2, 3]
    vectors = vectors_for(lengths)
    positions = torch.tensor([0, 3, 9, 14, -1, -1, 1, 2, 8])
    got = decoder(vectors, bounds(lengths), positions)
    same(got[1:2], decoder(vectors[4:6], bounds([2])))
    same(got[0:1], decoder(vectors[:4], bounds([4]), positions[:4]))
    same(got[2:3], decoder(vectors[6:], bounds([3]), positions[6:]))


def test_all_patches_without_positions_lie_where_they_belong():
    """With N tokens nothing is left to guess: what remains is the embedding that says guessed instead of known."""
    decoder, vectors = new_decoder(), vectors_for([PATCHES])
    got, placed = decoder(vectors, bounds([PATCHES])), decoder(vectors, bounds([PATCHES]), torch.arange(PATCHES))
    assert differ(got, placed).all()
    with torch.no_grad():
        decoder.placed_embed[1] = decoder.placed_embed[0]
    same(decoder(vectors, bounds([PATCHES])), placed)


def test_a_token_is_added_to_the_query_at_its_position():
    decoder = new_decoder(depth=0)
    vectors, positions = vectors_for([2, 1]), torch.tensor([4, 11, 0])
    expected = decoder.query_embed.repeat(2, 1, 1)
    tokens = decoder.in_proj(vectors) + decoder.placed_embed[0]
    expected = expected.index_put((torch.tensor([0, 0, 1]), positions), tokens, accumulate=True)
    same(decoder(vectors, bounds([2, 1]), positions), expected)


@pytest.mark.parametrize("options", [{}, {"conv": False}, {"placement": "rank"}, {"head": "mlp"}], ids=str)
def test_a_ragged_batch_equals_single_images(options):
    decoder, lengths = new_decoder(**options), [4, 1, PATCHES, 7]
    vectors = vectors_for(lengths)
    positions = torch.cat([torch.randperm(PATCHES)[:n].sort().values for n in lengths])
    for where in (positions, None):
        together = decoder(vectors, bounds(lengths), where)
        for i, (begin, end) in enumerate(zip(bounds(lengths)[:-1], bounds(lengths)[1:], strict=True)):
            alone = decoder(vectors[begin:end], bounds([lengths[i]]), None if where is None else where[begin:end])
            same(together[i : i + 1], alone)


@pytest.mark.parametrize("placement", ["grid", "rank"])
def test_a_batch_of_no_images(placement):
    assert new_decoder(placement)(vectors_for([]), bounds([])).shape == (0, PATCHES, WIDTH)


def test_rows_and_columns_are_not_confused():
    """The convolution carries a token to its neighbours on the grid, in this depth and no farther."""
    decoder = new_decoder(depth=1)
    block = decoder.blocks[0]
    with torch.no_grad():
        for layer in (block.self_proj, block.mlp[-1]):
            layer.weight.zero_()
    vectors, other = vectors_for([1]), vectors_for([1])
    row, column = 1, 3
    where = torch.tensor([row * GRID[1] + column])
    changed = (decoder(vectors, bounds([1]), where) - decoder(other, bounds([1]), where)).abs().amax(-1).view(
        GRID
    ) > 1e-9
    expected = torch.zeros(GRID, dtype=torch.bool)
    expected[row - 1 : row + 2, column - 1 : column + 2] = True
    assert torch.equal(changed, expected)


def test_placed_tokens_are_trained():
    decoder, lengths = new_decoder(), [4, 2]
    positions = torch.tensor([0, 3, 9, 14, -1, -1])
    vectors = vectors_for(lengths).requires_grad_()
    decoder(vectors, bounds(lengths), positions).square().sum().backward()
    assert (vectors.grad != 0).any(-1).all() and (decoder.placed_embed.grad != 0).all()


# Tokens known by their rank.


def test_rank_decoder_uses_order_and_not_positions():
    decoder, vectors = new_decoder("rank"), vectors_for([4])
    got = decoder(vectors, bounds([4]))
    same(got, decoder(vectors, bounds([4]), torch.tensor([1, 5, 6, 9])))
    assert differ(got, decoder(vectors.flip(0), bounds([4]))).all()


def test_rank_decoder_by_hand_without_blocks_of_its_own():
    """One block with its cross-attention alone: queries read tokens that carry their rank."""
    decoder = new_decoder("rank", depth=1)
    block = decoder.blocks[0]
    with torch.no_grad():
        for layer in (block.self_proj, block.mlp[-1]):
            layer.weight.zero_(), layer.bias.zero_()
    vectors = vectors_for([4])
    tokens = decoder.in_proj(vectors) + decoder.rank_embed[:4]
    q, (k, v) = block.cross_query(block.cross_norm(decoder.query_embed)), block.cross_kv(tokens).chunk(2, dim=-1)
    q, k, v = (x.unflatten(-1, (3, -1)).transpose(0, 1) for x in (q, k, v))
    read = ((q @ k.mT / (WIDTH // 3) ** 0.5).softmax(-1) @ v).transpose(0, 1).flatten(1)
    same(decoder(vectors, bounds([4]))[0], decoder.query_embed + block.cross_proj(read))


def test_rank_decoder_gives_lavits_numbers(parity):
    config = parity.config
    state = parity.weights("tokenizer_decoder.bin/", RELEASED_NAMES)
    unet = state.pop("unet_proj.weight"), state.pop("unet_proj.bias")
    for kind in ("weight", "bias"):
        for i in range(config["decoder_depth"]):
            parts = [state.pop(f"blocks.{i}.cross_{part}.{kind}") for part in ("key", "value")]
            state[f"blocks.{i}.cross_kv.{kind}"] = torch.cat(parts)
        state[f"head.0.{kind}"] = state.pop(f"norm.{kind}")
    for name in ("query_embed", "rank_embed"):
        state[name] = state[name][0]
    grid, out_dim = (config["grid"],) * 2, len(state["head.3.bias"])
    options = DecoderConfig(depth=config["decoder_depth"], num_heads=config["heads"], out_dim=out_dim)
    decoder = Decoder(grid, config["code_dim"], config["dim"], options)
    decoder.load_state_dict(state)
    features = decoder(parity["io/quantized"], bounds(parity["io/token_counts"].tolist()))
    assert parity.error("io/decoder_lowres", F.linear(features, *unet)) < 1e-5


def test_heads_must_divide_the_width():
    with pytest.raises(ConfigError, match="decoder.num_heads is 5, expected a divisor of its width 24"):
        Decoder(GRID, CODE_DIM, WIDTH, DecoderConfig(depth=1, num_heads=5, mlp_ratio=2.0))


# Pixels.


@pytest.mark.parametrize("patch_size", [1, 4, 7, 14])
def test_pixel_head_paints_the_whole_grid(patch_size):
    head = PixelHead(WIDTH, patch_size)
    pixels = head(torch.randn(2, PATCHES, WIDTH), GRID)
    assert pixels.shape == (2, 3, GRID[0] * patch_size, GRID[1] * patch_size)


@pytest.mark.parametrize("patch_size", [4, 7])
def test_every_patch_paints_twice_its_side_around_itself(patch_size):
    head = PixelHead(WIDTH, patch_size).double()
    features = torch.randn(1, PATCHES, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        head.proj.bias.zero_()
    row, column, p = 1, 2, patch_size
    only = torch.zeros_like(features)
    only[0, row * GRID[1] + column] = features[0, row * GRID[1] + column]
    pixels = head(only, GRID)[0]
    area = head.proj(only)[0, row * GRID[1] + column].view(3, 2 * p, 2 * p)
    top, left = row * p - p // 2, column * p - p // 2
    same(pixels[:, top : top + 2 * p, left : left + 2 * p], area)
    pixels[:, top : top + 2 * p, left : left + 2 * p] = 0
    assert (pixels == 0).all()
    # and neighbours add up
    same(
        head(features, GRID), sum(head(features * (torch.arange(PATCHES) == i)[:, None], GRID) for i in range(PATCHES))
    )


def test_a_constant_field_is_constant_inside():
    """Four areas meet in every pixel; two at the border of the picture, and one in its corners."""
    head = PixelHead(WIDTH, 4).double()
    with torch.no_grad():
        head.proj.weight.zero_()
        head.proj.bias.fill_(0.25)
    pixels = head(torch.randn(2, PATCHES, WIDTH, dtype=torch.float64), GRID)
    same(pixels[..., 2:-2, 2:-2], torch.ones_like(pixels[..., 2:-2, 2:-2]))
    same(pixels[..., :2, 2:-2], torch.full_like(pixels[..., :2, 2:-2], 0.5))
    same(pixels[..., 2:-2, -2:], torch.full_like(pixels[..., 2:-2, -2:], 0.5))
    same(pixels[..., -2:, :2], torch.full_like(pixels[..., -2:, :2], 0.25))
