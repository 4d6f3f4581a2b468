"""Runs of the command `kernels-core`, in the process of the tests: that is faster than another one."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from kernels_core import cli


@dataclass
class Ran:
    """The exit code and the output of a run."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Ran]


def run_here(capture: pytest.CaptureFixture[str], *words: str) -> Ran:
    """Run `kernels-core` with some words, in this process."""
    capture.readouterr()
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(), pytest.raises(SystemExit) as exit:
        patch.setattr(sys, "argv", ["kernels-core", *words])
        patch.setattr(sys, "path", [*sys.path])
        warnings.simplefilter("default")
        cli.main()
    output = capture.readouterr()
    return Ran(int(exit.value.code or 0), output.out, output.err)
