"""Loading layers from the Hub, through the dispatcher: requests, downloads, trust, cache and imports."""

from __future__ import annotations

import importlib.util
import json
import os
import py_compile
import re
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
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

from kernels_core import IntegrityError, Mode, resolve, use_kernel_forward_from_hub
from kernels_core.testing import _start_anew
from kernels_plugins import LayerRepository, LocalLayerRepository, register_kernel_mapping, use_kernel_mapping
from kernels_plugins.hub.builds.machine import this_machine
from kernels_plugins.hub.client import revision
from kernels_plugins.local_hub.server import LocalHub, Repository, Request
from kernels_plugins.local_hub.testing import kernel_metadata

pytest_plugins = ["kernels_plugins.hub.testing"]

FETCH = re.compile(r"/resolve/")


def test_layout(kernel_repository: Publish) -> None:
    """A kernel in `build/<variant>/` serves a decorated layer, with its origin and the checks that were made."""
    repository = kernel_repository(layers=kernel())
    outcome = call(scale())
    assert (outcome.value, outcome.said, outcome.resolution.refusals) == (3.0, [], ())
    assert outcome.resolution.origin == f"acme/kernels@{repository.head()[:12]} (torch-universal)"
    assert outcome.resolution.checked == {
        "digest": "2 files, sha256",
        "transfer": "3 files as listed by the Hub",
        "trust": "acme is a trusted publisher",
        "revision": "from the Hub",
    }


def test_inner_layout(kernel_repository: Publish) -> None:
    """A kernel in `build/<variant>/<name>/` serves, too."""
    files = {
        "fast_kernels/__init__.py": "from . import layers\n",
        "fast_kernels/layers.py": kernel(4),
        "__init__.py": "",
    }
    del files["__init__.py"]
    metadata = json.dumps(kernel_metadata("fast-kernels", files))
    repository = kernel_repository(layers={})
    repository.commit({f"build/torch-cpu/{p}": c for p, c in {**files, "metadata.json": metadata}.items()})
    assert served(scale()) == 4


@pytest.mark.parametrize("form", ["package", "class", "function"])
def test_forms_of_layers(kernel_repository: Publish, form: str) -> None:
    """`layers` may be a module, a package or a class; a function may serve a decorated function."""
    files = {
        "package": {
            "__init__.py": "from . import layers\n",
            "layers/__init__.py": "from .a import Scale\n",
            "layers/a.py": kernel(),
        },
        "class": {"__init__.py": "from . import a\n\n\nclass layers:\n    Scale = a.Scale\n", "a.py": kernel()},
        "function": {"layers.py": "def Scale(x):\n    return x * 3\n"},
    }[form]
    kernel_repository(layers=files)
    if form != "function":
        assert served(scale()) == 3
        return

    @use_kernel_forward_from_hub("scale_function")
    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    with use_kernel_mapping({"scale_function": {"cpu": scale()}}):
        assert double(torch.ones(1)).item() == 3
    assert double(torch.ones(1)).item() == 2


def test_model_repository(
    local_hub: LocalHub,
    kernel_repository: Publish,
    monkeypatch: pytest.MonkeyPatch,
    new_process: Callable[[], None],
) -> None:
    """The older form, a repository of type model, serves where there is none of type kernel; offline, too."""
    tree = kernel_repository("acme/made", kernel(5)).files()
    old = local_hub.add("acme/older", tree, repo_type="model")
    assert served(scale("acme/older")) == 5
    assert cached(old).is_dir()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    _start_anew()
    assert served(scale("acme/older")) == 5
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    local_hub.add("acme/older", kernel_repository("acme/made", kernel(6)).files())
    new_process()
    assert served(scale("acme/older")) == 6


# Revisions


def test_revisions(kernel_repository: Publish) -> None:
    """A branch, one with a slash, a tag, a commit and a version each name their tree; all live side by side."""
    repository = kernel_repository(layers=kernel(3))
    first = repository.tag("1.0")
    repository.branch("releases/one")
    repository.branch("v1")
    kernel_repository(layers=kernel(4))
    repository.branch("v2")
    third = kernel_repository(layers=kernel(5)).head()
    wanted: list[dict[str, Any]] = [
        {"revision": revision} for revision in ("1.0", "releases/one", "v1", first, "main", third)
    ]
    sources = [scale(**options) for options in [*wanted, {"version": 1}, {"version": 2}]]
    assert [served(source) for source in sources] == [3, 3, 3, 3, 5, 5, 3, 4]
    kernels = [name for name in sys.modules if re.fullmatch(r"kernel_kernels_[0-9a-f]{16}", name)]
    assert len(kernels) == 3
    assert len({source.load() for source in sources}) == 3


