"""Many processes and one Hub: requests in all, one commit for all, refusals and failures of some."""

from __future__ import annotations

import itertools
import json
import os
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fresh_process import run_python
from hub_scene import Publish, kernel

from kernels_plugins.local_hub.server import LocalHub, Request

pytest_plugins = ["kernels_plugins.hub.testing"]
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="starts its processes with fork")

PROGRAM = """
import json, os, sys, tempfile, threading, time
import torch, kernels_plugins.hub.source, kernels_plugins.hub.kernel
import torch.distributed as dist
from kernels_core import Mode, hookimpl, plugin_manager, resolve
from kernels_plugins import LayerRepository, use_kernel_mapping
from kernels_plugins.hub.client import answers
plugin_manager().plugins()
def ask(owner):
    with use_kernel_mapping({"Scale": {"cpu": LayerRepository(f"{owner}/kernels", layer_name="Scale", version=1)}}):
        found = resolve("Scale", device="cpu", mode=Mode.INFERENCE)
    return [found.origin, [refusal.reason for refusal in found.refusals]]
def start(count, code):
    '''Run a function in forked processes that begin together, as programs that have just started.'''
    place, answers._started, begin = tempfile.mkdtemp(), time.time(), time.time() + 0.2
    for rank in range(count):
        if os.fork() == 0:
            while time.time() < begin: time.sleep(0.002)
            try: found = code(rank)
            except BaseException as error: found = ["error", [repr(error)]]
            with open(f"{place}/{rank}", "w") as file: json.dump(found, file)
            os._exit(0)
    for rank in range(count): os.wait()
    return [json.load(open(f"{place}/{rank}")) if os.path.exists(f"{place}/{rank}") else None for rank in range(count)]
"""

Run = Callable[..., Any]


