"""Fixtures for the authors of kernel plugins: a local Hub, and kernel repositories to put on it.

Name this module in the `conftest.py` at the root of your tests:

    pytest_plugins = ["kernels_plugins.hub.testing"]

A test then talks to the real `huggingface_hub` client, over a real socket, and to no other machine:

    def test_layers(local_hub, kernel_repository):
        repository = kernel_repository("acme/kernels", "class Silu: ...")
        local_hub.fail("/resolve/", status=500)
        ...
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import runpy
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import constants, file_download, hf_api
from huggingface_hub.utils import _http

from ..hub.builds.integrity import is_byte_code
from ..hub.builds.metadata import METADATA, SIGNATURE
from .server import LocalHub, Repository

KernelRepository = Callable[..., Repository]


@pytest.fixture
def local_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    """A running, empty `LocalHub` that this process's client talks to, with an empty cache and no token.

    The client repeats failed requests as often as ever, but does not wait in between. Processes started
    from the test talk to this Hub too.
    """
    served = tmp_path / "hub-served"
    served.mkdir()
    with LocalHub(served) as hub:
        point_client_at(hub, tmp_path / "hub-home", monkeypatch)
        yield hub
        # Connections to this Hub, and its proxy settings, must not outlive it.
        _http.close_session()


def point_client_at(hub: LocalHub, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the imported client use `hub` and a cache under `home` until `monkeypatch` is undone.

    Example:
        >>> def test_two_hubs(monkeypatch, tmp_path):
        ...     with LocalHub() as hub:
        ...         point_client_at(hub, tmp_path, monkeypatch)
    """
    for name, value in hub.environment(home).items():
        monkeypatch.setenv(name, value)
    # The client read its environment when it was imported: its module of constants runs again, beside itself.
    for name, constant in runpy.run_path(constants.__file__).items():
        if name.isupper() and getattr(constants, name) != constant:
            monkeypatch.setattr(constants, name, constant)
    # Functions of the package, such as huggingface_hub.model_info, belong to one object made on import.
    monkeypatch.setattr(hf_api.api, "endpoint", hub.url)
    hurried = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})
    for module in (_http, file_download):
        monkeypatch.setattr(module, "time", hurried)
    _http.close_session()


@pytest.fixture
def kernel_repository(local_hub: LocalHub) -> KernelRepository:
    """Return a function that puts a kernel repository on `local_hub`; see `publish_kernels`."""
    return functools.partial(publish_kernels, local_hub)


def publish_kernels(
    hub: LocalHub,
    repo_id: str = "acme/kernels",
    layers: str | Mapping[str, str | bytes] = "",
    *,
    name: str | None = None,
    variant: str = "torch-universal",
    digest: bool = True,
    trusted: bool = True,
    metadata: Mapping[str, object] | None = None,
) -> Repository:
    """Put a kernel repository with one build variant on a Hub; a new commit if it is there already.

    Args:
        hub: the Hub.
        repo_id: `owner/name`; the owner becomes an organisation of the Hub.
        layers: the source of `layers.py`, or the files of the variant by their path in it.
        name: the kernel's name in its metadata (by default made of `repo_id`).
        variant: the folder under `build/`.
        digest: whether the metadata lists the hashes of the files.
        trusted: whether the owner is a trusted publisher of kernels.
        metadata: entries that replace those of the metadata; one that is None is left out.

    Example:
        >>> with LocalHub() as hub:
        ...     repository = publish_kernels(hub, "acme/kernels", "class Silu: ...")
        ...     [path.split("/")[-1] for path in sorted(repository.files())]
        ['__init__.py', 'layers.py', 'metadata.json']
    """
    files = {"layers.py": layers} if isinstance(layers, str) else dict(layers)
    files.setdefault("__init__.py", "from . import layers\n" if "layers.py" in files else "")
    # A kernel's name has lower-case letters, digits and dashes only.
    name = name or repo_id.split("/")[-1].lower().replace("_", "-")
    described = kernel_metadata(name, files, digest=digest, changes=metadata)
    files.setdefault("metadata.json", json.dumps(described, indent=2))
    tree = {f"build/{variant}/{path}": data for path, data in files.items()}
    hub.organization(repo_id.split("/")[0], trusted=trusted)
    repository = hub.repository(repo_id)
    if repository is None:
        return hub.add(repo_id, tree)
    repository.commit(tree)
    return repository


def kernel_metadata(
    name: str,
    files: Mapping[str, str | bytes],
    *,
    digest: bool = True,
    changes: Mapping[str, object] | None = None,
) -> dict[str, object]:
    """Describe a build variant as its `metadata.json` does.

    Example:
        >>> kernel_metadata("layers", {}, digest=False, changes={"version": 2})["version"]
        2
    """
    described: dict[str, object] = {
        "id": f"_{name.replace('-', '_')}_local",
        "name": name,
        "version": 1,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": "cpu"},
    }
    if digest:
        described["digest"] = {"algorithm": "sha256", "files": file_digests(files)}
    described |= changes or {}
    return {key: value for key, value in described.items() if value is not None}


def file_digests(files: Mapping[str, str | bytes]) -> dict[str, str]:
    """Hash the files of a build variant: base64 of sha256, without the metadata and compiled Python.

    Example:
        >>> file_digests({"a.py": "", "metadata.json": "{}"})
        {'a.py': '47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU='}
    """
    contents = {path: data.encode() if isinstance(data, str) else data for path, data in files.items()}
    return {
        path: base64.b64encode(hashlib.sha256(contents[path]).digest()).decode()
        for path in sorted(contents)
        if path not in (METADATA, SIGNATURE) and not is_byte_code(path)
    }
