"""Properties of numbers, required: by blocks, for the process, in the file, by receipts and on the command line."""

from __future__ import annotations

import gc
import json
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from norms import ByRows, Norm, Steady, by_rows, norm
from torch import nn
from typer.testing import CliRunner

from kernels_core import (
    ArgumentError,
    ArgumentTypeError,
    Candidate,
    KernelsWarning,
    Mode,
    NoKernelError,
    PluginManager,
    Reference,
    RequirementError,
    configuration,
    find_layer,
    hookimpl,
    kernelize,
    receipt,
    resolve,
    use_kernel_forward_from_hub,
)
from kernels_core.cli import command_line
from kernels_plugins import (
    Choice,
    ChoiceCell,
    MeasuredOn,
    check_kernel,
    choosing,
    numerics,
    register_numerics,
    use_choice,
    use_kernel_mapping,
    verify,
)
from kernels_plugins.choice import plugin as choice_plugin
from kernels_plugins.choice.machine import machine_of
from kernels_plugins.numerics import store, wanted

COMPILED = Mode.INFERENCE | Mode.TORCH_COMPILE


@pytest.fixture(autouse=True)
def _scene(numerics_plugin: None, isolated_plugins: PluginManager) -> None:
    """Run with the plugins `numerics` and `choice`."""
    isolated_plugins.register(choice_plugin, "choice")


class Modest(Steady):
    batch_invariant = False


@use_kernel_forward_from_hub("RequiredBlend")
class Blend(nn.Module):
    """A layer whose rows depend on their number: a reference that is not innocent."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * (1 + 2e-7 if x.shape[:-1].numel() > 64 else 1)


X = torch.randn(8, 64)
BOTH = {"NumericsNorm": {"cpu": [ByRows, Steady]}}
ONLY = {"NumericsNorm": {"cpu": ByRows}}


def origin(layer: object = Norm, mode: Mode = Mode.INFERENCE) -> str:
    return resolve(layer, device="cpu", mode=mode).origin.rpartition(".")[2]


# --- Blocks ----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::kernels_core.KernelsWarning")
def test_the_next_candidate_serves_where_the_first_one_lacks_what_is_required() -> None:
    """Judged at the first call, whose output is that of the next candidate already; the reason is in the receipt."""
    model, x = nn.Sequential(Norm()).eval(), torch.randn(100, 64)
    with use_kernel_mapping(BOTH):
        assert origin() == "ByRows" and not torch.equal(model(x), norm(x, model[0].weight))
        with numerics("batch_invariant"):
            assert "not known: it is found out" in receipt(model).rows[0].checked["batch_invariant"]
            assert torch.equal(model(x), norm(x, model[0].weight)) and origin() == "Steady"
            (row,) = receipt(model).require("*", batch_invariant=True).rows
        assert origin() == "ByRows"  # outside of the block
        outside = json.loads(receipt(model).to_json())[0]
    assert row.checked["batch_invariant"].startswith("yes: 1 to 4,096 rows")
    ((refused, reason),) = row.refusals
    assert refused.endswith("ByRows") and "it is not batch_invariant: " in reason and "65x64 float32" in reason
    assert outside["checked"]["batch_invariant"].startswith("no: ")


@pytest.mark.filterwarnings("ignore::kernels_core.KernelsWarning")
def test_a_reference_that_has_it_serves_without_an_error_in_strict_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference is the right answer, for it was found to have what is required."""
    monkeypatch.setenv("KERNELS_STRICT", "1")
    layer = Norm()
    with use_kernel_mapping(ONLY), numerics("deterministic", "batch_invariant"), torch.no_grad():
        for _ in range(3):
            assert torch.equal(layer(X), norm(X, layer.weight))
        resolution = resolve(Norm, device="cpu", mode=Mode.INFERENCE)
    assert (
        resolution.is_reference and resolution.note == "the reference is deterministic and batch_invariant, as required"
    )


