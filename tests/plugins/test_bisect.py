"""Bisect: the culprits are found in any kind of model, in few evaluations, and nothing is left behind."""

from __future__ import annotations

import copy
import functools
import io
import json
import math
import pickle
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console
from torch import nn
from torch.utils.checkpoint import checkpoint

from kernels_core import (
    ArgumentError,
    ArgumentTypeError,
    Mode,
    PluginManager,
    forget,
    kernelize,
    quarantined,
    release,
    unkernelize,
    use_kernel_forward_from_hub,
    use_kernelized_func,
)
from kernels_plugins import BisectError, BisectResult, bisect, use_kernel_mapping

pytestmark = pytest.mark.usefixtures("mapping_plugin")


@use_kernel_forward_from_hub("Step")
class Step(nn.Module):
    """Adds nothing on its reference, and a given number on its kernel."""

    def __init__(self, wrong: float = 0.0) -> None:
        super().__init__()
        self.wrong = wrong

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class FastStep(nn.Module):
    can_torch_compile = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.wrong


@use_kernel_forward_from_hub("double")
def double(x: torch.Tensor) -> torch.Tensor:
    return x * 2


def wrong_double(x: torch.Tensor) -> torch.Tensor:
    return x * 2 + (x > 0)


wrong_double.can_torch_compile = True  # type: ignore[attr-defined]


