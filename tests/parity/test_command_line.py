"""Lock files and the command line: each library reads the files of the other, and prints the same."""

from __future__ import annotations

import importlib.metadata
import io
import json
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest
from kernels.cli import main as their_main
from parity_scene import SIDES, Both, Side, call, kernel_source, publish_kernels, write_kernel

from kernels_core.cli import main as our_main
from kernels_plugins.local_hub.server import Repository


@dataclass
class Done:
    """The output of a command, and its exit code."""

    code: object
    stdout: str
    stderr: str


def command(both: Both, side: Side, *words: object, check: bool = True) -> Done:
    """Run a command of a side as from a shell; its cache is that of the side."""
    out, err = io.StringIO(), io.StringIO()

    def run(side: Side) -> object:
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
            patch.setattr(sys, "argv", ["command", *map(str, words)])
            try:
                (our_main if side.is_ours else their_main)()
            except SystemExit as end:
                return end.code
            return None

    code = both.alone(side, run).get()
    assert not check or code in (None, 0), out.getvalue() + err.getvalue()
    return Done(code, out.getvalue(), err.getvalue())


def project(both: Both, side: Side, *dependencies: str) -> Path:
    """Make a project that depends on kernels."""
    folder = both.home / f"project of {side.name}"
    folder.mkdir()
    lines = "".join(f'"{repo_id}" = 1\n' for repo_id in dependencies)
    (folder / "pyproject.toml").write_text(
        f'[project]\nname = "p"\nversion = "1"\n\n[tool.kernels.dependencies]\n{lines}'
    )
    return folder


@pytest.fixture
def published(kernels_hub: Both) -> Repository:
    """Publish a kernel, and another one that the first needs."""
    assert kernels_hub.hub is not None
    base = publish_kernels(kernels_hub.hub, "acme/base", {"__init__.py": "FACTOR = 3\n"})
    base.branch("v1")
    needs = {"kernel-depends": [{"repo-id": "acme/base", "version": 1}]}
    kernels = publish_kernels(kernels_hub.hub, "acme/kernels", kernel_source(3), metadata=needs)
    kernels.branch("v1")
    return kernels


def locks(path: Path) -> list[tuple[str, int, str]]:
    """Read a lock file: repositories, versions and commits."""
    return sorted(
        (entry["dependency"]["repo-id"], entry["dependency"]["version"], entry["lock"]["commit"])
        for entry in json.loads(path.read_text())
    )


def test_lock_files_are_the_same(kernels_hub: Both, published: Repository) -> None:
    """Both lock the same commits in the same file; each reads that of the other, downloads by it, and loads offline."""
    folders = {side.name: project(kernels_hub, side, "acme/kernels") for side in SIDES}
    for side in SIDES:
        command(kernels_hub, side, "lock", folders[side.name])
    theirs, ours = (locks(folders[side.name] / "kernels.lock") for side in SIDES)
    assert theirs == ours
    assert [(repo_id, version) for repo_id, version, _ in ours] == [("acme/base", 1), ("acme/kernels", 1)]
    assert ours[1][2] == published.head("v1")

    for reader, writer in (SIDES, SIDES[::-1]):
        folder = folders[writer.name]
        command(kernels_hub, reader, "download", folder)
        code = (
            f'lib.load_kernel("acme/kernels", lockfile={str(folder / "kernels.lock")!r}).layers.Scale()(torch.ones(1))'
        )
        assert kernels_hub.process(reader, f"tell({code}.item())", HF_HUB_OFFLINE="1") == 3.0


def test_lock_file_with_other_keys(kernels_hub: Both, published: Repository) -> None:
    """Both read a lock file that ours wrote in this process with the commit of another one than the branch's."""
    old = published.head("v1")
    publish_kernels(kernels_hub.hub, "acme/kernels", kernel_source(5))  # type: ignore[arg-type]
    published.branch("v1")
    lockfile = kernels_hub.home / "kernels.lock"
    entry = {"dependency": {"repo-id": "acme/kernels", "version": 1}, "lock": {"commit": old}}
    base = {"dependency": {"repo-id": "acme/base", "version": 1}, "lock": {"commit": _head(kernels_hub, "acme/base")}}
    lockfile.write_text(json.dumps([base, entry], indent=4))

    def scenario(side: Side) -> float:
        return call(side.lib.get_locked_kernel("acme/kernels", lockfile=lockfile).layers.Scale())

    kernels_hub.run(scenario).agree(3.0)


def _head(both: Both, repo_id: str) -> str:
    assert both.hub is not None
    repository = both.hub.repository(repo_id)
    assert repository is not None
    return repository.head("v1")