def test_two_revisions_in_one_forward(kernel_repository: Publish) -> None:
    """Two revisions of one kernel serve two layers of one model at the same time."""
    old = kernel_repository(
        layers={
            "layers.py": kernel(1).replace("x * 1", "factor(x)") + "\n\nfrom .f import factor\n",
            "f.py": "def factor(x): return x * 10\n",
        }
    ).head()
    new = kernel_repository(
        layers={
            "layers.py": kernel(1).replace("x * 1", "factor(x)") + "\n\nfrom .f import factor\n",
            "f.py": "def factor(x): return x * 7\n",
        }
    ).head()
    values = [served(scale(revision=old)), served(scale(revision=new)), served(scale(revision=old))]
    assert values == [10, 7, 10]


def test_branch_moves_between_processes(kernel_repository: Publish, new_process: Callable[[], None]) -> None:
    """A branch is the commit that it has when a process first asks, for the rest of that process."""
    kernel_repository(layers=kernel(3))
    assert served(scale()) == 3
    kernel_repository(layers=kernel(4))
    assert served(scale()) == 3
    new_process()
    assert served(scale()) == 4


@pytest.mark.parametrize("moment", ["after the pin", "before the listing", "before the download", "between two files"])
def test_branch_moves_during_load(local_hub: LocalHub, kernel_repository: Publish, moment: str) -> None:
    """A branch that moves while a kernel is loaded makes no mixture: all is from the commit found first."""
    repository = kernel_repository(
        layers={"layers.py": kernel(3), "z.py": "", "__init__.py": "from . import layers, z\n"}
    )
    first = repository.head()
    at = {
        "after the pin": "/api/organizations",
        "before the listing": "/tree/",
        "before the download": "HEAD /kernels",
        "between two files": "z.py",
    }[moment]
    moved: list[str] = []

    def move(request: Request) -> bool:
        if not moved and request.matches(at):
            tree = {path: data.replace(b"* 3", b"* 4") for path, data in repository.files().items()}
            moved.append(repository.commit(tree))
        return False

    local_hub.fail(move, status=500, times=None)
    outcome = call(scale())
    assert moved and repository.head() == moved[0]
    assert outcome.value == 3 and first[:12] in outcome.resolution.origin
    assert local_hub.count("revision/main") == 1
    assert [request for request in local_hub.requests if "main" in request.path] == [local_hub.requests[0]]


# Variants and what is fetched


def variants(local_hub: LocalHub, **files: str) -> Repository:
    """Publish one kernel in several variants (named with _ for -) with byte code and files outside of `build`."""
    tree: dict[str, str | bytes] = {"README.md": "hello", "src/kernel.cu": "source"}
    for number, (variant, source) in enumerate(files.items()):
        contents: dict[str, str | bytes] = {"__init__.py": "from . import layers\n", "layers.py": source}
        contents["metadata.json"] = json.dumps(kernel_metadata("kernels", contents, changes={"id": f"_{number}"}))
        folder = f"build/{variant.replace('_', '-')}"
        tree |= {f"{folder}/{path}": data for path, data in contents.items()}
        for byte_code in ("__pycache__/layers.cpython-311.pyc", "layers.pyc", "sub/__pycache__/x.py", "old.pyo"):
            tree[f"{folder}/{byte_code}"] = b"byte code"
    local_hub.organization("acme", trusted=True)
    return local_hub.add("acme/kernels", tree)


def test_only_the_chosen_variant(local_hub: LocalHub) -> None:
    """The best variant is fetched; other variants, other folders and byte code are not."""
    repository = variants(local_hub, torch_universal=kernel(3), torch_cpu=kernel(4), torch_cuda=kernel(5))
    assert served(scale()) == 4
    fetched = {
        request.path.split(repository.head() + "/")[1] for request in local_hub.requests if "/resolve/" in request.path
    }
    assert fetched == {f"build/torch-cpu/{name}" for name in ("__init__.py", "layers.py", "metadata.json")}
    root = cached(repository).parents[1]
    assert {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()} == fetched
    assert not [path for path in Path(constants.HF_HUB_CACHE).rglob("*") if path.suffix in (".pyc", ".pyo")]


