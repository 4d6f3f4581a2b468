"""Jobs as operators start them: torchrun with 2, 4 and 8 processes of gloo, and a Hub that refuses some requests."""

from __future__ import annotations

import json
import subprocess
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hub_scene import Publish, kernel, new_process
from ranks import torchrun

from kernels_plugins.local_hub.server import LocalHub

pytest_plugins = ["kernels_plugins.hub.testing"]
pytestmark = pytest.mark.slow

PRELUDE = """
import json, os, time, warnings
R, W = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
os.environ["KERNELS_CACHE"] = os.path.abspath(f"cache-{R // 2}")  # hosts of two ranks
import torch, torch.distributed as dist
from torch import nn
from kernels_core import *
from kernels_plugins import LayerRepository, register_kernel_mapping, use_kernel_mapping
warnings.simplefilter("ignore")
torch.set_num_threads(1)
LAST = R == W - 1

@use_kernel_forward_from_hub("Scale")
class Scale(nn.Module):
    def forward(self, x): return x * 2
@use_kernel_forward_from_hub("Norm")
class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, 4))
    def forward(self, x): return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight
calls = []
def make_kernel(label):
    class FastNorm(nn.Module):
        local_except = (-1,)
        def forward(self, x):
            calls.append((label, type(x).__name__, tuple(x.shape)))
            if failing == "raises": raise RuntimeError("a fault of this rank")
            if failing == "loses": x = x.detach()
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight
    return FastNorm
class OtherNorm(nn.Module):
    def forward(self, x): return x
failing = ""
hub = LayerRepository("acme/kernels", layer_name="Scale", version=1)
register_kernel_mapping({"Scale": {"cpu": hub}, "Norm": {"cpu": make_kernel("first")}})
model = nn.Sequential(Scale(), nn.Linear(4, 4), Norm())
def agreed(**options):
    '''Agree for training; return the error, or nothing.'''
    try: agree(model, device="cpu", mode=Mode.TRAINING, **options)
    except DisagreementError as error: return str(error)
    return ""
"""

JOB = """
dist.init_process_group("gloo")
torch.manual_seed(0)
found = {"first": agreed(), "origins": [row.origin for row in receipt(model, device="cpu", mode=Mode.TRAINING).rows]}

# Data parallelism: gradients are those of the undecorated model.
for parameter in model.parameters(): dist.broadcast(parameter.detach(), 0)
x = torch.randn(W, 2, 4, generator=torch.Generator().manual_seed(1))
def gradients(call, mine):
    model.zero_grad()
    call(mine).sum().backward()
    return [parameter.grad.clone() for parameter in model.parameters()]
def plain(x):
    weight = model[1].weight, model[1].bias
    x = nn.functional.linear(x * 3, *weight)
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * model[2].weight
expected = [gradient / W for gradient in gradients(plain, x)]
ours = gradients(nn.parallel.DistributedDataParallel(model), x[R])
found["gradients"] = all(torch.allclose(*pair, atol=1e-5) for pair in zip(ours, expected, strict=True))

# A sharded sequence: the kernel gets the shard of this rank.
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh
mesh, norm, sequence = init_device_mesh("cpu", (W,)), Norm(), torch.randn(1, 2 * W, 4)
dist.broadcast(sequence, 0)
norm.weight = nn.Parameter(distribute_tensor(norm.weight.detach(), mesh, [Replicate()]))
calls.clear()
y = norm(distribute_tensor(sequence, mesh, [Shard(1)]))
y.square().sum().backward()
whole = Norm()
with references(): whole(sequence).square().sum().backward()
found["sharded"] = torch.allclose(norm.weight.grad.full_tensor(), whole.weight.grad, atol=1e-5), calls[:]

# One rank of all differs; where it may, every rank warns.
with use_kernel_mapping({"Norm": {"cpu": OtherNorm}} if LAST else {}):
    found["differs"] = agreed()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found["may differ"] = agreed(on_difference="warn")
        found["warned"] = [str(each.message) for each in caught if each.category is KernelsWarning]
found["after"] = agreed()

# A kernel that fails on one rank: its calls are right, all others keep it, and all ranks leave it at the boundary.
def fail(fault):
    global failing
    found[f"{fault} before"] = agreed()
    if LAST: failing = fault
    mine = x[R].clone().requires_grad_()
    plain(mine).sum().backward()
    expected, right = mine.grad, []
    for _ in range(2):
        mine.grad = None
        model(mine).sum().backward()
        right.append(torch.allclose(mine.grad, expected, atol=1e-5))
    found[fault] = right, [entry.is_waiting for entry in quarantined()]
    failing = ""
    found[f"{fault} boundary"] = agreed()
    found[f"{fault} after"] = [entry.is_waiting for entry in quarantined()], str(quarantined()[0])
    calls.clear()
    model(mine)
    found[f"{fault} calls"] = [label for label, *_ in calls]
    release()
for fault in ("raises", "loses"):
    with use_kernel_mapping({"Norm": {"cpu": make_kernel(fault)}}): fail(fault)

# All ranks freeze into one file, and replay it.
path = "kernels.decisions.json"
receipt(model, device="cpu", mode=Mode.TRAINING).freeze(path)
dist.barrier()
os.environ["KERNELS_DECISIONS"] = path
forget()
found["replayed"] = agreed(), [row.note for row in receipt(model, device="cpu", mode=Mode.TRAINING).rows]
dist.barrier()
with open(f"rank{R}.json", "w") as file: json.dump(found, file)
dist.destroy_process_group()
"""