class EggInfo:
    """The argument that setuptools passes to writers of a project's metadata."""

    def __init__(self) -> None:
        self.written: dict[str, str | None] = {}

    def write_or_delete_file(self, what: str, filename: str, data: str | None, force: bool = False) -> None:
        self.written[what] = data


@pytest.mark.parametrize("there", ["project with a lock", "project without a lock", "project without kernels"])
def test_lock_travels_in_the_metadata(both: Both, monkeypatch: pytest.MonkeyPatch, there: str) -> None:
    """Both have setuptools put the lock file of a project that names kernels into its metadata."""
    writers = {writer.value.partition(":")[0].partition(".")[0]: writer for writer in _writers()}
    assert len(writers) == 2
    both.home.joinpath("pyproject.toml").write_text(
        "[project]\n" if there == "project without kernels" else '[tool.kernels.dependencies]\n"acme/kernels" = 1\n'
    )
    if there != "project without a lock":
        both.home.joinpath("kernels.lock").write_text("[]")
    monkeypatch.chdir(both.home)
    for writer in writers.values():
        command = EggInfo()
        writer.load()(command, "kernels.lock", "p.egg-info/kernels.lock")
        expected = {"project with a lock": {"kernels.lock": "[]"}, "project without a lock": {"kernels.lock": None}}
        assert command.written == expected.get(there, {}), writer


def _writers() -> list[importlib.metadata.EntryPoint]:
    found = importlib.metadata.entry_points(group="egg_info.writers")
    return [writer for writer in found if writer.name == "kernels.lock"]


@pytest.mark.parametrize("all_variants", [False, True])
def test_download(kernels_hub: Both, published: Repository, all_variants: bool) -> None:
    """Both download the build for this machine, or all of them with the option for it."""
    files = dict(published.files())
    other = "torch29-cxx11-cu126-riscv64-linux"
    files |= {path.replace("torch-universal", other): data for path, data in files.items()}
    commit = published.commit(files)
    published.branch("v1")
    for side in SIDES:
        folder = project(kernels_hub, side, "acme/kernels")
        entries = [("acme/kernels", commit), ("acme/base", _head(kernels_hub, "acme/base"))]
        (folder / "kernels.lock").write_text(
            json.dumps([{"dependency": {"repo-id": r, "version": 1}, "lock": {"commit": c}} for r, c in entries])
        )
        command(kernels_hub, side, "download", folder, *(["--all-variants"] if all_variants else []))
        build = kernels_hub.home / side.name / "hub/kernels--acme--kernels/snapshots" / commit / "build"
        whole = {path.name for path in build.iterdir() if (path / "layers.py").is_file()}
        assert whole == {"torch-universal", *([other] if all_variants else [])}, side.name


def test_download_without_a_lock_file(kernels_hub: Both) -> None:
    """Both fail, and name the file that is missing."""
    for side in SIDES:
        done = command(kernels_hub, side, "download", project(kernels_hub, side), check=False)
        assert done.code not in (None, 0) and "kernels.lock" in done.stdout + done.stderr


def test_info(kernels_hub: Both) -> None:
    """Both describe a repository and a folder, for programs; ours tells all that theirs tells."""
    assert kernels_hub.hub is not None
    changes = {"upstream": "https://example.com/upstream", "python-depends": ["einops"], "license": "MIT"}
    publish_kernels(kernels_hub.hub, "acme/kernels", kernel_source(3), metadata=changes).branch("v1")
    folder = write_kernel(kernels_hub.home / "kernel", kernel_source(3), changes=changes)
    for words in (["acme/kernels", "--version", "1"], ["acme/kernels"], [folder]):
        theirs, ours = (json.loads(command(kernels_hub, side, "info", *words, "--json").stdout) for side in SIDES)
        assert theirs["license"] == "MIT" and theirs["python_depends"] == ["einops"]
        assert {key: ours.get(key) for key in theirs} == theirs


def test_versions(kernels_hub: Both) -> None:
    """Both list the versions with their builds, and tell which fit this machine."""
    assert kernels_hub.hub is not None
    published = publish_kernels(kernels_hub.hub, "acme/kernels", kernel_source(3))
    published.branch("v1")
    publish_kernels(kernels_hub.hub, "acme/kernels", kernel_source(3), variant="torch29-cu126-riscv64-linux")
    published.branch("v12")
    for side in SIDES:
        told = command(kernels_hub, side, "versions", "acme/kernels").stdout
        for word in ("1", "12", "torch-universal", "torch29-cu126-riscv64-linux", "riscv64"):
            assert word in told, (side.name, word, told)
