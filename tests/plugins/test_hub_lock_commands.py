"""Locking from the command line, with real processes and a Hub over real sockets."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from command_line import Ran, Run, run_here
from fresh_process import run_python
from hub_scene import Publish, kernel, new_process

from kernels_plugins.hub.locking.lockfile import LOCK, Dependency, read_lock
from kernels_plugins.local_hub.repositories import git_blob_id
from kernels_plugins.local_hub.server import LocalHub, Repository
from kernels_plugins.local_hub.testing import kernel_metadata

pytest_plugins = ["kernels_plugins.hub.testing"]
pytestmark = pytest.mark.slow


@pytest.fixture
def python(local_hub: LocalHub, tmp_path: Path) -> Run:
    """Run Python in the project's folder; all processes share a cache."""

    def run(*arguments: str, **environment: str) -> Ran:
        # The client shows no bars where it is told so; these tests are about ours, too.
        variables = {**os.environ, **local_hub.environment(tmp_path / "hub-home"), "PYTHONWARNINGS": "ignore"}
        done = run_python(*arguments, environment={**variables, **environment}, folder=tmp_path)
        return Ran(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def cli(python: Run) -> Run:
    """Run the command line."""
    return lambda *arguments, **environment: python("-m", "kernels_core", *arguments, **environment)


@pytest.fixture
def here(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, new_process: object
) -> Run:
    """Run the command line in this process, for commands that only read."""
    monkeypatch.chdir(tmp_path)
    return functools.partial(run_here, capsys)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project that depends on version 1 of a kernel."""
    (tmp_path / "pyproject.toml").write_text('[tool.kernels.dependencies]\n"acme/kernels" = 1\n')
    return tmp_path


FOREIGN = "torch29-cxx11-cu126-riscv64-linux"


def needs(*dependencies: str, **wanted: object) -> dict[str, object]:
    """Say in metadata on which kernels another depends."""
    wanted = wanted or {"version": 1}
    return {"kernel-depends": [{"repo-id": repo_id, **wanted} for repo_id in dependencies]}


def add_variant(repository: Repository, variant: str = FOREIGN, source: str = "", **metadata: object) -> None:
    """Add a build to the head of a repository, and move its version 1 there."""
    files = {"__init__.py": "from . import layers\n", "layers.py": source or kernel(9)}
    described = json.dumps(kernel_metadata("kernels", files, changes=metadata))
    tree = {f"build/{variant}/{path}": text for path, text in {**files, "metadata.json": described}.items()}
    repository.commit({**repository.files(), **tree})
    repository.branch("v1")


def snapshots(home: Path, repo_id: str = "acme/kernels") -> set[str]:
    """Return the builds of a repository whose files are in the cache."""
    folder = home / "hub-home" / "hub" / f"kernels--{repo_id.replace('/', '--')}" / "snapshots"
    return {path.parent.name for path in folder.glob("*/build/*/layers.py")}


@pytest.fixture
def published(kernel_repository: Publish) -> Repository:
    """Version 1 of the kernel, which multiplies by three."""
    repository = kernel_repository(layers=kernel(3), metadata={"license": "MIT"})
    repository.branch("v1")
    return repository


PROGRAM = """
import torch
from kernels_core import Mode, resolve, use_kernel_forward_from_hub
from kernels_plugins import LockedLayerRepository, register_kernel_mapping

@use_kernel_forward_from_hub("Scale")
class Layer(torch.nn.Module):
    def forward(self, x):
        return x * 2.0

register_kernel_mapping({"Scale": {"cpu": LockedLayerRepository("acme/kernels", layer_name="Scale")}})
print(Layer()(torch.ones(1)).item())
print(resolve(Layer(), device="cpu", mode=Mode.INFERENCE))
"""


# --- From end to end -----------------------------------------------------------------------------


def test_lock_download_offline_start(
    project: Path, cli: Run, python: Run, published: Repository, kernel_repository: Publish, local_hub: LocalHub
) -> None:
    """Locked, downloaded, and started without a request: the kernel that was locked, though a newer one was pushed."""
    commit = published.head()
    (project / "program.py").write_text(PROGRAM)
    locked = cli("lock", ".")
    assert (locked.code, locked.err) == (0, "")
    assert locked.out.splitlines()[1].split() == ["acme/kernels", "version", "1", commit[:12], "new", "torch-universal"]
    kernel_repository(layers=kernel(5))
    published.branch("v1")
    downloaded = cli("download", ".")
    assert (downloaded.code, downloaded.err) == (0, "")
    local_hub.forget()
    started = python("program.py", HF_HUB_OFFLINE="1")
    assert started.out.startswith("3.0\n"), started.out + started.err
    assert f"acme/kernels@{commit[:12]} (torch-universal)" in started.out
    assert "lock: commit and files are those in" in started.out
    assert local_hub.count() == 0


SPOILS: dict[str, tuple[Callable[[Path], object], str]] = {
    "changed": (lambda build: (build / "layers.py").write_text(kernel(4)), "layers.py has other bytes"),
    "missing": (lambda build: (build / "__init__.py").unlink(), "__init__.py is missing"),
    "extra": (lambda build: (build / "more.py").touch(), "more.py is not on the Hub"),
}


@pytest.mark.parametrize("spoil", SPOILS)
def test_files_that_changed_are_refused_offline(
    project: Path, cli: Run, python: Run, published: Repository, spoil: str
) -> None:
    """A file that was changed, removed or added after the download refuses the kernel at load, by its name."""
    change, told = SPOILS[spoil]
    assert cli("lock", ".").code == cli("download", ".").code == 0
    (build,) = (project / "hub-home").rglob("torch-universal")
    change(build)
    code = "from kernels_plugins import load_kernel; load_kernel('acme/kernels', lockfile='kernels.lock')"
    ran = python("-c", code, HF_HUB_OFFLINE="1")
    assert ran.code == 1 and "IntegrityError: acme/kernels at v1, locked" in ran.err
    assert told in ran.err


def test_the_lock_counts_not_what_the_cache_says(project: Path, cli: Run, python: Run, published: Repository) -> None:
    """Who changes a file and the cache's own notes of it is still refused: the lock lies in the project."""
    assert cli("lock", ".").code == cli("download", ".").code == 0
    (build,) = (project / "hub-home").rglob("torch-universal")
    (notes,) = (project / "hub-home").rglob("kernels-core/commits/*.json")
    changed = kernel(4).encode()
    (build / "layers.py").write_bytes(changed)
    (build / "metadata.json").write_text(json.dumps(kernel_metadata("kernels", {}, digest=False)))
    record = json.loads(notes.read_text())
    for file in record["variants"]["torch-universal"]:
        content = (build / file["path"]).read_bytes()
        file |= {"size": len(content), "blob": git_blob_id(content)}
    notes.write_text(json.dumps(record))
    code = "from kernels_plugins import load_kernel; load_kernel('acme/kernels', lockfile='kernels.lock')"
    ran = python("-c", code, HF_HUB_OFFLINE="1")
    assert "IntegrityError" in ran.err and "not the one that was locked" in ran.err
    (project / "kernels.hashes").unlink()
    assert python("-c", code, HF_HUB_OFFLINE="1").code == 0, "without hashes, the cache is believed"


# --- lock ----------------------------------------------------------------------------------------


def test_all_that_any_variant_depends_on_is_locked(
    project: Path, here: Run, published: Repository, kernel_repository: Publish
) -> None:
    """Kernels that only the build for another machine depends on are locked, too, and their dependencies."""
    inner = kernel_repository("acme/inner", kernel())
    middle = kernel_repository("acme/middle", kernel(), metadata=needs("acme/inner", revision="main"))
    middle.branch("v1")
    add_variant(published, **needs("acme/middle"))
    ran = here("lock", ".", "--json")
    assert [(row["kernel"], row["wanted"], row["variants"]) for row in ran.json] == [
        ("acme/kernels", "version 1", ["torch-universal", FOREIGN]),
        ("acme/inner", "main", ["torch-universal"]),
        ("acme/middle", "version 1", ["torch-universal"]),
    ]
    lock = read_lock(project / LOCK)
    assert [kernel.commit for kernel in lock.kernels] == [published.head(), inner.head(), middle.head()]
    assert lock.find(Dependency("acme/inner", revision="main")) == lock.kernels[1]
    written = (project / LOCK).read_bytes(), (project / "kernels.hashes").read_bytes()
    assert here("lock", str(project)).code == 0
    assert written == ((project / LOCK).read_bytes(), (project / "kernels.hashes").read_bytes())


def test_a_kernel_that_two_depend_on_is_locked_once(
    project: Path, here: Run, published: Repository, kernel_repository: Publish
) -> None:
    """A diamond is no circle."""
    kernel_repository("acme/base", kernel()).branch("v1")
    for name in ("acme/left", "acme/right"):
        kernel_repository(name, kernel(), metadata=needs("acme/base")).branch("v1")
    add_variant(published, **needs("acme/left", "acme/right"))
    assert [row["kernel"] for row in here("lock", ".", "--json").json][1:] == ["acme/base", "acme/left", "acme/right"]


def test_check_and_upgrade(
    project: Path, here: Run, cli: Run, published: Repository, kernel_repository: Publish
) -> None:
    """`--check` shows changes and writes nothing; `--upgrade` moves one repository; `lock` shows each change."""
    other = kernel_repository("acme/other", kernel(5))
    other.branch("v1")
    table = '[tool.kernels.dependencies]\n"acme/kernels" = 1\n"acme/other" = 1\n'
    (project / "pyproject.toml").write_text(table)
    first = here("lock", ".", "--check", "--json")
    assert (first.code, [row["change"] for row in json.loads(first.out)]) == (1, ["new", "new"])
    assert "is out of date: run `kernels-core lock .`" in first.err and not (project / "kernels.lock").exists()
    assert here("lock", ".").code == 0
    assert here("lock", ".", "--check") == Ran(0, "", "")

    old = read_lock(project / "kernels.lock")
    before = (project / "kernels.lock").read_bytes()
    for repository in (published, other):
        add_variant(repository)
    changed = cli("lock", ".", "--check", "--json", "--upgrade", "acme/other")
    assert [row["kernel"] for row in json.loads(changed.out)] == ["acme/other"]
    assert (changed.code, (project / "kernels.lock").read_bytes()) == (1, before)

    upgraded = cli("lock", ".", "--upgrade", "acme/other")
    assert upgraded.code == 0 and f"from {old.require('acme/other').commit[:12]}" in upgraded.out
    new = read_lock(project / "kernels.lock")
    assert new.require("acme/kernels") == old.require("acme/kernels")
    assert new.require("acme/other").commit != old.require("acme/other").commit

    (project / "pyproject.toml").write_text(table.splitlines(keepends=True)[0] + '"acme/kernels" = 1\n')
    rows = json.loads(cli("lock", ".", "--json").out)
    assert [(row["kernel"], row["change"].partition(" ")[0]) for row in rows] == [
        ("acme/kernels", "from"),
        ("acme/other", "removed"),
    ]


def test_no_change_is_half_made(project: Path, here: Run, published: Repository) -> None:
    """An unknown repository is no upgrade; a malformed lock is an error, but for `lock`, which replaces it."""
    assert here("lock", ".").code == 0
    before = (project / "kernels.lock").read_bytes()
    wrong = here("lock", ".", "--upgrade", "acme/nothing")
    assert (wrong.code, (project / "kernels.lock").read_bytes()) == (2, before)
    assert "does not depend on acme/nothing: it locks acme/kernels" in wrong.err
    (project / "kernels.lock").write_text("[")
    for words in (["--check"], ["--upgrade", "acme/kernels"]):
        assert here("lock", ".", *words).code == 2 and (project / "kernels.lock").read_text() == "["
    assert here("lock", ".").code == 0 and (project / "kernels.lock").read_bytes() == before


def test_a_circle_is_named(project: Path, here: Run, published: Repository, kernel_repository: Publish) -> None:
    """Kernels that depend on each other are an error that names them in order, and nothing is written."""
    kernel_repository("acme/other", kernel(), metadata=needs("acme/kernels")).branch("v1")
    add_variant(published, **needs("acme/other"))
    ran = here("lock", ".")
    assert ran.err == (
        "error: Kernels depend on each other in a circle: acme/kernels version 1 -> acme/other version 1 -> "
        "acme/kernels version 1. Take another version of one of them, or tell its publisher.\n"
    )
    assert ran.code == 2 and not (project / LOCK).exists()


def test_whom_nobody_trusts_is_not_locked(project: Path, here: Run, kernel_repository: Publish) -> None:
    """Also a dependency of a trusted kernel needs a trusted publisher, or to be allowed by its name."""
    kernel_repository("stranger/base", kernel(), trusted=False).branch("v1")
    kernel_repository(layers=kernel(), metadata=needs("stranger/base")).branch("v1")
    ran = here("lock", ".")
    assert (ran.code, ran.out) == (2, "") and "'stranger' is not a trusted publisher" in ran.err
    assert here("lock", ".", "--trust-remote-code", "stranger/other").code == 2
    allowed = ("--trust-remote-code", "stranger/base", "--trust-remote-code", "stranger/more")
    assert here("lock", ".", *allowed).code == 0
    assert here("download", ".").code == 2
    assert here("download", ".", *allowed).code == 0


def test_a_lock_says_what_the_hub_has_now(project: Path, cli: Run, published: Repository) -> None:
    """A cached kernel is not locked while the Hub cannot be asked, and an old lock stays as it is."""
    assert cli("lock", ".").code == cli("download", ".").code == 0
    before = (project / LOCK).read_bytes()
    ran = cli("lock", ".", HF_HUB_OFFLINE="1")
    assert ran.code == 2 and ran.err.startswith("error: acme/kernels at v1: "), ran.err
    ran = cli("lock", ".", HF_ENDPOINT="http://127.0.0.1:9")
    assert ran.code == 2 and "acme/kernels at v1" in ran.err
    assert (project / LOCK).read_bytes() == before


@pytest.mark.parametrize(
    ("pyproject", "message"),
    [
        ("", "names no kernels"),
        (
            '[tool.kernels.dependencies]\n"acme/kernels" = 7\n',
            "acme/kernels at v7: it has no version 7: versions that exist",
        ),
        ('[tool.kernels.dependencies]\n"acme/nothing" = 1\n', "acme/nothing at v1: "),
        ('[tool.kernels.dependencies]\n"acme/kernels" = "1"\n', "is '1', not a whole number"),
    ],
)
def test_projects_that_cannot_be_locked(
    project: Path, here: Run, published: Repository, pyproject: str, message: str
) -> None:
    """A kernel that cannot be locked is one line on standard error and exit code 2; there is no lock then."""
    (project / "pyproject.toml").write_text(pyproject)
    ran = here("lock", ".")
    assert message in ran.err and "Traceback" not in ran.err
    assert (ran.code, ran.out, (project / LOCK).exists()) == (2, "", False)


# --- download ------------------------------------------------------------------------------------


def test_download_takes_one_build_or_all(project: Path, cli: Run, published: Repository, local_hub: LocalHub) -> None:
    """The build for this machine; with --all-variants, each; a second time, nothing is asked."""
    add_variant(published)
    assert cli("lock", ".").code == 0
    assert [row["variant"] for row in cli("download", ".", "--json").json] == ["torch-universal"]
    assert snapshots(project) == {"torch-universal"}
    both = cli("download", ".", "--all-variants")
    assert [line.split()[4] for line in both.out.splitlines()[1:]] == ["torch-universal", FOREIGN]
    assert snapshots(project) == {"torch-universal", FOREIGN}
    local_hub.forget()
    assert cli("download", ".", "--all-variants").out == both.out
    assert local_hub.count() == 0


def test_download_goes_on_after_a_failure(
    project: Path, here: Run, published: Repository, kernel_repository: Publish
) -> None:
    """A kernel without a build for this machine is reported, the others are downloaded, and the exit code is 1."""
    with (project / "pyproject.toml").open("a") as file:
        file.write('"acme/foreign" = 1\n')
    kernel_repository("acme/foreign", kernel(), variant=FOREIGN).branch("v1")
    assert here("lock", ".").code == 0
    ran = here("download", ".")
    assert ran.code == 1 and ran.out.count("\n") == 2 and "torch-universal" in ran.out
    assert "error: acme/foreign at v1, locked: no build variant fits this machine" in ran.err


def test_download_refuses_what_was_not_locked(
    project: Path, here: Run, published: Repository, local_hub: LocalHub
) -> None:
    """Bytes that changed on the way, and other files on the Hub than were locked, are refused with exit code 2."""
    assert here("lock", ".").code == 0
    local_hub.fail("layers.py", flip=3, times=None)
    ran = here("download", ".")
    assert ran.code == 2 and "layers.py has other bytes" in ran.err
    local_hub.heal()
    sealed = json.loads((project / "kernels.hashes").read_text())
    sealed[0]["variants"]["torch-universal"]["hash"] = f"sha256-{'0' * 64}"
    (project / "kernels.hashes").write_text(json.dumps(sealed))
    ran = here("download", ".")
    assert ran.code == 2 and "its variant torch-universal is not the one that was locked" in ran.err


def test_download_tells_of_an_old_lock(project: Path, cli: Run, published: Repository) -> None:
    """Where the project names another version than was locked, a warning says so, and the lock counts."""
    assert cli("lock", ".").code == 0
    (project / "pyproject.toml").write_text('[tool.kernels.dependencies]\n"acme/kernels" = 2\n')
    ran = cli("download", ".", PYTHONWARNINGS="default")
    assert ran.code == 0 and "version 1" in ran.out
    assert ran.err == (
        "warning: pyproject.toml names acme/kernels version 2, and kernels.lock does not have that: run `kernels-core "
        "lock .`.\n"
    )


def test_download_needs_a_lock(project: Path, here: Run) -> None:
    """Without a lock there is an error that says how to get one."""
    ran = here("download", ".")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err == "error: There is no lock 'kernels.lock': run `kernels-core lock .`, or check the path.\n"


# --- info, versions, variants --------------------------------------------------------------------


def test_info_describes_a_repository(here: Run, published: Repository) -> None:
    """By default of the newest version: for programs the keys of `kernels info`, and some more."""
    published.branch("v2")
    add_variant(published, "torch-cuda", **needs("acme/base"))
    ran = here("info", "acme/kernels", "--json", "--version", "2")
    assert ran.json == {
        "repo_id": "acme/kernels",
        "revision": "v2",
        "commit": published.head("v2"),
        "name": "kernels",
        "version": 1,
        "kernels_minver": None,
        "license": "MIT",
        "upstream": None,
        "source": None,
        "python_depends": [],
        "kernel_depends": [],
        "backends": ["universal"],
    }
    assert here("info", "acme/kernels", "--json").json == ran.json
    assert here("info", "acme/kernels", "--revision", "v1", "--json").json["backends"] == ["cuda", "universal"]
    told = here("info", "acme/kernels").out.splitlines()
    assert told[0] == "Repository: acme/kernels" and "License: MIT" in told and "Upstream: -" in told


def test_info_describes_a_folder(here: Run, tmp_path: Path) -> None:
    """A folder with `build`, a folder with builds, and one build."""
    files = {"__init__.py": "", "layers.py": ""}
    build = tmp_path / "kernel" / "build" / "torch-cuda"
    build.mkdir(parents=True)
    (build / "metadata.json").write_text(json.dumps(kernel_metadata("silu", files, digest=False)))
    for folder in (tmp_path / "kernel", build.parent, build):
        described = here("info", str(folder), "--json").json
        assert (described["path"], described["name"], described["backends"]) == (str(folder), "silu", ["cuda"])


def test_versions_lists_each_with_its_builds(here: Run, published: Repository) -> None:
    """Each version has its builds, and each that does not fit its reason."""
    add_variant(published, "torch-tpu")
    published.branch("v12", published.branches["v1"])
    published.branch("v1", next(iter(published.commits)))
    rows = here("versions", "acme/kernels", "--json").json
    assert [(row["version"], row["commit"]) for row in rows] == [(n, published.head(f"v{n}")) for n in (1, 12)]
    assert [(b["variant"], b["fits"]) for b in rows[1]["variants"]] == [
        ("torch-universal", True),
        ("torch-tpu", False),
    ]
    lines = [line.split() for line in here("versions", "acme/kernels").out.splitlines()]
    assert lines[0] == ["version", "variant", "fits", "reason"]
    assert [line[:3] for line in lines[1:]] == [
        ["1", "torch-universal", "True"],
        ["12", "torch-universal", "True"],
        ["12", "torch-tpu", "False"],
    ]
    assert lines[3][3:8] == ["built", "for", "TPU,", "this", "machine"]


def test_a_kernel_without_versions(here: Run, kernel_repository: Publish) -> None:
    """A repository without branches for versions: exit code 1, and what to do instead."""
    kernel_repository(layers=kernel())
    ran = here("versions", "acme/kernels")
    assert (ran.code, ran.out) == (1, "") and "name a revision instead" in ran.err
    assert here("versions", "acme/kernels", "--json").json == []
    assert here("info", "acme/kernels", "--json").json["revision"] == "main"


def test_variants_tells_what_fits_and_why_not(here: Run, published: Repository, kernel_repository: Publish) -> None:
    """Accepted builds first, with exit code 0; where none is for this machine, exit code 1."""
    add_variant(published)
    rows = here("variants", "acme/kernels", "--json").json
    assert [(row["variant"], row["fits"]) for row in rows] == [("torch-universal", True), (FOREIGN, False)]
    assert "riscv64 linux" in rows[1]["reason"]
    kernel_repository("acme/foreign", kernel(), variant=FOREIGN)
    ran = here("variants", "acme/foreign", "--revision", "main")
    assert ran.code == 1 and FOREIGN in ran.out and ran.err == ""


def test_looking_needs_no_trust(here: Run, kernel_repository: Publish) -> None:
    """Commands that run no code of a kernel work for any publisher, and do not make it trusted."""
    kernel_repository("stranger/kernels", kernel(), trusted=False).branch("v1")
    for command in ("info", "versions", "variants"):
        assert here(command, "stranger/kernels").code == 0
    assert "stranger" in here("variants", "stranger/nothing").err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["info", "acme/nothing"], "error: acme/nothing: "),
        (["info", "./nowhere"], "error: There is no folder './nowhere': check the path"),
        (["info", "/nowhere"], "error: There is no folder '/nowhere': check the path"),
        (["info", "nonsense"], "error: repo_id is 'nonsense': write 'owner/name'."),
        (["info", ".", "--version", "1"], "error: . is a folder: it has neither revisions nor versions"),
        (["info", "."], "error: . has no builds: name the folder of a kernel"),
        (["info", "acme/kernels", "--version", "1", "--revision", "main"], "needs exactly one of revision="),
        (["versions", "acme/nothing"], "error: acme/nothing: "),
        (["variants", "acme/kernels", "--version", "9"], "it has no version 9: versions that exist are 1"),
        (["variants", "acme/kernels", "--version", "-1"], "error: version is -1: kernel versions are whole numbers"),
        (["lock"], "Missing argument"),
    ],
)
def test_wrong_questions(here: Run, published: Repository, arguments: list[str], message: str) -> None:
    """A question without an answer is a message on standard error and exit code 2, never a traceback."""
    ran = here(*arguments)
    assert message in ran.err and "Traceback" not in ran.err
    assert (ran.code, ran.out) == (2, "")


def test_a_terminal_gets_a_table_and_bars(cli: Run, project: Path, published: Repository, local_hub: LocalHub) -> None:
    """On a terminal there are boxes, colours and bars; in a pipe there are none."""
    pty = pytest.importorskip("pty")
    assert not set("\x1b\u2501\u2503") & set(cli("lock", ".").out + cli("variants", "acme/kernels").out)
    variables = {**os.environ, **local_hub.environment(project / "hub-home"), "TERM": "xterm-256color", "COLUMNS": "90"}
    variables |= {"HF_HUB_DISABLE_PROGRESS_BARS": "0"}
    for words, expected in ((["lock", "."], "acme/kernels version 1"), (["variants", "acme/kernels"], "\x1b[32m")):
        ours, theirs = pty.openpty()
        command = [sys.executable, "-m", "kernels_core", *words]
        child = subprocess.Popen(command, env=variables, cwd=project, stdin=theirs, stdout=theirs, stderr=theirs)
        os.close(theirs)
        said = b""
        try:
            while chunk := os.read(ours, 4096):
                said += chunk
        except OSError:  # Linux says that the terminal is gone with an error
            pass
        assert child.wait() == 0
        os.close(ours)
        assert expected in said.decode() and "\u2503" in said.decode()
