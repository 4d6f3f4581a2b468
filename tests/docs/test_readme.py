"""README.md: its code runs, and its commands and links are real."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from fresh_process import run_python

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def test_tour_runs() -> None:
    """The Python blocks, run in order in one fresh process, raise nothing and end with a decision."""
    program = "\n".join(blocks("python"))
    run = run_python("-c", program, environment=os.environ, folder=ROOT)
    assert run.returncode == 0, run.stderr
    assert "refused __main__.FastSiluAndMul: it declares has_backward = False" in run.stdout


def test_ten_lines_run(tmp_path: Path) -> None:
    """The block that needs transformers runs, has ten lines, and its receipt says by how much each layer wins."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    (program,) = blocks("python needs=transformers")
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert re.search(r"model\.norm +RMSNorm +cpu +inference +\S+", run.stdout), run.stdout
    assert re.search(r"by kernels\.choice\.json: 1(-\d+)? rows? of 256 float32: ", run.stdout), run.stdout
    statements = [line for line in program.splitlines() if line and not line.startswith(("import", "from"))]
    assert len(statements) + 1 <= 10


def test_commands_name_sessions_that_exist() -> None:
    """Both commands run a nox session of noxfile.py."""
    sessions = re.findall(r"^def (\w+)\(session", (ROOT / "noxfile.py").read_text(encoding="utf-8"), re.MULTILINE)
    asked = [name for block in blocks("sh") for name in re.findall(r"nox -s (\w+)", block)]
    assert asked == ["demo", "tests"]
    assert set(asked) <= set(sessions)


@pytest.mark.parametrize("link", re.findall(r"\]\((?!https?:)([^)#]+)", README))
def test_links_lead_somewhere(link: str) -> None:
    """A relative link names a file of this repository."""
    assert (ROOT / link).exists()
