"""Ranks of a process group decide alike, or each of them raises one error: `agree`, and `kernelize` with a group."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks
from torch import nn

from kernels_core import ArgumentError, ArgumentTypeError, DisagreementError, KernelsError, Mode, agree
from kernels_core.decisions.decision import Decision, alike, differences, digest_of

MODEL = """
from kernels_plugins import register_kernel_mapping, use_kernel_mapping
warnings.simplefilter("ignore")

@use_kernel_forward_from_hub("Norm")
class Norm(nn.Module):
    def forward(self, x): return x + 1
class Fast(nn.Module):
    def forward(self, x): return x + 2
class Other(nn.Module):
    def forward(self, x): return x + 3
class Fails(nn.Module):
    def forward(self, x):
        if R == 1 and failing: raise RuntimeError("a fault of this rank")
        return x + 4
@use_kernel_forward_from_hub("scale")
def scale(x): return x * 2
def fast_scale(x): return x * 3
def other_scale(x): return x * 4
class Block(nn.Module):
    def __init__(self): super().__init__(); self.norm = Norm()
    def forward(self, x): return scale(self.norm(x))
class Net(nn.Module):
    def __init__(self, blocks=3): super().__init__(); self.layers = nn.ModuleList(Block() for _ in range(blocks))
    def forward(self, x):
        for layer in self.layers: x = layer(x)
        return x
failing = False
CPU = {"device": "cpu", "mode": Mode.INFERENCE}
sent = []
for name in ("all_gather", "broadcast", "all_reduce", "all_gather_object", "barrier"):
    def counted(*args, _real=getattr(dist, name), _name=name, **kwargs):
        sent.append((_name, args[1].numel() if _name == "all_gather" else 0)); return _real(*args, **kwargs)
    setattr(dist, name, counted)
def error(call, *args, **kwargs):
    del sent[:]
    try: call(*args, **kwargs)
    except KernelsError as error: return type(error).__name__ + ": " + str(error)
    return ""
"""

TWO = """
join()
found = {}
register_kernel_mapping({"Norm": {"cpu": Fast}, "scale": {"cpu": fast_scale}})
model = Net()
class Wrapper(nn.Module):  # as DDP
    def __init__(self): super().__init__(); self.module = model
same = torch.compile(model, backend="eager") if R else Wrapper()
found["same"], found["sent"] = error(agree, same, **CPU), list(sent)
found["kernelized"] = error(agree, kernelize(Net(), **CPU) if R else Net(), **CPU)

mine = {"Norm": {"cpu": Other if R else Fast}}
with use_kernel_mapping(mine):
    found["layers"] = error(agree, model, **CPU)
    classes = [type(m) for m in model.modules()]
    found["kernelize"] = error(kernelize, model, **CPU, group=dist.group.WORLD)
    found["unchanged"] = [type(m) for m in model.modules()] == classes
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found["warned"] = bool(agree(model, **CPU, on_difference="warn").rows)
        found["warning"] = [str(w.message) for w in caught if w.category is KernelsWarning]
with use_kernel_mapping({"scale": {"cpu": other_scale if R else fast_scale}}):
    found["functions"] = error(agree, model, **CPU)
found["models"] = error(agree, Net(2) if R else model, **CPU)
found["modes"] = error(agree, model, device="cpu", mode=Mode.TRAINING if R else Mode.INFERENCE)
found["one fails"] = error(agree, model, device="cpu", mode="nonsense" if R else Mode.INFERENCE)
with use_kernel_mapping({} if R else mine, inherit_mapping=False):
    found["kernelize fails"] = error(kernelize, Net(), **CPU, use_fallback=False, group=dist.group.WORLD)
found["model"] = error(agree, 1 if R else model, **CPU)
found["device"] = error(agree, model, device="nonsense" if R else "cpu", mode=Mode.INFERENCE)
found["kernelize model"] = error(kernelize, 1 if R else model, **CPU, group=dist.group.WORLD)
@use_kernel_forward_from_hub("shift")
def shift(x): return x - 2
shift.__name__ = "scale"  # as that of another file
class Both(nn.Module):
    def forward(self, x): return shift(scale(x))
with use_kernel_mapping({"scale": {"cpu": other_scale if R else fast_scale}}):
    found["homonyms"] = error(agree, Both(), **CPU)
