"""Files of repositories in the cache: those that have arrived, and those to be removed."""

from __future__ import annotations

import os
from pathlib import Path

from kernels_core import LoadError


def in_cache(link: Path, blobs: Path) -> Path:
    """Return the link to a new file, unless it leads out of the cache: the Hub names the file, by an ETag."""
    if link.is_symlink() and (place := link.parent / os.readlink(link)).parent.resolve() != blobs.resolve():
        link.unlink()
        raise LoadError(
            "the Hub gave one of its files a name that is a path, and the client wrote it to "
            f"{os.path.normpath(place)}: remove that file, unless it is yours, and find out what answers at HF_ENDPOINT"
        )
    return link


def arrived(folder: Path) -> list[tuple[str, int, int]]:
    """Return the name, size and time of the last write of files, also of those that arrive: parts come in any order."""
    try:
        with os.scandir(folder) as entries:
            return sorted((entry.name, (now := entry.stat()).st_size, now.st_mtime_ns) for entry in entries)
    except OSError:  # not there yet, or one was renamed meanwhile
        return []


def discard(place: Path) -> str:
    """Remove downloaded files that turned out wrong, so that the next attempt downloads them anew."""
    folder = place if place.is_dir() else place.parent
    blobs = (folder.parents[3] / "blobs").resolve()
    try:
        for path in sorted(place.rglob("*")) if place.is_dir() else [place]:
            if path.is_symlink():
                blob = path.resolve()
                path.unlink()
                if blob.parent == blobs:  # a changed link may lead out of the cache
                    blob.unlink(missing_ok=True)
            elif path.is_file():
                path.unlink()
    except OSError as error:
        return f"They cannot be removed from the cache ({type(error).__name__}: {error}): remove {place} and try again"
    return "They were removed from the cache: try again"
