"""Faults of a kernel or on the way to it: one refusal that names the fault, and the reference runs."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fresh_process import run_python
from hub_scene import (
    PROGRAM,
    REFERENCE,
    Outcome,
    Publish,
    _numbers,
    cached,
    call,
    kernel,
    new_process,
    process,
    scale,
    served,
)
from huggingface_hub import constants
from huggingface_hub.utils import _http
from patience import PATIENCE

from kernels_core import ArgumentError, NoKernelError, use_kernel_forward_from_hub
from kernels_plugins import LayerRepository, register_kernel_mapping
from kernels_plugins.local_hub.server import LocalHub
from kernels_plugins.local_hub.testing import kernel_metadata

pytest_plugins = ["kernels_plugins.hub.testing"]


def refused(source: object, *patterns: str) -> str:
    """Call, and check that the reference runs, that the reason matches, and that there is one warning."""
    outcome = call(source)
    assert outcome.value == REFERENCE
    for pattern in patterns:
        assert re.search(pattern, outcome.why, re.DOTALL), (pattern, outcome.why)
    assert len(outcome.said) == 1 and outcome.why in outcome.said[0]
    return outcome.why


# Names that do not exist


def test_unknown_repository(kernel_repository: Publish) -> None:
    """An unknown repository is named, with what to check."""
    refused(
        scale("acme/nothing"),
        "^acme/nothing at main: .*no such repository, or it is private: check the name, and log in",
    )


def test_unknown_revision(kernel_repository: Publish) -> None:
    """An unknown branch or commit is named, with the branches and tags that exist."""
    repository = kernel_repository(layers=kernel())
    repository.branch("next")
    repository.tag("1.0")
    refused(
        scale(revision="nope"), "^acme/kernels at nope: .*no revision 'nope': branches and tags are main, next, 1.0"
    )
    refused(scale(revision="f" * 40), f"^acme/kernels at {'f' * 40}: .*branches and tags are main")


def test_unknown_version(kernel_repository: Publish) -> None:
    """An unknown version names those that exist, in the order of numbers."""
    repository = kernel_repository(layers=kernel())
    refused(scale(version=3), "^acme/kernels at v3: .*no version 3: versions that exist are none")
    for name in ("v10", "v2", "v1", "versions", "v"):
        repository.branch(name)
    refused(scale(version=4), "^acme/kernels at v4: .*no version 4: versions that exist are 1, 2, 10")


def test_unknown_version_and_no_answer(local_hub: LocalHub, kernel_repository: Publish) -> None:
    """Where the Hub does not list its branches, a missing revision is still missing, and a version is not denied."""
    kernel_repository(layers=kernel())
    local_hub.fail("/refs", status=500, times=None)
    refused(scale(revision="v3"), "^acme/kernels at v3: .*no revision 'v3'.*could not be asked")
    refused(scale(version=3), "^acme/kernels at v3: the Hub is in trouble")


def test_unknown_revision_of_model(local_hub: LocalHub, kernel_repository: Publish) -> None:
    """The older form names its versions, too."""
    local_hub.add("acme/older", kernel_repository(layers=kernel()).files(), repo_type="model").branch("v1")
    refused(scale("acme/older", version=3), "^acme/older at v3: .*versions that exist are 1")


def test_unknown_layer(kernel_repository: Publish) -> None:
    """An unknown layer names those there are, and repository, revision and variant."""
    kernel_repository(layers=kernel() + kernel().replace("Scale", "Other"))
    source = LayerRepository("acme/kernels", layer_name="Nope", revision="main")
    refused(source, "^acme/kernels at main .*variant torch-universal: .*no 'Nope': there are Other, Scale")


@pytest.mark.parametrize("name", ["__name__", "__doc__", "torch", "CONSTANT"])
def test_layer_that_is_none(kernel_repository: Publish, name: str) -> None:
    """A name in `layers` that is no layer is refused."""
    kernel_repository(layers=kernel() + "CONSTANT = 3\n")
    refused(
        LayerRepository("acme/kernels", layer_name=name, revision="main"),
        "neither an nn.Module subclass nor|no '__doc__'",
    )


@pytest.mark.parametrize("repo_id", ["../x", "a b/c", "acme/..", "acme/x\0", "-/-", "a:b/c", "acme/x\\y", "/a"])
def test_impossible_repository(repo_id: str) -> None:
    """A name that no repository can have is refused where it is written; it would become a part of paths."""
    with pytest.raises(ArgumentError, match=r"repo_id is .*: write 'owner/name'"):
        scale(repo_id)


@pytest.mark.parametrize("repo_id", ["acme/" + "x" * 200, "acme/x--y", "acme/x..y"])
def test_repository_that_the_client_refuses(local_hub: LocalHub, repo_id: str, tmp_path: Path) -> None:
    """A name of the right form that the Hub allows nowhere is refused, and nothing is written outside of the cache."""
    before = {path for path in tmp_path.rglob("*") if "hub-home" not in path.parts}
    refused(scale(repo_id), f"^{re.escape(repo_id)} at main: ")
    assert {path for path in tmp_path.rglob("*") if "hub-home" not in path.parts} == before


def test_strict_layer(kernel_repository: Publish) -> None:
    """A layer without fallback raises instead, with the same words."""
    kernel_repository(layers="1 / 0")

    @use_kernel_forward_from_hub("ScaleStrict", use_fallback=False)
    class Layer(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    register_kernel_mapping({"ScaleStrict": {"cpu": scale()}})
    with pytest.raises(NoKernelError, match=r"acme/kernels at main .*ZeroDivisionError"):
        Layer()(torch.ones(1))


# What publishers do


GOOD: dict[str, str] = {"__init__.py": "from . import layers\n", "layers.py": kernel()}
BAD: dict[str, tuple[dict[str, str], dict[str, Any], str]] = {
    "no layers": ({"__init__.py": ""}, {}, "defines no `layers`"),
    "no package": ({"other/__init__.py": ""}, {}, r"neither __init__.py nor kernels/__init__.py"),
    "unreadable metadata": ({"metadata.json": "{"}, {}, r"metadata.json cannot be read .*Rebuild"),
    "deep metadata": ({"metadata.json": "[" * 100_000}, {}, r"metadata.json cannot be read .*Rebuild"),
    "metadata of another form": ({"metadata.json": "[]"}, {}, "metadata.json holds list"),
    "incomplete metadata": ({}, {"backend": None}, "backend is missing. Rebuild"),
    "newer interface": (
        {},
        {"kernels-minver": "0.18"},
        "level 0.18 .*implements 0.17.*pip install --upgrade kernels-core",
    ),
    "missing package": ({}, {"python-depends": ["helion"]}, "pip install helion"),
    "missing import": ({"layers.py": "import no_such_package"}, {}, "pip install no_such_package"),
    "broken import": ({"layers.py": "1 / 0"}, {}, "its import fails: ZeroDivisionError: division by zero"),
    "exit": ({"layers.py": "raise SystemExit(1)"}, {}, "its import fails: SystemExit: 1"),
    "syntax error": ({"layers.py": "def broken(:\n"}, {}, "SyntaxError in .*layers.py, line 1"),
    "other parameters": ({"layers.py": kernel().replace("self, x", "self, x, y")}, {}, "other parameters"),
    "constructor": ({"layers.py": kernel() + "\n    def __init__(self): ...\n"}, {}, "constructor of its own"),
    "strange layers": ({"__init__.py": "layers = {}\n"}, {}, "no 'Scale': there are none"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_kernel(kernel_repository: Publish, new_process: Callable[[], None], what: str) -> None:
    """The fault of a kernel is reported with repository, revision, variant and next step; a fixed one serves."""
    files, metadata, message = BAD[what]
    good = GOOD if what != "no package" else {}
    repository = kernel_repository(layers={})
    contents = {**good, **files}
    contents.setdefault("metadata.json", json.dumps(kernel_metadata("kernels", contents, changes={**metadata})))
    if "backend" in metadata:
        contents["metadata.json"] = contents["metadata.json"].replace('"backend"', '"frontend"')
    repository.commit({f"build/torch-universal/{path}": content for path, content in contents.items()})
    contract = what in ("other parameters", "constructor")
    where = "" if contract else rf"^acme/kernels at main \(commit {repository.head()[:12]}\), variant torch-universal: "
    refused(scale(), where + ".*" + message)
    if not contract:
        assert [name for name in sys.modules if name.startswith("kernel_kernels_")] == [] or what in (
            "no layers",
            "strange layers",
        )
    kernel_repository(layers=GOOD)
    new_process()
    assert served(scale()) == 3


@pytest.mark.parametrize(
    "files", [{"README.md": "x"}, {"build": "a file"}, {"build/readme.txt": "x"}, {"builds/torch-cpu/__init__.py": ""}]
)
def test_no_build(local_hub: LocalHub, files: dict[str, str]) -> None:
    """A repository without builds is reported as one."""
    local_hub.organization("acme", trusted=True)
    local_hub.add("acme/kernels", files)
    refused(scale(), "^acme/kernels at main: (.*no folder `build`|.*`build` is empty)")
    assert local_hub.count("/resolve/") == 0


def test_variant_without_metadata(local_hub: LocalHub) -> None:
    """A variant without metadata is reported as one."""
    local_hub.organization("acme", trusted=True)
    local_hub.add("acme/kernels", {f"build/torch-cpu/{path}": content for path, content in GOOD.items()})
    refused(scale(), "^acme/kernels at main .*variant torch-cpu: it has no metadata.json. Rebuild")


EVIL = [
    "../evil.py",
    "../torch-cpu/evil.py",
    "../../../../../evil.py",
    "sub/../../evil.py",
    "/evil.py",
    "./evil.py",
    "//evil.py",
]


@pytest.mark.parametrize("path", EVIL)
@pytest.mark.parametrize("large", [False, True])
def test_path_traversal(
    local_hub: LocalHub, kernel_repository: Publish, path: str, large: bool, tmp_path: Path
) -> None:
    """A listing whose file names lead out of the variant is refused, and writes nothing out of the cache."""
    if large:
        local_hub.lfs_threshold = 1
    tree = dict(kernel_repository(layers=kernel()).files())
    repository = local_hub.repository("acme/kernels")
    assert repository is not None
    tree[f"build/torch-universal/{path}"] = b"raise SystemExit('evil')"
    repository.commit(tree)
    outcome = call(scale())
    assert outcome.value == REFERENCE and outcome.why.startswith("acme/kernels at main")
    home = tmp_path / "hub-home"
    assert not [
        found for found in tmp_path.rglob("evil.py") if home / "hub" / "kernels--acme--kernels" not in found.parents
    ]
    assert not Path("/evil.py").exists()


@pytest.mark.parametrize("variant", ["..", ".", "torch-cpu\n", "*", "[t]orch-cpu"])
def test_odd_variant_names(local_hub: LocalHub, variant: str) -> None:
    """A folder whose name is no variant is never chosen, whatever its name could mean to a file system or pattern."""
    local_hub.organization("acme", trusted=True)
    local_hub.add("acme/kernels", {f"build/{variant}/layers.py": "x"})
    outcome = call(scale())
    assert outcome.value == REFERENCE and local_hub.count("/resolve/") == 0


@pytest.mark.parametrize("sha", [None, "main", "../../../../evil", "", 5])
def test_answer_without_commit(local_hub: LocalHub, kernel_repository: Publish, sha: object, tmp_path: Path) -> None:
    """An answer that names no commit is refused: nothing is loaded by a branch that may move, or by a path."""
    kernel_repository(layers=kernel())
    body = json.dumps({"id": "acme/kernels", "sha": sha})
    local_hub.fail("/revision/", body=body, content_type="application/json", times=None)
    refused(scale(), "^acme/kernels at main: ")
    assert local_hub.count("/resolve/") == local_hub.count("/tree/") == 0 and not list(tmp_path.rglob("*evil*"))


# Who may read


def test_gated(
    local_hub: LocalHub, kernel_repository: Publish, monkeypatch: pytest.MonkeyPatch, new_process: Callable[[], None]
) -> None:
    """A gated repository says where to ask for access; with a token that has it, it serves."""
    local_hub.add("acme/gated", kernel_repository(layers=kernel()).files(), gated=True)
    refused(
        scale("acme/gated"),
        rf"^acme/gated at main .*variant torch-universal: .*gated: ask for it at {local_hub.url}/acme/gated",
    )
    monkeypatch.setenv("HF_TOKEN", local_hub.stranger_token)
    new_process()
    refused(scale("acme/gated"), "gated")
    monkeypatch.setenv("HF_TOKEN", local_hub.token)
    new_process()
    assert served(scale("acme/gated")) == 3


def test_private(
    local_hub: LocalHub, kernel_repository: Publish, monkeypatch: pytest.MonkeyPatch, new_process: Callable[[], None]
) -> None:
    """A private repository is reported as one that may be private; with a token it serves."""
    local_hub.add("acme/private", kernel_repository(layers=kernel()).files(), private=True)
    for token in ("", local_hub.stranger_token):
        monkeypatch.setenv("HF_TOKEN", token)
        new_process()
        refused(scale("acme/private"), "^acme/private at main: .*no such repository, or it is private.*HF_TOKEN")
    monkeypatch.setenv("HF_TOKEN", local_hub.token)
    new_process()
    assert served(scale("acme/private")) == 3


def test_disabled(local_hub: LocalHub, kernel_repository: Publish) -> None:
    """A disabled repository is reported as one."""
    local_hub.add("acme/gone", kernel_repository(layers=kernel()).files(), disabled=True)
    refused(scale("acme/gone"), "^acme/gone at main: .*disabled.*publisher")


def test_bad_token(local_hub: LocalHub, kernel_repository: Publish, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token that the Hub does not know is reported as one."""
    kernel_repository(layers=kernel())
    monkeypatch.setenv("HF_TOKEN", "hf_invented")
    refused(scale(), r"^acme/kernels at main: .*token \(401\).*hf auth login")