def test_a_reference_that_lacks_it_is_a_warning_and_an_error_in_strict_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is judged as a kernel is, with the smallest input; also where no kernel is offered."""
    layer = Blend()
    with numerics("batch_invariant"):
        with pytest.warns(UserWarning, match="though it lacks what is required: .*not batch_invariant: .*65x64"):
            assert torch.equal(layer(X), X)
        monkeypatch.setenv("KERNELS_STRICT", "1")
        for _ in range(2):
            with pytest.raises(NoKernelError, match="of the reference itself, it is not batch_invariant"):
                Blend()(X)
        store._found.clear()
        with pytest.raises(NoKernelError, match="of the reference itself"):  # found out at this call
            Blend()(X)
    assert torch.equal(Blend()(X), X)


class _Backward(torch.autograd.Function):
    """The identity, whose gradient depends on the number of rows."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * (1 + 2e-7 * (len(gradient) > 64))


class Backward(nn.Module):
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return _Backward.apply(norm(x, self.weight))  # type: ignore[no-untyped-call, no-any-return]


@pytest.mark.filterwarnings("ignore::kernels_core.KernelsWarning")
def test_gradients_of_rows_are_required_in_training() -> None:
    """A kernel whose backward depends on the number of rows serves inference, and no training."""
    model = nn.Sequential(Norm())
    with use_kernel_mapping({"NumericsNorm": {"cpu": [Backward, Steady]}}), numerics("batch_invariant"):
        with torch.no_grad():
            model(X)
        assert origin() == "Backward"
        model(X).sum().backward()
        assert (origin(), origin(mode=Mode.TRAINING)) == ("Backward", "Steady")
        refused = str(resolve(Norm, device="cpu", mode=Mode.TRAINING).refusals[0])
        assert "in backward, of the gradients of inputs: " in refused and "x 65x64 float32" in refused
    with use_kernel_mapping({"NumericsNorm": {"cpu": Backward}}):
        receipt(model.eval(), mode=Mode.INFERENCE).require("*", "*Backward", batch_invariant=True)
        with pytest.raises(RequirementError, match="no: in backward"):
            receipt(model.train(), mode=Mode.TRAINING).require("*", "*Backward", batch_invariant=True)
        report = verify(Norm(), X, numerics=["batch_invariant"])
        assert not report.ok and "in backward" in str(report)
        assert verify(Norm(), X, gradients=False, numerics=["batch_invariant"]).ok
        with pytest.raises(AssertionError, match="batch_invariant: in backward"):
            check_kernel(Backward, Norm(), X, ignore={"compile"})


def test_a_call_of_another_width_is_judged_anew() -> None:
    """A kernel that has the property for one width, and lacks it for another, is refused from then on."""

    class Wide(nn.Module):
        def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
            return ByRows.forward(self, x) if x.shape[-1] > 64 else Steady.forward(self, x)

    with use_kernel_mapping({"NumericsNorm": {"cpu": Wide}}), numerics("batch_invariant"):
        narrow, wide = Norm(), Norm(128)
        narrow(X)
        assert origin() == "Wide"
        with pytest.warns(UserWarning, match="65x128 float32"):
            y = wide(torch.randn(100, 128))
            wide(torch.randn(100, 128))  # decided anew
        assert origin() == "reference" and y.shape == (100, 128)


@pytest.mark.filterwarnings("ignore::kernels_core.KernelsWarning")
def test_compiled_calls_are_served_by_what_is_known() -> None:
    """Nothing can be tried in a trace: a kernel that is not known is refused, one that eager calls proved serves."""
    model = nn.Sequential(Norm()).eval()
    with use_kernel_mapping({"NumericsNorm": {"cpu": Steady}}), numerics("batch_invariant"), torch.no_grad():
        refused = resolve(Norm, device="cpu", mode=COMPILED)
        assert refused.is_reference and "batch_invariant is not known of it" in str(refused.refusals[0])
        assert "of the reference itself, it is not known" in str(refused.refusals[-1])
        model(X)
        assert origin(mode=COMPILED) == "Steady"
        assert torch.equal(torch.compile(model, backend="aot_eager", fullgraph=True)(X), norm(X, model[0].weight))


@pytest.mark.filterwarnings("ignore::kernels_core.KernelsWarning")
def test_kernelized_models_are_judged_too() -> None:
    """A frozen kernel that lacks it does not serve, also in calls after the block."""
    model, x = nn.Sequential(Norm()).eval(), torch.randn(100, 64)
    with use_kernel_mapping(BOTH), numerics("batch_invariant"):
        kernelize(model, device="cpu", mode=Mode.INFERENCE)
        with torch.no_grad():
            first = model(x)
    with torch.no_grad():
        assert torch.equal(first, norm(x, model[0].weight)) and torch.equal(model(x), first)


