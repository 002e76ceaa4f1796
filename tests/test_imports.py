"""The direction of imports: no circle between modules or rooms, and no arrow that points up.

Imports inside functions count: they only hide a circle. Imports for type checkers (under TYPE_CHECKING) count, too.
"""

import ast
from pathlib import Path

import pytest

import dyntok
import dyntok_kernels

PACKAGE = Path(dyntok.__file__).parent
KERNELS = Path(dyntok_kernels.__file__).parent

# From the top down. A room, or a module directly in dyntok, may import what stands further down.
LEVELS = [
    {"cli"},
    {"registration"},
    {"llm"},
    {"batch", "golden", "machine", "page"},
    {"loading"},
    {"lavit", "training", "export", "visualize"},
    {"vocab"},
    {"tokenizer"},
    {"network"},
    {"checkpoint", "chunks", "refine"},
    {"ahead", "policy", "precision", "image"},
    {"imaging", "fitting", "margins", "model", "encoding", "features", "ids", "target"},
    {"config", "epochs", "original", "ragged", "validation"},
    {"texts"},
    {"tables"},
    {"addresses", "device", "structure", "layout", "locks", "names", "tars"},
    {"errors"},
    {"dyntok_kernels"},
]
# Optional packages and the rooms that may import them.
OPTIONAL = {
    "accelerate": {"training"},
    "diffusers": {"lavit"},
    "litdata": {"batch"},
    "megatron": {"batch"},
    "onnx": {"page"},
    "onnxscript": {"export"},
    "pyarrow": {"batch", "llm", "tables"},
    "ray": {"batch"},
    "sglang": {"llm"},
    "transformers": {"llm", "lavit"},
    "vllm": {"llm"},
    "yaml": {"training"},
}


def modules_of(root: Path, package: str) -> dict[str, Path]:
    """Module names and files."""
    names = {}
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        names[".".join([package, *parts]).removesuffix(".__init__")] = path
    return names


MODULES = modules_of(PACKAGE, "dyntok") | modules_of(KERNELS, "dyntok_kernels")


def imported_by(name: str) -> set[str]:
    """All modules that a module imports, wherever it does; `from package import module` counts as the module."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import, expected absolute ones"
            members = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {member if member in MODULES else node.module for member in members}
    return found - {name}


IMPORTS = {name: imported_by(name) for name in MODULES}


def room_of(module: str) -> str:
    """The folder in dyntok, or the module directly in it, or dyntok_kernels; "" for dyntok itself."""
    package, *rest = module.split(".")
    return package if package != "dyntok" else (rest[0] if rest else "")


def strongly_connected(arrows: dict[str, set[str]]) -> list[set[str]]:
    """Groups of two or more that reach each other."""
    reach = {start: reachable(start, arrows) for start in arrows}
    groups = {frozenset({a, *(b for b in reach[a] if a in reach.get(b, ()))}) for a in arrows}
    return [set(group) for group in groups if len(group) > 1]


def reachable(start: str, arrows: dict[str, set[str]]) -> set[str]:
    seen, waiting = set(), [start]
    while waiting:
        for target in arrows.get(waiting.pop(), ()):
            if target in arrows and target not in seen:
                seen.add(target)
                waiting.append(target)
    return seen


def room_arrows() -> dict[str, set[str]]:
    """Which room imports which; `dyntok` itself gives public names to its users and to the command line."""
    arrows: dict[str, set[str]] = {}
    for module, targets in IMPORTS.items():
        rooms = {room_of(target) for target in targets if target in MODULES}
        arrows.setdefault(room_of(module), set()).update(rooms - {room_of(module)})
    arrows.pop("")
    return arrows


def test_no_circle_of_modules():
    inside = {name: {target for target in targets if target in MODULES} for name, targets in IMPORTS.items()}
    assert strongly_connected(inside) == []


def test_no_circle_of_rooms():
    assert strongly_connected(room_arrows()) == []


def test_no_arrow_points_up():
    level = {room: depth for depth, rooms in enumerate(LEVELS) for room in rooms}
    arrows = room_arrows()
    assert set(arrows) <= set(level), f"rooms without a level: {set(arrows) - set(level)}"
    upward = [(room, target) for room in arrows for target in arrows[room] - {""} if level[target] < level[room]]
    assert upward == []


def test_rooms_do_not_import_the_package_itself():
    """`from dyntok import load` in a room would be a hidden arrow to the top. Batch only reads the version."""
    users = {room_of(name) for name, targets in IMPORTS.items() if "dyntok" in targets}
    assert users <= {"cli", "batch"}


def test_kernels_do_not_know_the_package():
    targets = set().union(*(IMPORTS[name] for name in modules_of(KERNELS, "dyntok_kernels")))
    assert not any(target.split(".")[0] == "dyntok" for target in targets)


@pytest.mark.parametrize("package", OPTIONAL)
def test_optional_packages_are_imported_in_the_rooms_of_their_extra(package):
    users = {room_of(name) for name, targets in IMPORTS.items() if any(t.split(".")[0] == package for t in targets)}
    assert users <= OPTIONAL[package]
