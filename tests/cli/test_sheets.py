"""`dyntok demo` and `dyntok show`: the contact sheets that they draw."""

import io
import json
import re

import pytest
from PIL import Image

from dyntok.cli.main import main
from dyntok.loading import BUNDLED


def picture_size(path):
    with Image.open(path) as image:
        return image.size


def test_show_draws_a_panel_for_each_image(run, folder, tmp_path):
    photographs = sorted(folder.iterdir())
    code, out, _ = run("show", *photographs, "-o", tmp_path / "sheet.png", "--columns", 2, "--max-tokens", 5)
    *lines, last = out.splitlines()
    assert code == 0 and lines == [f"{path}: 5 tokens" for path in photographs]
    assert last.startswith(f"wrote {tmp_path}/sheet.png; next: dyntok encode")
    assert picture_size(tmp_path / "sheet.png") == (2 * 800, 2 * 286 + 8)
    _, out, err = run("show", folder / "cat.png", "-o", tmp_path / "sheet.png", "--json")
    assert json.loads(out)["picture"] == f"{tmp_path}/sheet.png" and picture_size(tmp_path / "sheet.png") == (800, 294)
    assert err.startswith(f"wrote {tmp_path}/sheet.png")


def test_demo_draws_a_contact_sheet(run, tmp_path):
    code, out, _ = run("demo", "-o", tmp_path / "demo.png", "--budget", "10")
    first, codes, last = out.splitlines()
    assert code == 0 and first == "astronaut.jpg: 64 patches became 10 integers (10 bytes)" and len(codes.split()) == 10
    assert last.startswith(f"wrote {tmp_path}/demo.png (") and "; next: dyntok encode" in last
    assert picture_size(tmp_path / "demo.png") == (800, 294)
    values = json.loads(run("demo", "-o", tmp_path / "demo.png", "--json", "--budget", "10")[1])
    assert " ".join(map(str, values["codes"][0])) == codes and values["picture"] == f"{tmp_path}/demo.png"


@pytest.mark.skipif(not (BUNDLED / "model.safetensors").exists(), reason="the bundled tokenizer is missing")
def test_demo_works_out_of_the_box(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["demo"]) == 0
    assert "256 patches became" in capsys.readouterr().out and picture_size("demo.png") == (800, 294)


def test_contact_sheets_go_to_stdout(checkpoint_folder, folder, capsysbinary):
    for command in (["show", str(folder / "cat.png")], ["demo"]):
        assert main([*command, "--model", str(checkpoint_folder), "-o", "-"]) == 0
        assert picture_size(io.BytesIO(capsysbinary.readouterr().out)) == (800, 294)


def test_unusable_images_and_paths_are_errors(run, folder, bad, tmp_path):
    photograph, nowhere = folder / "cat.png", tmp_path / "no" / "where.png"
    for arguments, message in (
        (("show", bad, "-o", tmp_path / "sheet.png"), "bad.jpg"),
        (("show", photograph, "-o", nowhere), "can't write .*where.png"),
        (("show", photograph, "-o", tmp_path / "sheet.xyz"), "can't write .*not written as .xyz"),
        (("demo", "-o", nowhere), "can't write .*where.png"),
    ):
        code, out, err = run(*arguments)
        assert (code, out) == (1, "") and err.startswith("dyntok: "), arguments
        assert re.search(message, err)
