"""Puts the lock of a project into its metadata: setuptools calls it whenever it builds a project.

It runs in the builds of all projects, also of those without kernels. So it imports neither torch nor the client of the
Hub, and does nothing for a project that names no kernels.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def write_metadata(command: Any, name: str, target: str) -> None:
    """Copy one file of the project, or remove its copy if the project has no such file any more."""
    try:
        project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return
    if "dependencies" not in project.get("tool", {}).get("kernels", {}):
        return
    source = Path(name)
    text = source.read_text(encoding="utf-8") if source.is_file() else None
    if text is None and name == "kernels.lock":
        logging.warning(
            "pyproject.toml names kernels, and there is no %s: run `kernels-core lock .`", source.absolute()
        )
    command.write_or_delete_file(name, target, text, force=True)
