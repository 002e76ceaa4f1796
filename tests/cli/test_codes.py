"""`dyntok encode` and `dyntok decode`: what they print and write, and what they refuse."""

import io
import json
import re
import sys

import pytest
from PIL import Image, ImageDraw, ImageFont

from dyntok.cli.main import main


def set_stdin(monkeypatch, raw):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw)))


def picture_size(path):
    with Image.open(path) as image:
        return image.size


def test_encode_prints_the_codes(run, tokenizer, folder):
    code, out, err = run("encode", folder / "cat.png", folder / "coffee.png")
    (cat, coffee), lines = tokenizer.encode([folder / "cat.png", folder / "coffee.png"]).codes, out.splitlines()
    assert code == 0 and err == ""
    assert lines[0] == f"{folder}/cat.png: {len(cat)} tokens: {' '.join(map(str, cat.tolist()))}"
    assert lines[1].startswith(f"{folder}/coffee.png: {len(coffee)} tokens: ")
    assert lines[2] == f"encoded 2 images, {len(cat) + len(coffee)} tokens; next: add -o codes.json to keep the codes"


def test_codes_survive_the_way_through_a_file(run, tokenizer, folder, tmp_path):
    photographs = sorted(folder.iterdir())
    code, out, _ = run("encode", *photographs, "-o", tmp_path / "codes.json", "--budget", "0.25")
    first, *_, last = out.splitlines()
    assert code == 0 and first == f"{photographs[0]}: 16 tokens"
    assert last == (
        f"wrote {tmp_path}/codes.json (3 images, 48 tokens); next: dyntok decode {tmp_path}/codes.json -o again"
    )
    values = json.loads((tmp_path / "codes.json").read_text())
    encoding = tokenizer.encode(photographs, budget=16)
    assert values["sources"] == list(map(str, photographs)) and values["codes"] == [c.tolist() for c in encoding.codes]
    assert values["fingerprint"] == tokenizer.fingerprint

    code, out, _ = run("decode", tmp_path / "codes.json", "-o", tmp_path / "again")
    *paths, last = out.splitlines()
    assert code == 0 and paths == [f"{tmp_path}/again/0000{i}.png" for i in range(3)]
    assert last.startswith(f"wrote 3 images to {tmp_path}/again (64 x 64 pixels); next: dyntok show")
    for path, image in zip(paths, tokenizer.decode(encoding), strict=True):
        with Image.open(path) as written:
            assert written.tobytes() == image.tobytes()


def test_stdout_holds_only_json_on_request(run, folder, tmp_path):
    _, out, err = run("encode", folder / "cat.png", "--json")
    known = {"codes", "positions", "grids", "fingerprint", "failures", "source_index", "originals", "sources"}
    assert set(json.loads(out)) == known
    assert err.startswith("encoded 1 image, ")
    assert run("encode", folder / "cat.png", "-o", "-")[1] == out
    _, again, err = run("encode", folder / "cat.png", "--json", "-o", tmp_path / "codes.json")
    assert json.loads((tmp_path / "codes.json").read_text()) == json.loads(again) == json.loads(out)
    assert err.startswith(f"wrote {tmp_path}/codes.json (1 image, ")

    (tmp_path / "of.2024").mkdir()
    _, out, err = run("decode", tmp_path / "codes.json", "-o", tmp_path / "of.2024", "--json")
    assert json.loads(out) == [f"{tmp_path}/of.2024/00000.png"] and err.startswith("wrote 1 image to ")
    _, out, _ = run("decode", tmp_path / "codes.json", "-o", tmp_path / "cat.png", "--json")
    assert json.loads(out) == [f"{tmp_path}/cat.png"] and picture_size(tmp_path / "cat.png") == (64, 64)


@pytest.mark.parametrize("text, images", [("[[17, 42, 9], [3]]", 2), ("[17, 42, 9]", 1), ("[]", 0)])
def test_decode_reads_bare_codes_from_stdin(run, monkeypatch, tmp_path, text, images):
    set_stdin(monkeypatch, text.encode())
    code, out, _ = run("decode", "-", "-o", tmp_path / "out", "--json")
    assert code == 0 and len(json.loads(out)) == len(list((tmp_path / "out").iterdir())) == images


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_decode_reads_the_encodings_that_shells_write(run, tmp_path, encoding):
    (tmp_path / "codes.json").write_bytes("[1, 2, 3]".encode(encoding))
    assert run("decode", tmp_path / "codes.json", "-o", tmp_path / "one.png")[0] == 0
    assert picture_size(tmp_path / "one.png") == (64, 64)