# What networks and Hubs do


STAGES: dict[str, str | re.Pattern[str]] = {
    "commit": "/revision/",
    "publisher": "/api/organizations",
    "listing": "/tree/",
    "head": "HEAD /kernels",
    "file": re.compile("GET /kernels.*/layers.py"),
}
FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "401": ({"status": 401}, r"401|log in|download failed"),
    "403": ({"status": 403}, r"403|download failed"),
    "404": ({"status": 404}, r"404|no such repository|no folder|not a trusted publisher|download failed|not complete"),
    "429": ({"status": 429}, r"429|too many"),
    "500": ({"status": 500}, r"500|in trouble|Internal Server Error"),
    "503": ({"status": 503}, r"503|in trouble|Service Unavailable"),
    "drop": ({"drop": True}, r"cannot be reached|download failed.*disconnected|[Dd]isconnected"),
    "login page": (
        {"body": "<html>Log in</html>"},
        r"not JSON|download failed|client failed|not those on the Hub|bytes",
    ),
    "half an answer": ({"truncate": 1}, r"cannot be reached|download failed|peer closed|incomplete"),
    "another JSON": (
        {"body": "[]", "content_type": "application/json"},
        r"client failed|download failed|not those on the Hub|no folder|empty|trusted|not complete",
    ),
}
NETWORK = ("429", "500", "503", "drop", "half an answer")


