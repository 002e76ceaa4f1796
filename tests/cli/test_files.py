"""Images named on the command line: a folder, a pattern or an address is answered with what to do instead."""

import pytest


@pytest.mark.parametrize("command", [["encode"], ["show", "-o", "sheet.png"]], ids=["encode", "show"])
@pytest.mark.parametrize(
    "name, problem, advice",
    [
        ("{folder}", "is a folder", "dyntok batch {folder} OUTPUT"),
        ("{folder}/", "is a folder", "name its files ({folder}/*.jpg)"),
        ("{folder}/*.webp", "matches no file", "check the pattern and the folder"),
        ("https://example.org/cat.jpg", "is an address", "curl -O https://example.org/cat.jpg"),
        ("s3://bucket/cat.jpg", "is an address", "download it first"),
    ],
    ids=["folder", "folder with a slash", "pattern", "https", "s3"],
)
def test_what_is_no_image_file_is_answered_with_the_right_way(run, folder, command, name, problem, advice):
    code, out, err = run(*command, folder / "cat.png", name.format(folder=folder))
    assert (code, out) == (1, "") and err.count("\n") == 1
    assert problem in err and "expected image files" in err and advice.format(folder=folder) in err


@pytest.mark.parametrize("name", ["a::b.png", "[cat]*.png", "zip:..d.png"])
def test_a_file_may_have_an_unusual_name(run, folder, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes((folder / "cat.png").read_bytes())
    code, out, _ = run("encode", name)
    assert code == 0 and out.startswith(f"{name}: ")