found["both fail"] = error(agree, model, device="cpu", mode="nonsense")

found["kernelize works"] = error(kernelize, model, **CPU, group=dist.group.WORLD)
found["frozen"] = type(model.layers[0].norm) is not Norm
found["after"] = error(agree, model, **CPU), list(sent)
report(**found)
"""


def alike_on_all(found: list[dict[str, Any]], name: str) -> str:
    """Return a value that all ranks have reported."""
    assert len({str(one[name]) for one in found}) == 1, [one[name] for one in found]
    return str(found[0][name])


def test_two_ranks(tmp_path: Path) -> None:
    """Equal decisions cost one collective of 32 bytes; differences are one error on both ranks, and change nothing."""
    found = run_ranks(tmp_path, MODEL + TWO)
    for name in ("same", "kernelized", "kernelize works"):
        assert alike_on_all(found, name) == ""
    assert found[0]["sent"] == found[1]["sent"] == [["all_gather", 32]]
    assert found[0]["after"] == found[1]["after"] == ["", [["all_gather", 32]]]
    assert all(one["frozen"] and one["unchanged"] and one["warned"] for one in found)

    text = alike_on_all(found, "layers")
    assert text.startswith("DisagreementError: The 2 ranks of a process group would run different kernels.")
    assert "  layers.0-2.norm (layer 'Norm'):\n    rank 0: __main__.Fast [" in text.replace("<string>", "__main__")
    assert "    rank 1: __main__.Other [" in text and "for inference on cpu" in text and "scale" not in text
    assert alike_on_all(found, "kernelize") == text
    assert alike_on_all(found, "warning")
    assert found[0]["warning"] == [text.removeprefix("DisagreementError: ")]

    functions = alike_on_all(found, "functions")
    assert "layers.0-2:scale (layer 'scale')" in functions and "fast_scale" in functions and "other_scale" in functions
    assert "layers.2.norm" in (models := alike_on_all(found, "models")) and "rank 1: they have no such layer" in models
    assert "for inference on cpu" in (modes := alike_on_all(found, "modes")) and "for training on cpu" in modes
    assert "fast_scale" in (homonyms := alike_on_all(found, "homonyms")) and "other_scale" in homonyms
    fails = {"one fails": "ArgumentError", "device": "ArgumentError", "kernelize fails": "KernelizeError"}
    for name, kind in {**fails, "model": "ArgumentTypeError", "kernelize model": "ArgumentTypeError"}.items():
        assert found[1][name].startswith(f"{kind}: ")
        assert (
            found[0][name].startswith("DisagreementError: Ranks cannot agree")
            and f"  rank 1: {kind}: " in found[0][name]
        )
    assert alike_on_all(found, "both fail").startswith("ArgumentError: 'nonsense' is not the mode")


QUARANTINE = """
join()
found = {}
register_kernel_mapping({"Norm": {"cpu": Fails}, "scale": {"cpu": fast_scale}})
model, x = Net(1), torch.zeros(1)
def numbers(): return [model(x).item(), [entry.is_waiting for entry in quarantined()]]
found["start"] = error(agree, model, **CPU), numbers()
failing = True
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    found["failing"] = numbers()
    found["warning"] = [str(w.message) for w in caught if w.category is KernelsWarning]
found["again"] = numbers()
failing = False
found["better"] = numbers()
found["boundary"] = error(agree, model, **CPU), list(sent)
failing = True
found["after"] = numbers(), [str(entry) for entry in quarantined()]
found["next"] = error(agree, model, **CPU), list(sent)

release()
found["released"] = error(agree, model, **CPU)
failing = False
if R == 0: quarantine("*fast_scale", reason="ours")
found["glob waits"] = numbers()
found["glob"] = error(agree, model, **CPU), numbers(), [str(entry) for entry in quarantined()]

release()
if R == 0: quarantine(decorated_layer(Norm), Fails.forward, reason="now", now=True, dtype=torch.float32)
found["now"] = numbers()
found["now on all"] = error(agree, model, **CPU), numbers()

