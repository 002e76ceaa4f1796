"""A model process works on its own device, and asks little of the program that starts it."""

import subprocess
import sys

import pytest
import torch
from support.batch_data import codes, pictures, run, write_folder

from dyntok.batch.engines import devices
from dyntok.errors import ConfigError


class _Pipe:
    """What a model process receives and sends."""

    def __init__(self, job):
        self.job, self.sent = job, []

    def receive(self):
        return self.job

    def send(self, message):
        self.sent.append(message)


@pytest.mark.parametrize("device", ["cuda:1", "cuda:0"])
def test_the_device_is_made_current_before_anything_else(device, monkeypatch):
    def refuse(chosen):
        raise ConfigError(f"chose {chosen}")

    monkeypatch.setattr(torch.cuda, "set_device", refuse)
    pipe = _Pipe(devices._DeviceJob(None, device, torch.get_num_threads()))
    devices._serve(pipe)
    assert [str(message) for message in pipe.sent] == [f"chose {device}"]


def test_a_script_without_a_main_guard_and_few_file_descriptors(photos, checkpoint_folder, tmp_path):
    """A model has more tensors than the script may have files."""
    source, output = write_folder(tmp_path / "in", pictures(photos, 4)), tmp_path / "out"
    script = tmp_path / "script.py"
    script.write_text(
        "import resource\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))\n"
        "from dyntok import batch\n"
        "print('started')\n"
        "engine = batch.EngineOptions(devices=('cpu', 'cpu'), workers=2)\n"
        f"batch.tokenize({source!r}, {str(output)!r}, model={str(checkpoint_folder)!r}, engine=engine)\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "started\n"), done.stderr
    run(source, tmp_path / "plain", checkpoint_folder)
    assert codes(output) == codes(tmp_path / "plain")
