"""The kernel in Triton of a package that `kernels-core new-plugin` writes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels_plugins.authoring.package import Names, render, write

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")


def test_its_kernel_is_right_on_this_gpu(tmp_path: Path) -> None:
    """The package's own checks of its kernel in Triton pass: outputs, dtypes, layouts, sizes, compiled and captured."""
    folder = tmp_path / "acme-kernels"
    write(render(Names("acme-kernels", "RMSNorm")), folder)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "triton_is_right"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *sys.path])}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "3 passed" in done.stdout, done.stdout + done.stderr