@pytest.fixture
def built_for_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a torch that was built for CUDA, as most are, whether or not there is such a device."""
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    this_machine.cache_clear()


@pytest.mark.usefixtures("built_for_cuda")
@pytest.mark.parametrize("local", [False, True], ids=["Hub", "folder"])
def test_calls_on_the_cpu_get_a_build_for_the_cpu(local_hub: LocalHub, tmp_path: Path, local: bool) -> None:
    """Also where torch was built for CUDA; a call on CUDA gets the other build of the same source, and both stay."""
    builds = {"torch_universal": kernel(3), "torch_cpu": kernel(4), "torch_cuda": kernel(5)}
    repository = variants(local_hub, **builds)
    source: Any = scale()
    if local:
        for path, content in repository.files().items():
            if path.endswith(("__init__.py", "layers.py", "metadata.json")):
                (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / path).write_bytes(content)
        source = LocalLayerRepository(tmp_path, layer_name="Scale")

    @use_kernel_forward_from_hub("OnTwoDevices")
    class Layer(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2

    with use_kernel_mapping({"OnTwoDevices": {"cpu": source, "cuda": source}}):
        for _ in range(2):
            assert Layer()(torch.ones(1)).item() == 4
            on_cuda = resolve(Layer(), device="cuda", mode=Mode.INFERENCE)
            assert "torch-cuda" in on_cuda.origin and on_cuda.implementation is not None
            assert on_cuda.implementation(Layer(), torch.ones(1)).item() == 5


@pytest.mark.usefixtures("built_for_cuda")
def test_a_build_for_cuda_alone_does_not_serve_the_cpu(local_hub: LocalHub) -> None:
    """A kernel that is not compiled for the CPU is refused there: the reason says so."""
    variants(local_hub, torch_cuda=kernel(5))
    outcome = call(scale())
    assert outcome.value == REFERENCE
    assert "torch-cuda: only for CUDA, and this call is on the CPU" in outcome.why


def test_no_fitting_variant(local_hub: LocalHub) -> None:
    """Without a fitting variant nothing is fetched, and each variant has its reason."""
    variants(local_hub, torch_tpu=kernel(), docs="")
    outcome = call(scale())
    assert outcome.value == REFERENCE and len(outcome.said) == 1
    assert re.search(
        r"acme/kernels at main: no build variant fits.*docs: .*torch-tpu: built for TPU", outcome.why, re.DOTALL
    )
    assert "Ask the publisher" in outcome.why and local_hub.count("/resolve/") == 0


def test_poisoned_byte_code_in_cache(
    kernel_repository: Publish, new_process: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Byte code planted in the cache is neither run nor counted as a file, and none is written."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    folder = cached(kernel_repository(layers=kernel()))
    assert served(scale()) == 3
    assert list(folder.rglob("*.pyc")) == []
    (folder / "evil.txt").write_text(kernel(666))
    target = importlib.util.cache_from_source(str(folder / "layers.py"))
    py_compile.compile(
        str(folder / "evil.txt"), cfile=target, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH
    )
    (folder / "evil.txt").unlink()
    new_process()
    assert served(scale()) == 3


# Requests


def seen(local_hub: LocalHub) -> list[str]:
    """List the requests, shortened, and forget them."""
    listed = [f"{r.method} {r.path.split('?')[0]}" for r in local_hub.requests]
    local_hub.forget()
    return listed


@pytest.mark.parametrize("kind", ["branch", "tag", "commit", "version"])
def test_requests(local_hub: LocalHub, kernel_repository: Publish, new_process: Callable[[], None], kind: str) -> None:
    """Cold, each question is asked once; warm, a branch, tag or version costs one request and a commit none."""
    repository = kernel_repository(layers=kernel())
    commit = repository.tag("1.0")
    repository.branch("v1")
    options: Any = {
        "branch": {},
        "tag": {"revision": "1.0"},
        "commit": {"revision": commit},
        "version": {"version": 1},
    }[kind]
    source = scale(**options)
    assert served(source) == 3
    cold = seen(local_hub)
    versions = ["GET /api/kernels/acme/kernels/refs"] if kind == "version" else []
    revision = commit if kind == "version" else source.kernel_request().wanted
    questions = [
        *versions,
        f"GET /api/kernels/acme/kernels/revision/{revision}",
        f"GET /api/kernels/acme/kernels/tree/{commit}",
        "GET /api/organizations/acme/overview",
    ]
    assert cold[: len(questions)] == questions
    assert all("/resolve/" in request and commit in request for request in cold[len(questions) :])
    assert served(source) == 3 and seen(local_hub) == []
    new_process()
    assert served(source) == 3
    assert seen(local_hub) == ([] if kind == "commit" else [cold[0]])
    new_process()
    assert served(scale(revision=commit)) == 3 and seen(local_hub) == []


def test_commit_of_untrusted_needs_no_request(
    local_hub: LocalHub, kernel_repository: Publish, new_process: Callable[[], None]
) -> None:
    """A cached commit that the user allows needs no request either, and the publisher is never asked for."""
    commit = kernel_repository("eve/kernels", kernel(), trusted=False).head()
    source = scale("eve/kernels", revision=commit, trust_remote_code=True)
    assert served(source) == 3 and local_hub.count("organizations") == 0
    local_hub.forget()
    new_process()
    assert served(source) == 3 and local_hub.requests == []


def test_commit_in_another_process(
    local_hub: LocalHub, kernel_repository: Publish, process: Callable[..., Any]
) -> None:
    """A commit in the cache needs no request at all in a real new process; a branch one; with the Hub gone, too."""
    commit = kernel_repository(layers=kernel()).head()
    assert served(scale()) == 3
    local_hub.forget()
    assert process(scale(revision=commit))[:2] == [3, ""] and local_hub.requests == []
    assert process(scale())[:2] == [3, ""] and local_hub.count() == 1
    local_hub.stop()
    (value, why, checked, said), gone = process(scale(), scale("acme/other"))
    assert (value, why, said) == (3, "", 0) and "cannot be reached" in checked["revision"]
    assert gone[0] == REFERENCE and "cannot be reached" in gone[1] and gone[3] == 1
    local_hub.start()


def test_two_layers_of_one_repository(local_hub: LocalHub, kernel_repository: Publish) -> None:
    """A second layer of a loaded repository asks nothing: it comes from the commit of the first."""
    kernel_repository(layers=kernel(3) + kernel(4).replace("Scale", "Other"))
    assert served(scale()) == 3
    local_hub.forget()
    assert served(LayerRepository("acme/kernels", layer_name="Other", revision="main")) == 4
    assert local_hub.requests == []


def test_a_push_between_two_layers(local_hub: LocalHub, kernel_repository: Publish) -> None:
    """Both layers of a repository come from one commit, whatever is pushed between their first calls."""
    source = kernel(3) + kernel(4).replace("Scale", "Other")
    repository = kernel_repository(layers=source)
    assert served(scale()) == 3
    kernel_repository(layers=source.replace("x * 4", "x * 5"))
    assert served(LayerRepository("acme/kernels", layer_name="Other", revision="main")) == 4
    assert len(repository.commits) == 2  # the push was real


def test_eight_threads(local_hub: LocalHub, kernel_repository: Publish) -> None:
    """Eight threads that call first at the same time make one download."""
    kernel_repository(layers=kernel())
    local_hub.fail("", delay=0.05, times=None)

    @use_kernel_forward_from_hub("ScaleThreads")
    class Layer(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * REFERENCE

    register_kernel_mapping({"ScaleThreads": {"cpu": scale()}})
    with ThreadPoolExecutor(8) as pool:
        values = list(pool.map(lambda _: Layer()(torch.ones(1)).item(), range(8)))
    assert values == [3.0] * 8
    assert local_hub.count("/revision/main") == local_hub.count("organizations") == 1
    assert local_hub.count("GET /kernels/acme/kernels/resolve") == 3


def test_a_listing_that_another_thread_keeps(
    local_hub: LocalHub, kernel_repository: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A listing may leave the memory of the process, for a file in the cache, while a thread looks for it."""

    class Emptied(dict[Any, Any]):
        def __contains__(self, key: object) -> bool:
            return self.pop(key, None) is not None

        def get(self, key: object, default: Any = None) -> Any:
            return self.pop(key, default)

    kernel_repository(layers=kernel())
    monkeypatch.setattr(revision, "_listed", Emptied())
    assert served(scale()) == 3


