"""Are these the bytes that were promised? Any change, removal or addition is found."""

from __future__ import annotations

import base64
import dataclasses
import gc
import hashlib
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_core import IntegrityError, LoadError
from kernels_plugins.hub.builds.integrity import (
    Build,
    RemoteFile,
    as_build,
    check_digest,
    check_transfer,
    is_byte_code,
    read_files,
)
from kernels_plugins.hub.builds.metadata import Digest
from kernels_plugins.hub.client.files import arrived, discard
from kernels_plugins.local_hub.repositories import git_blob_id
from kernels_plugins.local_hub.testing import kernel_metadata

FILES = {
    "__init__.py": b"from . import layers\n",
    "layers.py": b"class Silu: ...\n",
    "sub/data.bin": bytes(range(64)),
    "empty": b"",
}


def described(files: dict[str, bytes], algorithm: str | None = "sha256") -> Build:
    """Make a variant whose metadata has the digests of its files; without them for None."""
    data: dict[str, Any] = kernel_metadata("fast-layers", {}, digest=False)
    if algorithm:
        hashes = {p: base64.b64encode(hashlib.new(algorithm, c).digest()).decode() for p, c in files.items()}
        data["digest"] = {"algorithm": algorithm, "files": hashes}
    return as_build(Path("nowhere"), {**files, "metadata.json": json.dumps(data).encode()})


def listed(files: dict[str, bytes], large: int = 10**9) -> list[RemoteFile]:
    """List files as the Hub does, those from a size on as large ones."""

    def entry(path: str, content: bytes) -> RemoteFile:
        if len(content) < large:
            return RemoteFile(path, len(content), git_blob_id(content))
        return RemoteFile(path, len(content), "0" * 40, hashlib.sha256(content).hexdigest())

    return [entry(path, content) for path, content in files.items()]


def with_files(variant: Build, files: dict[str, bytes]) -> Build:
    """Give a variant other files, but the metadata it has."""
    return dataclasses.replace(variant, files={**files, "metadata.json": variant.files["metadata.json"]})


# What is right passes


@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
def test_right(algorithm: str) -> None:
    """Right files pass, and the answer says how many were checked and how."""
    assert check_digest(described(FILES, algorithm)) == f"4 files, {algorithm}"
    assert (
        check_transfer(FILES, listed(FILES))
        == check_transfer(FILES, listed(FILES, large=10))
        == "4 files as listed by the Hub"
    )


def test_exceptions() -> None:
    """The metadata and its signature are no part of the digest; of the listing they are."""
    variant = described(FILES)
    assert check_digest(dataclasses.replace(variant, files={**variant.files, "metadata.json.sigstore": b"signed"}))
    with pytest.raises(IntegrityError, match=r"metadata.json is not on the Hub"):
        check_transfer({**FILES, "metadata.json": b""}, listed(FILES))
    with pytest.raises(IntegrityError, match=r"sub/metadata.json is not in the digest"):
        check_digest(with_files(variant, {**FILES, "sub/metadata.json": b""}))


def test_no_digests() -> None:
    """A kernel without digests is reported as not checked."""
    assert check_digest(described(FILES, None)) == "not checked: the kernel has no digests"


def test_empty_digests() -> None:
    """A digest that lists nothing promises that there is nothing."""
    with pytest.raises(IntegrityError, match=r"layers.py is not in the digest"):
        check_digest(with_files(described({}), FILES))


@pytest.mark.parametrize(
    "bad", ["", "!", "ZZ", "e3b0c44298fc1c149afbf4c8996fb924", "47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU", "é"]
)
def test_malformed_digest(bad: str) -> None:
    """A digest that is no base64, or of the wrong length, matches nothing."""
    variant = described({"empty": b""})
    metadata = dataclasses.replace(variant.metadata, digest=Digest("sha256", {"empty": bad}))
    with pytest.raises(IntegrityError, match="empty has other bytes"):
        check_digest(dataclasses.replace(variant, metadata=metadata))


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "a/../layers.py", "./layers.py", "sub", "LAYERS.py"])
def test_paths_that_lead_elsewhere(path: str) -> None:
    """A digest or listing cannot speak of anything but the files of the variant, as they are spelled."""
    variant = described({**FILES, path: b""})
    with pytest.raises(IntegrityError, match="is missing"):
        check_digest(with_files(variant, FILES))
    with pytest.raises(IntegrityError, match="is missing"):
        check_transfer(FILES, listed({**FILES, path: b""}))


# Any change is seen

ANY_FILES = st.dictionaries(
    st.text("ab/.é", min_size=1, max_size=6), st.binary(max_size=40), min_size=1, max_size=5
).map(lambda files: {path: content for path, content in files.items() if not is_byte_code(path)} | {"x": b"x"})