@pytest.mark.parametrize(
    ("stage", "fault"),
    # The answer to a HEAD request has no half.
    [pair for pair in itertools.product(STAGES, FAULTS) if pair != ("head", "half an answer")],
)
def test_fault(
    local_hub: LocalHub, kernel_repository: Publish, new_process: Callable[[], None], stage: str, fault: str
) -> None:
    """A lasting fault of the Hub or network, at any stage, is named; after its end, the kernel serves."""
    kernel_repository(layers=kernel())
    options, message = FAULTS[fault]
    local_hub.fail(STAGES[stage], times=None, **options)
    outcome = call(scale())
    assert any(request.matches(STAGES[stage]) for request in local_hub.requests)
    where = r", variant torch-universal: " if stage in ("head", "file") else ": "
    assert re.search(f"^acme/kernels at main.*{where}", outcome.why) and len(outcome.said) == 1
    assert re.search(message, outcome.why), outcome.why
    if fault in NETWORK:
        assert "not those on the Hub" not in outcome.why and "trust_remote_code" not in outcome.why
    assert outcome.value == REFERENCE
    local_hub.heal()
    new_process()
    assert served(scale()) == 3


@pytest.mark.parametrize("body", ["[[]]", '{"sha": null}', '{"siblings": 3}', '{"error": "not now"}', "[" * 100_000])
def test_an_answer_that_only_looks_like_one(
    local_hub: LocalHub, kernel_repository: Publish, new_process: Callable[[], None], body: str
) -> None:
    """JSON that no Hub answers is no answer, as a login page is none: it is asked again, and the cache serves."""
    kernel_repository(layers=kernel())
    local_hub.fail(STAGES["commit"], times=None, body=body, content_type="application/json")
    refused(scale(), "loaded again in the background")
    local_hub.heal()
    new_process()
    assert served(scale()) == 3
    local_hub.fail(STAGES["commit"], times=None, body=body, content_type="application/json")
    new_process()
    outcome = call(scale())
    assert outcome.value == 3 and "from the cache: " in outcome.resolution.checked["revision"]