def test_two_processes(
    local_hub: LocalHub, kernel_repository: Publish, process: Callable[..., Any], tmp_path: Path
) -> None:
    """Two processes that start on one empty cache at the same time both get the kernel."""
    kernel_repository(
        layers={
            "layers.py": kernel(),
            "__init__.py": "from . import layers\n",
            **{f"{n}.bin": "x" * 5000 for n in range(10)},
        }
    )
    local_hub.fail("/resolve/", delay=0.02, times=None)
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda _: process(scale(), home=tmp_path / "shared"), range(2)))
    assert [answer[:2] for answer in answers] == [[3, ""], [3, ""]]


# Trust


def test_untrusted(local_hub: LocalHub, kernel_repository: Publish) -> None:
    """An untrusted publisher is refused before anything is listed or fetched; the error says how to allow it."""
    kernel_repository("eve/kernels", kernel(), trusted=False)
    outcome = call(scale("eve/kernels"))
    assert outcome.value == REFERENCE and len(outcome.said) == 1
    assert "eve/kernels at main: 'eve' is not a trusted publisher" in outcome.why
    allow = re.search(r"trust_remote_code=\[[^]]*\]", outcome.why)
    assert allow and allow[0] == "trust_remote_code=['eve/kernels']"
    assert local_hub.count(FETCH) == 0
    assert not list(Path(constants.HF_HUB_CACHE).rglob("*.py"))
    assert served(scale("eve/kernels", trust_remote_code=["eve/kernels"])) == 3