@pytest.fixture
def run(local_hub: LocalHub, tmp_path: Path) -> Run:
    """Run a program in a new Python that talks to the Hub; it prints what it found."""

    def start(code: str, **environment: str) -> Any:
        variables = {**os.environ, **local_hub.environment(tmp_path / "hub-home")}
        done = run_python(
            "-c", PROGRAM + textwrap.dedent(code), environment={**variables, **environment}, folder=tmp_path
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return start


@pytest.fixture
def publish(local_hub: LocalHub, kernel_repository: Publish) -> Callable[..., str]:
    """Publish version 1 of the kernel of each owner; return the origin of the last one."""

    def release(*owners: str, factor: float = 3) -> str:
        for owner in owners:
            repository = kernel_repository(f"{owner}/kernels", kernel(factor))
            repository.branch("v1")
        return f"{owners[-1]}/kernels@{repository.head()[:12]} (torch-universal)"

    return release


def is_api(request: Request) -> bool:
    """Whether a request is one of those that the Hub limits to few: not one for a file."""
    return "/api/" in request.path


def test_processes_of_one_cache(local_hub: LocalHub, publish: Callable[..., str], run: Run) -> None:
    """Many processes of one cache, without a process group, send about as many requests as one of them.

    A warm start of 16 by version sends 4 requests at most in all; a cold one 3 times those of one process. Of 64, all
    are served under a limit of 60. A Hub in trouble is asked once for all.
    """
    publish("one", "warm", "cold", "limited", "down")
    left = itertools.count()
    local_hub.fail(
        lambda request: is_api(request) and "limited" in request.path and next(left) >= 60,
        status=429,
        headers={"Retry-After": "300"},
        times=None,
    )
    trouble: dict[str, Any] = {"status": 503, "headers": {"Retry-After": "0"}, "delay": 1.0}  # so that all come to wait
    local_hub.fail(lambda request: "down" in request.path, **trouble, times=None)
    found = run(
        """
        phases = {"one": 1, "warm": 1, "cold": 16, "limited": 64, "down": 16}
        found = {owner: start(count, lambda rank: ask(owner)) for owner, count in phases.items()}
        found["again"] = start(16, lambda rank: ask("warm"))
        print(json.dumps(found))
        """
    )
    sent = {
        owner: [
            sum(f"{owner}/" in f"{one.path}/" and is_api(one) == api for one in local_hub.requests) for api in (1, 0)
        ]
        for owner in ("one", "warm", "cold", "limited", "down")
    }
    assert all("@" in origin for phase in ("one", "warm", "cold", "limited", "again") for origin, _ in found[phase])
    assert sent["one"][0] == 4
    assert sum(sent["warm"]) - sum(sent["one"]) <= 4
    assert sent["cold"][0] <= 3 * sent["one"][0] and sent["cold"][1] <= 3 * sent["one"][1]
    assert sent["limited"][0] <= 60
    assert all(origin == "reference" and "(503)" in why[0] for origin, why in found["down"])
    assert sent["down"][0] <= 2 * 3  # one process, which sends a request again twice; two where some came late


def test_a_process_that_started_later_asks_the_hub(local_hub: LocalHub, publish: Callable[..., str], run: Run) -> None:
    """A note serves no program that starts later: it gets the new commit. With `KERNELS_SHARE_SECONDS=0`, none."""
    publish("acme")
    first = run("print(json.dumps(start(2, lambda rank: ask('acme'))))")
    again = publish("acme", factor=5)
    local_hub.forget()
    found = run("print(json.dumps(start(3, lambda rank: ask('acme'))))", KERNELS_SHARE_SECONDS="0")
    assert found == [[again, []]] * 3 and first[0][0] != again
    assert local_hub.count("/refs") == 3


def test_ranks_with_a_folder_have_one_commit(
    local_hub: LocalHub, publish: Callable[..., str], run: Run, tmp_path: Path
) -> None:
    """With `KERNELS_LEADER_DIR`, ranks of two caches send the requests of one process, and each cache downloads once.

    Ranks, spawned workers and child processes that come after the branch has moved have the commit of the others, in
    another cache, too. A rank whose policy refuses says so in its decision. Another job has the new commit.
    """
    publish("one")
    first = publish("acme")
    code = """
        def rank(number):
            os.environ["KERNELS_CACHE"] = f"cache-{number % 2}"
            class Policy:
                @hookimpl
                def kernels_authorize(self, request, candidate): return f"not on rank {number}"
            if number == 3: plugin_manager().register(Policy(), "policy")
            return ask("acme")
        found = start(6, rank)
        start(1, lambda number: ask("one"))
        print(json.dumps(found))
    """
    found = run(code, KERNELS_LEADER_DIR=f"{tmp_path}/job")
    refused = found.pop(3)
    assert found == [[first, []]] * 5
    assert refused[0] == "reference" and "not on rank 3" in refused[1][0]
    api, one = (
        sum(is_api(request) and name in request.path for request in local_hub.requests) for name in ("acme", "one")
    )
    assert api == one
    assert local_hub.count(lambda request: request.method == "GET" and "acme/kernels/resolve" in request.path) == 2 * 3

    moved = publish("acme", factor=5)
    local_hub.forget()
    late = """
        import multiprocessing, subprocess
        from importlib import import_module
        with open("worker.py", "w") as file: file.write(WORKER)
        sys.path.insert(0, os.getcwd())
        os.environ.update(PYTHONPATH=os.getcwd(), KERNELS_CACHE="cache-2")
        import worker
        context = multiprocessing.get_context("spawn")
        with context.Pool(1) as pool: spawned = pool.apply(worker.found)
        child = subprocess.check_output([sys.executable, "-c", "import worker; print(worker.found())"], text=True)
        print(json.dumps([worker.found(), spawned, child.strip()]))
    """
    worker = """
from kernels_core import Mode, plugin_manager, resolve
from kernels_plugins import LayerRepository, use_kernel_mapping
def found():
    with use_kernel_mapping({"Scale": {"cpu": LayerRepository("acme/kernels", layer_name="Scale", version=1)}}):
        origin = resolve("Scale", device="cpu", mode=Mode.INFERENCE).origin
    return f"{origin} {sorted(plugin_manager().plugins())}"
"""
    own, spawned, child = run(f"WORKER = {worker!r}\n" + textwrap.dedent(late), KERNELS_LEADER_DIR=f"{tmp_path}/job")
    assert own.startswith(first) and own == spawned == child and "'mapping'" in own
    assert local_hub.count(is_api) == 0
    assert run("print(json.dumps(ask('acme')))", KERNELS_LEADER_DIR=f"{tmp_path}/next job") == [moved, []]


def test_ranks_of_a_process_group(local_hub: LocalHub, publish: Callable[..., str], run: Run) -> None:
    """Under a group of 4 ranks, each with its own cache, all have one commit, though the Hub refuses some requests.

    `KERNELS_LEADER=0` asks on each rank. A rank that dies while it asks is waited for, and the next one asks. A process
    that is forked from a rank does not use the connection of its parent.
    """
    commit, dead = publish("acme"), publish("dead")
    publish("alone")
    local_hub.fail("/api/kernels/acme", status=429, headers={"Retry-After": "1"}, times=5)
    local_hub.fail("/api/kernels/dead", delay=60)
    found = run(
        """
        def rank(number):
            os.environ.update(KERNELS_CACHE=f"cache-{number}", KERNELS_LEADER_TIMEOUT="30")
            dist.init_process_group("gloo", init_method=f"file://{os.getcwd()}/store", rank=number, world_size=4)
            found = [ask("acme")]
            os.environ["KERNELS_LEADER"] = "0"
            found.append(ask("alone"))
            del os.environ["KERNELS_LEADER"]
            from kernels_plugins.hub.client.board import find_board
            assert find_board() is not None
            if (child := os.fork()) == 0: os._exit(0 if find_board() is None else 1)
            found.append(os.waitpid(child, 0)[1])
            dist.barrier()
            os.environ["KERNELS_LEADER_TIMEOUT"] = "2"
            if number == 0: threading.Timer(0.5, os._exit, [0]).start()
            else: time.sleep(0.3)
            return [*found, ask("dead")]
        print(json.dumps(start(4, rank)))
        """
    )
    assert found[0] is None  # it died
    for rank in found[1:]:
        assert rank[0] == [commit, []] and rank[2] == 0 and rank[3] == [dead, []]
        assert rank[1][0].startswith("alone/kernels@")
    assert local_hub.count("alone/kernels/refs") == 4
    assert local_hub.count("acme/kernels/refs") == 6


def test_ray_actors(local_hub: LocalHub, publish: Callable[..., str], run: Run, tmp_path: Path) -> None:
    """Actors of Ray find the plugins, and have the commit of the job in caches of their own, after the branch moved."""
    pytest.importorskip("ray")
    first = publish("acme")
    assert run("print(json.dumps(ask('acme')))", KERNELS_LEADER_DIR=f"{tmp_path}/job") == [first, []]
    publish("acme", factor=5)
    local_hub.forget()
    found = run(
        """
        import ray
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
        @ray.remote
        class Actor:
            def found(self, cache):
                os.environ["KERNELS_CACHE"] = cache
                return [ask("acme"), sorted(plugin_manager().plugins())]
        actors = [Actor.remote() for _ in range(2)]
        found = ray.get([actor.found.remote(os.path.abspath(f"cache-{n}")) for n, actor in enumerate(actors)])
        ray.shutdown()
        print(json.dumps([*found, sorted(plugin_manager().plugins())]))
        """,
        KERNELS_LEADER_DIR=f"{tmp_path}/job",
    )
    assert found == [[[first, []], found[2]]] * 2 + [found[2]] and "hub" in found[2]
    assert local_hub.count(is_api) == 0


def test_a_refusal_on_one_rank_is_a_disagreement(publish: Callable[..., str], run: Run) -> None:
    """Ranks share a resolution, and the policy of one refuses it: `agree` raises the same error on all, with why."""
    commit = publish("acme")
    found = run(
        """
        from kernels_core import DisagreementError, agree, use_kernel_forward_from_hub
        @use_kernel_forward_from_hub("Scale")
        class Scale(torch.nn.Module):
            def forward(self, x): return x * 2
        class Policy:
            @hookimpl
            def kernels_authorize(self, request, candidate): return "not on this rank"
        def rank(number):
            os.environ["KERNELS_CACHE"] = f"cache-{number}"
            dist.init_process_group("gloo", init_method=f"file://{os.getcwd()}/store", rank=number, world_size=3)
            if number == 1: plugin_manager().register(Policy(), "policy")
            with use_kernel_mapping({"Scale": {"cpu": LayerRepository("acme/kernels", layer_name="Scale", version=1)}}):
                try: return str(agree(torch.nn.Sequential(Scale()), device="cpu", mode=Mode.INFERENCE))
                except DisagreementError as error: return str(error)
        print(json.dumps(start(3, rank)))
        """
    )
    assert len(set(found)) == 1
    for part in ("ranks 0,2", "rank 1", commit.partition(" ")[0], "not on this rank"):
        assert part in found[0], found[0]
