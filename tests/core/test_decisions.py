"""Decision files: decisions are frozen, replayed whatever is offered since, and refused where they do not hold."""

from __future__ import annotations

import importlib
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kernels_core import (
    ArgumentError,
    Candidate,
    DecisionError,
    DecisionFile,
    FrozenKernel,
    FrozenLayer,
    FrozenModel,
    KernelsWarning,
    Mode,
    PluginManager,
    Reference,
    hookimpl,
    kernelize,
    quarantine,
    receipt,
    release,
    resolve,
    use_kernel_forward_from_hub,
    use_kernelized_func,
)
from kernels_core.decisions import replay
from kernels_core.decisions.content import content_of
from kernels_core.testing import HookRecorder
from kernels_plugins import use_kernel_mapping
from kernels_plugins.mapping import register_kernel_mapping

X = torch.zeros(1)
EVAL = {"device": "cpu", "mode": Mode.INFERENCE}


@use_kernel_forward_from_hub("Add")
class Add(nn.Module):
    """Adds one; its kernels add more."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1


@use_kernel_forward_from_hub("add")
def add(x: torch.Tensor) -> torch.Tensor:
    """Adds one."""
    return x + 1


@use_kernelized_func(add)
class Block(nn.Module):
    """A layer and a function."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Add(), Add()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return add(self.layers[1](self.layers[0](x)))


def adding(number: int, **declared: Any) -> type[nn.Module]:
    """Make a kernel that adds a number."""

    def forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return x + number

    members = {"__module__": "kernels", "__qualname__": f"Add{number}", "forward": forward, **declared}
    return type(f"Add{number}", (nn.Module,), members)


Add2, Add3 = adding(2), adding(3)


def add_two(x: torch.Tensor) -> torch.Tensor:
    """The kernel of the function."""
    return x + 2


