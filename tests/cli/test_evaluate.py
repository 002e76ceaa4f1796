"""`dyntok eval`: what it measures, and what it refuses."""

import json


def test_eval_measures_a_folder(run, folder, bad):
    code, out, _ = run("eval", folder, "--limit", 2, "--selection", "even", "--without-positions", "--budget", 9)
    assert code == 0 and "PSNR" in out and "images" in out and out.splitlines()[-1].startswith("evaluated ")
    code, out, err = run("eval", folder, bad, "--json", "--budget", 9)
    values = json.loads(out)
    assert code == 3 and values["images"] == 3 and values["failures"] == 1 and values["tokens"]["mean"] == 9
    assert err.splitlines()[-1].startswith("evaluated ")
    code, out, _ = run("eval", folder, "--keys", "ca", "--json")
    assert code == 0 and json.loads(out)["images"] == 1


def test_eval_refuses_pictures_above_the_limit(run, folder):
    code, _, err = run("eval", folder, "--budget", 9, "--max-pixels", 99)
    assert code == 1 and "the limit is 99" in err


def test_eval_without_images_is_an_error(run, folder):
    for arguments, message in (((folder, "--keys", "x"), "no key of an image"), ((folder / "none",), "does not exist")):
        code, _, err = run("eval", *arguments)
        assert code == 1 and message in err