@pytest.mark.filterwarnings("ignore::kernels_core.KernelsWarning")
def test_a_kernel_that_declares_not_to_have_it_is_refused_unseen() -> None:
    """`batch_invariant = False` needs no trial; anything but a boolean is a mistake in the contract."""

    class Odd(Steady):
        batch_invariant = "yes"

    with use_kernel_mapping({"NumericsNorm": {"cpu": [Odd, Modest]}}), numerics("batch_invariant"):
        first, second = resolve(Norm, device="cpu", mode=Mode.INFERENCE).refusals
    assert "its batch_invariant is 'yes': write True or False" in first.reason
    assert "it declares batch_invariant = False" in second.reason


def test_blocks_apply_to_the_thread_that_enters_them_and_nest() -> None:
    """The requirement of an outer block applies in an inner one, and not in another thread."""
    seen: list[tuple[str, ...]] = []

    def look() -> None:
        seen.append(wanted.required(resolve(Norm, device="cpu", mode=Mode.INFERENCE).request))

    with numerics("deterministic"), numerics("batch_invariant"):
        look()
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
    look()
    assert seen == [("deterministic", "batch_invariant"), (), ()]


def test_a_failed_call_is_not_judged_twice_and_nothing_is_kept_of_it() -> None:
    """The snapshot of a call is dropped after the trial; modules and tensors are freed with their last reference."""
    layer = Norm()
    with use_kernel_mapping({"NumericsNorm": {"cpu": Steady}}), numerics("batch_invariant"):
        before = layer.weight.detach().clone()
        layer(X).sum().backward()
    assert torch.equal(layer.weight, before) and layer.weight.grad is not None
    import weakref

    gone = weakref.ref(layer)
    del layer
    gc.collect()
    assert gone() is None


# --- For the process, and in the file ----------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::kernels_core.KernelsWarning")
def test_properties_are_registered_for_the_process() -> None:
    """`register_numerics` applies until it is called without names; wrong names change nothing."""
    layer = Norm()
    with use_kernel_mapping(BOTH):
        register_numerics("batch_invariant")
        layer(X)
        assert origin() == "Steady"
        for wrong, kind in (("exact", ArgumentError), (1, ArgumentTypeError)):
            with pytest.raises(kind):
                register_numerics(wrong)  # type: ignore[arg-type]
            with pytest.raises(kind):
                numerics(wrong)  # type: ignore[arg-type]
        with pytest.raises(ArgumentError, match="names no property: there are deterministic, batch_invariant"):
            numerics()
        assert origin() == "Steady"
        register_numerics()
        assert origin() == "ByRows"


@pytest.mark.filterwarnings("ignore::kernels_core.KernelsWarning")
def test_properties_are_required_in_the_configuration_file(configure: Callable[..., Path]) -> None:
    """`numerics = [...]` applies to the process; an unknown one is a problem of the file, with its line."""
    configure('numerics = ["batch_invariant"]\n')
    layer = Norm()
    with use_kernel_mapping(BOTH):
        layer(X)
        assert origin() == "Steady"
    configure('numerics = ["exact"]\n')
    (problem,) = configuration().problems
    assert "kernels.toml:1" in problem and "names 'exact': there are deterministic" in problem


def test_a_blocked_plugin_is_no_silence(isolated_plugins: PluginManager) -> None:
    """Where the plugin is blocked, what is required has no effect, and a warning says so."""
    isolated_plugins.unregister(name="numerics")
    with pytest.warns(UserWarning, match="The plugin numerics is blocked"):
        numerics("batch_invariant")


# --- Receipts, and the command line ------------------------------------------------------------------


