"""A model process works on its own device."""

import pytest
import torch

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
