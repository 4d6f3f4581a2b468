"""Decision files with kernels from the Hub: the frozen commit serves, with its files, and without a request."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fresh_process import run_python
from hub_scene import Publish, kernel, new_process, scale
from huggingface_hub import constants
from ranks import torchrun

from kernels_core import DecisionError, DecisionFile, Mode, receipt, use_kernel_forward_from_hub
from kernels_plugins import LayerRepository, LockedLayerRepository, reference_backward, register_kernel_mapping
from kernels_plugins.hub.dependency import Dependency
from kernels_plugins.hub.locking.lockfile import LOCK, write_lock
from kernels_plugins.hub.locking.maker import make_lock
from kernels_plugins.local_hub.server import LocalHub, Repository

pytest_plugins = ["kernels_plugins.hub.testing"]


@use_kernel_forward_from_hub("Scale")
class Scale(torch.nn.Module):
    """Doubles; version 1 of the kernel triples, and what is pushed later multiplies by five."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


@pytest.fixture
def published(kernel_repository: Publish) -> Repository:
    repository = kernel_repository(layers=kernel(3))
    repository.branch("v1")
    return repository


@pytest.fixture
def push(kernel_repository: Publish) -> Callable[[], None]:
    """Move the branches."""
    return lambda: kernel_repository(layers=kernel(5)).branch("v1")


def value() -> float:
    with torch.no_grad():
        return float(Scale()(torch.ones(1)).item())


def freeze(source: Any, place: Path) -> None:
    register_kernel_mapping({"Scale": {"cpu": source}})
    receipt(Scale(), device="cpu", mode=Mode.INFERENCE).freeze(place)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "kernels.decisions.json"