@given(ANY_FILES, st.data())
@settings(max_examples=150, deadline=None)
def test_any_change(files: dict[str, bytes], data: st.DataObject) -> None:
    """One byte changed, added or taken away, one file more or less or renamed: always refused, and named."""
    path = data.draw(st.sampled_from(sorted(files)))
    content = files[path]
    position = data.draw(st.integers(0, max(len(content) - 1, 0)))
    damaged = dict(files)
    change = data.draw(st.sampled_from(["byte", "insert", "cut", "remove", "add", "rename"]))
    if change == "byte" and content:
        other = bytes([content[position] ^ data.draw(st.integers(1, 255))])
        damaged[path] = content[:position] + other + content[position + 1 :]
    elif change == "cut" and content:
        damaged[path] = content[:position] + content[position + 1 :]
    elif change == "remove":
        del damaged[path]
    elif change == "add":
        damaged["new"] = content
        path = "new"
    elif change == "rename":
        damaged["new"] = damaged.pop(path)
    else:
        damaged[path] = content[:position] + b"\0" + content[position:]
    variant = described(files, data.draw(st.sampled_from(["sha256", "sha512"])))
    check_digest(variant)
    listing = listed(files, large=data.draw(st.sampled_from([0, 10, 10**9])))
    check_transfer(files, listing)
    with pytest.raises(IntegrityError) as caught:
        check_digest(with_files(variant, damaged))
    assert path in str(caught.value)
    with pytest.raises(IntegrityError) as caught:
        check_transfer(damaged, listing)
    assert path in str(caught.value)


@given(ANY_FILES, ANY_FILES)
@settings(max_examples=100, deadline=None)
def test_fingerprint(one: dict[str, bytes], two: dict[str, bytes]) -> None:
    """Fingerprints are equal where all names and bytes are, whatever their order, and only there."""
    first, second = described(FILES), described(FILES)
    first, second = with_files(first, one), with_files(second, dict(reversed(two.items())))
    assert (first.fingerprint == second.fingerprint) == (one == two)


def test_fingerprint_separates() -> None:
    """Where a name ends and content begins cannot be confused."""
    variant = described({})
    ends = [{"a": b"", "b": b""}, {"a": b"b"}, {"ab": b""}, {"a\0b": b""}, {"a": b"", "b\0": b""}]
    assert len({dataclasses.replace(variant, files=files).fingerprint for files in ends}) == len(ends)


# Reading from disk


def test_read_files(tmp_path: Path) -> None:
    """All files are read at any depth, hidden ones too, and byte code is not."""
    (tmp_path / "sub" / "__pycache__").mkdir(parents=True)
    for name in ("a.py", ".hidden", "sub/b.so", "sub/c.pyc", "sub/d.pyo", "sub/__pycache__/e.py", "sub/f.pyc.txt"):
        (tmp_path / name).write_text(name)
    assert read_files(tmp_path) == {name: name.encode() for name in (".hidden", "a.py", "sub/b.so", "sub/f.pyc.txt")}
    assert read_files(tmp_path / "nowhere") == {}


def test_no_metadata(tmp_path: Path) -> None:
    """A variant without metadata is an error with the next step."""
    with pytest.raises(LoadError, match=r"no metadata.json. Rebuild"):
        as_build(tmp_path, {"__init__.py": b""})


# Discarding


def snapshot(cache: Path) -> tuple[Path, Path]:
    """Lay out a cache as the client does, with one file; return the variant's folder and the blob."""
    folder = cache / "kernels--acme--kernels" / "snapshots" / ("0" * 40) / "build" / "torch-cpu"
    blob = cache / "kernels--acme--kernels" / "blobs" / "abc"
    folder.mkdir(parents=True)
    blob.parent.mkdir()
    blob.write_text("bad")
    (folder / "layers.py").symlink_to(os.path.relpath(blob, folder))
    return folder, blob


def test_discard(tmp_path: Path) -> None:
    """Discarding removes links with their targets in the cache, broken links and plain files."""
    folder, blob = snapshot(tmp_path)
    (folder / "copied.py").write_text("bad")
    (folder / "broken.py").symlink_to("../../../../blobs/gone")
    discard(folder)
    assert list(folder.iterdir()) == [] and not blob.exists()


def test_discard_stays_inside(tmp_path: Path) -> None:
    """A link out of the cache is removed, and its target is left alone: files and folders."""
    folder, _ = snapshot(tmp_path / "cache")
    precious = tmp_path / "home" / "thesis.txt"
    precious.parent.mkdir()
    precious.write_text("years of work")
    (folder / "evil.py").symlink_to(precious)
    (folder / "folder").symlink_to(precious.parent)
    other = folder.parents[3] / "refs"
    other.write_text("main")
    (folder / "other.py").symlink_to(other)
    discard(folder)
    assert precious.read_text() == "years of work" and other.exists()
    assert list(folder.iterdir()) == []


def test_what_has_arrived_of_files(tmp_path: Path) -> None:
    """A part written into the middle of a file has arrived; a file that is renamed meanwhile leaves nothing open."""
    file = tmp_path / "a.incomplete"
    file.write_bytes(bytes(8))
    os.utime(file, (1, 1))
    before = arrived(tmp_path)
    with file.open("r+b") as stream:
        stream.seek(4)
        stream.write(b"x")
    assert arrived(tmp_path) != before
    for name in "bcd":
        (tmp_path / name).symlink_to(tmp_path / "gone")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        unraisable: list[object] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "unraisablehook", unraisable.append)
            assert arrived(tmp_path) == [] == arrived(tmp_path / "nowhere")
            gc.collect()
    assert not unraisable
