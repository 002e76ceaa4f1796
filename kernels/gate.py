"""Compile every kernel as it is launched, for GPUs that need not be present, and check the result (`make kernels`).

    python kernels/gate.py            compare with kernels/resources.json
    python kernels/gate.py --write    write that table again (with --only: these rows of it)

Always checked: no register is spilled, shared memory is within the target's limit, and kernels that multiply
half-precision matrices contain the target's instructions for it. If Triton's version is the table's, registers and
shared memory must equal the table's, too. This is a process of its own, because Triton can't compile while its
interpreter is on.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    raise SystemExit("TRITON_INTERPRET is set, and the interpreter can't compile; unset it")

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).parent))
from dyntok_kernels.gpu import attention, codebook_stats, merge_similar, nearest_code, rows  # noqa: E402
from dyntok_kernels.gpu.tiles import Variant  # noqa: E402

TABLE = Path(__file__).with_name("resources.json")
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32), "sm_90": GPUTarget("cuda", 90, 32), "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}  # fmt: skip
SHARED_LIMIT = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}  # bytes per program
MATRIX = {
    "sm_80": r"mma\.sync",
    "sm_90": r"wgmma\.|mma\.sync",
    "sm_100": r"tcgen05\.mma|mma\.sync",
    "gfx942": r"v_mfma",
}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def variants() -> dict[str, Variant]:
    found = [
        variant
        for module in (attention, nearest_code, rows, codebook_stats, merge_similar)
        for variant in module.variants()
    ]
    named = {variant.name: variant for variant in found}
    assert len(named) == len(found), "two variants have one name"
    return named


def build(name: str, target: str) -> tuple[str, str, dict, list[str]]:
    """Returns (variant, target, resources used, problems found)."""
    variant = variants()[name]
    pointers = [i for i, kind in enumerate(variant.signature.values()) if kind.startswith("*")]
    source = ASTSource(
        fn=variant.kernel, signature=variant.signature, constexprs=variant.constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in pointers},
    )  # fmt: skip
    numbers = {name for name, kind in variant.signature.items() if kind == "i32"}
    if numbers != set(variant.kernel.do_not_specialize):
        return (
            name,
            target,
            {},
            [f"would be compiled anew for values of {', '.join(sorted(numbers))}; name them to `kernel`"],
        )
    options = {"num_warps": variant.blocks.warps, "num_stages": variant.blocks.stages}
    try:
        compiled = triton.compile(source, target=TARGETS[target], options=options)
    except Exception as error:
        return name, target, {}, [f"does not compile: {str(error).splitlines()[-1]}"]
    uses = {"registers": 0, "shared": compiled.metadata.shared, "spills": 0}  # the latter two in bytes
    if target == "gfx942":
        text = compiled.asm["amdgcn"]
        numbers = {
            key: int(value) for key, value in re.findall(r"\.(vgpr_count|private_segment_fixed_size): +(\d+)", text)
        }
        uses["registers"] = numbers["vgpr_count"]
        uses["spills"] = numbers[
            "private_segment_fixed_size"
        ]  # a scalar register kept in a vector register's lane touches no memory
    else:
        text = compiled.asm["ptx"]
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            told = subprocess.run(
                [CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
            ).stdout
        numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", told)}
        uses["registers"] = numbers["REG"]
        uses["spills"] = numbers["STACK"] + numbers["LOCAL"]
    wrong = []
    if uses["spills"]:
        wrong.append(f"spills {uses['spills']}")
    if uses["shared"] > SHARED_LIMIT[target]:
        wrong.append(f"takes {uses['shared']:,} bytes of shared memory, the limit is {SHARED_LIMIT[target]:,}")
    if variant.matrix:
        found = re.search(MATRIX[target], text)
        if not found:
            wrong.append(f"has no matrix instruction ({MATRIX[target]})")
        uses["matrix"] = found[0].rstrip(".") if found else ""
    return name, target, uses, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the table instead of comparing with it")
    parser.add_argument("--only", default="", help="variants whose name begins so")
    options = parser.parse_args()
    names = [name for name in variants() if name.startswith(options.only)]
    pairs = [(name, target) for name in names for target in TARGETS]
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        results = list(pool.map(build, *zip(*pairs, strict=True), chunksize=4))
    rows: dict[str, dict] = {}
    faults = []
    for name, target, uses, wrong in results:
        rows.setdefault(name, {})[target] = uses
        faults += [f"{name}, {target}: {fault}" for fault in wrong]
    old = json.loads(TABLE.read_text()) if TABLE.exists() else {"triton": None, "kernels": {}}
    if not options.write and old["triton"] == triton.__version__:
        faults += [
            f"{name}: {rows[name]}, the table says {old['kernels'].get(name)}"
            for name in rows
            if rows[name] != old["kernels"].get(name)
        ]
        if not options.only:
            faults += [f"{name} is in the table and no kernel any more" for name in old["kernels"] if name not in rows]
    elif not options.write:
        print(f"Triton {triton.__version__}; the table is of {old['triton']}, so registers are not compared")
    for fault in faults:
        print(fault)
    print(
        f"{len(results)} compilations of {len(names)} variants for {', '.join(TARGETS)}, "
        f"PyTorch {torch.__version__}: {len(faults)} faults"
    )
    if options.write and not faults:
        if options.only and old["triton"] == triton.__version__:
            kept = {name: row for name, row in old["kernels"].items() if name in variants() and name not in rows}
            rows = {name: (kept | rows)[name] for name in variants() if name in kept or name in rows}
        lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(rows[name])}" for name in rows)
        TABLE.write_text(f'{{"triton": {json.dumps(triton.__version__)}, "kernels": {{\n{lines}\n}}}}\n')
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