@use_kernelized_func(double)
class Doubling(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return double(x)


def kernel(forward: Callable[..., torch.Tensor]) -> type[nn.Module]:
    """Make a kernel layer of its forward."""
    return type(forward.__name__, (nn.Module,), {"forward": forward, "can_torch_compile": True})


KERNELS = {"Step": {"cpu": FastStep}, "double": {"cpu": wrong_double}}


@pytest.fixture(autouse=True)
def _kernels(mapping_plugin: object) -> Iterator[None]:
    with use_kernel_mapping(KERNELS):
        yield


def make(*wrong: float) -> nn.Sequential:
    return nn.Sequential(*map(Step, wrong))


def total(model: nn.Module) -> torch.Tensor:
    return model(torch.zeros(1)).sum()


def paths(result: BisectResult) -> list[str]:
    return [culprit.path for culprit in result.culprits]


def bound(kernels: int, culprits: int) -> int:
    return culprits * (math.ceil(math.log2(kernels)) + 4) + 5


# --- What is found -------------------------------------------------------------------------------


def test_a_culprit_is_found_with_its_kernel_and_its_change() -> None:
    """The result names path, layer and origin, the metric with only that kernel on, and how far that is."""
    result = bisect(make(0, 0, 0.25, 0), total, tolerance=0.1)
    (culprit,) = result.culprits
    assert (culprit.path, culprit.layer, culprit.metric, culprit.change) == ("2", "Step", 0.25, 0.25)
    assert culprit.origin == f"{__name__}.FastStep" and result.origins == (culprit.origin,)
    assert (result.baseline, result.suspect, result.change, result.mended) == (0.0, 0.25, 0.25, 0.0)
    assert (result.ok, result.is_mended, result.kernels, result.noise) == (False, True, 4, 0.0)


def test_within_tolerance_is_a_result() -> None:
    """No culprit: four evaluations, and no error."""
    result = bisect(make(0.01, 0.02, 0.0), total, tolerance=0.1)
    assert result.ok and not result.sets and result.evaluations == 4
    assert str(result).startswith("no culprit: within tolerance (0 on references, 0.03 on kernels")


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_evaluations_of_a_model_are_o_of_k_log_n(data: st.DataObject) -> None:
    """Random culprits among up to 300 modules: all are found, and evaluations are within the documented bound."""
    count = data.draw(st.integers(2, 300))
    culprits = data.draw(st.sets(st.integers(0, count - 1), min_size=1, max_size=4))
    seen = 0

    def metric(model: nn.Module) -> torch.Tensor:
        nonlocal seen
        seen += 1
        return total(model)

    result = bisect(make(*(float(item in culprits) for item in range(count))), metric, tolerance=0.5)
    assert paths(result) == [str(item) for item in sorted(culprits)]
    assert seen == result.evaluations <= bound(count, len(culprits))


def test_a_pair_that_fails_together_is_found() -> None:
    """Neither is enough alone: the result says that they are needed together."""
    model = make(*(0.1,) * 30)
    model[4].wrong = model[21].wrong = 10.0

    def metric(model: nn.Module) -> float:
        return float(total(model) > 15)

    result = bisect(model, metric, tolerance=0.5)
    assert paths(result) == ["4", "21"]
    assert [group.paths for group in result.sets] == [("4", "21")]
    assert [culprit.change for culprit in result.culprits] == [0.0, 0.0]
    assert result.sets[0].change == 1.0
    assert "together: 4, 21: 1, a change of 1" in str(result)
    assert result.evaluations <= bound(30, 2)


def test_several_kernels_and_layers_are_told_apart() -> None:
    """Only the kernel that is wrong is named, though others are around it."""

    class OtherStep(Step):
        pass

    @use_kernel_forward_from_hub("Other")
    class Other(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    with use_kernel_mapping({"Other": {"cpu": kernel(lambda self, x: x + 1)}}):
        result = bisect(nn.Sequential(OtherStep(), Other(), OtherStep()), total, tolerance=0.5)
    assert [(culprit.path, culprit.layer) for culprit in result.culprits] == [("1", "Other")]


def test_a_shared_module_is_one_kernel_with_all_its_paths() -> None:
    """It is switched as a whole, and the table names each of its places."""
    shared = Step(0.25)
    result = bisect(nn.Sequential(Step(), shared, Step(), shared), total, tolerance=0.1)
    (culprit,) = result.culprits
    assert (culprit.path, culprit.also, culprit.metric, result.kernels) == ("1", ("3",), 0.5, 3)
    assert "1 = 3" in str(result)


def test_the_model_itself_can_be_the_layer() -> None:
    """A decorated module on its own has an empty path, which the table spells out."""
    result = bisect(Step(1.0), total, tolerance=0.5)
    assert paths(result) == [""] and "(the model)" in str(result)


def test_a_layer_inside_of_one_that_a_kernel_replaces() -> None:
    """The inner layer runs only where the outer one is on its reference, and is on its reference then, too."""

    @use_kernel_forward_from_hub("Outer")
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Step(100.0)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x)

    with use_kernel_mapping({"Outer": {"cpu": kernel(lambda self, x: x + 1)}}):
        result = bisect(nn.Sequential(Outer(), Step()), total, tolerance=0.5)
    assert paths(result) == ["0"] and result.baseline == 0.0 and result.kernels == 2


def test_a_subclass_that_calls_the_decorated_forward() -> None:
    """A kernel that runs inside of an undecorated forward is found, at the path of its module."""

    class Wrapped(Step):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 2

    assert paths(bisect(nn.Sequential(Step(), Wrapped(1.0)), total, tolerance=0.5)) == ["1"]


def test_functions_are_told_apart_by_the_module_that_calls_them() -> None:
    """A decorated function is wrong for one of three callers: that one is named, however it calls."""

    class Plain(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return double(x)

    model = nn.ModuleList([Doubling(), Plain(), Doubling()])

    def metric(model: nn.ModuleList) -> tuple[torch.Tensor, ...]:
        return model[0](-torch.ones(())), model[1].forward(torch.ones(())), model[2](torch.zeros(()))

    result = bisect(model, metric, tolerance=0.5)
    assert paths(result) == ["1:double"]
    assert (result.baseline, result.suspect) == ((-2.0, 2.0, 0.0), (-2.0, 3.0, 0.0))


def test_gradients_and_checkpoints() -> None:
    """A kernel whose gradient is wrong is found, also where its forward runs again in the backward."""

    class Straight(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            return grad * 3

    @kernel
    def fast(self: Step, x: torch.Tensor) -> torch.Tensor:
        return Straight.apply(x) if self.wrong else x * 1

    model = nn.Sequential(nn.Linear(4, 4), Step(), Step(1.0), Step(), nn.Linear(4, 1))

    def metric(model: nn.Sequential) -> dict[str, torch.Tensor]:
        loss = checkpoint(model, torch.ones(2, 4), use_reentrant=False).sum()
        loss.backward()
        return {"loss": loss, "gradient": model[0].weight.grad.norm()}

    with use_kernel_mapping({"Step": {"cpu": fast}}):
        result = bisect(model, metric, tolerance=1e-4)
    assert paths(result) == ["2"]
    assert result.baseline["loss"] == result.suspect["loss"]
    assert model[0].weight.grad is None


# --- Kernelized and compiled models --------------------------------------------------------------


@pytest.mark.parametrize("mode", [Mode.INFERENCE, Mode.TRAINING, Mode.INFERENCE | Mode.TORCH_COMPILE], ids=str)
def test_kernelized_models(mode: Mode) -> None:
    """Frozen kernels are switched too, also after the scope that chose them, and classes stay as they were."""
    model = kernelize(nn.ModuleList([Step(), Step(0.25), Doubling()]), mode=mode, device="cpu")
    model.train(Mode.TRAINING in mode)
    classes = [type(module) for module in model]

    def metric(model: nn.ModuleList) -> tuple[torch.Tensor, ...]:
        return tuple(module(torch.ones(())) for module in model)

    with use_kernel_mapping({}, inherit_mapping=False):
        result = bisect(model, metric, tolerance=0.1)
        assert metric(model) == (1.0, 1.25, 3.0)
    assert paths(result) == ["1", "2:double"]
    assert result.origins == (f"{__name__}.FastStep", f"{__name__}.wrong_double")
    assert (result.baseline, result.suspect) == ((1.0, 1.0, 2.0), (1.0, 1.25, 3.0))
    assert [type(module) for module in model] == classes
    assert all("forward" not in module.__dict__ for module in model)


def test_a_metric_that_changes_the_mode_of_a_kernelized_model() -> None:
    """`eval` and `train` put kernels to sleep and wake them: culprits are found, and the mode is put back."""
    model = kernelize(make(0, 0.25, 0), mode=Mode.INFERENCE, device="cpu").eval()
    model.train()
    before = [(type(module), dict(module.__dict__)) for module in model]
    assert paths(bisect(model, lambda model: total(model.eval()), tolerance=0.1)) == ["1"]
    assert model.training
    assert [(type(module), dict(module.__dict__)) for module in model] == before


@pytest.mark.slow
@pytest.mark.parametrize("kernelized", [False, True])
def test_compiled_models(kernelized: bool) -> None:
    """A kernel that is wrong only under torch.compile is found, without a graph break, beyond the recompile limit."""

    @kernel
    def fast(self: Step, x: torch.Tensor) -> torch.Tensor:
        return x + self.wrong if torch.compiler.is_compiling() else x

    torch._dynamo.reset()
    model = make(*(float(item in (3, 9, 14)) for item in range(16)))
    with use_kernel_mapping({"Step": {"cpu": fast}}):
        if kernelized:
            kernelize(model, mode=Mode.INFERENCE | Mode.TORCH_COMPILE, device="cpu")
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        with torch.no_grad():
            assert bisect(model, total, tolerance=0.5).ok
            result = bisect(compiled, total, tolerance=0.5)
            assert total(compiled) == 3.0
    assert paths(result) == ["3", "9", "14"]
    torch._dynamo.reset()


@pytest.mark.slow
def test_a_compiled_function_counts_once() -> None:
    """Calls in compiled code cannot be told apart: the function is named for all of them."""

    def fast(x: torch.Tensor) -> torch.Tensor:
        return x * 2 + 1

    fast.can_torch_compile = True  # type: ignore[attr-defined]
    torch._dynamo.reset()

    class Plain(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return double(x)

    model = torch.compile(nn.Sequential(Plain(), Step(), Plain()), backend="eager", fullgraph=True)
    with use_kernel_mapping({"double": {"cpu": fast}}), torch.no_grad():
        assert paths(bisect(model, total, tolerance=0.5)) == ["*:double"]
    torch._dynamo.reset()


def test_a_forward_that_somebody_else_put_there_stays() -> None:
    """The hook of another library runs in every evaluation; in eager code it is no obstacle."""
    model, calls = make(0, 0.25), []
    original = model[1].forward

    def hooked(x: torch.Tensor) -> torch.Tensor:
        calls.append(x)
        return original(x)

    model[1].forward = hooked
    result = bisect(model, total, tolerance=0.1)
    assert paths(result) == ["1"] and len(calls) == result.evaluations
    assert model[1].forward is hooked


def test_a_forward_of_its_own_on_a_kernelized_module() -> None:
    """The reference would replace the hook of another library: an error names the module, which stays as it is."""
    model = kernelize(make(0, 0.25), mode=Mode.INFERENCE, device="cpu")
    original = model[1].forward
    model[1].forward = hooked = lambda x: original(x)
    with pytest.raises(BisectError, match="Module '1' is compiled or kernelized, and has a forward of its own"):
        bisect(model, total, tolerance=0.1)
    assert model[1].forward is hooked


@pytest.mark.slow
def test_a_metric_that_changes_the_mode_of_a_compiled_model() -> None:
    """The mode of the compiled model and of the model in it are put back."""
    torch._dynamo.reset()
    model = make(0, 0.25)
    compiled = torch.compile(model, backend="eager")
    result = bisect(compiled, lambda model: total(model.eval()), tolerance=0.1)
    assert paths(result) == ["1"]
    assert compiled.training and all(module.training for module in model.modules())
    torch._dynamo.reset()


def test_layers_that_must_not_run_their_reference() -> None:
    """`use_fallback=False` and strict mode are about what serves: a bisection may compare all the same."""

    @use_kernel_forward_from_hub("Must", use_fallback=False)
    class Must(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    @kernel
    def fast(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return x + 1

    with use_kernel_mapping({"Must": {"cpu": fast}}):
        assert paths(bisect(nn.Sequential(Step(), Must()), total, tolerance=0.5)) == ["1"]


def test_conditions_are_asked_as_ever() -> None:
    """A module whose condition is not met runs no kernel, and is none of those that are looked at."""

    @use_kernel_forward_from_hub("When", condition=lambda module: module.when)
    class When(nn.Module):
        def __init__(self, when: bool) -> None:
            super().__init__()
            self.when = when

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    @kernel
    def fast(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return x + 1

    with use_kernel_mapping({"When": {"cpu": fast}}):
        result = bisect(nn.Sequential(When(False), When(True)), total, tolerance=0.5)
    assert paths(result) == ["1"] and result.kernels == 1


# --- Metrics -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form",
    [float, lambda t: t, lambda t: t.double().numpy(), lambda t: {"a": 0, "b": t}, lambda t: (t, 1), lambda t: [t]],
    ids=["float", "tensor", "numpy", "dict", "tuple", "list"],
)
def test_forms_of_metrics(form: Callable[[torch.Tensor], Any]) -> None:
    """Numbers in all their forms, alone or several by name or place."""
    assert paths(bisect(make(0, 0.25), lambda model: form(total(model)), tolerance=0.1)) == ["1"]


@pytest.mark.parametrize(
    ("tolerance", "relative", "ok"), [(0.3, 0.0, True), (0.2, 0.0, False), (0.0, 0.06, True), (0.1, 0.04, True)]
)
def test_tolerances_add_up(tolerance: float, relative: float, ok: bool) -> None:
    """The absolute tolerance is allowed, and a share of the metric on references besides."""
    result = bisect(make(0.25), lambda model: 5 - total(model), tolerance=tolerance, relative=relative)
    assert result.ok is ok


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_on_kernels_is_found(value: float) -> None:
    """It is a change beyond every tolerance."""
    result = bisect(make(0, 0, value, 0.1), total, tolerance=1e9)
    assert paths(result) == ["2"] and math.isinf(result.change)
    assert json.loads(result.to_json())["suspect"] in ("nan", "inf")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_on_references_is_an_error(value: float) -> None:
    """Nothing can be compared with it."""
    with pytest.raises(BisectError, match=r"on its reference, the metric is (nan|inf)"):
        bisect(make(1.0), lambda model: total(model) * 0 + value, tolerance=0.1)


@pytest.mark.parametrize(
    "answer",
    [None, "high", torch.ones(2), {}, {"a": "b"}, 1j, torch.tensor(1j), torch.ones((), device="meta")],
    ids=repr,
)
def test_no_number_is_an_error(answer: object) -> None:
    """The message names the evaluation and the value that the metric returned."""
    with pytest.raises(ArgumentTypeError, match="At evaluation 1, with the model as it is, the metric returned"):
        bisect(make(1.0), lambda model: (total(model), answer)[1], tolerance=0.1)


def test_other_numbers_than_before_are_an_error() -> None:
    """A metric returns the same names each time."""
    with pytest.raises(BisectError, match=r"returned \['b'\], and before that \['a'\]") as caught:
        bisect(make(1.0), lambda model: {"a" if total(model) else "b": 1.0}, tolerance=0.1)
    assert caught.value.evaluation == 2


# --- What cannot be answered ---------------------------------------------------------------------


def test_a_metric_that_raises() -> None:
    """The error says at which evaluation and with which kernels, and has the cause."""

    def metric(model: nn.Module) -> float:
        found = total(model)
        if found == 0.5:
            raise RuntimeError("half")
        return float(found)

    with pytest.raises(BisectError, match=r"raised at evaluation 5, with only the kernels of '0'.*: half") as caught:
        bisect(make(0.5, 0.5), metric, tolerance=0.1)
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert (caught.value.evaluation, caught.value.paths) == (5, ("0",))
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.evaluation, again.paths) == (str(caught.value), 5, ("0",))


@pytest.mark.parametrize("broken", ["reference", "inputs"])
def test_a_reference_that_fails_itself(broken: str) -> None:
    """The error says that every layer was on its reference, or that the model was as it is."""

    @use_kernel_forward_from_hub("Broken")
    class Broken(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise NotImplementedError("one day")

    @kernel
    def fast(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return x

    model = nn.Sequential(Broken(), nn.Linear(1, 1))
    inputs = torch.zeros(1, device="meta" if broken == "inputs" else "cpu")
    where = "2, with every decorated layer on its reference" if broken == "reference" else "1, with the model as it is"
    with (
        use_kernel_mapping({"Broken": {"cpu": fast}}),
        pytest.raises(BisectError, match=f"raised at evaluation {where}"),
    ):
        bisect(model, lambda model: model(inputs).sum(), tolerance=0.1)


def test_a_baseline_that_is_not_deterministic() -> None:
    """It is evaluated twice: the error says by how much both differ."""
    numbers = iter(range(100))
    with pytest.raises(BisectError, match=r"evaluated twice with every decorated layer on its reference.* of 1,"):
        bisect(make(1.0), lambda model: total(model) * 0 + next(numbers), tolerance=0.5)


def test_kernels_that_are_not_deterministic() -> None:
    """All kernels are evaluated twice as well."""
    numbers = iter(range(100))

    @kernel
    def fast(self: Step, x: torch.Tensor) -> torch.Tensor:
        return x + next(numbers)

    with (
        use_kernel_mapping({"Step": {"cpu": fast}}),
        pytest.raises(BisectError, match="evaluated twice with all kernels on") as caught,
    ):
        bisect(make(1.0), total, tolerance=0.5)
    assert caught.value.evaluation == 4 and caught.value.paths == ("0",)


def test_noise_within_the_tolerance_is_told() -> None:
    """A difference below the tolerance is no error, and is in the result."""
    numbers = iter(range(100))
    result = bisect(make(1.0), lambda model: float(total(model)) + next(numbers) % 2 / 64, tolerance=0.5)
    assert result.noise == 1 / 64 and paths(result) == ["0"]
    assert "which differ by up to 0.0156" in str(result)


def test_random_numbers_start_alike() -> None:
    """A metric that draws them is deterministic, and the caller's next numbers are as without."""
    torch.manual_seed(3), random.seed(3)
    expected = torch.rand(1), random.random()
    torch.manual_seed(3), random.seed(3)
    result = bisect(make(1.0), lambda model: total(model) + torch.rand(()) + random.random(), tolerance=1e-3)
    assert paths(result) == ["0"] and result.noise == 0
    assert (torch.rand(1), random.random()) == expected


def test_no_decorated_layer() -> None:
    """The error says what to do."""
    with pytest.raises(BisectError, match="has no decorated layer"):
        bisect(nn.Sequential(nn.ReLU()), total, tolerance=0.1)


def test_no_kernel_in_use() -> None:
    """Also where there would be kernels on another device, or the metric never runs the model."""
    for model, metric in ((make(1.0), lambda model: 1.0), (make(1.0).to("meta"), lambda model: 2.0)):
        with pytest.raises(BisectError, match="every decorated layer on its reference"):
            bisect(model, metric, tolerance=0.1)
    with use_kernel_mapping({}, inherit_mapping=False), pytest.raises(BisectError, match="No kernel is in use"):
        bisect(make(1.0), total, tolerance=0.1)


def test_a_metric_that_copies_the_model() -> None:
    """Kernels of a copy are not those of the model: an error, rather than finding nothing."""
    with pytest.raises(BisectError, match="no copy of it"):
        bisect(make(1.0), lambda model: total(copy.deepcopy(model)), tolerance=0.1)


def test_a_metric_that_changes_parameters() -> None:
    """They are not kept twice, so that is an error that names one."""

    def metric(model: nn.Sequential) -> torch.Tensor:
        with torch.no_grad():
            model[1].weight.add_(1)
        return total(model)

    with pytest.raises(BisectError, match=r"changed 1 parameters of the model, such as '1.weight'"):
        bisect(nn.Sequential(Step(1.0), nn.Linear(1, 1)), metric, tolerance=0.1)


def test_a_kernel_that_raises() -> None:
    """It goes into quarantine, as in any call, and the error states that."""

    @kernel
    def fast(self: Step, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no such launch")

    with use_kernel_mapping({"Step": {"cpu": fast}}):
        with (
            pytest.warns(match="quarantine"),
            pytest.raises(BisectError, match=r"a kernel was taken out(.|\n)*no such launch"),
        ):
            bisect(make(1.0), total, tolerance=0.1)
        assert release(quarantined()) == 1


@pytest.mark.parametrize("tolerance", [-1, math.nan, math.inf])
def test_bad_tolerances(tolerance: float) -> None:
    """They are refused before anything is evaluated."""
    for arguments in ({"tolerance": tolerance}, {"tolerance": 0, "relative": tolerance}):
        with pytest.raises(ArgumentError, match="0 or more"):
            bisect(make(1.0), total, **arguments)


def test_arguments_of_the_wrong_type() -> None:
    """Model, metric and tolerance are checked."""
    for model, metric, tolerance in ((total, total, 0.1), (make(1.0), 3, 0.1), (make(1.0), total, "0.1")):
        with pytest.raises(ArgumentTypeError):
            bisect(model, metric, tolerance=tolerance)  # type: ignore[arg-type]


# --- Afterwards ----------------------------------------------------------------------------------


def raising(model: nn.Module) -> float:
    model.eval()
    model(torch.ones(2, 3)).sum().backward()
    raise KeyError("metric")


def interrupted(model: nn.Module) -> float:
    model(torch.ones(2, 3)).sum().backward()
    raise KeyboardInterrupt


def fine(model: nn.Module) -> torch.Tensor:
    loss = model(torch.ones(2, 3)).sum()
    loss.backward()
    return loss


def halved(model: nn.Module) -> torch.Tensor:
    return model.half().float().double()(torch.ones(2, 3).double()).sum()


def replaced(model: nn.Sequential) -> torch.Tensor:
    model[0].weight = nn.Parameter(torch.ones(3, 3), requires_grad=False)
    model[0].bias.data = torch.ones(3)
    return model.requires_grad_(False)(torch.ones(2, 3)).sum()


@pytest.mark.parametrize("kernelized", [False, True])
@pytest.mark.parametrize("metric", [fine, raising, interrupted, halved, replaced])
def test_everything_is_as_before(metric: Callable[[nn.Module], Any], kernelized: bool) -> None:
    """Parameters, buffers, gradients, modes, attributes, plugins, decisions: kept after answers, errors, interrupts."""
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), Step(1.0), Step(), nn.Dropout(0.5))
    if kernelized:
        kernelize(model, mode=Mode.TRAINING, device="cpu")
    gradient = model[0].weight.grad = torch.ones(3, 3)
    manager_before = _plugins()
    state = {name: (t, t.detach().clone(), t.requires_grad) for name, t in _tensors(model).items()}
    attributes = [(type(module), module.training, set(module.__dict__)) for module in model.modules()]
    try:
        bisect(model, metric, tolerance=0.1)
    except (BisectError, KeyboardInterrupt):
        assert metric in (raising, interrupted)
    assert model[0].weight.grad is gradient and torch.equal(gradient, torch.ones(3, 3))
    assert model[0].bias.grad is None
    for name, tensor in _tensors(model).items():
        was, numbers, requires_grad = state[name]
        assert tensor is was and tensor.dtype == numbers.dtype and tensor.requires_grad is requires_grad
        assert torch.equal(tensor, numbers)
    assert [(type(module), module.training, set(module.__dict__)) for module in model.modules()] == attributes
    assert _plugins() == manager_before
    assert model[2](torch.zeros(1)) == 1.0
    unkernelize(model)


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _plugins() -> list[str]:
    from kernels_core import plugin_manager

    return list(plugin_manager().plugins())


def test_others_are_not_disturbed(isolated_plugins: PluginManager) -> None:
    """Another model of the same class keeps its kernels while one is bisected."""
    other = make(7.0)
    seen = set()

    def metric(model: nn.Module) -> torch.Tensor:
        seen.add(float(total(other)))
        return total(model)

    assert paths(bisect(make(0, 0.25), metric, tolerance=0.1)) == ["1"]
    assert seen == {7.0}
    forget()
    assert list(isolated_plugins.plugins()) == ["core", "mapping"]


def test_bisections_within_bisections() -> None:
    """A metric may bisect another model: each has its own switch."""
    inner = make(0, 1.0)

    def metric(model: nn.Module) -> torch.Tensor:
        assert paths(bisect(inner, total, tolerance=0.5)) == ["1"]
        return total(model)

    assert paths(bisect(make(0, 0, 1.0), metric, tolerance=0.5)) == ["2"]


# --- Reports -------------------------------------------------------------------------------------


def test_reports() -> None:
    """A plain table, one for terminals, and JSON say the same."""
    result = bisect(make(0, 0.25), total, tolerance=0.1)
    lines = str(result).splitlines()
    assert (
        lines[0]
        == "1 of 2 kernels changes the metric (0 on references, 0.25 on kernels: a change of 0.25, 0.1 is allowed)"
    )
    assert lines[1].split() == ["path", "layer", "origin", "metric", "change"]
    assert lines[2].split() == ["1", "Step", f"{__name__}.FastStep", "0.25", "0.25"]
    console = Console(file=io.StringIO(), force_terminal=True, width=200)
    console.print(result)
    assert "FastStep" in console.file.getvalue()
    plain = json.loads(result.to_json())
    assert plain["culprits"][0]["path"] == "1" and plain["ok"] is False
    assert plain["sets"] == [{"paths": ["1"], "metric": 0.25, "change": 0.25}]


def test_a_partial_is_a_metric() -> None:
    """Anything that can be called with a model is one."""
    metric = functools.partial(lambda scale, model: total(model) * scale, 2)
    assert bisect(make(0.25), metric, tolerance=0.1).suspect == 0.5