def test_a_receipt_requires_what_was_found_out() -> None:
    """A property that is not known or lacking fails; a reference that has it will do, but not for an origin."""
    model = nn.ModuleDict({"norm": Norm(), "blend": Blend()}).eval()
    with use_kernel_mapping(ONLY):
        with pytest.raises(RequirementError, match=r"(?s)anything that is batch_invariant.*not known: run verify"):
            receipt(model).require("norm", batch_invariant=True)
        verify(model["norm"], X, gradients=False, numerics=["batch_invariant", "deterministic"])
        receipt(model).require("norm", "*ByRows", deterministic=True)
        with pytest.raises(RequirementError, match=r"(?s)'\*ByRows' that is deterministic and batch_invariant.*65x64"):
            receipt(model).require("norm", "*ByRows", deterministic=True, batch_invariant=True)
        with pytest.raises(ArgumentTypeError):
            receipt(model).require("norm", batch_invariant="yes")  # type: ignore[arg-type]
    receipt(model).require("norm", batch_invariant=True)
    with pytest.raises(RequirementError):
        receipt(model).require("norm")
    with pytest.raises(RequirementError, match="not known"):
        receipt(model).require("blend", batch_invariant=True)


MADE: dict[str, Any] = {}


def make() -> nn.Module:
    return nn.Sequential(Norm()).eval()


def inputs() -> torch.Tensor:
    return X


def wrong_inputs() -> tuple[torch.Tensor, ...]:
    return X, X


