"""Run each scenario through `kernels` and through ours; see `parity_scene.py`."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
REASON = "the library `kernels` is not installed, so there is nothing to compare with: run `nox -s parity`"

if importlib.util.find_spec("kernels") is not None:
    sys.path.insert(0, str(HERE))  # for parity_scene
    from hub_scene import new_process  # noqa: F401
    from parity_scene import both, fresh_theirs, kernels_hub  # noqa: F401

    from kernels_plugins.local_hub.testing import local_hub  # noqa: F401
else:

    class Absent(pytest.Module):
        """A module that is not imported, and says why."""

        def collect(self) -> list[pytest.Item]:
            raise pytest.skip.Exception(REASON, allow_module_level=True)

    def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
        """Skip every module of this folder."""
        return Absent.from_parent(parent, path=module_path) if HERE in module_path.parents else None
