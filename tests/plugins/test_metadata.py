"""`metadata.json`: what is read of it, and that nothing in it can do more than be refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from packaging.version import Version

import kernels_core
from kernels_core import LoadError
from kernels_plugins.hub import metadata
from kernels_plugins.hub.metadata import INTERFACE_LEVEL, Metadata, check_metadata, parse_metadata

GOOD: dict[str, Any] = {
    "id": "_kernels_cpu_abc",
    "name": "fast-layers",
    "version": 3,
    "license": "MIT",
    "backend": {"type": "cuda", "archs": ["9.0"]},
    "python-depends": ["einops"],
    "kernels-minver": "0.14",
    "digest": {"algorithm": "SHA256", "files": {"__init__.py": "47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU="}},
    "something": {"of": ["later", 1, None]},
}


def changed(**changes: Any) -> bytes:
    """Write good metadata with some entries replaced, those that are None left out."""
    data = {**GOOD, **{key.replace("_", "-"): value for key, value in changes.items()}}
    return json.dumps({key: value for key, value in data.items() if value is not None}).encode()


def test_good() -> None:
    """Everything that loading depends on is read, and entries of later times are let be."""
    read = parse_metadata(changed())
    files = GOOD["digest"]["files"]
    expected = Metadata(
        "_kernels_cpu_abc",
        "fast-layers",
        3,
        "cuda",
        ("einops",),
        Version("0.14"),
        digest_algorithm="sha256",
        digests=files,
    )
    assert read == expected and read.python_name == "fast_layers"


def test_least() -> None:
    """Minimum level and digests may be left out, or be null."""
    for nothing in (changed(kernels_minver=None, digest=None), changed().replace(b'"0.14"', b"null")):
        assert parse_metadata(nothing).minver is None
    read = parse_metadata(changed(digest=None))
    assert read.digests is None and read.digest_algorithm is None


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-8-sig"])
def test_encodings(encoding: str) -> None:
    """JSON in any of its encodings is read."""
    assert parse_metadata(changed().decode().encode(encoding)).name == "fast-layers"


@pytest.mark.parametrize("key", ["id", "name", "version", "backend", "python-depends"])
@pytest.mark.parametrize("value", ["missing", 3.5, [1], True])
def test_incomplete(key: str, value: object) -> None:
    """A missing entry, or one of another type, is named, with what to do."""
    content = json.dumps({k: v for k, v in {**GOOD, key: value}.items() if v != "missing"}).encode()
    with pytest.raises(LoadError, match=key) as caught:
        parse_metadata(content)
    assert str(caught.value).startswith("metadata.json") and "ebuild the kernel" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backend": {}}, "backend.type is missing"),
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
    """What is wrong inside is named."""
    with pytest.raises(LoadError, match=message):
        parse_metadata(changed(**changes))


@pytest.mark.parametrize(
    "content", [b"", b"{", b"<html>", b"\xff\xfe\xff", b"[]", b"null", b'"x"', b"NaN", b"[" * 200_000]
)
def test_unreadable(content: bytes) -> None:
    """What is no JSON object is told as that, also JSON made to exhaust the stack."""
    with pytest.raises(LoadError, match=r"metadata.json (cannot be read|holds) .*Rebuild the kernel"):
        parse_metadata(content)


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
        return parse_metadata(content)
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
    """Good metadata with arbitrary entries is read or refused; what is read can be checked or refused."""
    data = {**GOOD, **changes}
    for key in ("digest", "backend"):
        if isinstance(data[key], dict):
            data[key] = {**data[key], **inner}
    read = parses_or_refuses(json.dumps(data).encode())
    if read is not None:
        assert isinstance(read.version, int) and read.digest_algorithm in (None, "sha256", "sha512")


@given(st.integers(0, len(changed()) - 1), st.integers(0, 255))
@settings(max_examples=200, deadline=None)
def test_any_damage(position: int, byte: int) -> None:
    """Good metadata with one byte changed is read or refused."""
    content = bytearray(changed())
    content[position] = byte
    parses_or_refuses(bytes(content))


# --- May this process run it? --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("minver", "fits"), [("0.17", True), ("0.17.9", True), ("0.9", True), ("0.18", False), ("1.0", False)]
)
def test_minver(minver: str, fits: bool) -> None:
    """The level asked for is compared with that of the interface, which is 0.17, in its first two numbers."""
    assert Version("0.17") == INTERFACE_LEVEL
    read = parse_metadata(changed(kernels_minver=minver, python_depends=[]))
    if fits:
        check_metadata(read)
        return
    with pytest.raises(LoadError, match=rf"level {minver} .*implements 0.17.*pip install --upgrade"):
        check_metadata(read)


def test_minver_is_not_our_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """The level is one constant, and our own version has no part in it."""
    assert Version(kernels_core.__version__) != INTERFACE_LEVEL
    monkeypatch.setattr(kernels_core, "__version__", "99.0")
    read = parse_metadata(changed(kernels_minver="0.18", python_depends=[]))
    with pytest.raises(LoadError):
        check_metadata(read)
    monkeypatch.setattr(metadata, "INTERFACE_LEVEL", Version("0.18"))
    check_metadata(read)


def test_python_packages() -> None:
    """Missing Python packages are all named as what pip installs; those there are enough."""
    check_metadata(parse_metadata(changed(python_depends=["json", "torch"])))
    missing = changed(python_depends=["no-such-package", "tvm-ffi", "torch", "nvidia-cutlass-dsl"])
    with pytest.raises(LoadError, match=r"pip install no-such-package apache-tvm-ffi nvidia-cutlass-dsl$"):
        check_metadata(parse_metadata(missing))


@pytest.mark.parametrize("name", ["", ".", "..", "no_such.b", "\0", "\ud800", "x" * 300, "/etc/passwd", "-r x"])
def test_odd_package_names(name: str) -> None:
    """A name that can be no package is a missing one."""
    with pytest.raises(LoadError, match="not installed"):
        check_metadata(parse_metadata(changed(python_depends=[name])))


def test_packages_are_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To see that a package is there, it is not run, also where the name is that of a part of it."""
    (tmp_path / "dangerous").mkdir()
    (tmp_path / "dangerous" / "__init__.py").write_text("raise RuntimeError('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    check_metadata(parse_metadata(changed(python_depends=["dangerous", "dangerous.part"])))
