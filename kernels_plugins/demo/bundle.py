"""`write_bundle`: the kernel repository of the demo, with the kernels of the pack `triton` in its build for GPUs."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
from pathlib import Path

_HUB = Path(__file__).with_name("hub")
_PACK = Path(__file__).parents[1] / "packs" / "triton"
_SHARED = ("launch.py", "rms_norm.py", "gated.py", "rotary.py")
"""Files of the pack that import only each other, PyTorch and Triton: a repository may hold them."""


def write_bundle(folder: Path) -> Path:
    """Write `kernels-demo/llama-layers` into a folder that is not there yet, as it would be on the Hub.

    Each build is described by the hashes of its files, as its publisher does last.

    Returns:
        The folder, for a local Hub to serve.
    """
    shutil.copytree(_HUB, folder, ignore=shutil.ignore_patterns("__pycache__"))
    for build in (folder / "kernels-demo" / "llama-layers" / "build").iterdir():
        backend = build.name.removeprefix("torch-")
        for name in _SHARED if backend == "cuda" else ():
            shutil.copyfile(_PACK / name, build / name)
        contents = {path.name: path.read_bytes() for path in sorted(build.iterdir())}
        digests = {name: base64.b64encode(hashlib.sha256(data).digest()).decode() for name, data in contents.items()}
        metadata = {
            "id": f"_llama_layers_{backend}_{hashlib.sha256(json.dumps(digests).encode()).hexdigest()[:12]}",
            "name": "llama-layers",
            "version": 1,
            "license": "Apache-2.0",
            "python-depends": [],
            "backend": {"type": backend},
            "digest": {"algorithm": "sha256", "files": digests},
        }
        (build / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    return folder
