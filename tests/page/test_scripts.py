"""The page's arithmetic in JavaScript is that of Python: choice of patches, fitting, resizing, and codes as text."""

import json
import shutil
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image

import dyntok
from dyntok.config import ImageConfig
from dyntok.fitting import choose_grid, fit
from dyntok.image import to_array
from dyntok.layout import canonical_mask, counts_to_map, lattice_order, mask_to_counts
from dyntok.model.decoder import guessed_positions
from dyntok.page.build import SITE
from dyntok.policy import KeepPolicy

NODE = shutil.which("node")
pytestmark = pytest.mark.skipif(NODE is None, reason="there is no node to run JavaScript")
GRIDS = [(16, 16), (6, 9), (7, 5)]


def run(imports, expression, values):
    """Returns the value of a JavaScript expression, in which `x` stands for the values."""
    lines = [f'import {{ {names} }} from "{(SITE / file).as_uri()}";' for file, names in imports.items()]
    code = "\n".join([*lines, f"const x = {json.dumps(values)};", f"console.log(JSON.stringify({expression}));"])
    done = subprocess.run([NODE, "--input-type=module"], input=code, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("places", ["free", "map", "lattice"])
@pytest.mark.parametrize("grid", GRIDS)
def test_the_same_patches_are_kept(grid, places):
    scores = torch.randn(grid[0] * grid[1]).round(decimals=1)  # with equal ones
    log_probs = torch.stack([scores / 2, -scores / 2], -1)[None]
    for count in (None, 8, 20):
        keep = canonical_mask(KeepPolicy(budget=count)(log_probs), grid, places)
        expression = "keptPatches(x.scores, x.grid, x.places, x.count)"
        values = {"scores": scores.tolist(), "grid": grid, "places": places, "count": count}
        assert run({"policy.js": "keptPatches"}, expression, values) == keep[0].nonzero()[:, 0].tolist()


@pytest.mark.parametrize("grid", GRIDS)
def test_lattice_guesses_and_maps(grid):
    mask = canonical_mask(torch.rand(1, grid[0] * grid[1]) > 0.5, grid, "map")
    kept = mask[0].nonzero()[:, 0].tolist()
    names = "latticeOrder, guessedPositions, mapValues, fromMap"
    expression = (
        "[latticeOrder(x.grid), guessedPositions(9, x.grid, true), guessedPositions(9, x.grid, false),"
        " mapValues(x.kept, x.grid), fromMap(mapValues(x.kept, x.grid), x.grid)]"
    )
    values = counts_to_map(mask_to_counts(mask[0], grid), grid).tolist()
    bounds = torch.tensor([0, 9], dtype=torch.int32)
    guesses = [guessed_positions(bounds, 9, grid, dithered).tolist() for dithered in (True, False)]
    expected = [lattice_order(grid).tolist(), *guesses, values, kept]
    assert run({"policy.js": names}, expression, {"grid": grid, "kept": kept}) == expected


def test_pictures_of_any_shape_get_the_same_grid():
    sizes = [(640, 480), (333, 500), (100, 799), (1, 1), (5000, 3333)]
    got = run({"fitting.js": "chooseGrid"}, "x.map(([w, h]) => [64, 256].map((n) => chooseGrid(w, h, n)))", sizes)
    assert got == [[list(choose_grid(*size, n)) for n in (64, 256)] for size in sizes]


@pytest.mark.parametrize("how", ["crop", "squash", "pad"])
def test_the_same_part_of_a_picture_is_used(how):
    sizes = [(640, 480), (333, 501), (101, 799), (1, 3)]
    facts = {"resize": how, "grid": [8, 8], "patch": 8, "anyGrid": False}
    got = run({"fitting.js": "fit"}, "x[0].map(([w, h]) => fit(w, h, x[1]))", [sizes, facts])
    expected = [fit(*size, ImageConfig(img_size=64, resize=how)) for size in sizes]
    assert [(*p["size"], *p["box"], *p["inner"]) for p in got] == [(*p.size, *p.box, *p.inner) for p in expected]


@pytest.mark.parametrize("shape", [(96, 130), (40, 33), (700, 6), (512, 200)], ids=str)
def test_resizing_gives_the_bytes_of_pillow(photos, shape):
    photo = np.asarray(Image.fromarray(photos[1]).resize(shape[::-1]))
    rgba = np.dstack([photo, np.full(shape, 255, np.uint8)]).flatten().tolist()
    config = ImageConfig(img_size=64)
    box = fit(shape[1], shape[0], config).box
    values = {"rgba": rgba, "size": shape[::-1], "box": box}
    got = run({"resize.js": "resize"}, "[...resize(x.rgba, ...x.size, x.box, 64, 64)]", values)
    assert np.array_equal(np.reshape(got, (64, 64, 3)), to_array(photo, config)[0])


@pytest.mark.parametrize("places", ["free", "map", "lattice"])
def test_every_form_of_text_is_read_back_and_is_that_of_python(places):
    grid, patches = (4, 6), torch.rand(1, 24) > 0.4
    kept = canonical_mask(patches, grid, places)[0].nonzero()[:, 0].tolist()
    encoding = {"codes": [(7 * p) % 256 for p in kept], "kept": kept, "grid": grid, "known": True}
    facts = {"codes": 256, "grid": grid, "anyGrid": False, "places": places, "fingerprint": "f" * 16}
    names = "asCodes, asText, asJson, asPython, parse"
    forms = "[asCodes, asText, asJson, asPython].map((form) => form(x[0], x[1]))"
    texts = run({"text.js": names}, forms, [encoding, facts])
    layout = {"free": "positions", "map": "map", "lattice": "lattice"}[places]
    vocab = dyntok.VisualVocab.after(0, 256, 24 if places == "free" else 0, layout=layout, grid=grid)
    assert texts[1] == vocab.to_text(encoding["codes"], positions=kept, grid=grid)
    assert dyntok.Encoding.from_dict(json.loads(texts[2])).positions[0].tolist() == kept
    back = run({"text.js": names}, "x[0].map((text) => parse(text, x[1]))", [texts, facts])
    assert [form["codes"] for form in back] == [encoding["codes"]] * 4
    assert [form["kept"] for form in back] == [None, kept, kept, kept]


@pytest.mark.parametrize("name", ["flex", "tiny"])
def test_the_line_of_python_runs_and_gives_the_picture(name, photos):
    tokenizer = dyntok.load(name)
    encoding = tokenizer.encode(photos[0], budget=16)
    values = {"codes": encoding.codes[0].tolist(), "kept": encoding.positions[0].tolist(), "known": True}
    values |= {"grid": encoding.grids[0].tolist()}
    line = run({"text.js": "asPython"}, "asPython(x[0], x[1])", [values, {"name": name}])
    picture = eval(line, {"dyntok": dyntok})  # as a reader does after `import dyntok`
    assert np.array_equal(picture, tokenizer.decode(encoding)[0])


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "No codes are in this text"),
        ("12 256", "256 is no code"),
        ("1 " * 25, "25 codes are too many for 24 patches"),
        ('{"codes": [[1]], "fingerprint": "0"}', "These codes are of the tokenizer 0"),
        ('{"codes": [[1, 2]], "positions": [[3, 3]]}', "Positions must be one for each code"),
        ("{", "not complete"),
        ("decode([[1]], grid=(5, 5))", "This tokenizer has 4 x 6"),
    ],
)
def test_text_that_holds_no_image(text, message):
    facts = {"codes": 256, "grid": [4, 6], "anyGrid": False, "places": "free", "fingerprint": "f" * 16}
    expression = "(() => { try { return parse(x[0], x[1]); } catch (error) { return error.message; } })()"
    assert message in run({"text.js": "parse"}, expression, [text, facts])
