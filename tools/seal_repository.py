"""Writes the `metadata.json` of every build variant of a kernel repository, digests included.

Run it after any change to a variant's files: `python tools/seal_repository.py [REPOSITORY]`.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
from pathlib import Path

DEFAULT = Path(__file__).resolve().parents[1] / "kernels_plugins/demo/hub/kernels-demo/llama-layers"
METADATA = "metadata.json"


def digests(variant: Path) -> dict[str, str]:
    """The base64 SHA-256 of every file of the variant but its metadata, by relative path."""
    paths = sorted(path for path in variant.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {
        path.relative_to(variant).as_posix(): base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode()
        for path in paths
        if path != variant / METADATA
    }


def metadata(variant: Path, version: int = 1) -> dict[str, object]:
    """The metadata of one variant folder, named `torch-<backend>`; its id changes with its content."""
    name = variant.parents[1].name
    backend = variant.name.removeprefix("torch-")
    files = digests(variant)
    content = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:12]
    return {
        "id": f"_{name.replace('-', '_')}_{backend}_{content}",
        "name": name,
        "version": version,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": files},
    }


def main() -> None:
    """Seals every variant of the repository."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repository", type=Path, nargs="?", default=DEFAULT)
    repository = parser.parse_args().repository.resolve()
    for variant in sorted((repository / "build").glob("torch-*")):
        (variant / METADATA).write_text(json.dumps(metadata(variant), indent=2) + "\n", encoding="utf-8")
        print(f"sealed {variant.relative_to(repository)}")


if __name__ == "__main__":
    main()
