"""What holds for a kernel holds for it within the limit of a choice, and the other way round."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from kernels_core import (
    KernelsWarning,
    Mode,
    NoKernelError,
    PluginManager,
    count_calls,
    hookimpl,
    kernelize,
    quarantine,
    quarantined,
    receipt,
    release,
    resolve,
    use_kernel_forward_from_hub,
    warn_once,
)
from kernels_plugins import choosing, use_choice, use_kernel_mapping
from kernels_plugins.choice import race

from .test_choice import (
    A_FIRST,
    B_FIRST,
    BOTH,
    CALLS,
    REFERENCE_FIRST,
    WIDTH,
    A,
    B,
    Steady,
    Twice,
    cell,
    choice_plugin,  # noqa: F401 - for all tests here
    made,
    served,
)

SPLIT = made(cell(REFERENCE_FIRST), cell(A_FIRST, 16), cell(B_FIRST, 1024))


@pytest.fixture(autouse=True)
def anew() -> None:
    """Forget the warnings of other tests."""
    warn_once.forget()


def kernel(name: str, forward: Any, **declared: Any) -> type[nn.Module]:
    """Make a kernel layer that has a name in measurements."""
    members = {"forward": forward, "__module__": "kernels", "__qualname__": name, **declared}
    return type(name, (nn.Module,), members)


# --- Guards -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("chosen_first", [False, True])
def test_a_quarantine_with_and_without_a_choice(chosen_first: bool) -> None:
    """A kernel in quarantine serves neither within a limit nor without, wherever it was found to be wrong."""
    module = Twice()
    with use_kernel_mapping(BOTH), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        choice = use_choice(SPLIT)
        if not chosen_first:
            choice.close()
        found = resolve(module, device="cpu", mode=Mode.INFERENCE)
        assert found.request.layer is not None
        entry = quarantine(found.request.layer, found.implementation, kernel=found.origin, reason="wrong")
        choice.close()
        assert served(module, 16) == ["B"]
        with use_choice(SPLIT):
            assert served(module, 1, 16, 1024) == ["reference", "B", "B"]
            release(entry)
            assert served(module, 16) == ["A"]


def test_a_kernel_that_raises_within_its_limit() -> None:
    """The breaker takes it out, with a choice and without; the call is answered."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("boom")

    bad, module = kernel("Bad", forward), Twice()
    cells = cell({**REFERENCE_FIRST, "kernels.Bad": 4.0}), cell({**B_FIRST, "kernels.Bad": 0.5}, 16)
    with use_kernel_mapping({"Twice": {"cpu": [bad, B]}}):
        with use_choice(made(*cells)):
            with pytest.warns(KernelsWarning, match=r"kernels\.Bad: it is in quarantine: it raised RuntimeError: boom"):
                assert served(module, 1, 16, 16) == ["reference", "reference", "B"]
        assert served(module, 1) == ["B"] and len(quarantined()) == 1


def test_warnings_as_errors() -> None:
    """A warning of ours that a filter turns into an error is no fault of the kernel: it is raised, and that serves."""
    module = Twice()
    with use_kernel_mapping(BOTH), use_choice(SPLIT):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(KernelsWarning, match="has no measurement for"):
                served(module, 100)
        assert not quarantined()
        with pytest.warns(KernelsWarning, match="has no measurement for"):
            assert served(module, 100) == ["A"]