@pytest.mark.parametrize("unknown", ["user", "no field"])
def test_not_known_as_trusted(local_hub: LocalHub, kernel_repository: Publish, unknown: str) -> None:
    """A user, and an organisation without a mark of trust, are no trusted publishers."""
    kernel_repository("eve/kernels", kernel(), trusted=True)
    if unknown == "user":
        local_hub.organizations.clear()
    else:
        body = json.dumps({"name": "eve", "fullname": "eve", "avatarUrl": "", "isVerified": True})
        local_hub.fail("organizations", body=body, content_type="application/json", times=None)
    outcome = call(scale("eve/kernels"))
    assert outcome.value == REFERENCE and "not a trusted publisher" in outcome.why and local_hub.count(FETCH) == 0


@pytest.mark.parametrize(
    ("trust", "allowed"),
    [(True, True), (["eve/kernels"], True), (["eve/other", "eve"], False), ([], False), (False, False)],
)
def test_trust_remote_code(local_hub: LocalHub, kernel_repository: Publish, trust: Any, allowed: bool) -> None:
    """The user allows all of it, or names repositories; the publisher is then not asked for."""
    kernel_repository("eve/kernels", kernel(), trusted=False)
    outcome = call(scale("eve/kernels", trust_remote_code=trust))
    assert outcome.value == (3 if allowed else REFERENCE)
    assert local_hub.count("organizations") == (0 if allowed else 1)
    if allowed:
        assert outcome.resolution.checked["trust"] == "allowed by trust_remote_code"


@pytest.mark.parametrize("trust", [False, ["acme/kernels"], ["eve/kernels"], True])
def test_moved_into_untrusted_hands(local_hub: LocalHub, kernel_repository: Publish, trust: Any) -> None:
    """Trust goes by who finally serves: a trusted name that leads into an untrusted organisation is refused."""
    kernel_repository(layers=kernel())
    local_hub.organization("eve", trusted=False)
    local_hub.rename("acme/kernels", "eve/kernels")
    outcome = call(scale(trust_remote_code=trust))
    if trust in (True, ["eve/kernels"]):
        assert outcome.value == 3 and outcome.resolution.origin.startswith("eve/kernels@")
        return
    assert outcome.value == REFERENCE and local_hub.count(FETCH) == 0
    assert "'eve' is not a trusted publisher ('acme/kernels' was moved to 'eve/kernels')" in outcome.why
    assert "trust_remote_code=['eve/kernels']" in outcome.why


def test_moved_after_download(local_hub: LocalHub, kernel_repository: Publish, new_process: Callable[[], None]) -> None:
    """A name that moves after a download is judged anew by branch; the commit downloaded before stays good."""
    commit = kernel_repository(layers=kernel()).head()
    assert served(scale()) == 3
    local_hub.organization("eve", trusted=False)
    local_hub.rename("acme/kernels", "eve/kernels")
    new_process()
    assert "'eve' is not a trusted publisher" in call(scale()).why
    assert served(scale(revision=commit)) == 3