release()
agree(model, **CPU)
frozen = kernelize(Net(1), **CPU, group=dist.group.WORLD)
quarantine(decorated_layer(Norm), Fails.forward, reason="on all ranks")
found["same on all"] = frozen(x).item(), error(agree, frozen, **CPU), frozen(x).item(), list(sent)
release()
dist.destroy_process_group()
quarantine(decorated_layer(Norm), Fails.forward, reason="alone")
found["alone"] = numbers()
report(**found)
"""


def test_quarantine_waits_for_a_boundary(tmp_path: Path) -> None:
    """A kernel that fails on one rank is answered by the reference there, call by call; `agree` takes it out on all."""
    zero, one = run_ranks(tmp_path, MODEL + QUARANTINE)
    assert zero["start"] == one["start"] == ["", [12.0, []]]
    assert zero["failing"] == zero["again"] == [12.0, []]  # the kernel, on a rank where it does not fail
    assert one["failing"] == one["again"] == [3.0, [True]]  # the reference, call by call
    assert one["better"] == [12.0, [True]]  # the kernel serves where it can
    assert not zero["warning"]
    (warning,) = one["warning"]
    assert "On this rank, " in warning and "a fault of this rank" in warning and "agree(...)" in warning
    for rank in (zero, one):
        text, sent = rank["boundary"]
        assert text == "" and [name for name, _ in sent].count("all_gather") == 2
        (served, waiting), entries = rank["after"]
        assert (served, waiting) == (3.0, [False]) and len(entries) == 1 and "a fault of this rank" in entries[0]
        assert rank["next"] == ["", [["all_gather", 32]]]
        assert rank["released"] == ""
        assert rank["glob"][:2] == ["", [8.0, [False]]]
        assert rank["now on all"][0] == "" and rank["now on all"][1] == [3.0, [False]]
        kernel, text, reference, sent = rank["same on all"]
        assert (kernel, text, reference) == (12.0, "", 3.0) and sent == [["all_gather", 32]] * 2
        assert rank["alone"] == [3.0, [False]]
    assert "on rank 1, it raised" in zero["after"][1][0]
    assert zero["glob waits"] == [12.0, [True]] and one["glob waits"] == [12.0, []]
    assert zero["now"] == [3.0, [False]] and one["now"] == [12.0, []]


GRADIENTS = """
from kernels_plugins import opaque, reference_backward
join()
found = {}
CPU["mode"] = Mode.TRAINING
calls = []
def make(in_place=False):
    class Loses(nn.Module):
        can_torch_compile = True
        def forward(self, x):
            torch.compiler.is_compiling() or calls.append(0)
            if in_place and failing: x.mul_(1)
            return (x.detach() if R == 1 and failing else x) + 1
    return Loses
class Unlike(nn.Module):  # an operator and a backward of the reference need outputs like those of the reference
    def forward(self, x): return (x + 1).double() if R == 1 else x + 1
def trained(call):
    start = torch.ones(2, requires_grad=True)
    x = start * 1
    if (y := call(x)).requires_grad: y.sum().backward()
    return None if start.grad is None else start.grad.tolist()
def waiting(): return [entry.is_waiting for entry in quarantined()]
def under(source, prepare=lambda model: model):
    '''Agree, train three times, and agree again; return what was found on the way.'''
    global failing
    release()
    with use_kernel_mapping({"Norm": {"cpu": source}}, inherit_mapping=False):
        failing = False
        model = Net(1)
        agreed = error(agree, model, **CPU)
        call = prepare(model)
        failing = True
        del calls[:]
        results = [trained(call) for _ in range(3)]
        ran, wait = len(calls), waiting()
        compiled = trained(torch.compile(model, backend="eager")) if source is lossy else None
        boundary = error(agree, model, **CPU)
        return agreed, results, ran, wait, compiled, boundary, waiting(), receipt(model, **CPU).rows[0].origin
lossy = make()
found["lossy"] = under(lossy)
found["kernelized"] = under(make(), lambda model: kernelize(model, **CPU))
found["in place"] = under(make(in_place=True))
found["backward"] = under(reference_backward(Unlike))
@use_kernel_forward_from_hub("Must", use_fallback=False)
class Must(nn.Module):
    def forward(self, x): return x + 1
class Next(nn.Module):
    def forward(self, x): return 1 + x
