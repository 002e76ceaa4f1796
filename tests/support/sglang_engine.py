"""A real engine of SGLang in a process of its own: requests as JSON in, answers out.

    python -m support.sglang_engine MODEL ANSWERS < job.json

A job has `engine`, options of `Engine`, and `requests`: lists of [prompt, sampling parameters]. They run side by side.
On a CPU the engine does without SGLang's own kernels, which there are no wheels of.
"""

import asyncio
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

STARTED = "the engine has started"


def answers(model, folder, requests, **engine):
    """Returns what an engine answers; skips the test where none starts."""
    if find_spec("sglang") is None:
        pytest.skip("SGLang is not installed")
    job, file = json.dumps({"engine": engine, "requests": requests}), folder / "answers.json"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "support.sglang_engine", str(model), str(file)],
        env=environment | {"TRITON_INTERPRET": "0"},
        input=job,
        capture_output=True,
        text=True,
        timeout=580,
    )
    if STARTED not in done.stdout:
        pytest.skip(f"no engine of SGLang starts here: {done.stderr.strip()[-300:]}")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return json.loads(file.read_text())


def main(model, file):
    import sglang

    from dyntok.llm.sglang_plugin import SglangImageGrammar

    job = json.load(sys.stdin)
    plain = dict(attention_backend="torch_native", sampling_backend="pytorch", mem_fraction_static=0.1)
    options = {} if torch.cuda.is_available() else {"device": "cpu", **plain}
    options |= dict(dtype="float32", disable_cuda_graph=True, enable_custom_logit_processor=True, log_level="error")
    engine = sglang.Engine(model_path=model, **options, **job["engine"])
    print(STARTED, flush=True)

    async def ask(prompt, sampling):
        own = SglangImageGrammar.to_str() if "custom_params" in sampling else None
        try:
            return await engine.async_generate(prompt, sampling, custom_logit_processor=own)
        except ValueError as error:
            return {"error": str(error)}

    async def ask_all():
        return await asyncio.gather(*(ask(*request) for request in job["requests"]))

    Path(file).write_text(json.dumps(engine.loop.run_until_complete(ask_all()), default=str))
    engine.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
