"""Repositories as values: checked when they are made, compared and shown without I/O."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from kernels_core import ArgumentError, ArgumentTypeError, KernelsError, source_label
from kernels_plugins import LayerRepository, LocalLayerRepository
from kernels_plugins.local_hub.server import LocalHub

pytest_plugins = ["kernels_plugins.hub.testing"]


def silu(repo_id: Any = "acme/kernels", layer_name: Any = "Silu", **options: Any) -> LayerRepository:
    """Name a layer, by default of version 1."""
    if not options.keys() & {"revision", "version"}:
        options["version"] = 1
    return LayerRepository(repo_id, layer_name=layer_name, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repo_id": "kernels"}, "repo_id is 'kernels': write 'owner/name'"),
        ({"repo_id": "acme/"}, "owner/name"),
        ({"repo_id": "/kernels"}, "owner/name"),
        ({"repo_id": "a/b/c"}, "owner/name"),
        ({"repo_id": ""}, "owner/name"),
        ({"revision": None}, "exactly one of revision=.* and version=<number>, got revision=None and version=None"),
        ({"revision": "main", "version": 1}, "exactly one .*got revision='main' and version=1"),
        ({"revision": ""}, "revision is ''"),
        ({"version": -1}, "version is -1: .*whole numbers"),
        ({"version": True}, "version is True"),
        ({"version": 1.0}, "version is 1.0"),
        ({"version": "1"}, "version is '1'"),
    ],
)
def test_bad_values(options: dict[str, Any], message: str) -> None:
    """A value that names no repository is refused at once, as a ValueError, with what to write."""
    with pytest.raises(ArgumentError, match=message) as caught:
        silu(**options)
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, KernelsError)


@pytest.mark.parametrize(
    "options",
    [
        {"repo_id": None},
        {"repo_id": 3},
        {"repo_id": Path("acme/kernels")},
        {"layer_name": None},
        {"layer_name": b"Silu"},
        {"revision": 1},
        {"trust_remote_code": "acme/kernels"},
        {"trust_remote_code": [1]},
        {"trust_remote_code": None},
        {"trust_remote_code": 1},
    ],
)
def test_bad_types(options: dict[str, Any]) -> None:
    """An argument of the wrong type is refused at once, as a TypeError that names it."""
    with pytest.raises(ArgumentTypeError, match=next(iter(options))) as caught:
        silu(**options)
    assert isinstance(caught.value, TypeError) and isinstance(caught.value, KernelsError)


def test_arguments_are_named() -> None:
    """Only the repository is positional."""
    with pytest.raises(TypeError):
        LayerRepository("acme/kernels", "Silu")  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        LocalLayerRepository("kernels", "Silu")  # type: ignore[arg-type, call-arg]


def test_local_types() -> None:
    """A folder is a path or a string, and compares as a path."""
    assert LocalLayerRepository("a/b", layer_name="Silu") == LocalLayerRepository(Path("a/b"), layer_name="Silu")  # type: ignore[arg-type]
    for wrong in ({"repo_path": 3}, {"repo_path": "a", "layer_name": None}):
        with pytest.raises(ArgumentTypeError, match=next(reversed(wrong))):
            LocalLayerRepository(**{"layer_name": "Silu", **wrong})  # type: ignore[arg-type]


def test_no_input_or_output(local_hub: LocalHub, tmp_path: Path) -> None:
    """Making, showing, hashing, comparing and pickling a source asks no Hub and touches no disk."""
    sources = [
        silu("acme/nothing"),
        silu(revision="main"),
        LocalLayerRepository(tmp_path / "nowhere", layer_name="Silu"),
    ]
    for source in sources:
        assert repr(source) and str(source) and source_label(source) == repr(source)
        assert source == source and hash(source) == hash(pickle.loads(pickle.dumps(source)))
        assert pickle.loads(pickle.dumps(source)) == source
    assert len(set(sources)) == 3
    assert local_hub.requests == [] and not Path(constants.HF_HOME).exists()


@pytest.mark.parametrize(
    "trust", [True, False, [], ["acme/kernels", "eve/kernels"], ("acme/kernels",), {"acme/kernels"}]
)
def test_trust_hashes(trust: Any) -> None:
    """However trust is written, the source hashes, equals its like, and has a repr that can be typed again."""
    source = silu(trust_remote_code=trust)
    assert source == silu(trust_remote_code=trust) and hash(source) == hash(silu(trust_remote_code=trust))
    assert eval(repr(source)) == source or trust == []
    assert source.kernel_request().trusts("acme/kernels") == bool(trust)
    assert source.kernel_request().trusts("acme/other") == (trust is True)


def test_repr() -> None:
    """A source is shown as it was written."""
    assert repr(silu()) == "LayerRepository('acme/kernels', layer_name='Silu', version=1)"
    assert repr(silu(revision="main", trust_remote_code=True)).endswith("revision='main', trust_remote_code=True)")
    assert tuple(silu(**pin).kernel_request().wanted for pin in ({"version": 0}, {"revision": "main"})) == (
        "v0",
        "main",
    )


def test_frozen() -> None:
    """A source does not change after it was checked; a list given to it can."""
    trust = ["acme/kernels"]
    source = silu(trust_remote_code=trust)
    trust.append("eve/kernels")
    assert not source.kernel_request().trusts("eve/kernels")
    with pytest.raises(AttributeError):
        source.repo_id = "eve/kernels"  # type: ignore[misc]