release()
failing, must = False, nn.Sequential(Must())
with use_kernel_mapping({"Must": {"cpu": [make(), Next]}}):
    agree(must, **CPU)
    failing = True
    found["must"] = trained(must), waiting(), receipt(must, **CPU).rows[0].origin
CPU["mode"] |= Mode.TORCH_COMPILE
found["operator"] = under(opaque(Unlike), lambda model: torch.compile(model, backend="eager"))
CPU["mode"] = Mode.TRAINING
release()
failing, model = False, Net(1)
with use_kernel_mapping({"Norm": {"cpu": lossy}}, inherit_mapping=False):
    agree(model, **CPU)
    failing = True
    before = trained(model), waiting()
    dist.barrier()
    dist.destroy_process_group()
    found["ended"] = *before, waiting(), trained(model), waiting(), receipt(model, **CPU).rows[0].origin
report(**found)
"""


def test_gradients_that_one_rank_loses(tmp_path: Path) -> None:
    """Each such call is answered by the reference, and the ranks leave the kernel together; compiled calls, at once.

    So for a kernel that cannot have the backward of the reference. One that changed its arguments is left at once.
    """
    zero, one = run_ranks(tmp_path, MODEL + GRADIENTS)
    right, waits = [[2.0, 2.0]] * 3, {"lossy": [True, False], "kernelized": [True, False], "in place": [False]}
    # Where the reference must not serve, the next candidate does, at once.
    (gradients, *no_entry, first), (on_one, *at_once, following) = zero.pop("must"), one.pop("must")
    assert gradients == on_one == [1.0, 1.0] and (no_entry, at_once) == ([[]], [[False]])
    assert first.endswith(".Loses") and following.endswith(".Next")
    # Without a group, nothing is waited for.
    zero.pop("ended")
    before, waiting, *after = one.pop("ended")
    assert (before, waiting) == (right[0], [True, False])
    assert after == [[False, False], right[0], [False, False], "reference"]
    assert zero.keys() == one.keys()
    for name in zero:
        for rank in (zero, one):
            agreed, results, ran, waiting, compiled, boundary, applied, origin = rank[name]
            lost_at_once = rank is one and name == "in place"
            assert results == ([None, *right[1:]] if lost_at_once else right), name
            assert agreed == boundary == "" and not any(applied) and origin == "reference"
            assert compiled == (right[0] if name == "lossy" else None)
            assert waiting == (waits.get(name, [True]) if rank is one else [])
            assert name not in waits or ran == (1 if rank is one else 3)  # it is tried once, not in each call


MANY = """
import time
from kernels_core.decisions import decision
join()
found = {}
register_kernel_mapping({"Norm": {"cpu": Fast}, "scale": {"cpu": fast_scale}})
model = Net()
found["same"] = error(agree, model, **CPU), list(sent)
with use_kernel_mapping({"Norm": {"cpu": Other}} if R == 5 else {}):
    found["one differs"] = error(agree, model, **CPU)

# Builds of one commit, for GPUs of two kinds: half of the ranks have each of them.
class Acme:
    @hookimpl
    def kernels_load_layer(self, request, source):
        commit, variant = source if isinstance(source, tuple) else ("", "")
        about = {"repository": "acme/norm", "commit": commit}
        if commit: return LoadedLayer(Fast, f"acme/norm@{commit} ({variant})", content=variant, provenance=about)
    @hookimpl
    def kernels_find_candidates(self, request):
        source = "c0ffee" if R < commits else "beef", f"sm{where[1]}{built}"
        return [Candidate(source, tier="scope")] if request.layer_name == "Norm" else []
plugin_manager().register(Acme(), "acme")
decision.hardware = lambda device: where
where, built, commits = ("cuda", 90 if R % 2 else 80), "", W
forget(); found["mixed"] = error(agree, model, **CPU), list(sent)
built = "-old" if R == 3 else ""
forget(); found["another build"] = error(agree, model, **CPU)
built, commits = "", 4
forget(); found["another commit"] = error(agree, model, **CPU)

# A group of some ranks: the others have no part in it.
plugin_manager().unregister("acme"); where = "cpu", None; forget()
some = dist.new_group([2, 3, 6])
with use_kernel_mapping({"Norm": {"cpu": Other}} if R == 6 else {}):
    found["some"] = error(agree, model, **CPU, group=some)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