@pytest.mark.parametrize("name", ["{outside}/evil", "../../../../evil"])
def test_a_hub_that_names_a_file_by_a_path(
    local_hub: LocalHub, kernel_repository: Publish, new_process: Callable[[], None], name: str, tmp_path: Path
) -> None:
    """The client writes where an ETag leads: the file is not used, the reason says where it is, and the cache heals."""
    kernel_repository(layers=kernel())
    local_hub.fail(re.compile("HEAD /kernels.*/layers.py"), headers={"ETag": f'"{name.format(outside=tmp_path)}"'})
    refused(scale(), f"a name that is a path.* to {tmp_path}/.*evil: remove that file")
    new_process()
    assert served(scale()) == 3


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("name", ["layers.py", "__init__.py", "metadata.json"])
def test_corrupted_download(
    local_hub: LocalHub, kernel_repository: Publish, new_process: Callable[[], None], name: str, large: bool
) -> None:
    """One wrong byte in a file of the right length is caught without digests, and does not stay in the cache."""
    local_hub.lfs_threshold = 1 if large else None
    kernel_repository(layers=kernel(), digest=False)
    local_hub.fail(re.compile(f"GET /kernels/acme/kernels/resolve/.*/{name}"), flip=3)
    where = "^acme/kernels at main .*variant torch-universal: "
    refused(scale(), f"{where}.*{name} has other bytes.*removed from the cache: try again")
    new_process()
    assert served(scale()) == 3