@pytest.fixture(autouse=True)
def _mapping(mapping_plugin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(replay.VARIABLE, raising=False)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Where the file lies."""
    return tmp_path / "kernels.decisions.json"


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Replay a file from now on, as a job that starts again does."""

    def use(path: Path) -> None:
        monkeypatch.setenv(replay.VARIABLE, str(path))
        register_kernel_mapping({})  # decides anew

    return use


def run(model: Any) -> float:
    """Call a model without gradients."""
    with torch.no_grad():
        return float(model(X).item())


class Counted:
    """A source that counts how often it is loaded."""

    def __init__(self, kernel: Any, name: str) -> None:
        self.kernel, self.name, self.loads = kernel, name, 0

    def load(self) -> Any:
        self.loads += 1
        return self.kernel

    def __repr__(self) -> str:
        return f"Counted({self.name!r})"


# --- Freezing and replaying -------------------------------------------------------------------------


def test_what_was_frozen_serves_and_others_are_not_asked(
    isolated_plugins: PluginManager, place: Path, use: Callable[[Path], None]
) -> None:
    """A kernel of higher rank that is offered later is neither loaded nor authorized: the frozen one serves."""
    asked: list[str] = []

    class Policy:
        @hookimpl
        def kernels_authorize(self, candidate: Candidate) -> None:
            asked.append(candidate.label)

    register_kernel_mapping({"Add": {"cpu": Add2}, "add": {"cpu": add_two}})
    assert receipt(Block(), **EVAL).freeze(place) == place
    assert run(Block()) == 6
    newer = Counted(Add3, "newer")
    isolated_plugins.register(Policy(), "policy")
    register_kernel_mapping({"Add": {"cpu": [newer, Add2]}, "add": {"cpu": [newer, add_two]}})
    assert "newer" in str(resolve(Add, **EVAL).candidate)
    loads, asked[:] = newer.loads, []
    use(place)
    assert run(Block()) == 6
    assert newer.loads == loads
    assert not [label for label in asked if "newer" in label]
    rows = receipt(Block(), **EVAL).rows
    assert [row.path for row in rows] == [":add", "layers.0", "layers.1"]
    assert {row.note for row in rows} == {f"decided in {place}"}


def test_the_reference_is_a_decision(place: Path, use: Callable[[Path], None]) -> None:
    """A layer that the reference served stays with it, where a kernel is offered since, and the receipt says why."""
    receipt(Add(), **EVAL).freeze(place)
    register_kernel_mapping({"Add": {"cpu": Add2}})
    assert run(Add()) == 2
    use(place)
    assert run(Add()) == 1
    (row,) = receipt(Add(), **EVAL).rows
    assert (row.origin, row.note) == ("reference", f"decided in {place}")


def test_named_reference(place: Path, use: Callable[[Path], None]) -> None:
    """A reference that the mapping names is frozen with that reason."""
    register_kernel_mapping({"Add": {"cpu": [Reference, Add2]}})
    receipt(Add(), **EVAL).freeze(place)
    assert DecisionFile.from_file(place).models[0].decided[0].note == "the mapping names it"
    use(place)
    assert run(Add()) == 1


def test_kernels_that_pass_calls_on_are_frozen_with_the_next(place: Path, use: Callable[[Path], None]) -> None:
    """For a kernel that declares dtypes, that of the other calls is frozen, too; one between them is not asked."""
    half = adding(2, dtypes=(torch.float16,))
    register_kernel_mapping({"Add": {"cpu": [half, Add3]}})
    receipt(Add(), **EVAL).freeze(place)
    between = Counted(adding(4), "between")
    register_kernel_mapping({"Add": {"cpu": [between, half, between, Add3]}})
    use(place)
    with torch.no_grad():
        assert (Add()(X.half()).item(), Add()(X).item(), between.loads) == (2, 3, 0)


def test_undeclared_calls_are_served_by_the_reference_with_a_warning(place: Path, use: Callable[[Path], None]) -> None:
    """The reference serves calls that a kernel passes on undeclared; one warning names the kernel that is not asked."""

    def forward(self: nn.Module, x: torch.Tensor) -> Any:
        return NotImplemented

    picky = type("Picky", (nn.Module,), {"__module__": "kernels", "forward": forward})
    register_kernel_mapping({"Add": {"cpu": [picky, Add3]}})
    receipt(Add(), **EVAL).freeze(place)
    use(place)
    with pytest.warns(KernelsWarning, match="passes on a call of layer 'Add'.*and not kernels.Add3"):
        assert run(Add()) == 1


def test_modes_are_decided_apart(place: Path, use: Callable[[Path], None]) -> None:
    """A file that is for inference and training has a kernel for each; freezing for a mode keeps the other one."""
    register_kernel_mapping({"Add": {"cpu": {Mode.INFERENCE: Add2, Mode.TRAINING: Add3}}})
    receipt(Add(), **EVAL).freeze(place)
    receipt(Add(), device="cpu", mode=Mode.TRAINING).freeze(place)
    assert [model.mode for model in DecisionFile.from_file(place).models] == ["inference", "training"]
    register_kernel_mapping({"Add": {"cpu": [adding(4), Add2, Add3]}})
    use(place)
    assert run(Add()) == 2
    assert Add()(X.clone().requires_grad_()).item() == 3


def test_one_kernel_for_all_modes(place: Path, use: Callable[[Path], None]) -> None:
    """A kernel that serves inference because it serves training is replayed from a file that is for inference only."""
    register_kernel_mapping({"Add": {"cpu": Add2}}, same_for_all_modes=True)
    receipt(Add(), **EVAL).freeze(place)
    use(place)
    assert run(Add()) == 2


def test_compiled_calls(place: Path, use: Callable[[Path], None]) -> None:
    """Traced calls are decided by the section for them."""
    traced = adding(2, can_torch_compile=True)
    register_kernel_mapping({"Add": {"cpu": traced}})
    receipt(Add(), device="cpu", mode=Mode.INFERENCE | Mode.TORCH_COMPILE).freeze(place)
    register_kernel_mapping({"Add": {"cpu": [adding(3, can_torch_compile=True), traced]}})
    use(place)
    torch._dynamo.reset()
    assert run(torch.compile(Add(), backend="eager", fullgraph=True)) == 2
    with pytest.raises(DecisionError, match=r"none for mode 'inference', and some for inference \+ compile"):
        run(Add())


def test_kernelized_models(place: Path, use: Callable[[Path], None]) -> None:
    """Kernelized models are frozen as they are; under a file, kernelize takes its kernels, and raises drift."""
    with use_kernel_mapping({"Add": {"cpu": Add2}}):
        model = kernelize(Block(), **EVAL)
    receipt(model, device="cpu").freeze(place)
    register_kernel_mapping({"Add": {"cpu": [Add3, Add2]}})
    use(place)
    assert run(kernelize(Block(), **EVAL)) == 5
    register_kernel_mapping({"Add": {"cpu": Add3}})
    fresh = Block()
    with pytest.raises(DecisionError, match=r"Expected: kernels.Add2.*Found: it is not offered here: kernels.Add3"):
        kernelize(fresh, **EVAL)
    assert type(fresh.layers[0]) is Add


def test_two_kernels_for_one_layer_cannot_be_frozen(place: Path) -> None:
    """A model that was kernelized in parts has two kernels for one layer: an error says so, and nothing is written."""
    model = Block()
    for number, kernel in enumerate((Add2, Add3)):
        with use_kernel_mapping({"Add": {"cpu": kernel}}):
            kernelize(model.layers[number], **EVAL)
    with pytest.raises(DecisionError, match=r"kernels.Add2 and kernels.Add3 at different paths"):
        receipt(model, device="cpu").freeze(place)
    assert not place.exists()


def test_scopes_are_under_the_file(place: Path, use: Callable[[Path], None]) -> None:
    """A scope that offers another kernel besides is not asked; one that leaves the frozen kernel out is drift."""
    register_kernel_mapping({"Add": {"cpu": Add2}})
    receipt(Add(), **EVAL).freeze(place)
    use(place)
    with use_kernel_mapping({"Add": {"cpu": Add3}}):
        assert run(Add()) == 2
    with use_kernel_mapping({"Add": {"cpu": Add3}}, inherit_mapping=False), pytest.raises(DecisionError):
        run(Add())


def test_the_setting(configure: Callable[..., Path], place: Path) -> None:
    """`decisions` of a configuration file names a file beside it; KERNELS_DECISIONS, also an empty one, wins."""
    register_kernel_mapping({"Add": {"cpu": Add2}})
    receipt(Add(), **EVAL).freeze(place)
    register_kernel_mapping({"Add": {"cpu": Add3}})
    configure(f'decisions = "{place.name}"')
    with pytest.raises(DecisionError, match=r"Add2"):
        run(Add())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(replay.VARIABLE, "")
        register_kernel_mapping({})
        assert run(Add()) == 3


def test_a_relative_path_survives_a_change_of_folder(
    place: Path, use: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is that of the working directory in which it was first needed."""
    register_kernel_mapping({"Add": {"cpu": Add2}})
    receipt(Add(), **EVAL).freeze(place)
    monkeypatch.chdir(place.parent)
    use(Path(place.name))
    assert run(Add()) == 2
    (place.parent / "other").mkdir()
    monkeypatch.chdir(place.parent / "other")
    register_kernel_mapping({})
    assert run(Add()) == 2
    replay._absolute.cache_clear()


# --- Drift ------------------------------------------------------------------------------------------


@pytest.fixture
def frozen(place: Path, use: Callable[[Path], None]) -> Path:
    """A file in use, with a kernel for the layer."""
    register_kernel_mapping({"Add": {"cpu": Add2}})
    receipt(Add(), **EVAL).freeze(place)
    use(place)
    return place


def drift() -> DecisionError:
    """Return the error of a call, which a second call and `serving_forward` raise, too."""
    for _ in range(2):
        with pytest.raises(DecisionError) as caught:
            run(Add())
    assert caught.value.layer == "Add"
    (row,) = receipt(Add(), **EVAL).rows
    assert row.is_reference and caught.value.found in row.refusals[-1][1]
    return caught.value


def changed(place: Path, **kernel: Any) -> None:
    """Change the kernel in the file."""
    value = json.loads(place.read_text())
    value["models"][0]["decided"][0]["kernels"][0].update(kernel)
    place.write_text(json.dumps(value))
    register_kernel_mapping({})


def test_a_kernel_that_is_not_offered_any_more(frozen: Path) -> None:
    """A call raises, and names layer, expected and found; the receipt shows it, and nothing else serves."""
    register_kernel_mapping({"Add": {"cpu": Add3}})
    error = drift()
    assert error.expected.startswith("kernels.Add2")
    assert error.found == "it is not offered here: kernels.Add3 is"


def test_a_kernel_that_cannot_be_loaded(place: Path, use: Callable[[Path], None]) -> None:
    """The decision has the reason of the loader."""
    source = Counted(Add2, "kernel")
    register_kernel_mapping({"Add": {"cpu": source}})
    receipt(Add(), **EVAL).freeze(place)
    source = Counted(3, "kernel")
    register_kernel_mapping({"Add": {"cpu": source}})
    use(place)
    assert "Counted('kernel'): " in drift().found


def test_a_kernel_that_is_denied(frozen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A policy that refuses the frozen kernel makes no other one serve."""
    monkeypatch.setenv("KERNELS_DENY", "kernels.Add2")
    register_kernel_mapping({})
    assert "KERNELS_DENY" in drift().found


def test_a_kernel_that_is_denied_leaves_its_calls_to_no_other(
    place: Path, use: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next kernel of the file is for the calls that the first one passes on: it does not serve in its place."""
    half = adding(2, dtypes=(torch.float16,))
    register_kernel_mapping({"Add": {"cpu": [half, Add3]}})
    receipt(Add(), **EVAL).freeze(place)
    monkeypatch.setenv("KERNELS_DENY", "kernels.Add2")
    use(place)
    error = drift()
    assert error.expected.startswith("kernels.Add2 [") and ", then kernels.Add3 [" in error.expected
    assert error.found.startswith("kernels.Add3 [") and "for kernels.Add2: " in error.found
    monkeypatch.setenv("KERNELS_DENY", "kernels.Add3")
    use(place)
    with torch.no_grad():
        assert Add()(X.half()).item() == 2
    with pytest.raises(DecisionError, match="KERNELS_DENY"):
        run(Add())


def test_other_content(frozen: Path) -> None:
    """A kernel of the same name with another hash is drift."""
    changed(frozen, content="0" * 64, origin="kernels.Add2 of yesterday")
    error = drift()
    assert error.expected == f"kernels.Add2 of yesterday [{'0' * 12}]"
    assert error.found.startswith("kernels.Add2")


def test_a_layer_that_is_not_in_the_file(frozen: Path) -> None:
    """A kernel for a layer of another model is an error that names both; where none is offered, the layer runs."""

    @use_kernel_forward_from_hub("Other")
    class Other(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1

    assert run(Other()) == 1
    register_kernel_mapping({"Other": {"cpu": Add2}})
    with pytest.raises(DecisionError, match=r"no decision for layer 'Other' on cpu.*and some for .*test_decisions.Add"):
        run(Other())


TABLE = {"add": add}


class Table(nn.Module):
    """Finds a function in a table."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return TABLE["add"](x)


class Hidden(nn.Module):
    """Finds a function by a text."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return getattr(sys.modules[__name__], "a" + "dd"[:2])(x)


def test_functions_in_tables(place: Path, use: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """A function in a table of a module is frozen; of one that no name leads to, warning and error say what to do."""
    register_kernel_mapping({"add": {"cpu": add_two}})
    receipt(Table(), **EVAL).freeze(place)
    use(place)
    assert run(Table()) == 2
    monkeypatch.delenv(replay.VARIABLE)
    with pytest.warns(KernelsWarning, match=r"No decision is frozen for .*Hidden: .*use_kernelized_func"):
        receipt(Hidden(), **EVAL).freeze(place.with_name("hidden"))
    use(place.with_name("hidden"))
    with pytest.raises(DecisionError, match=r"has no decision for layer 'add'.*does not list the function.*_func"):
        run(Hidden())
    monkeypatch.delenv(replay.VARIABLE)
    declared = use_kernelized_func(add)(type("Declared", (Hidden,), {}))()
    receipt(declared, **EVAL).freeze(place.with_name("declared"))
    use(place.with_name("declared"))
    assert run(declared) == 2


def test_quarantine_is_no_drift(frozen: Path) -> None:
    """A kernel that proves wrong in this process makes way for the reference, with a warning, as without a file."""
    resolution = resolve(Add, **EVAL)
    assert resolution.request.layer is not None
    entry = quarantine(resolution.request.layer, resolution.implementation, reason="it is wrong")
    try:
        with pytest.warns(KernelsWarning, match="it is wrong"):
            assert run(Add()) == 1
    finally:
        release([entry])


def test_switched_off(frozen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DISABLE_KERNEL_MAPPING wins over the file; decisions that were made so cannot be frozen."""
    monkeypatch.setenv("DISABLE_KERNEL_MAPPING", "1")
    register_kernel_mapping({})
    assert run(Add()) == 1
    with pytest.raises(DecisionError, match="DISABLE_KERNEL_MAPPING is on"):
        receipt(Add(), **EVAL).freeze(frozen)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (None, "No such file or directory"),
        ("{", "Expecting property name"),
        ("[]", "its format is None"),
        ('{"decisions": 2, "models": []}', "its format is 2, and this version of kernels-core reads 1"),
        ('{"decisions": 1, "models": [{}]}', "it is malformed: KeyError: 'decided'"),
        ('{"decisions": 1, "models": [{"decided": [], "color": 1}]}', "it is malformed: TypeError"),
        ('{"decisions": 1, "models": 3}', "it is malformed: TypeError"),
        ('{"format": 1, "machines": []}', "its format is None"),  # of a choice
    ],
)
def test_files_of_another_kind(frozen: Path, text: str | None, problem: str) -> None:
    """A missing, broken or foreign file is an error with a remedy at each call; freezing into it changes nothing."""
    frozen.unlink() if text is None else frozen.write_text(text)
    register_kernel_mapping({})
    assert problem in str(drift()) and "kernels-core freeze" in str(drift())
    if text is not None:
        with replay.replaying_nothing():
            found = receipt(Add(), **EVAL)
        with pytest.raises(ArgumentError, match="is no decision file"):
            found.freeze(frozen)
        assert frozen.read_text() == text


def test_a_file_of_another_machine(frozen: Path) -> None:
    """A file for another class of hardware, or without a mode, is an error that names both, and how to freeze these."""
    compiled = receipt(Add(), device="cpu", mode=Mode.INFERENCE | Mode.TORCH_COMPILE)
    assert "freeze MODULE:FACTORY --device cpu --compile --output FILE" in str(compiled.rows[0].refusals)
    value = json.loads(frozen.read_text())
    value["models"][0].update(device="cuda", capability=90)
    frozen.write_text(json.dumps(value))
    register_kernel_mapping({})
    assert "it has none for cpu, and some for cuda 9.0" in str(drift())


def test_a_pipe_is_no_file(tmp_path: Path) -> None:
    """A path that would be read for ever is refused."""
    with pytest.raises(ArgumentError, match="no regular file"):
        DecisionFile.from_file(tmp_path)


# --- Files ------------------------------------------------------------------------------------------


def one(model: str = "m", device: str = "cpu", capability: int | None = None, **layer: Any) -> DecisionFile:
    """Make a file with one layer."""
    kernels = (FrozenKernel("k", "k", "c" * 64),)
    found = FrozenLayer(**{"layer": "Add", "defined": "shop.Add", "paths": ("0",), "kernels": kernels, **layer})
    return DecisionFile((FrozenModel(model, device, capability, "inference", (found,)),))


def test_files_are_merged(place: Path) -> None:
    """Other models and hardware are kept, equal ones replaced; equal decisions give equal bytes."""
    one().save(place)
    before = place.read_bytes()
    one().save(place)
    assert place.read_bytes() == before
    one(device="cuda", capability=90).save(place)
    one(device="cuda", capability=80).save(place)
    one(kernels=()).save(place)
    found = DecisionFile.from_file(place)
    assert [(model.where, len(model.decided[0].kernels)) for model in found.models] == [
        ("cpu", 0),
        ("cuda 9.0", 1),
        ("cuda 8.0", 1),
    ]
    assert [path.name for path in place.parent.iterdir() if place.name in path.name] == [place.name]


def test_two_decisions_for_one_layer_are_refused(place: Path) -> None:
    """Two models with one layer and two kernels cannot be told apart by calls: nothing is written."""
    one().save(place)
    before = place.read_bytes()
    with pytest.raises(ArgumentError, match=r"decided twice for cpu, inference: k \[c{12}\] in m, and reference"):
        one(model="n", kernels=()).save(place)
    assert place.read_bytes() == before


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    """A place that is no folder is an error of ours."""
    (tmp_path / "file").touch()
    with pytest.raises(ArgumentError, match="Cannot write the decision file"):
        one().save(tmp_path / "file" / "inner")


def test_differences() -> None:
    """A difference has path, hardware, mode and both kernels; equal ones are folded; the table fits 80 columns."""
    paths = tuple(f"model.layers.{number}.input_layernorm" for number in range(24))
    before, after = one(paths=paths), one(paths=paths, kernels=(FrozenKernel("k", "acme/norm@012345678901 (torch)"),))
    assert not before.diff(before) and str(before.diff(before)) == "no difference"
    found = before.diff(after)
    assert len(found.changes) == 24
    assert str(found).splitlines() == [
        "path                               layer  device  mode",
        "model.layers.0-23.input_layernorm  Add    cpu     inference",
        "    - k [cccccccccccc]",
        "    + acme/norm@012345678901 (torch)",
    ]
    assert max(map(len, str(found).splitlines())) <= 80
    assert json.loads(found.to_json())[0] == {
        **{"path": paths[0], "where": "cpu", "mode": "inference", "layer": "Add"},
        **{"before": "k [cccccccccccc]", "after": "acme/norm@012345678901 (torch)"},
    }
    (change,) = one().diff(one(device="cuda", capability=90)).changes[:1]
    assert (change.where, change.after) == ("cpu", "not there")


def test_measured_orders_are_a_difference() -> None:
    """Two files whose kernels serve other shapes differ."""
    orders = [(FrozenKernel("k", "k", record={"eager": [rows]}),) for rows in (1, 2)]
    found = one(kernels=orders[0]).diff(one(kernels=orders[1]))
    assert "as measured before" in str(found) and not one(kernels=orders[0]).diff(one(kernels=orders[0]))


def test_receipts_of_other_processes_cannot_be_frozen(place: Path) -> None:
    """A receipt that was pickled has no kernels, and says where to freeze it."""
    copy = pickle.loads(pickle.dumps(receipt(Add(), **EVAL)))
    with pytest.raises(ArgumentError, match="copied from another process"):
        copy.freeze(place)


def test_wrappers_are_no_part_of_paths(place: Path) -> None:
    """A compiled model is frozen as the model in it."""
    receipt(Block(), **EVAL).freeze(place)
    wrapped = place.with_name("wrapped")
    receipt(torch.compile(Block()), **EVAL).freeze(wrapped)
    assert wrapped.read_bytes() == place.read_bytes()


def test_a_cold_decision_without_a_file_reads_nothing(hook_recorder: HookRecorder) -> None:
    """Without a file, no replay is made, and hooks are called as ever."""
    assert replay.FileReplay.find(resolve("Add", **EVAL).request) is None
    assert hook_recorder.names()[:2] == ["kernels_resolve_forward", "kernels_find_candidates"]


# --- Content ----------------------------------------------------------------------------------------

CODE = """
import functools
from torch import nn

HELP = {constant}

class Add:
    def __call__(self, x): return x + HELP

helper = Add()

class Base(nn.Module):
    def forward(self, x): return helper(x)

class Fast(Base):
    kinds = frozenset(("a", "b", "c", "d"))
    def extend(self, by=(1, 2)): return by in {{"p", "q", "r"}}

@functools.lru_cache(None)
def table(): return {other}

if __name__ == "__main__":
    from kernels_core.decisions.content import content_of
    print(content_of(Fast))
"""


def test_content_is_equal_in_all_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A class has one digest in any process, as a module or a program.

    It changes with a constant that its helper reads, and not with other code of the file.
    """
    for name, numbers in {"shop": (1, 1), "other_code": (1, 2), "other_constant": (2, 1)}.items():
        text = CODE.format(constant=numbers[0], other=numbers[1])
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    found = [content_of(__import__(name).Fast) for name in ("shop", "other_code", "other_constant")]
    assert found[0] == found[1] != found[2]
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    ran = subprocess.run([sys.executable, tmp_path / "shop.py"], env=environment, capture_output=True, text=True)
    assert ran.stdout.strip() == found[0], ran.stderr


def test_content_of_adapted_kernels_is_that_of_their_code() -> None:
    """Closures and defaults are parts of a kernel: two that differ in them have two digests."""
    contents = {content_of(adding(number)) for number in (2, 3)} | {content_of(adding(2))}
    assert len(contents) == 2
    assert content_of(torch.relu) == content_of(3) == ""


KERNEL = """
import collections
import torch, uuid
from beside import LIMITS as BOUNDS, by_beside
from near.tables import SIZES, Base
import near.tables, settings
from every import *
try:
    from tried import TRIED
except ImportError:
    TRIED = []

N = 1
WEIGHTS = [1.0, 2.0]
TABLE = {"a": N}
TABLE["b"] = 3
COUNTS = collections.defaultdict(int)
SCALE = torch.tensor(4.0)
calls, FILLED, made = 0, {}, None
for key in "xy":
    FILLED[key] = 5

def fill(): return 6
FILLED.update(z=fill())

class Wide:
    kinds = ["wide"]

SESSION = uuid.uuid4().hex

class Made:
    def by_made(self): return 12

class Lazy:
    def __getattr__(self, name):
        raise ImportError(name)

lazy = Lazy()

def start():
    global made
    made = Made()
    return made

class Fast(Base):
    seen, last, bias = 0, None, 13

    def forward(self, x):
        global calls
        calls += 1
        Fast.seen += 1
        type(self).last = Fast.first = x
        made or lazy.run(start(), SESSION)
        COUNTS[x] += 1
        return by_beside(x) + WEIGHTS[0] + TABLE["a"] + SCALE + BOUNDS[0] + SIZES["s"] + settings.EPS + FILLED["z"] + (
            near.tables.PLAIN + settings.KEPT["k"] + len(Wide.kinds) + EVERY[0] + TRIED[0])

if N:
    Fast.bias += 16

def other(x): return x + 7
"""
FILES = {
    "kern.py": KERNEL,
    "beside.py": "def by_beside(x): return x + 100\nLIMITS = [8]",
    "near/__init__.py": "",
    "near/tables.py": """
SIZES = {'s': 9}
PLAIN = 10
class Base:
    @classmethod
    def keep(cls): cls.kept = 1
""",
    "settings.py": "EPS = 1e-6\nKEPT = {'k': 11}",
    "every.py": "EVERY = [14]",
    "tried.py": "TRIED = [15]",
}
MODULES = ("kern", "beside", "near", "near.tables", "settings", "every", "tried")
EDITS = [
    ("beside.py", "100", "200"),
    ("beside.py", "[8]", "[80]"),
    ("near/tables.py", "9", "90"),
    ("near/tables.py", "10", "0"),
    ("settings.py", "1e-6", "1e-5"),
    ("settings.py", "11", "12"),
    ("kern.py", "N = 1", "N = 2"),
    ("kern.py", "[1.0, 2.0]", "[1.0, 2.5]"),
    ("kern.py", '["b"] = 3', '["b"] = 4'),
    ("kern.py", "tensor(4.0)", "tensor(5.0)"),
    ("kern.py", "FILLED[key] = 5", "FILLED[key] = 6"),
    ("kern.py", "return 6", "return 7"),
    ("kern.py", '["wide"]', '["narrow"]'),
    ("kern.py", "return 12", "return 21"),
    ("kern.py", "+= 16", "+= 61"),
    ("kern.py", "0, None, 13", "0, None, 31"),
    ("every.py", "14", "41"),
    ("tried.py", "15", "51"),
]


def contents(folder: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str]) -> tuple[str, str]:
    """Import a program from a folder; return the digests of its kernel, for one machine and for comparing ranks."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    with monkeypatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setattr(sys, "dont_write_bytecode", True)  # which tells an edit by time and size
        for name in MODULES:
            patch.delitem(sys.modules, name, raising=False)
        kern = importlib.import_module("kern")
        kern.COUNTS[1], kern.calls = 1, folder.name.count("e")  # what calls do
        if kern.calls > 2:
            kern.Fast.seen, kern.Fast.last, kern.Fast.first = 1, [2], 3
            kern.start()
            kern.Fast.keep()
        found = content_of(kern.Fast), content_of(kern.Fast, on_any_rank=True)
        for name in MODULES:
            sys.modules.pop(name)
    return found


def test_content_has_tables_objects_and_files_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each edit of a value or a helper that a kernel names, in any file of its folder, is another content.

    Not what calls keep in names and tables, another function, or a folder of another name. Ranks compare the same.
    """
    first = contents(tmp_path / "first", monkeypatch, FILES)
    assert contents(tmp_path / "the same elsewhere", monkeypatch, FILES) == first
    more = {**FILES, "kern.py": "# moved\n" + KERNEL.replace("x + 7", "x + 8")}
    assert contents(tmp_path / "other", monkeypatch, more) == first
    found = [first]
    for number, (name, before, after) in enumerate(EDITS):
        assert before in FILES[name]
        edited = {**FILES, name: FILES[name].replace(before, after, 1)}
        found.append(contents(tmp_path / str(number), monkeypatch, edited))
    assert all(len(set(each)) == len(EDITS) + 1 for each in zip(*found, strict=True))


def test_content_does_not_count_decorated_layers() -> None:
    """A decorated class, or a kernel that calls a decorated function, has one content after any number of others."""

    def contents() -> tuple[str, str]:
        @use_kernel_forward_from_hub("inner")
        def inner(x: torch.Tensor) -> torch.Tensor:
            return x * 2

        @use_kernel_forward_from_hub("Outer")
        class Outer(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return inner(x)

        def kernel(x: torch.Tensor) -> torch.Tensor:
            return inner(x)

        return content_of(Outer), content_of(kernel)

    assert contents() == contents()


def test_installed_files_are_of_their_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where packages are installed, files beside a kernel are those of others: their version is theirs to tell."""
    folder = tmp_path / "site-packages"
    first = contents(folder / ".", monkeypatch, FILES)
    assert contents(folder, monkeypatch, {**FILES, "beside.py": FILES["beside.py"].replace("100", "2")}) == first
    assert contents(folder, monkeypatch, {**FILES, "kern.py": KERNEL.replace("N = 1", "N = 2")}) != first


def test_a_replay_finds_an_edit_of_a_table(
    tmp_path: Path, place: Path, use: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel whose table has been edited is not served as the frozen one."""

    def kernel(number: int) -> Any:
        (tmp_path / "tabled.py").write_text(f"TABLE = [{number}]\ndef add(x): return x + TABLE[0]\n")
        monkeypatch.delitem(sys.modules, "tabled", raising=False)
        importlib.invalidate_caches()
        return importlib.import_module("tabled").add

    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.syspath_prepend(tmp_path)
    register_kernel_mapping({"add": {"cpu": kernel(4)}})
    receipt(Table(), **EVAL).freeze(place)
    use(place)
    register_kernel_mapping({"add": {"cpu": kernel(4)}})
    assert run(Table()) == 4
    register_kernel_mapping({"add": {"cpu": kernel(400)}})
    with pytest.raises(DecisionError, match=r"Expected: tabled.add \[.*Found: tabled.add \["):
        run(Table())