found["small mesh"] = error(agree, model, **CPU, group=DeviceMesh("cpu", [2, 3, 6]))
mesh = init_device_mesh("cpu", (W // 2, 2), mesh_dim_names=("dp", "tp"))
with use_kernel_mapping({"Norm": {"cpu": Other}} if R >= 6 else {}):
    found["mesh"] = error(agree, model, **CPU, group=mesh["tp"])
    found["both"] = error(agree, model, **CPU, group=mesh)

# A rank that comes too late: it is in the barrier until the others have given up. And one that dies.
late = dist.new_group(list(range(W)), timeout=timedelta(seconds=300))
if R != 7: found["late"] = error(agree, model, **CPU, group=late, timeout=0.3)
dist.barrier()
dead = dist.new_group(list(range(W)))
open(f"connected{R}", "w").close()
while R == 7 and not all(os.path.exists(f"connected{rank}") for rank in range(W)):
    time.sleep(0.01)  # or others would find it gone while they connect
if R != 7: found["dead"] = error(agree, model, **CPU, group=dead)
report(**found)
os._exit(0)
"""


def test_eight_ranks(tmp_path: Path) -> None:
    """The rank that differs is named; GPUs of two kinds may have two builds of a commit; groups; late, dead ranks."""
    found = run_ranks(tmp_path, MODEL + MANY, world=8)
    assert alike_on_all(found, "same") == "['', [['all_gather', 32]]]"
    text = alike_on_all(found, "one differs")
    assert "    ranks 0-4,6-7: " in text and "    rank 5: " in text
    assert alike_on_all(found, "mixed") == "['', [['all_gather', 32]]]"
    text = alike_on_all(found, "another build")
    assert "ranks 1,5,7: acme/norm@c0ffee (sm90) [sm90] for inference on cuda 9.0" in text
    assert "rank 3: acme/norm@c0ffee (sm90-old) [sm90-old]" in text and "offered by plugin 'acme'" in text
    assert "ranks 1,3: acme/norm@c0ffee" in (text := alike_on_all(found, "another commit"))
    assert "ranks 5,7: acme/norm@beef" in text

    inside, outside = [found[rank] for rank in (2, 3, 6)], [found[rank] for rank in (0, 1, 4, 5, 7)]
    assert "    ranks 2-3: " in (text := alike_on_all(inside, "some")) and "    rank 6: " in text
    for rank in outside:
        for name in ("some", "small mesh"):
            assert rank[name].startswith("ArgumentError: Rank ") and "is not in this process group" in rank[name]
    assert alike_on_all(inside, "small mesh") == ""
    assert alike_on_all(found, "mesh") == ""
    assert "mesh of 2 dimensions" in alike_on_all(found, "both")
    for rank in found[:7]:
        for name in ("late", "dead"):
            assert rank[name].startswith("DisagreementError: Rank ") and "did not" not in rank[name]
            assert "ranks 0-7" in rank[name] and "start the ranks again" in rank[name]


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({}, ArgumentError, "call torch.distributed.init_process_group"),
        ({"timeout": 0}, ArgumentError, "positive number of seconds"),
        ({"timeout": float("nan")}, ArgumentError, "positive number of seconds"),
        ({"timeout": "1"}, ArgumentTypeError, "timeout is a number of seconds"),
    ],
)
def test_bad_input(options: dict[str, Any], kind: type[KernelsError], text: str) -> None:
    """Without a group, and with odd arguments, this is an error of ours that names the remedy."""
    with pytest.raises(kind, match=text):
        agree(**{"model": nn.ReLU(), "device": "cpu", "mode": Mode.INFERENCE, **options})


def test_one_process_that_is_a_group(tmp_path: Path) -> None:
    """A group of one rank agrees without a collective; a destroyed group and other objects are errors."""
    (found,) = run_ranks(
        tmp_path,
        MODEL
        + """
join()
found = {"same": error(agree, Net(), **CPU), "sent": list(sent), "text": error(agree, Net(), **CPU, group="all")}
found["rule"] = error(agree, Net(), **CPU, on_difference="ignore")
group = dist.new_group([0])
dist.destroy_process_group(group)
found["destroyed"] = error(agree, Net(), **CPU, group=group)
report(**found)
""",
        world=1,
    )
    assert found["same"] == "" and not found["sent"]
    assert found["text"] == "ArgumentTypeError: group is a process group, a device mesh or None, not 'all'."
    assert found["rule"].startswith("ArgumentError: on_difference is 'raise' or 'warn'")
    assert found["destroyed"].startswith("ArgumentError: The process group was destroyed")


def decision(served: str, hardware: str = "cuda 9.0", path: str = "norm") -> Decision:
    """Make the decision for a kernel `commit/build`."""
    return Decision(path, "Norm", "inference", hardware, served, served.partition("/")[0])


@pytest.mark.parametrize(
    ("ranks", "same"),
    [
        ([decision("a/1"), decision("a/1")], True),
        ([decision("a/1"), decision("b/1")], False),
        ([decision("a/1"), decision("a/2")], False),
        ([decision("a/1"), decision("a/2", "cuda 8.0")], True),
        ([decision("a/1"), decision("a/2", "cuda 8.0"), decision("a/3", "cuda 8.0")], False),
        ([decision("a/1"), decision("b/1", "cuda 8.0")], False),
        ([decision("a/1"), decision("a/1", path="other")], False),
    ],
)
def test_digests_and_details_decide_alike(ranks: list[Decision], same: bool) -> None:
    """The digests of ranks are alike if and only if the details show no difference, in any order of the ranks."""
    for order in itertools.permutations(ranks):
        assert alike(digest_of([each]) for each in order) is same
        assert (not list(differences((number, [each]) for number, each in enumerate(order)))) is same


def test_an_error_that_travels() -> None:
    """The error can be pickled, as executors do, and is a kind of `KernelsError`."""
    import pickle

    error = pickle.loads(pickle.dumps(DisagreementError("they differ", layers=["norm"])))
    assert (
        isinstance(error, DisagreementError)
        and isinstance(error, KernelsError)
        and error.layers == ("norm",)
        and str(error) == "they differ"
    )


PARALLEL = """
join()
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel
from torch.distributed.tensor.parallel import parallelize_module
from torch.distributed.tensor import Shard
found = {}
register_kernel_mapping({"Norm": {"cpu": Fast}, "scale": {"cpu": fast_scale}})
mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
class Weighted(Block):
    def __init__(self): super().__init__(); self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)
    def forward(self, x): return self.down(self.up(super().forward(x)))
def make(): return nn.Sequential(Weighted(), Weighted())
def sharded():
    model = make()
    for block in model: fully_shard(block, mesh=mesh["dp"])
    return model
def tensor_parallel():
    model = make()
    up, down = ColwiseParallel(input_layouts=Shard(1)), RowwiseParallel(output_layouts=Shard(1))
    for block in model: parallelize_module(block, mesh["tp"], {"norm": SequenceParallel(), "up": up, "down": down})
    return model
def checkpointed():
    return nn.Sequential(*map(checkpoint_wrapper, make()))
for make_one in (make, lambda: nn.parallel.DistributedDataParallel(make()), sharded, tensor_parallel, checkpointed):
    model = make_one()
    model(torch.randn(2, 4, 4))
    with use_kernel_mapping({"Norm": {"cpu": Other}} if R == 3 else {}):
        texts = [error(agree, model, **CPU, group=group) for group in (mesh["dp"], None)]
    found.setdefault("parallel", []).append(texts)
# Each rank has another kind of model around the same layers.
found["mixed"] = error(agree, (make, sharded, tensor_parallel, checkpointed)[0 if R < 2 else 3](), **CPU)
report(**found)
"""


def test_four_ranks_of_parallel_models(tmp_path: Path) -> None:
    """Models of DDP, FSDP2, tensor parallelism and checkpoint wrappers agree, and name layers as the bare one does."""
    found = run_ranks(tmp_path, MODEL + PARALLEL, world=4)
    assert alike_on_all(found, "mixed") == ""
    for rank, ended in enumerate(found):
        for group, job in ended["parallel"]:
            assert ("rank 3" in group and "rank 1" in group) if rank in (1, 3) else group == ""
            assert "  0-1.norm (layer 'Norm'):\n    ranks 0-2: " in job and "    rank 3: " in job
            assert job == found[0]["parallel"][0][1]