@pytest.fixture
def restart(place: Path, new_process: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Start anew, under the file."""

    def start() -> None:
        new_process()
        monkeypatch.setenv("KERNELS_DECISIONS", str(place))

    return start


@pytest.mark.parametrize("pin", [{"revision": "main"}, {"version": 1}], ids=["branch", "version"])
def test_the_frozen_commit_serves_without_a_request(
    pin: dict[str, Any],
    published: Repository,
    push: Callable[[], None],
    place: Path,
    restart: Callable[[], None],
    local_hub: LocalHub,
) -> None:
    """A branch and a version that have moved are not asked about; from an empty cache, the frozen commit is loaded."""
    freeze(scale(**pin), place)
    commit = published.head()
    push()
    restart()
    local_hub.forget()
    assert (value(), local_hub.count()) == (3.0, 0)
    shutil.rmtree(constants.HF_HUB_CACHE)
    restart()
    assert value() == 3.0
    assert not [one.path for one in local_hub.requests if "refs" in one.path or "/main" in one.path]
    (row,) = receipt(Scale(), device="cpu", mode=Mode.INFERENCE).rows
    assert commit[:12] in row.origin and row.checked["lock"] == "commit and files are those in the decision file"


def test_without_the_file_the_newer_commit_serves(
    published: Repository, push: Callable[[], None], place: Path, new_process: Callable[[], None]
) -> None:
    """The branch really moves."""
    freeze(scale(), place)
    push()
    new_process()
    assert value() == 5.0


def test_a_commit_that_cannot_be_loaded(
    published: Repository, push: Callable[[], None], place: Path, restart: Callable[[], None], local_hub: LocalHub
) -> None:
    """Without cache and Hub, calls raise with the reason; neither the newer commit nor the reference serves."""
    freeze(scale(), place)
    push()
    shutil.rmtree(constants.HF_HUB_CACHE)
    local_hub.fail("/", status=503, times=None)
    restart()
    with pytest.raises(DecisionError, match=r"Expected: acme/kernels@.* Found: LayerRepository\('acme/kernels'.*503"):
        value()


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (
            lambda pin: pin["hashes"][0]["variants"]["torch-universal"].update(hash=f"sha256-{'0' * 64}"),
            "it is sha256-",
        ),
        (lambda pin: pin["lock"][0]["lock"].update(commit="main"), "'main' is not a commit"),
        (lambda pin: pin["lock"].clear(), "has no commit of a kernel"),
    ],
    ids=["another build", "no commit", "nothing"],
)
def test_other_files_than_were_frozen(
    change: Callable[[Any], None],
    found: str,
    published: Repository,
    push: Callable[[], None],
    place: Path,
    restart: Callable[[], None],
) -> None:
    """A build with another hash, and a file in which the commit is malformed, are errors with the remedy."""
    freeze(scale(), place)
    content = json.loads(place.read_text())
    change(content["models"][0]["decided"][0]["kernels"][0]["pin"])
    place.write_text(json.dumps(content))
    restart()
    with pytest.raises(DecisionError, match="freeze the decisions anew") as caught:
        value()
    assert found in str(caught.value)


def test_dependencies_are_frozen_too(
    kernel_repository: Publish, place: Path, restart: Callable[[], None], local_hub: LocalHub
) -> None:
    """A kernel that another one depends on stays at its commit, without a request."""
    base = kernel_repository("acme/base", {"__init__.py": "FACTOR = 3\n"}, name="base")
    base.branch("v1")
    layers = "import torch\nfrom kernels import get_kernel_dep\nFACTOR = get_kernel_dep('acme/base').FACTOR\n"
    layers = layers.replace("from kernels ", "from kernels_plugins ") + kernel(1).replace("* 1", "* FACTOR")
    needs = {"kernel-depends": [{"repo-id": "acme/base", "version": 1}]}
    kernel_repository("acme/kernels", layers, metadata=needs)
    freeze(scale(), place)
    before = DecisionFile.from_file(place)
    assert len(before.models[0].decided[0].kernels[0].pin["lock"]) == 2
    kernel_repository("acme/base", {"__init__.py": "FACTOR = 5\n"}, name="base").branch("v1")
    restart()
    local_hub.forget()
    assert (value(), local_hub.count()) == (3.0, 0)


def test_adapted_sources_are_frozen_with_the_kernel_inside(
    published: Repository, push: Callable[[], None], place: Path, restart: Callable[[], None], local_hub: LocalHub
) -> None:
    """An adapter around a repository keeps the frozen commit inside."""
    freeze(reference_backward(scale()), place)
    push()
    restart()
    local_hub.forget()
    assert (value(), local_hub.count()) == (3.0, 0)


def test_redirected_and_locked_kernels(
    published: Repository,
    kernel_repository: Publish,
    place: Path,
    restart: Callable[[], None],
    local_hub: LocalHub,
    tmp_path: Path,
) -> None:
    """The repository that a redirect led to is frozen, also where the redirect is changed; locked kernels are, too."""
    moved = kernel_repository("acme/old", kernel(1))
    status = 'kind = "redirect"\ndestination = "acme/kernels"\nrevision = "main"\n'
    moved.commit({"kernel-status.toml": status.encode()})
    freeze(LayerRepository("acme/old", layer_name="Scale", revision="main"), place)
    kernel_repository("acme/other", kernel(7))
    moved.commit({"kernel-status.toml": status.replace("acme/kernels", "acme/other").encode()})
    restart()
    local_hub.forget()
    assert (value(), local_hub.count()) == (3.0, 0)
    write_lock(tmp_path / LOCK, make_lock([Dependency("acme/kernels", version=1)]))
    place.unlink()
    os.environ["KERNELS_DECISIONS"] = ""
    freeze(LockedLayerRepository("acme/kernels", lockfile=tmp_path / LOCK, layer_name="Scale"), place)
    restart()
    local_hub.forget()
    assert (value(), local_hub.count()) == (3.0, 0)


def test_two_ranks_freeze_at_once(published: Repository, place: Path) -> None:
    """Ranks that freeze into one file at the same time lose nothing of each other, and leave no other file."""
    register_kernel_mapping({"Scale": {"cpu": scale()}})
    modes = (Mode.INFERENCE, Mode.TRAINING, Mode.INFERENCE | Mode.TORCH_COMPILE, Mode.TRAINING | Mode.TORCH_COMPILE)
    receipts = [receipt(Scale(), device="cpu", mode=mode) for mode in modes]
    threads = [threading.Thread(target=found.freeze, args=(place.parent / "new" / "file",)) for found in receipts * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(DecisionFile.from_file(place.parent / "new" / "file").models) == 4
    assert [path.name for path in (place.parent / "new").iterdir()] == ["file"]


def test_a_kernel_that_cannot_be_reached_is_not_frozen(
    published: Repository, push: Callable[[], None], place: Path, local_hub: LocalHub
) -> None:
    """The reference that serves while the Hub is away is no decision: nothing is written."""
    local_hub.fail("/", status=503, times=None)
    with pytest.raises(DecisionError, match="could not be reached, and may be later"):
        freeze(scale(), place)
    assert not place.exists()


WORKER = """
import sys, torch
from kernels_core import Mode, plugin_manager, receipt, use_kernel_forward_from_hub
from kernels_plugins import LayerRepository, register_kernel_mapping
@use_kernel_forward_from_hub("Scale")
class Scale(torch.nn.Module):
    def forward(self, x): return x * 2
register_kernel_mapping({"Scale": {"cpu": LayerRepository("acme/kernels", layer_name="Scale", revision="main")}})
def found():
    with torch.no_grad(): return [Scale()(torch.ones(1)).item(), sorted(plugin_manager().plugins())]
def freeze(path): receipt(Scale(), device="cpu", mode=Mode.INFERENCE).freeze(path)
"""

STARTS = """
import json, multiprocessing, os, subprocess, sys
from concurrent.futures import ProcessPoolExecutor
sys.path.insert(0, os.getcwd())
os.environ["PYTHONPATH"] = os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])
import worker
if not os.path.exists("decisions.json"): worker.freeze("decisions.json")
found = {"program": worker.found()}
if os.environ.get("ONLY"):
    print(json.dumps(found))
    sys.exit()
