"""Puts the lock of a project into its metadata; called by setuptools whenever it builds a project.

It runs in the builds of all projects, those without kernels too. So it stands alone: importing one of the
packages would import torch. Where a project names no kernels, it does nothing.
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
    """Copy one file of the project, or remove the copy where there is no such file any more.

    Args:
        command: The command `egg_info` of setuptools.
        name: `kernels.lock` or `kernels.hashes`.
        target: Where the copy belongs.
    """
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