def alike(found: list[dict[str, Any]], name: str) -> Any:
    """Return what all ranks have found."""
    assert all(rank[name] == found[0][name] for rank in found), [rank[name] for rank in found]
    return found[0][name]


@pytest.fixture
def start(local_hub: LocalHub, kernel_repository: Publish, tmp_path: Path) -> Callable[..., Any]:
    """Publish a kernel, and start a job that asks for it."""
    kernel_repository("acme/kernels", kernel(3)).branch("v1")
    environment = local_hub.environment(tmp_path / "home")
    return lambda program, world, **options: torchrun(tmp_path, PRELUDE + program, world, **{**environment, **options})


@pytest.mark.parametrize("world", [2, 4, 8])
def test_a_job(world: int, start: Callable[..., Any], local_hub: LocalHub, tmp_path: Path) -> None:
    """All ranks have one commit for the requests of one, agree, name the rank that differs, and leave kernels together.

    Gradients are those of the undecorated model: under DDP, on the shards of a sequence, and of a kernel that fails.
    """
    local_hub.fail("/api/kernels/acme", status=429, headers={"Retry-After": "1"}, times=2)
    done = start(JOB, world, forked=world > 2)
    assert done.returncode == 0, done.stderr
    found = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(world)]
    last, others = found[-1], found[:-1]

    origins = alike(found, "origins")
    assert origins[0].startswith("acme/kernels@") and origins[1].endswith("FastNorm")
    refused, hosts, files = 2, world // 2, 3
    assert local_hub.count("acme/kernels/refs") == 1 + refused
    loaded = local_hub.count(lambda request: request.method == "GET" and "acme/kernels/resolve" in request.path)
    assert loaded == hosts * files

    for name in ("first", "after", "raises before", "raises boundary", "loses before", "loses boundary"):
        assert alike(found, name) == "", name
    assert alike(found, "gradients") is True
    assert alike(found, "sharded") == [True, [["first", "Tensor", [1, 2, 4]]]]
    text = alike(found, "differs")
    assert text.startswith(f"The {world} ranks of a process group would run different kernels")
    assert f"rank {world - 1}: " in text and "OtherNorm" in text and "(layer 'Norm')" in text and "Scale" not in text
    assert alike(found, "may differ") == "" and alike(found, "warned") == [text]
    # One that loses gradients leaves compiled calls at once: these are not checked.
    kinds: list[tuple[str, str, list[bool]]]
    kinds = [("raises", "a fault of this rank", [True]), ("loses", "loses gradients", [True, False])]
    for fault, reason, waiting in kinds:
        assert [rank[fault] for rank in others] == [[[True, True], []]] * (world - 1)
        assert last[fault] == [[True, True], waiting]
        for rank in found:
            after, entry = rank[f"{fault} after"]
            assert not any(after) and len(after) == len(waiting) and reason in entry
        assert f"on rank {world - 1}, it {fault[:-1]}" in found[0][f"{fault} after"][1]
        assert alike(found, f"{fault} calls") == ["first"]  # the next candidate
    error, notes = alike(found, "replayed")
    assert error == "" and all("decided in kernels.decisions.json" in note for note in notes)


ENDINGS = {
    "they differ": (
        """
        with use_kernel_mapping({"Norm": {"cpu": OtherNorm}} if LAST else {}):
            agree(model, device="cpu", mode=Mode.TRAINING)
        """,
        "kernels_core.DisagreementError: The 2 ranks of a process group would run different kernels",
    ),
    "one does not come": (
        """
        while LAST: time.sleep(1)
        agree(model, device="cpu", mode=Mode.TRAINING, timeout=0.5)
        """,
        "kernels_core.DisagreementError: Rank 0 could not compare its decisions with ranks 0-1",
    ),
    "one dies": (
        """
        if LAST: os._exit(7)
        agree(model, device="cpu", mode=Mode.TRAINING)
        """,
        "exitcode  : 7",
    ),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_how_a_job_ends(ending: str, start: Callable[..., Any]) -> None:
    """A job whose ranks cannot agree ends with an exit code and the reason: they differ, or one is gone."""
    program, text = ENDINGS[ending]
    done: subprocess.CompletedProcess[str] = start("dist.init_process_group('gloo')" + textwrap.dedent(program), 2)
    assert done.returncode == 1 and text in done.stdout + done.stderr, done.stderr