def test_decode_writes_into_an_existing_folder_with_the_name_of_a_picture(run, tmp_path):
    (tmp_path / "codes.json").write_text("[[1], [2]]")
    (tmp_path / "all.png").mkdir()
    assert run("decode", tmp_path / "codes.json", "-o", tmp_path / "all.png")[0] == 0
    assert picture_size(tmp_path / "all.png" / "00001.png") == (64, 64)


def test_a_decoded_picture_goes_to_stdout(checkpoint_folder, tmp_path, capsysbinary):
    (tmp_path / "codes.json").write_text("[1, 2, 3]")
    assert main(["decode", str(tmp_path / "codes.json"), "--model", str(checkpoint_folder), "-o", "-"]) == 0
    assert picture_size(io.BytesIO(capsysbinary.readouterr().out)) == (64, 64)


@pytest.mark.parametrize(
    "options, count",
    [
        (["--budget", "7"], 7),
        (["--budget", ".5"], 32),
        (["--threshold", "0"], 64),
        (["--sample", "3", "--max-tokens", "4"], 4),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_keep_policies_are_options(run, folder, options, count):
    assert len(json.loads(run("encode", folder / "cat.png", "--json", *options)[1])["codes"][0]) == count


def test_a_sample_is_the_same_for_the_same_seed(run, folder):
    first, again, other = (run("encode", folder / "cat.png", "--json", "--sample", seed)[1] for seed in (3, 3, 4))
    assert first == again != other


def test_an_impossible_budget_is_an_error(run, folder):
    code, _, err = run("encode", folder / "cat.png", "--budget", "65")
    assert code == 1 and re.fullmatch("dyntok: budget is 65 .*64 patches.*\n", err)


@pytest.mark.parametrize("command", ["encode", "show"])
def test_the_limit_of_pixels_is_an_option(run, command, folder, tmp_path):
    output = ["-o", tmp_path / "out.png"] if command == "show" else []
    code, _, err = run(command, folder / "cat.png", *output, "--max-pixels", "99")
    assert code == 1 and "the limit is 99" in err and "--max-pixels" in err
    assert run(command, folder / "cat.png", *output, "--max-pixels", "1000000")[0] == 0


def test_bad_images_stop_the_command_or_are_skipped(run, folder, bad, tmp_path):
    photograph, missing = folder / "cat.png", tmp_path / "none.png"
    code, out, err = run("encode", bad, photograph)
    assert (code, out) == (1, "") and err.startswith(f"dyntok: {bad}: ") and err.count("\n") == 1
    code, out, err = run("encode", bad, photograph, missing, "--skip-errors", "--json")
    values = json.loads(out)
    assert code == 3 and values["source_index"] == [1] and values["sources"] == [str(photograph)]
    assert all(err.count(str(path)) == 1 and f"skipped {path}: " in err for path in (bad, missing))
    assert f"skipped {photograph}" not in err and ", 2 skipped; next: " in err


@pytest.mark.parametrize(
    "text, message",
    [
        ("not JSON", "can't read codes from .*: Expecting value.*expected JSON as `dyntok encode -o` writes it"),
        ("[" * 100_000, "can't read codes from"),
        ("17", "holds int, expected what `dyntok encode -o` writes or a list of lists of codes"),
        ("[[256]]", "code 256 is out of range, this codebook has codes 0 to 255"),
        ('[["a"]]', "expected a list or tensor of integers"),
        ('{"codes": [[1]]}', "expected a mapping with codes and grids"),
        (
            '{"codes": [[1]], "grids": [[8, 8]], "fingerprint": "0123456789abcdef"}',
            "written by the tokenizer 0123456789abcdef",
        ),
    ],
    ids=["no JSON", "deep", "a number", "out of range", "text", "no grids", "other tokenizer"],
)
def test_bad_codes_are_refused(run, tmp_path, text, message):
    (tmp_path / "codes.json").write_text(text)
    code, out, err = run("decode", tmp_path / "codes.json", "-o", tmp_path / "out.png")
    assert (code, out) == (1, "") and not (tmp_path / "out.png").exists()
    assert re.search(message, err)


def test_unusable_paths_of_codes_are_errors(run, bad, tmp_path):
    codes = tmp_path / "codes.json"
    codes.write_text("[[1], [2]]")
    for source, output, message in (
        (tmp_path / "none.json", tmp_path / "a.png", "can't read codes from"),
        (codes, tmp_path / "a.png", "has codes of 2 images, but .*a.png holds one; give a folder"),
        (codes, bad, "holds one; give a folder"),
        (codes, tmp_path / "out.txt", r"can't write pictures as \.txt; name a \.png"),
        (codes, bad / "folder", "can't write"),
    ):
        code, out, err = run("decode", source, "-o", output)
        assert (code, out) == (1, "") and err.startswith("dyntok: "), output
        assert re.search(message, err)


def test_codes_are_not_written_where_there_is_no_folder(run, folder, tmp_path):
    code, out, err = run("encode", folder / "cat.png", "-o", tmp_path / "no" / "where.json")
    assert (code, out) == (1, "") and re.fullmatch("dyntok: can't write .*where.json: .*\n", err)


def page_of_text(size):
    page = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(page)
    for top in range(40, size[1] - 60, 60):
        draw.text((40, top), "Plain paper needs few patches, print needs many.", "black", ImageFont.load_default(40))
    return page


def test_pictures_that_are_no_squares_come_back_whole(photos, tmp_path, capsys):
    """A panorama, a page, a telephone's screenshot, a strip, a logo with transparency, gray; and a strip too long."""
    photo = Image.fromarray(photos[0])
    pictures = {
        "panorama.jpg": photo.resize((2304, 512)),
        "page.png": page_of_text((1240, 1754)),
        "phone.png": page_of_text((1080, 2340)),
        "strip.jpg": photo.resize((900, 300)),
        "logo.png": Image.merge(
            "RGBA", (*photo.resize((600, 400)).split(), Image.linear_gradient("L").resize((600, 400)))
        ),
        "gray.png": photo.convert("L"),
    }
    for name, picture in pictures.items():
        picture.save(tmp_path / name)
    assert main(["encode", *(str(tmp_path / name) for name in pictures), "-o", str(tmp_path / "codes.json")]) == 0
    values = json.loads((tmp_path / "codes.json").read_text())
    for (rows, columns), picture in zip(values["grids"], pictures.values(), strict=True):
        assert 200 < rows * columns <= 256
        assert columns / rows == pytest.approx(picture.width / picture.height, rel=0.1)
    assert {tuple(original["crop_box"][:2]) for original in values["originals"]} == {(0, 0)}
    decode = ["decode", str(tmp_path / "codes.json"), "-o", str(tmp_path / "again"), "--size", "original"]
    assert main(decode) == 0
    found = [Image.open(path).size for path in sorted((tmp_path / "again").iterdir())]
    assert found == [picture.size for picture in pictures.values()]
    photo.resize((900, 100)).save(tmp_path / "long.png")
    capsys.readouterr()
    assert main(["show", str(tmp_path / "long.png"), "-o", str(tmp_path / "sheet.png")]) == 1
    told = capsys.readouterr().err
    assert "long.png: 900 x 100 pixels are 9.0 to 1, expected at most 8 to 1" in told and "(--fit)" in told


@pytest.mark.parametrize("name", ["again.psd", "again.mpg"])
def test_formats_that_are_read_only(run, folder, tmp_path, name):
    assert run("encode", folder / "cat.png", "-o", tmp_path / "codes.json")[0] == 0
    for command in (["decode", tmp_path / "codes.json"], ["show", folder / "cat.png"]):
        code, _, err = run(*command, "-o", tmp_path / name)
        assert code == 1 and "can't write" in err and "name a .png" in err


def test_names_that_the_output_can_not_encode_are_escaped(run, folder, tmp_path, monkeypatch):
    name = tmp_path / "\u65e5.png"
    name.write_bytes((folder / "cat.png").read_bytes())
    raw = io.BytesIO()
    stdout = io.TextIOWrapper(raw, encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", stdout)
    assert run("encode", name)[0] == 0
    assert rb"\u65e5.png: " in raw.getvalue() and stdout.errors == "strict"
