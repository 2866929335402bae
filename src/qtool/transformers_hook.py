"""Puts qtool's checkpoints into transformers' registry of quantizers, whichever of the two is imported first.

Neither torch nor transformers is imported here: what is registered is loaded when transformers loads its registry.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

REGISTRY = "transformers.quantizers.auto"
QUANTIZER = "qtool.runtime.pretrained.quantizer"


class RegistryFinder:
    """A finder of modules (importlib's MetaPathFinder, which would cost more to import than all of qtool's help): finds
    transformers' registry where it is, and has qtool's quantizer added to it once it is loaded."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != REGISTRY:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        load = spec.loader.exec_module

        def load_and_register(module: ModuleType) -> None:
            load(module)
            register(module)

        spec.loader.exec_module = load_and_register  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Register now if transformers has its registry already, else when it loads it. Calling it again does nothing."""
    if (registry := sys.modules.get(REGISTRY)) is not None:
        register(registry)
    elif not any(isinstance(finder, RegistryFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, RegistryFinder())


def register(registry: ModuleType) -> None:
    """Add qtool's quantizer to a loaded registry. An unknown transformers is left as it is, with a warning."""
    try:
        importlib.import_module(QUANTIZER).register(registry)
    except (ImportError, AttributeError) as error:
        warnings.warn(f"qtool checkpoints cannot be opened with from_pretrained: {error}", stacklevel=2)
