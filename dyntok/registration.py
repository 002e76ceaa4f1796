"""Registers dyntok's classes with transformers, whichever of the two is imported first.

transformers has no entry point for this. So a finder on `sys.meta_path` waits for the modules that classes are
registered with, registers as soon as transformers has loaded one, and removes itself after the last.
"""

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_AUTO = "transformers.models.auto"
_REGISTER = {  # a module of transformers, and what registers with it
    f"{_AUTO}.configuration_auto": ("auto_model", "register_config"),
    f"{_AUTO}.modeling_auto": ("auto_model", "register_model"),
    f"{_AUTO}.image_processing_auto": ("auto_processors", "register_image_processor"),
    f"{_AUTO}.processing_auto": ("auto_processors", "register_processor"),
}


def register_with_transformers() -> None:
    """Register with what transformers has loaded, and with the rest as soon as it is loaded."""
    waiting = {name for name in _REGISTER if name not in sys.modules}
    if waiting:
        sys.meta_path.insert(0, _Finder(waiting))
    for name in _REGISTER.keys() - waiting:
        _register(sys.modules[name])


class _Finder:
    def __init__(self, waiting: set[str]) -> None:
        self._waiting = waiting

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Returns the spec of a module that is waited for, whose loader then also registers."""
        spec = PathFinder.find_spec(name, path, target) if name in self._waiting else None
        if spec and spec.loader:
            load = spec.loader.exec_module

            def load_and_register(module: ModuleType) -> None:
                load(module)
                self._waiting.discard(name)
                if not self._waiting and self in sys.meta_path:
                    sys.meta_path.remove(self)
                _register(module)

            spec.loader.exec_module = load_and_register  # type: ignore[method-assign]  # of this module's loader alone
        return spec


def _register(module: ModuleType) -> None:
    home, function = _REGISTER[module.__name__]
    try:
        getattr(import_module(f"dyntok.llm.{home}"), function)(module)
    except Exception as error:  # a transformers that dyntok does not fit, older or newer, still serves others
        reason = f"{type(error).__name__}: {error}"
        warnings.warn(f"transformers does not know dyntok's classes ({reason})", ImportWarning, stacklevel=2)