def explain(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(command_line(), ["explain", f"{__name__}:make", *arguments])
    text = result.output if result.exception is None else f"{result.output}{result.exception}"
    return result.exit_code, text


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the command line import this module by its name."""
    import sys

    monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__) or __import__(__name__))


@pytest.mark.usefixtures("importable")
def test_explain_finds_it_out_and_requires_it() -> None:
    """CI: exit code 1 with the smallest input where the kernel that serves lacks it, 0 where it has it."""
    call = ("--numerics", "batch_invariant", "--inputs", f"{__name__}:inputs", "--require", "*")
    with use_kernel_mapping(ONLY):
        code, text = explain(*call)
        assert code == 1 and "not served by anything that is batch_invariant" in text and "65x64 float32" in text
    with use_kernel_mapping({"NumericsNorm": {"cpu": Steady}}):
        code, text = explain(*call, "--json")
        assert code == 0 and json.loads(text)[0]["checked"]["batch_invariant"].startswith("yes: ")
    assert "--numerics names exact" in explain("--numerics", "exact")[1]
    assert "the model has no dummy_inputs" in explain("--numerics", "deterministic")[1]
    assert "--inputs are those that --numerics" in explain("--inputs", f"{__name__}:inputs")[1]
    code, text = explain("--numerics", "deterministic", "--inputs", f"{__name__}:wrong_inputs")
    assert code == 1 and "The model cannot be run with its inputs: TypeError: " in text


# --- Measured choice -----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::kernels_core.KernelsWarning")
def test_only_those_that_qualify_race() -> None:
    """A candidate that lacks what is required is out, with the reason, before it is timed."""
    model = nn.Sequential(Norm()).eval()
    with use_kernel_mapping(BOTH), numerics("batch_invariant"), torch.no_grad():
        with choosing(contexts=("eager",), seconds=0.01, progress=False) as chosen:
            model(X)
    for cell in chosen.choice.cells_on("cpu"):
        assert "Steady" in "".join(cell.times) and "ByRows" not in "".join(cell.times)
        assert any("batch_invariant" in reason for reason in cell.lost.values())


def test_one_winner_serves_all_rows_where_rows_must_not_matter() -> None:
    """Where two kernels win for different numbers of rows, one of them serves all, for they have other bits."""
    steady, other = (f"{Steady.__module__}.{name}" for name in ("Steady", "Slower"))
    slower = type("Slower", (nn.Module,), {"forward": lambda self, x: Steady.forward(self, x)})
    slower.__module__ = Steady.__module__
    place = ("NumericsNorm", "cpu", "eager", "inference", "float32", 64)
    few = ChoiceCell(*place, 4, {"reference": 3.0, steady: 1.0, other: 2.0})
    many = ChoiceCell(*place, 13, {"reference": 3.0, steady: 1.5, other: 1.0})
    choice = Choice((MeasuredOn(machine_of(torch.device("cpu")), (few, many)),))
    with use_kernel_mapping({"NumericsNorm": {"cpu": [Steady, slower]}}), use_choice(choice):
        free = resolve(Norm, device="cpu", mode=Mode.INFERENCE)
        with numerics("batch_invariant"):
            bound = resolve(Norm, device="cpu", mode=Mode.INFERENCE)
    assert free.candidate is not None and free.candidate.limit.orders is not None  # type: ignore[union-attr, attr-defined]
    assert bound.candidate is not None and bound.candidate.limit.orders is None  # type: ignore[union-attr, attr-defined]
    assert bound.origin == steady


def test_a_finding_within_a_choice_holds_within_it_only() -> None:
    """A kernel that a choice keeps to some rows is not known there, and is judged anew without it, with no warning."""
    times = {f"{Steady.__module__}.Steady": 1.0, f"{__name__}.Slower": 2.0, "reference": 3.0}
    turned = {**times, f"{Steady.__module__}.Steady": 2.5}
    place: Any = {"layer": "NumericsNorm", "device": "cpu", "context": "eager", "mode": "inference"}
    cells = [
        ChoiceCell(**place, dtype="float32", width=64, bucket=bucket, times=each)
        for bucket, each in ((1, times), (11, turned))
    ]
    slower = type("Slower", (Steady,), {"__module__": __name__})
    model = nn.Sequential(Norm()).eval()
    with use_kernel_mapping({"NumericsNorm": {"cpu": [Steady, slower]}}), torch.no_grad():
        with use_choice(Choice((MeasuredOn(machine_of(torch.device("cpu")), tuple(cells)),))):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                verify(model, X[:1], numerics=["batch_invariant"], gradients=False)
                model(X[:1])
            found = receipt(model, device="cpu").rows[0].checked["batch_invariant"]
            assert found.startswith("not known: it passes on calls with other rows")
            with pytest.warns(KernelsWarning, match="is called with 8 or more rows"):
                model(X)
        with numerics("batch_invariant"):
            model(X)
            (row,) = receipt(model, device="cpu").require("*", batch_invariant=True).rows
    assert row.origin == f"{Steady.__module__}.Steady" and not row.refusals


@pytest.mark.filterwarnings("ignore::kernels_core.KernelsWarning")
def test_a_kernel_that_passes_a_call_on_is_not_judged_by_it() -> None:
    """It serves the calls that it takes, once these were judged; calls of another dtype go to the next one."""

    class Narrow(Steady):
        dtypes = (torch.bfloat16,)

    layer = Norm()
    with use_kernel_mapping({"NumericsNorm": {"cpu": Narrow}}), numerics("batch_invariant"), torch.no_grad():
        assert torch.equal(layer(X), norm(X, layer.weight))
        assert origin() == "Narrow"
        low = layer.bfloat16()
        low(X.bfloat16())
        assert origin() == "Narrow"
        found = resolve(Norm, device="cpu", mode=Mode.INFERENCE).checked["batch_invariant"]
        assert found.startswith("yes: 1 to 4,096 rows") and "; not float32, float16" in found

    class Short(Steady):
        def supports(self: Any, x: torch.Tensor) -> bool:
            return len(x) <= 64

    with use_kernel_mapping({"NumericsNorm": {"cpu": Short}}), numerics("batch_invariant"):
        Norm()(X)
        (refusal,) = resolve(Norm, device="cpu", mode=Mode.INFERENCE).refusals
    assert "it passes on calls with other rows" in refusal.reason


@pytest.mark.filterwarnings("ignore::kernels_core.KernelsWarning")
def test_a_reference_that_lacks_it_wins_no_race() -> None:
    """Its times are measured, for others are compared with them; a kernel serves, even if it is slower."""

    class Slow(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(50):
                x = x * 1
            return x

    model = nn.Sequential(Blend()).eval()
    with use_kernel_mapping({"RequiredBlend": {"cpu": Slow}}), numerics("batch_invariant"), torch.no_grad():
        with choosing(contexts=("eager",), seconds=0.01, progress=False) as chosen:
            model(X)
        with use_choice(chosen.choice):
            assert origin(Blend) == "Slow"
    (cell,) = chosen.choice.cells_on("cpu")
    assert cell.order[-1] == "reference" and cell.ratio(cell.winner) > 1
    assert "batch_invariant: no: " in cell.lost["reference"]


@pytest.mark.filterwarnings("ignore::kernels_core.KernelsWarning")
def test_a_reference_that_was_chosen_and_lacks_it_is_left_out(isolated_plugins: PluginManager) -> None:
    """Where a ranking puts the reference first, a kernel that has the property serves in its place."""

    class First:
        @hookimpl
        def kernels_rank_candidates(self, candidates: list[Candidate]) -> list[Candidate]:
            return [Candidate(Reference, "first", "user"), *candidates]

    class Even(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 1

    isolated_plugins.register(First(), "first")
    layer = Blend()
    with use_kernel_mapping({"RequiredBlend": {"cpu": Even}}), numerics("batch_invariant"):
        layer(X)
        assert origin(Blend) == "Even"


def test_code_without_a_file_shares_no_finding() -> None:
    """Two kernels of which no source is known, as at a prompt, are judged apart, and the right one serves."""
    scope: dict[str, Any] = {"torch": torch, "nn": nn}
    exec(
        "def double(x):\n    return x + x\n"
        "def few(factor, x):\n    return factor * x if len(x) < 65 else x + x + 1e-7\n"
        "def steady(factor, x):\n    return factor * x\n"
        "split = lambda x: few(2, x)\nright = lambda x: steady(2, x)\n",
        scope,
    )
    double = use_kernel_forward_from_hub("WithoutFile")(scope["double"])
    x = torch.randn(4, 8)
    for kernels, served in ((["split", "right"], "right"), (["right", "split"], "right"), (["split"], None)):
        functions = [scope[name] for name in kernels]
        with use_kernel_mapping({"WithoutFile": {"cpu": functions}}), numerics("batch_invariant"):
            assert torch.equal(double(x), 2 * x)
            resolution = resolve(double, device="cpu", mode=Mode.INFERENCE)
            assert resolution.implementation is (scope[served] if served else None), resolution
            assert resolution.checked["batch_invariant"].startswith("yes")


def test_modules_with_other_values_share_no_finding() -> None:
    """An attribute that a kernel reads, such as a number of splits, decides: each of its values is judged."""

    class Limited(Norm):
        most = 10**9

    class Reading(nn.Module):
        def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
            return by_rows(x, self.weight, self.most)

    free, bound, named = Limited(), Limited(), Limited()
    bound.most = 64
    named.index = 3  # type: ignore[assignment]
    with use_kernel_mapping({"NumericsNorm": {"cpu": Reading}}), torch.no_grad():
        with numerics("batch_invariant"):
            free(X)
            assert origin() == "Reading"
            named(X)
            layer = find_layer(Norm)
            assert layer is not None
            kinds = store.known(store.key_of(layer, Reading.forward, torch.device("cpu")))
            assert len(kinds) == 1  # `index` is not read
            x = torch.randn(100, 64)
            assert torch.equal(bound(x), norm(x, bound.weight))
            assert "65x64" in str(resolve(Norm, device="cpu", mode=Mode.INFERENCE).refusals[0])


def test_kernels_around_other_values_share_no_finding() -> None:
    """Two kernels of one code, around two dicts, are judged apart."""
    double = use_kernel_forward_from_hub("AroundValues")(lambda x: x + x)

    def made(limits: dict[str, int]) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda x: 2 * x if len(x) <= limits["most"] else x + x + 1e-7

    for most, found in ((10**9, "yes"), (64, "no")):
        with use_kernel_mapping({"AroundValues": {"cpu": made({"most": most})}}), numerics("batch_invariant"):
            double(torch.randn(4, 8))
            assert resolve(double, device="cpu", mode=Mode.INFERENCE).is_reference is (found == "no")


def test_devices_that_are_not_there() -> None:
    """Decisions about a GPU of another machine call its properties not known, without an error."""
    away = f"cuda:{torch.cuda.device_count()}"
    with warnings.catch_warnings(), use_kernel_mapping({"NumericsNorm": {"cuda": Steady}}), numerics("batch_invariant"):
        warnings.simplefilter("error")
        decision = resolve(Norm, device=away, mode=Mode.INFERENCE)
    assert decision.checked["batch_invariant"] == "not known: it is found out at the first eager call"
