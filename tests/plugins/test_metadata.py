"""`metadata.json`: the entries that are read, and that nothing in it can do more than be refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from packaging.version import Version

from kernels_core import LoadError
from kernels_plugins.hub.builds.metadata import (
    BackendInfo,
    BuilderInfo,
    Digest,
    GitStatus,
    KernelName,
    Metadata,
    Provenance,
)
from kernels_plugins.hub.dependency import Dependency

GOOD: dict[str, Any] = {
    "id": "_kernels_cpu_abc",
    "name": "fast-layers",
    "version": 3,
    "license": "MIT",
    "backend": {"type": "cuda", "archs": ["9.0"]},
    "python-depends": ["einops"],
    "kernel-depends": [{"repo-id": "acme/base", "version": 2}, {"repo-id": "acme/other", "revision": "main"}],
    "upstream": "https://github.com/acme/fast-layers",
    "source": "git+https://github.com/acme/fast-layers",
    "provenance": {
        "kernel-builder": {"version": "1.2", "commit": "A" * 40, "dirty": False},
        "kernel": {"commit": "b" * 64, "dirty": True},
    },
    "kernels-minver": "0.14",
    "digest": {"algorithm": "SHA256", "files": {"__init__.py": "47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU="}},
    "something": {"of": ["later", 1, None]},
}


def changed(**changes: Any) -> bytes:
    """Write good metadata with some entries replaced, those that are None left out."""
    data = {**GOOD, **{key.replace("_", "-"): value for key, value in changes.items()}}
    return json.dumps({key: value for key, value in data.items() if value is not None}).encode()


def test_good() -> None:
    """Everything is read, and entries of later times are let be."""
    expected = Metadata(
        id="_kernels_cpu_abc",
        name=KernelName("fast-layers"),
        version=3,
        backend=BackendInfo("cuda", ("9.0",)),
        license="MIT",
        upstream="https://github.com/acme/fast-layers",
        source="git+https://github.com/acme/fast-layers",
        python_depends=("einops",),
        kernel_depends=(Dependency("acme/base", version=2), Dependency("acme/other", revision="main")),
        kernels_minver=Version("0.14"),
        digest=Digest("sha256", GOOD["digest"]["files"]),
        provenance=Provenance(BuilderInfo("1.2", GitStatus("a" * 40, False)), GitStatus("b" * 64, True)),
    )
    assert Metadata.from_bytes(changed()) == expected and expected.name.python_name == "fast_layers"


def test_two_ways_to_read(tmp_path: Path) -> None:
    """Metadata is read from bytes and from a file; a file that is not there is an error of ours, and a ValueError."""
    (tmp_path / "metadata.json").write_bytes(changed())
    assert Metadata.read_from_file(tmp_path / "metadata.json") == Metadata.from_bytes(changed())
    for bad in (lambda: Metadata.read_from_file(tmp_path / "no.json"), lambda: Metadata.from_bytes(b"{}")):
        with pytest.raises(LoadError) as caught:
            bad()
        assert isinstance(caught.value, ValueError)


LEAST = {"id", "name", "version", "backend", "python-depends"}


def test_least() -> None:
    """Everything else may be left out, or be null."""
    rest = {key: None for key in GOOD if key not in LEAST and key != "something"}
    nulls = json.dumps({**GOOD, **rest, "backend": {"type": "cuda", "archs": None}}).encode()
    for read in (Metadata.from_bytes(changed(**rest)), Metadata.from_bytes(nulls)):
        assert (read.license, read.upstream, read.source, read.kernels_minver) == (None,) * 4
        assert (read.digest, read.provenance, read.kernel_depends) == (None, None, ())


def test_provenance() -> None:
    """A build is dirty if the kernel or the builder was, and says which; an unknown state is not dirty."""
    git = {"commit": "a" * 40, "dirty": True}
    table: list[tuple[dict[str, Any], tuple[str, ...]]] = [
        ({"kernel-builder": {"version": "1"}}, ()),
        ({"kernel-builder": {"version": "1"}, "kernel": None}, ()),
        ({"kernel-builder": {"version": "1"}, "kernel": git}, ("the kernel",)),
        ({"kernel-builder": {"version": "1", **git}}, ("the builder",)),
        ({"kernel-builder": {"version": "1", **git}, "kernel": git}, ("the kernel", "the builder")),
        ({"kernel-builder": {"version": "1", "git": git}}, ()),
    ]
    for provenance, sources in table:
        read = Metadata.from_bytes(changed(provenance=provenance)).provenance
        assert read is not None and (read.dirty_sources, read.dirty) == (sources, bool(sources))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-8-sig"])
def test_encodings(encoding: str) -> None:
    """JSON in any of its encodings is read."""
    assert Metadata.from_bytes(changed().decode().encode(encoding)).name == "fast-layers"


@pytest.mark.parametrize("key", ["id", "name", "version", "backend", "python-depends"])
@pytest.mark.parametrize("value", ["missing", 3.5, [1], True])
def test_incomplete(key: str, value: object) -> None:
    """A missing entry, or one of another type, is named, with the next step."""
    content = json.dumps({k: v for k, v in {**GOOD, key: value}.items() if v != "missing"}).encode()
    with pytest.raises(LoadError, match=key) as caught:
        Metadata.from_bytes(content)
    assert str(caught.value).startswith("metadata.json") and "ebuild the kernel" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backend": {}}, "backend.type is missing"),
        ({"backend": {"type": "cuda", "archs": "9.0"}}, "backend.archs is"),
        ({"backend": {"type": "cuda", "archs": [9.0]}}, "backend.archs is"),
        ({"license": 3}, "license is 3, not str"),
        ({"python_depends": [1]}, "python-depends is"),
        ({"kernel_depends": {}}, "kernel-depends is"),
        ({"kernel_depends": ["acme/base"]}, "kernel-depends has 'acme/base'"),
        ({"kernel_depends": [{"repo-id": "acme/base"}]}, "either version .* or revision"),
        ({"kernel_depends": [{"repo-id": "acme/base", "version": 1, "revision": "main"}]}, "either version"),
        ({"kernel_depends": [{"repo-id": "../../base", "version": 1}]}, "repo-id"),
        ({"kernel_depends": [{"repo-id": "acme/base", "version": -1}]}, "whole number"),
        ({"kernel_depends": [{"repo-id": "acme/base", "version": True}]}, "whole number"),
        ({"kernel_depends": [{"repo-id": "acme/base", "revision": ""}]}, "revision"),
        ({"kernel_depends": [{"repo-id": "acme/base", "version": 1, "branch": "x"}]}, "kernel-depends has"),
        ({"kernel_depends": [{"repo-id": "a/b", "version": 1}, {"repo-id": "a/b", "version": 2}]}, "names a/b twice"),
        ({"provenance": []}, "provenance is"),
        ({"provenance": {}}, "provenance.kernel-builder is missing"),
        ({"provenance": {"kernel-builder": {}}}, "kernel-builder.version is missing"),
        ({"provenance": {"kernel-builder": {"version": "1", "dirty": True}}}, "kernel-builder.commit is missing"),
        ({"provenance": {"kernel-builder": {"version": "1"}, "kernel": {"commit": "a" * 40}}}, "dirty is missing"),
        ({"provenance": {"kernel-builder": {"version": "1", "commit": "x", "dirty": True}}}, "'x', no commit"),
        ({"name": "Fast_Layers"}, "no kernel name"),
        ({"name": "../../evil"}, "no kernel name"),
        ({"name": "x"}, "no kernel name"),
        ({"name": "os\n"}, "no kernel name"),
        ({"kernels_minver": "soon"}, "'soon', not a version"),
        ({"digest": []}, "digest is"),
        ({"digest": {}}, "digest.(algorithm|files) is missing"),
        ({"digest": {"algorithm": "md5", "files": {}}}, "'md5'; sha256 and sha512"),
        ({"digest": {"algorithm": "sha256"}}, "digest.files is missing"),
        ({"digest": {"algorithm": "sha256", "files": {"a": 1}}}, "does not map paths to digests"),
    ],
)
def test_wrong(changes: dict[str, Any], message: str) -> None:
    """The entry that is wrong inside is named."""
    with pytest.raises(LoadError, match=message):
        Metadata.from_bytes(changed(**changes))


@pytest.mark.parametrize(
    "content", [b"", b"{", b"<html>", b"\xff\xfe\xff", b"[]", b"null", b'"x"', b"NaN", b"[" * 200_000]
)
def test_unreadable(content: bytes) -> None:
    """Text that is no JSON object is reported as such, also JSON made to exhaust the stack."""
    with pytest.raises(LoadError, match=r"metadata.json (cannot be read|holds) .*Rebuild the kernel"):
        Metadata.from_bytes(content)


# --- Nothing but LoadError -----------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
KEYS = st.sampled_from([*GOOD, "kernels-minver", "digest"])


def parses_or_refuses(content: bytes) -> Metadata | None:
    """Parse, letting nothing but a LoadError count as a refusal."""
    try:
        return Metadata.from_bytes(content)
    except LoadError as error:
        assert "metadata.json" in str(error)
        return None


@given(st.binary(max_size=64) | JSON.map(lambda value: json.dumps(value).encode()))
@settings(max_examples=150, deadline=None)
@example(b"\xed\xa0\x80")
@example(b"1" * 10_000)
def test_any_bytes(content: bytes) -> None:
    """Arbitrary bytes and arbitrary JSON are read or refused, never anything else."""
    parses_or_refuses(content)


@given(st.dictionaries(KEYS, JSON, max_size=3), st.dictionaries(st.sampled_from(["algorithm", "files", "type"]), JSON))
@settings(max_examples=200, deadline=None)
def test_any_entries(changes: dict[str, Any], inner: dict[str, Any]) -> None:
    """Good metadata with arbitrary entries is read or refused; metadata that is read can be checked or refused."""
    data = {**GOOD, **changes}
    for key in ("digest", "backend", "provenance"):
        if isinstance(data[key], dict):
            data[key] = {**data[key], **inner}
    read = parses_or_refuses(json.dumps(data).encode())
    if read is not None:
        assert isinstance(read.version, int) and (read.digest is None or read.digest.algorithm in ("sha256", "sha512"))


@given(st.integers(0, len(changed()) - 1), st.integers(0, 255))
@settings(max_examples=200, deadline=None)
def test_any_damage(position: int, byte: int) -> None:
    """Good metadata with one byte changed is read or refused."""
    content = bytearray(changed())
    content[position] = byte
    parses_or_refuses(bytes(content))