def test_a_limit_hides_nothing() -> None:
    """Within its limit, a kernel has the attributes that guards ask for, has to prove gradients, and is counted."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight.detach()  # it loses a gradient

    forward.kernels_mark = "kept"  # type: ignore[attr-defined]
    lossy, module = kernel("Lossy", forward), Twice()
    first = cell({**REFERENCE_FIRST, "kernels.Lossy": 4.0}, mode="training")
    second = cell({**B_FIRST, "kernels.Lossy": 0.5}, 16, mode="training")
    with use_kernel_mapping({"Twice": {"cpu": [lossy, B]}}), use_choice(made(first, second)):
        found = resolve(module, device="cpu", mode=Mode.TRAINING).implementation
        assert found is not forward and vars(found)["kernels_mark"] == "kept"
        with pytest.warns(KernelsWarning, match="gradient"), count_calls():
            for rows in (1, 16, 16):
                module(torch.ones(rows, WIDTH)).sum().backward()
        assert module.weight.grad is not None and module.weight.grad.sum() == (1 + 16 + 16) * WIDTH
        calls = receipt(module, device="cpu", mode=Mode.TRAINING).rows[0].calls
    assert calls == {"reference": 1, "kernels.Lossy": 1, "kernels.B": 2}  # one call was made by two


# --- What is offered --------------------------------------------------------------------------------


def test_a_winner_that_is_not_offered_any_more() -> None:
    """The best of those that are left serves, also where winners differ by shape; a warning and the receipt say so."""
    gone = {**B_FIRST, "kernels.Gone": 0.5}
    with use_kernel_mapping({"Twice": {"cpu": [A, B]}}):
        with (
            use_choice(made(cell(gone))),
            pytest.warns(KernelsWarning, match=r"has kernels\.Gone as the fastest"),
        ):
            assert served(Twice(), 1) == ["B"]
        choice = made(cell(A_FIRST), cell(gone, 16), cell({**REFERENCE_FIRST, "pack:none": 0.5}, 64))
        with use_choice(choice), pytest.warns(KernelsWarning, match="pack:none as the fastest"):
            assert served(Twice(), 1, 16, 64) == ["A", "B", "reference"]
    alone = made(cell({"reference": 3.0, "kernels.Gone": 0.5}))
    with use_choice(alone):
        note = receipt(Twice(), device="cpu", mode=Mode.INFERENCE).rows[0].note
    assert note.endswith("reference, the fastest that is offered here; kernels.Gone won, and is not offered here")


def test_strict_mode_with_a_winner_that_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A refused winner is an error there, as any refused kernel; the reference serves where it has won."""
    monkeypatch.setenv("KERNELS_STRICT", "1")
    changed = {"kernels.B": "another"}
    with use_kernel_mapping(BOTH):
        with use_choice(made(cell({**B_FIRST, "kernels.A": 4.0}, digests=changed))):
            with pytest.raises(NoKernelError, match="its code has changed"):
                served(Twice(), 1)
        with use_choice(made(cell(REFERENCE_FIRST))):
            assert served(Twice(), 1) == ["reference"]


def test_a_kernelized_model_keeps_its_choice() -> None:
    """It decides as at that time, also about the calls that the frozen kernel passes on."""
    with use_kernel_mapping(BOTH):
        with use_choice(SPLIT):
            model = kernelize(Twice().eval(), device="cpu", mode=Mode.INFERENCE)
        assert served(model, 1, 16, 1024, 1) == ["reference", "A", "B", "reference"]


class Packs:
    """A plugin with a pack that has no kernel for the layer."""

    @hookimpl
    def kernels_packs(self) -> dict[str, Any]:
        """Offer it."""
        return {"none": lambda layer_name, device: None}