def test_unreachable(local_hub: LocalHub, kernel_repository: Publish, new_process: Callable[[], None]) -> None:
    """A Hub that cannot be reached is a network error; a kernel in the cache serves, and says so."""
    kernel_repository(layers=kernel())
    local_hub.stop()
    refused(scale(), rf"^acme/kernels at main: {local_hub.url} cannot be reached .*check the network and HF_ENDPOINT")
    local_hub.start()
    new_process()
    assert served(scale()) == 3
    local_hub.stop()
    new_process()
    outcome = call(scale())
    assert outcome.value == 3 and "from the cache: " in outcome.resolution.checked["revision"]
    local_hub.start()


@pytest.mark.parametrize("fault", [{"status": 500}, {"status": 429}, {"drop": True}, {"body": "<html>"}])
def test_trouble_with_cache(
    local_hub: LocalHub, kernel_repository: Publish, new_process: Callable[[], None], fault: dict[str, Any]
) -> None:
    """With the kernel in the cache, a Hub in trouble only costs the newest commit, and a warning says so."""
    kernel_repository(layers=kernel())
    assert served(scale()) == 3
    kernel_repository(layers=kernel(4))
    local_hub.fail("", times=None, **fault)
    new_process()
    outcome = call(scale())
    assert outcome.value == 3 and "from the cache: " in outcome.resolution.checked["revision"]


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_no_is_a_no(
    local_hub: LocalHub, kernel_repository: Publish, new_process: Callable[[], None], status: int
) -> None:
    """A kernel that the Hub refuses by branch is not taken from the cache instead."""
    kernel_repository(layers=kernel())
    assert served(scale()) == 3
    local_hub.fail("/api/", status=status, times=None)
    new_process()
    assert call(scale()).value == REFERENCE


def test_network_dies_during_second_attempt(
    local_hub: LocalHub, kernel_repository: Publish, new_process: Callable[[], None]
) -> None:
    """A half download whose rest cannot be fetched is a network error, and the files that are there stay."""
    repository = kernel_repository(layers=kernel())
    local_hub.fail(re.compile("GET /kernels.*/layers.py"), status=500, times=None)
    assert call(scale()).value == REFERENCE
    kept = list(cached(repository).rglob("*.json"))
    local_hub.fail(
        lambda request: "revision/" + repository.head() in request.path or "HEAD" in request.method,
        drop=True,
        times=None,
    )
    new_process()
    why = refused(scale(), "variant torch-universal: ", "not complete|cannot be reached|download failed")
    assert "not those on the Hub" not in why and list(cached(repository).rglob("*.json")) == kept
    local_hub.heal()
    new_process()
    assert served(scale()) == 3


