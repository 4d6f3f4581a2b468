"""Files that are replaced whole or not at all."""

from __future__ import annotations

import os
import secrets
from pathlib import Path


def write_file(path: Path, text: str) -> None:
    """Write a text file, and its folder where that is missing.

    Readers find the old content or the new one, also when two processes write at once, or one is killed.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "new" / "file.txt"
        >>> write_file(path, "whole")
        >>> path.read_text(), [other.name for other in path.parent.iterdir()]
        ('whole', ['file.txt'])
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder: a rename across file systems would be a copy, which readers could find half done.
    new = path.with_name(f".{path.name[:100]}.{secrets.token_hex(8)}.new")
    try:
        with new.open("x", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())  # before the rename: after a power cut, a file of this name would be empty
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)  # there only if the writing failed