def test_all_that_is_offered_is_known_afterwards(
    isolated_plugins: PluginManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is offered twice, one that cannot be traced, and a pack without a kernel lose, and are not new."""
    monkeypatch.setattr(race, "_compiled", lambda forward: forward)  # compiling takes seconds
    isolated_plugins.register(Packs(), "packs")
    steady = kernel("Steady", Steady.forward, can_torch_compile=True)
    again = kernel("Again", Steady.forward, can_torch_compile=True)
    with use_kernel_mapping({"Twice": {"cpu": [B, steady, again, "pack:none"]}}), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with choosing(contexts=["eager", "compiled"], seconds=0.01) as chosen, torch.no_grad():
            Twice()(torch.ones(64, WIDTH))
        eager, compiled = chosen.choice.cells_on("cpu")
        assert eager.winner == "kernels.B" and eager.lost["kernels.Again"] == "it is kernels.Steady, by another name"
        assert compiled.winner == "kernels.Steady" and "cannot be compiled" in compiled.lost["kernels.B"]
        assert "no kernel for 'Twice'" in compiled.lost["pack:none:Twice"]
        with use_choice(chosen.choice):
            assert served(Twice(), 64) == ["B"]
            traced = resolve(Twice, device="cpu", mode=Mode.INFERENCE | Mode.TORCH_COMPILE)
    assert traced.origin == "kernels.Steady"


# --- Compiled code ----------------------------------------------------------------------------------


class Plain(nn.Module):
    """The layer without a decorator, and without Python that no compiler knows."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((WIDTH,), 2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


@use_kernel_forward_from_hub("Twice")
class Decorated(Plain):
    """The layer."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


ADDS = kernel("C", lambda self, x: (x + x) * 1, can_torch_compile=True)


def compiled(reference: float, rows: int) -> Any:
    """Make a cell of compiled code, where the kernel takes one second."""
    return cell({"reference": reference, "kernels.C": 1.0}, rows, context="compiled")


def test_one_compilation_for_each_range() -> None:
    """Rows in one range share a graph, of any number of dimensions; there is nothing of the choice in it."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    with use_kernel_mapping({"Twice": {"cpu": ADDS}}), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", KernelsWarning)  # a call that was not measured is no news in compiled code
        with use_choice(made(compiled(0.5, 2), compiled(2.0, 64), compiled(2.0, 1024))):
            run = torch.compile(Decorated(), backend=counter, fullgraph=True, dynamic=True)
            for rows, graphs in ((70, 1), (80, 1), (1500, 1), (2, 2), (3, 2), (9000, 2), (400, 2)):
                run(torch.ones(2, rows // 2, WIDTH))
                assert counter.frame_count == graphs
            marked = torch.ones(70, WIDTH)
            torch._dynamo.mark_dynamic(marked, 0)
            torch.compile(Decorated(), backend="eager", fullgraph=True)(marked)
    operations = [[node.name for node in graph.graph.nodes if node.op.startswith("call")] for graph in counter.graphs]
    assert [len(names) for names in operations] == [2, 1]


def test_the_graph_where_the_reference_wins() -> None:
    """It is that of the undecorated layer, but for the order of its inputs."""
    found = []
    with use_kernel_mapping({"Twice": {"cpu": ADDS}}), use_choice(made(compiled(0.5, 2), compiled(0.5, 64))):
        for kind in (Plain, Decorated):
            torch._dynamo.reset()
            counter = CompileCounterWithBackend("eager")
            with torch.no_grad():
                torch.compile(kind(), backend=counter, fullgraph=True)(torch.ones(3, WIDTH))
            found.append(sorted(str(node.target) for node in counter.graphs[0].graph.nodes))
    assert found[0] == found[1]


@pytest.mark.parametrize("rows", [2, 70])
def test_an_exported_program_takes_all_rows(rows: int) -> None:
    """A guard would forbid some that its user names: the default order serves it."""
    dynamic = {"x": {0: torch.export.Dim("rows", min=1, max=4096)}}
    with use_kernel_mapping({"Twice": {"cpu": ADDS}}), use_choice(made(compiled(0.5, 2), compiled(2.0, 64))):
        program = torch.export.export(Decorated(), (torch.ones(rows, WIDTH),), dynamic_shapes=dynamic)
    assert torch.equal(program.module()(torch.ones(999, WIDTH)), torch.full((999, WIDTH), 2.0))
    assert "add" in str(program.graph)


# --- First tensors ----------------------------------------------------------------------------------


@use_kernel_forward_from_hub("anyhow")
def anyhow(scale: float, x: torch.Tensor | None = None, *, parts: tuple[torch.Tensor, ...] = ()) -> torch.Tensor:
    """Take a tensor in the second place, by keyword, or in a tuple."""
    return (x if x is not None else parts[0]) * scale


def test_calls_by_their_first_tensor() -> None:
    """The first tensor counts wherever it stands; indices count one by one; a call without any gets the default."""

    def fast(scale: float, x: Any = None, *, parts: Any = ()) -> torch.Tensor:
        CALLS.append("fast")
        return scale * (x if x is not None else parts[0])

    name = f"{__name__}.{fast.__qualname__}"
    slow, quick = {name: 2.0, "reference": 1.0}, {name: 1.0, "reference": 2.0}
    cells = [cell(slow, layer="anyhow"), cell(quick, 16, layer="anyhow")]
    cells += [cell(slow, 4, layer="anyhow", dtype="int64", width=1)]
    few, many = torch.ones(1, WIDTH), torch.ones(16, WIDTH)
    indices = torch.ones(1, 5, dtype=torch.long)
    with use_kernel_mapping({"anyhow": {"cpu": fast}}), use_choice(made(*cells)):
        for given, served_by in ((few, []), (many, ["fast"]), (few, []), (indices, []), (indices[:, :4], [])):
            for call in (lambda x: anyhow(2.0, x), lambda x: anyhow(2.0, x=x), lambda x: anyhow(scale=2.0, x=x)):
                CALLS.clear()
                call(given)
                assert served_by == CALLS
        CALLS.clear()
        anyhow(2.0, parts=(few,))
        assert CALLS == ["fast"]