def test_disk(kernel_repository: Publish, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A cache that cannot be written to is reported as an error of the disk, not of the network."""
    kernel_repository(layers=kernel())
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("KERNELS_CACHE", str(tmp_path / "file" / "cache"))
    why = refused(scale(), "^acme/kernels at main", "Check the disk")
    assert "reached" not in why and "network" not in why


@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_a_hub_that_names_a_long_time(
    local_hub: LocalHub, kernel_repository: Publish, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Where the Hub asks to wait for an hour before a file is requested again, a call does not wait for that."""
    kernel_repository(layers=kernel())
    hour = threading.Event()
    monkeypatch.setattr(_http, "time", SimpleNamespace(**{**vars(time), "sleep": hour.wait}))
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 1 / 6)
    local_hub.fail(
        lambda request: request.method == method and "layers.py" in request.path,
        status=429,
        headers={"Retry-After": "3600"},
        times=None,
    )
    try:
        refused(scale(), "^acme/kernels at main", "did not answer in 1 seconds")
    finally:
        local_hub.heal()
        hour.set()
        for thread in threading.enumerate():  # it must not go on while other tests run
            if thread.name == "kernels-core-request":
                thread.join(PATIENCE)


@pytest.mark.parametrize(("variable", "value"), [("HF_ENDPOINT", "http://[::1"), ("HF_HUB_ETAG_TIMEOUT", "soon")])
def test_variables_that_the_client_cannot_read(variable: str, value: str, local_hub: LocalHub, tmp_path: Path) -> None:
    """Where huggingface_hub cannot be imported for its variables, that is an error of ours, as any other of a load."""
    program = (
        "from kernels_core import LoadError\nfrom kernels_plugins import get_kernel\n"
        "try: get_kernel('acme/kernels', version=1)\n"
        "except LoadError as error: print(error)"
    )
    environment = {**os.environ, **local_hub.environment(tmp_path), variable: value}
    done = run_python("-c", program, environment=environment, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "acme/kernels at v1: huggingface_hub cannot be imported (ValueError: " in done.stdout
    commands = {"versions acme/kernels": "error: ", "cache list": "error: ", "doctor --offline": "problem "}
    for command, before in commands.items():
        done = run_python("-m", "kernels_core", *command.split(), environment=environment, folder=tmp_path)
        assert done.returncode and "Traceback" not in done.stderr, command
        assert f"{before}huggingface_hub cannot be imported (" in " ".join((done.stdout + done.stderr).split())


def test_next_process(local_hub: LocalHub, kernel_repository: Publish, process: Callable[..., Any]) -> None:
    """After faults of every kind, a real new process on the same cache gets every kernel once the Hub is well."""
    sources = []
    for number, (stage, (fault, _)) in enumerate(
        itertools.product(("listing", "head", "file"), [FAULTS[n] for n in ("403", "500", "drop", "login page")])
    ):
        repo_id = f"acme/kernels-{number}"
        kernel_repository(repo_id, kernel(number))
        sources.append(scale(repo_id))
        local_hub.fail(
            STAGES[stage] if stage == "listing" else re.compile(f"/kernels/{repo_id}/resolve.*layers.py"),
            times=None,
            **fault,
        )
        assert call(sources[-1]).value == REFERENCE
        local_hub.heal()
    kernel_repository("acme/flipped", kernel(99))
    local_hub.fail("acme/flipped/resolve", flip=0)
    sources.append(scale("acme/flipped"))
    assert call(sources[-1]).value == REFERENCE
    local_hub.heal()
    answers = process(*sources)
    assert [answer[:2] for answer in answers] == [[number, ""] for number in (*range(12), 99)]


def test_killed_download(
    local_hub: LocalHub, kernel_repository: Publish, process: Callable[..., Any], tmp_path: Path
) -> None:
    """A process killed in the middle of its download leaves nothing that the next one trips over."""
    kernel_repository(layers=kernel())
    local_hub.fail(re.compile("GET /kernels.*/layers.py"), delay=2 * PATIENCE)
    environment = {**os.environ, **local_hub.environment(tmp_path / "hub-home")}
    started = subprocess.Popen([sys.executable, "-c", PROGRAM, repr(scale())], env=environment)
    deadline = time.monotonic() + PATIENCE
    blobs = Path(constants.HF_HUB_CACHE) / "kernels--acme--kernels" / "blobs"
    while not list(blobs.glob("*.incomplete")) and time.monotonic() < deadline:
        time.sleep(0.05)
    started.send_signal(signal.SIGKILL)
    started.wait()
    local_hub.heal()
    assert process(scale())[:2] == [3, ""]
