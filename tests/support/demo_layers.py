"""The layers of the demo and their kernels, imported beside the package."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

from kernels_core.generated import dispatched_layer

DEMO = Path(__file__).resolve().parents[2] / "kernels_plugins" / "demo"


def load(name: str, path: Path) -> Any:
    """Imports the package folder or file `path` as `name`, leaving no bytecode in a folder that is sealed."""
    init = path / "__init__.py" if path.is_dir() else path
    spec = importlib.util.spec_from_file_location(
        name, init, submodule_search_locations=[str(path)] if path.is_dir() else None
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    written, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        spec.loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = written
    return module


def load_reference(name: str) -> Any:
    """The demo's layers as `name`, undecorated: no installed plugin may serve the reference."""
    module = load(name, DEMO / "layers.py")
    for cls in (getattr(module, layer) for layer in module.__all__):
        layer = dispatched_layer(cls.forward)
        cls.forward = layer.reference if layer is not None else cls.forward
    return module