context = multiprocessing.get_context("spawn")
with ProcessPoolExecutor(1, context) as pool: found["spawned"] = pool.submit(worker.found).result()
child = subprocess.check_output([sys.executable, "-c", "import worker, json; print(json.dumps(worker.found()))"])
found["child"] = json.loads(child)
if len(sys.argv) > 1:
    import ray
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    found["actor"] = ray.get(ray.remote(worker.found).remote())
    ray.shutdown()
print(json.dumps(found))
"""


@pytest.mark.slow
def test_spawned_workers_and_ray_actors_have_the_decisions(
    published: Repository, push: Callable[[], None], local_hub: LocalHub, tmp_path: Path
) -> None:
    """Spawned workers, child processes and actors of Ray find the plugins, and serve by the file of the program."""
    (tmp_path / "worker.py").write_text(WORKER)
    options = ["ray"] if importlib.util.find_spec("ray") else []

    def run(**variables: str) -> dict[str, Any]:
        environment = {**os.environ, **local_hub.environment(tmp_path / "home"), **variables}
        done = run_python("-c", STARTS, *options, environment=environment, folder=tmp_path)
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found

    first = run(ONLY="program")
    push()
    newer, frozen = run(), run(KERNELS_DECISIONS=str(tmp_path / "decisions.json"))
    for found, value in ((first, 3.0), (newer, 5.0), (frozen, 3.0)):
        assert found == {place: [value, found["program"][1]] for place in found}
        assert len(found) == (1 if found is first else 3 + len(options))
        assert "hub" in found["program"][1]


PROGRAM = """
import json, os, sys, time
import torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch import nn
from kernels_core import Mode, forget, receipt, use_kernel_forward_from_hub
from kernels_plugins import LayerRepository, register_kernel_mapping

@use_kernel_forward_from_hub("Scale")
class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
    def forward(self, x):
        return x * 2

def value():
    with torch.no_grad():
        return model[0](torch.ones(1)).item()

dist.init_process_group("gloo")
rank, model = dist.get_rank(), nn.Sequential(Scale())
register_kernel_mapping({"Scale": {"cpu": LayerRepository("acme/kernels", layer_name="Scale", revision="main")}})
if not os.path.exists("pushed"):
    first = value()
    nn.init.constant_(model[0].weight, first)
    receipt(model, device="cpu", mode=Mode.INFERENCE).freeze("kernels.decisions.json")
    dcp.save({"model": model.state_dict()}, checkpoint_id="step")
    open(f"ready{rank}", "w").close()
    while not os.path.exists("pushed"):
        time.sleep(0.02)
    os._exit(1)  # as a worker that is killed
dcp.load({"model": (state := model.state_dict())}, checkpoint_id="step")
without = value()
os.environ["KERNELS_DECISIONS"] = "kernels.decisions.json"
forget()
with open(f"found{rank}", "w") as file:
    json.dump([state["0.weight"].item(), without, value()], file)
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_elastic_restarts_continue_with_the_frozen_commit(
    published: Repository, push: Callable[[], None], local_hub: LocalHub, tmp_path: Path
) -> None:
    """Workers that torchrun restarts take the newer commit of a branch, and with the file that of the checkpoint."""
    done = threading.Event()

    def move() -> None:
        while not (all((tmp_path / f"ready{rank}").exists() for rank in range(2)) or done.is_set()):
            time.sleep(0.02)
        push()
        (tmp_path / "pushed").touch()

    mover = threading.Thread(target=move)
    mover.start()
    try:
        # On a loaded machine, a Hub that answers late would be taken for one that is away, and the cache would serve.
        more = {"HF_HUB_ETAG_TIMEOUT": "600"}
        # Or the workers find the addresses, and the answers of the Hub, that those before the restart have left.
        more["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        environment = {**local_hub.environment(tmp_path / "home"), **more}
        ran = torchrun(tmp_path, PROGRAM, 2, "--max-restarts", "5", **environment)
    finally:
        done.set()
        mover.join()
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert [json.loads((tmp_path / f"found{rank}").read_text()) for rank in range(2)] == [[3.0, 5.0, 3.0]] * 2
