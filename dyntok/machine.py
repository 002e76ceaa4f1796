"""What this machine is: versions, devices, instructions of the processor, and which form of each operation runs."""

import importlib.util
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

_LIBRARIES = ("torch", "timm", "triton", "numpy", "Pillow", "safetensors")


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the libraries that decide about codes."""
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def devices() -> dict[str, str]:
    """Returns the devices that PyTorch can use, and what each is."""
    threads = torch.get_num_threads()
    found = {"cpu": f"{platform.machine()}, {threads} threads, {torch.backends.cpu.get_cpu_capability()}"}
    for index in range(torch.cuda.device_count()):
        name, memory = torch.cuda.get_device_name(index), torch.cuda.get_device_properties(index).total_memory
        major, minor = torch.cuda.get_device_capability(index)
        found[f"cuda:{index}"] = f"{name}, {memory / 2**30:.0f} GiB, capability {major}.{minor}"
    if torch.backends.mps.is_available():
        found["mps"] = platform.processor() or platform.machine()
    return found


def instructions() -> dict[str, bool]:
    """Returns instructions that change how the processor rounds, and whether PyTorch uses them."""
    capability = torch.backends.cpu.get_cpu_capability()
    return {
        "AVX2": capability in ("AVX2", "AVX512"),
        "AVX512": capability == "AVX512",
        "oneDNN": torch.backends.mkldnn.is_available(),
        "MKL": torch.backends.mkl.is_available(),
        # builds without oneDNN, as for Macs, lack the operation
        "bf16 in hardware": torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    }


def kernels(device: torch.device) -> dict[str, str]:
    """Returns the form of each operation of `dyntok_kernels` that runs on a device, after one try of it.

    An operation that fails is listed with its error.
    """
    form = "PyTorch"
    if device.type == "cuda":
        form = "Triton" if importlib.util.find_spec("triton") else "Triton is not installed"
    found = {}
    for name, run in _tries(device).items():
        try:
            run()
            found[name] = form
        except Exception as error:  # a compiler, a driver or a missing package; the doctor tells what there is
            found[name] = f"fails: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return found


def _tries(device: torch.device) -> dict:
    import dyntok_kernels as ops

    keep = torch.tensor([[True, False, True, True], [False, True, False, False]], device=device)
    index, cu = ops.compact(keep.cpu())
    index, cu = index[:4].to(device), cu.to(device)
    rows = torch.linspace(-1, 1, 4 * 32, dtype=torch.float32, device=device).view(4, 32)
    grid = torch.linspace(1, -1, 8 * 32, dtype=torch.float32, device=device).view(8, 32)
    heads = rows.view(4, 2, 16)
    return {
        "varlen_attention": lambda: ops.varlen_attention(heads, heads, heads, cu, cu).sum().item(),
        "nearest_code": lambda: ops.nearest_code(rows, grid).sum().item(),
        "compact": lambda: ops.compact(keep)[0].sum().item(),
        "gather_rows": lambda: ops.gather_rows(grid, index).sum().item(),
        "scatter_rows": lambda: ops.scatter_rows(rows, index, total=8).sum().item(),
        "codebook_stats": lambda: ops.codebook_stats(rows, index.long(), 8)[1].sum().item(),
        "merge_similar": lambda: ops.merge_similar(grid.view(2, 4, 32), keep, grid.new_ones(2, 4))[0].sum().item(),
    }