def test_moved_between_trusted_hands(
    local_hub: LocalHub, kernel_repository: Publish, new_process: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A repository that moves to another trusted organisation serves, from there, and offline by its old name."""
    kernel_repository(layers=kernel())
    local_hub.organization("better", trusted=True)
    local_hub.rename("acme/kernels", "better/layers")
    outcome = call(scale())
    assert outcome.value == 3 and outcome.resolution.checked["trust"] == "better is a trusted publisher"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    new_process()
    assert served(scale()) == 3


def test_trust_is_remembered_with_the_download(
    local_hub: LocalHub, kernel_repository: Publish, new_process: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trusted download stays trusted, offline and after the publisher lost its standing; a new commit does not."""
    kernel_repository(layers=kernel())
    assert served(scale()) == 3
    local_hub.organization("acme", trusted=False)
    new_process()
    assert served(scale()) == 3
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    new_process()
    outcome = call(scale())
    assert (
        outcome.value == 3 and "was a trusted publisher when it was downloaded" in outcome.resolution.checked["trust"]
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    kernel_repository(layers=kernel(4), trusted=False)
    new_process()
    assert "not a trusted publisher" in call(scale()).why


def test_allowed_once_is_not_trusted(
    kernel_repository: Publish, new_process: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel that one caller allowed is in the cache, and refused to another who did not, offline as well."""
    kernel_repository("eve/kernels", kernel(), trusted=False)
    assert served(scale("eve/kernels", trust_remote_code=True)) == 3
    assert "not a trusted publisher" in call(scale("eve/kernels")).why
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    new_process()
    outcome = call(scale("eve/kernels"))
    assert outcome.value == REFERENCE and "cannot be asked while HF_HUB_OFFLINE is set" in outcome.why
    assert "trust_remote_code=['eve/kernels']" in outcome.why
    assert served(scale("eve/kernels", trust_remote_code=["eve/kernels"])) == 3


# Digests, and tampering


def test_no_digests(kernel_repository: Publish) -> None:
    """A kernel without digests loads, and the resolution says that they were not checked."""
    kernel_repository(layers=kernel(), digest=False)
    outcome = call(scale())
    assert outcome.value == 3 and outcome.resolution.checked["digest"] == "not checked: the kernel has no digests"
    assert outcome.resolution.checked["transfer"] == "3 files as listed by the Hub"
    assert "not checked" in outcome.resolution.explain()


@pytest.mark.parametrize("fault", ["wrong", "missing", "extra", "signature"])
def test_digest(local_hub: LocalHub, kernel_repository: Publish, fault: str) -> None:
    """A file that is wrong, missing or extra by the digest is refused before anything runs; a signature is not."""
    repository = kernel_repository(
        layers={"layers.py": kernel(), "__init__.py": "from . import layers\nimport os\nos.environ['RAN'] = '1'\n"}
    )
    files = dict(repository.files())
    folder = "build/torch-universal"
    if fault == "wrong":
        files[f"{folder}/layers.py"] = kernel(4).encode()
    elif fault == "missing":
        del files[f"{folder}/layers.py"]
    else:
        files[f"{folder}/{'metadata.json.sigstore' if fault == 'signature' else 'more.py'}"] = b""
    repository.commit(files)
    os.environ.pop("RAN", None)
    outcome = call(scale())
    ran = os.environ.pop("RAN", None)
    if fault == "signature":
        assert outcome.value == 3 and ran == "1"
        return
    assert outcome.value == REFERENCE and ran is None and len(outcome.said) == 1
    what = {
        "wrong": "layers.py has other bytes",
        "missing": "layers.py is missing",
        "extra": "more.py is not in the digest",
    }[fault]
    assert what in outcome.why and "variant torch-universal" in outcome.why and repository.head()[:12] in outcome.why
    assert not list(cached(repository).rglob("*.py"))


def tamper(folder: Path, how: str) -> None:
    """Change the cache as another program could."""
    layers = folder / "layers.py"
    blob = layers.resolve()
    if how == "content":
        blob.write_text(kernel(666))
    elif how == "replaced link":
        layers.unlink()
        layers.write_text(kernel(666))
    elif how == "link to the outside":
        outside = folder.parents[5] / "outside.py"
        outside.write_text(kernel(666))
        layers.unlink()
        layers.symlink_to(outside)
    elif how == "extra file":
        (folder / "torch.py").write_text("raise SystemExit")
    elif how == "metadata":
        metadata = folder / "metadata.json"
        data = json.loads(metadata.read_text())
        metadata.resolve().write_text(json.dumps({**data, "digest": None}))
        blob.write_text(kernel(666))
    else:
        raise AssertionError(how)


@pytest.mark.parametrize("offline", [False, True])
@pytest.mark.parametrize("how", ["content", "replaced link", "link to the outside", "extra file", "metadata"])
@pytest.mark.parametrize("digest", [True, False])
def test_tampering(
    kernel_repository: Publish,
    new_process: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
    how: str,
    offline: bool,
    digest: bool,
) -> None:
    """Files that change in the cache are caught, offline and without digests, too; then online it is whole again."""
    repository = kernel_repository(layers=kernel(), digest=digest)
    assert served(scale()) == 3
    folder = cached(repository)
    tamper(folder, how)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    new_process()
    outcome = call(scale())
    assert outcome.value == REFERENCE and len(outcome.said) == 1
    assert "acme/kernels at main" in outcome.why and "not those on the Hub" in outcome.why
    if how == "link to the outside":
        assert (folder.parents[5] / "outside.py").exists()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    new_process()
    assert served(scale()) == 3


@pytest.mark.parametrize("how", ["file", "broken link", "blob", "folder"])
def test_holes_in_the_cache(
    kernel_repository: Publish, new_process: Callable[[], None], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Files missing in the cache are fetched again; offline the error names them, and the other files stay."""
    repository = kernel_repository(layers=kernel())
    commit = repository.head()
    assert served(scale()) == 3
    layers = cached(repository) / "layers.py"
    if how == "folder":
        shutil.rmtree(layers.parent)
    elif how == "blob":
        layers.resolve().unlink()
        layers.unlink()
    elif how == "broken link":
        layers.resolve().unlink()
    else:
        layers.unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    new_process()
    why = call(scale()).why
    assert "not in the cache" in why and "HF_HUB_OFFLINE" in why and "variant torch-universal" in why
    assert how == "folder" or (layers.parent / "metadata.json").exists()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    new_process()
    assert served(scale(revision=commit)) == 3


NOTES = [
    b"",
    b"{",
    b"[]",
    b"{}",
    b"null",
    b"[" * 100_000,
    b'{"commit": 3}',
    b'{"variants": 3, "publisher_trusted": true}',
    b"\xff",
]


@pytest.mark.parametrize(
    "note",
    [
        *NOTES,
        b'{"repo_id": "a/b", "repo_type": "kernel", "commit": "../../x"}',
        b'{"variants": {"x": [{"y": 1}]}, "publisher_trusted": true}',
        b'{"variants": {"x": [{"path": "a", "size": "3", "blob": "0"}]}, "publisher_trusted": true, "redirect": []}',
        b'{"variants": {}, "publisher_trusted": true, "redirect": ["acme/other", ".."]}',
    ],
)
def test_damaged_notes(kernel_repository: Publish, new_process: Callable[[], None], note: bytes) -> None:
    """Notes in the cache that cannot be read or understood count as none, and are written anew."""
    kernel_repository(layers=kernel())
    assert served(scale()) == 3
    notes = list(Path(constants.HF_HUB_CACHE).rglob("kernels-core/**/*.json"))
    assert len(notes) == 6
    before = {path: path.read_bytes() for path in notes if path.parent.name != "answers"}  # those have times
    for path in notes:
        path.write_bytes(note)
    new_process()
    assert served(scale()) == 3
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes in folders here")
def test_a_pipe_or_a_folder_in_place_of_a_note(kernel_repository: Publish, new_process: Callable[[], None]) -> None:
    """Neither is read for ever: the kernel is served, and the pipe becomes a note again."""
    kernel_repository(layers=kernel())
    assert served(scale()) == 3
    notes = sorted(Path(constants.HF_HUB_CACHE).rglob("kernels-core/**/*.json"))
    for number, path in enumerate(notes):
        path.unlink()
        path.mkdir() if number else os.mkfifo(path)
    for _ in range(2):
        new_process()
        assert served(scale()) == 3
    assert [path.is_file() for path in notes] == [True, *[False] * 5]


def test_tampering_in_a_read_only_cache(
    kernel_repository: Publish, new_process: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong bytes that cannot be removed are reported as wrong bytes, with the place to remove."""
    repository = kernel_repository(layers=kernel())
    assert served(scale()) == 3
    layers = cached(repository) / "layers.py"
    layers.write_text(layers.read_text() + "# changed\n")
    new_process()

    def refuse(self: Path, missing_ok: bool = False) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "unlink", refuse)
    (refusal,) = call(scale()).resolution.refusals
    assert isinstance(refusal.error, IntegrityError)
    assert "the files on disk are not those on the Hub: layers.py" in refusal.reason
    assert f"They cannot be removed from the cache (PermissionError: {PermissionError(13, 'Permission denied')})" in (
        refusal.reason
    )
    assert f"remove {cached(repository)} and try again" in refusal.reason


def test_notes_cannot_be_written(kernel_repository: Publish, new_process: Callable[[], None]) -> None:
    """A cache in which no notes can be written serves all the same."""
    repository = kernel_repository(layers=kernel())
    notes = cached(repository).parents[3] / "kernels-core"
    notes.parent.mkdir(parents=True)
    notes.write_text("in the way")
    assert served(scale()) == 3
    new_process()
    assert served(scale()) == 3


# Offline


@pytest.mark.parametrize("kind", ["branch", "tag", "commit", "version"])
def test_offline(
    local_hub: LocalHub,
    kernel_repository: Publish,
    new_process: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    """A kernel loaded once by branch, tag, commit or version loads again offline, without a request."""
    repository = kernel_repository(layers=kernel())
    repository.branch("v1")
    options: Any = {
        "branch": {},
        "tag": {"revision": repository.tag("1.0") and "1.0"},
        "commit": {"revision": repository.head()},
        "version": {"version": 1},
    }[kind]
    assert served(scale(**options)) == 3
    local_hub.forget()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    new_process()
    assert served(scale(**options)) == 3
    assert served(scale(revision=repository.head())) == 3
    outcome = call(scale(revision="never"))
    assert (
        outcome.value == REFERENCE
        and "acme/kernels at never: it is not in the cache, and HF_HUB_OFFLINE" in outcome.why
    )
    assert local_hub.requests == []


def test_offline_process(local_hub: LocalHub, kernel_repository: Publish, process: Callable[..., Any]) -> None:
    """HF_HUB_OFFLINE means the same to a real new process: branch, version and commit, and tampering is caught."""
    repository = variants(local_hub, torch_cpu=kernel(4), torch_cuda=kernel(5))
    repository.branch("v1")
    sources = [scale(), scale(version=1), scale(revision=repository.head())]
    assert [served(source) for source in sources] == [4, 4, 4]
    local_hub.forget()
    answers = process(*sources, scale(version=7), HF_HUB_OFFLINE="1")
    assert [answer[0] for answer in answers] == [4, 4, 4, REFERENCE] and "not in the cache" in answers[3][1]
    tamper(cached(repository, "torch-cpu"), "content")
    value, why, *_ = process(scale(), HF_HUB_OFFLINE="1")
    assert value == REFERENCE and "layers.py has" in why
    assert local_hub.requests == []


# The client's own settings, in real processes


def test_home_and_cache(
    local_hub: LocalHub, kernel_repository: Publish, process: Callable[..., Any], tmp_path: Path
) -> None:
    """HF_HOME moves the cache, and KERNELS_CACHE that of kernels, also relative to the user's home."""
    kernel_repository(layers=kernel())
    home, user = tmp_path / "elsewhere", tmp_path / "user"
    user.mkdir()
    assert process(scale(), home=home, without=("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"))[:2] == [3, ""]
    assert (home / "hub" / "kernels--acme--kernels" / "snapshots").is_dir()
    own = {"KERNELS_CACHE": "~/mine", "HOME": str(user)}
    assert process(scale(), home=tmp_path / "third", **own)[:2] == [3, ""]
    assert (user / "mine" / "kernels--acme--kernels" / "snapshots").is_dir()
    assert not (tmp_path / "third" / "hub" / "kernels--acme--kernels").exists()


def test_kernels_cache(
    local_hub: LocalHub,
    kernel_repository: Publish,
    new_process: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """In KERNELS_CACHE a commit is found again without a request, offline too."""
    commit = kernel_repository(layers=kernel()).head()
    monkeypatch.setenv("KERNELS_CACHE", str(tmp_path / "mine"))
    assert served(scale(revision=commit)) == 3
    assert (tmp_path / "mine" / "kernels--acme--kernels").is_dir() and not Path(
        constants.HF_HUB_CACHE, "kernels--acme--kernels"
    ).exists()
    local_hub.forget()
    new_process()
    assert served(scale(revision=commit)) == 3 and local_hub.requests == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    new_process()
    assert served(scale(revision=commit)) == 3


def test_token_retries_and_progress(
    local_hub: LocalHub, kernel_repository: Publish, process: Callable[..., Any], tmp_path: Path
) -> None:
    """A private repository loads with HF_TOKEN and not without; failures are retried; progress is shown unless off."""
    tree = kernel_repository(layers=kernel()).files()
    local_hub.add("acme/private", tree, private=True)
    value, why, _, said = process(scale("acme/private"))
    assert value == REFERENCE and said == 1
    assert "acme/private at main" in why and "private" in why and "HF_TOKEN" in why
    local_hub.forget()
    local_hub.fail("HEAD /kernels/acme/private", status=503, times=1)
    shown = {"HF_HUB_DISABLE_PROGRESS_BARS": "0"}
    assert process(scale("acme/private"), HF_TOKEN=local_hub.token, **shown)[:2] == [3, ""]
    assert all(request.headers.get("authorization") == f"Bearer {local_hub.token}" for request in local_hub.requests)
    assert local_hub.count(lambda request: request.status == 503) == 1
    assert "Fetching" in process.stderr or "Downloading" in process.stderr  # type: ignore[attr-defined]
    assert all(
        "kernels-core/" in r.headers["user-agent"] for r in local_hub.requests if r.path.startswith("/api/kernels")
    )


# Local repositories


def test_local_repository(local_hub: LocalHub, kernel_repository: Publish, tmp_path: Path) -> None:
    """A folder with `build`, with variants, or a variant itself serves without the Hub, its digest checked."""
    root = tmp_path / "kernel"
    for path, data in kernel_repository(layers=kernel()).files().items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data)
    for folder in (root, root / "build", root / "build" / "torch-universal"):
        assert served(LocalLayerRepository(folder, layer_name="Scale")) == 3
    assert call(LocalLayerRepository(root, layer_name="Scale")).resolution.checked["trust"] == "local files"
    (root / "build" / "torch-universal" / "layers.py").write_text(kernel(666))
    _start_anew()
    outcome = call(LocalLayerRepository(root, layer_name="Scale"))
    assert outcome.value == REFERENCE and "layers.py has other bytes" in outcome.why and str(root) in outcome.why
    assert (root / "build" / "torch-universal" / "layers.py").exists() and local_hub.requests == []
    outcome = call(LocalLayerRepository(tmp_path / "nowhere", layer_name="Scale"))
    assert outcome.value == REFERENCE and "there is no such folder" in outcome.why
