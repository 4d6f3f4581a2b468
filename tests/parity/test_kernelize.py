"""`kernelize`: kernels that serve, fallbacks, errors, and the changes to a model."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable
from itertools import chain, combinations
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parity_scene import (
    OURS,
    REFERENCE,
    SIDES,
    THEIRS,
    Both,
    Side,
    Source,
    able,
    call,
    capability,
    kernel_class,
    play,
)
from torch import nn

FLAGS = ("NO_LAYER", "NO_DEVICE", "NO_COMPATIBLE_PROPERTIES", "NO_COMPATIBLE_MODE", "CANNOT_LOAD")
SUBSETS = list(chain.from_iterable(combinations(FLAGS, size) for size in range(len(FLAGS) + 1)))

# --- What falls back -----------------------------------------------------------------------------

Situation = tuple[str, Callable[[Side], Any], str, str]

SITUATIONS: dict[str, Situation] = {
    "no mapping": ("NO_LAYER", lambda side: None, "INFERENCE", "cpu"),
    "mapped for another device": ("NO_DEVICE", lambda side: {"cuda": able(3)}, "INFERENCE", "cpu"),
    "mapped for another capability": (
        "NO_COMPATIBLE_PROPERTIES",
        lambda side: {side.lib.Device("cuda", side.lib.CUDAProperties(75, 80)): able(3)},
        "INFERENCE",
        "cuda",
    ),
    "mapped for inference, wanted for training": (
        "NO_COMPATIBLE_MODE",
        lambda side: {"cpu": {side.lib.Mode.INFERENCE: able(3)}},
        "TRAINING",
        "cpu",
    ),
    "mapped for eager, wanted for compile": (
        "NO_COMPATIBLE_MODE",
        lambda side: {"cpu": {side.lib.Mode.TRAINING: able(3)}},
        "INFERENCE|TORCH_COMPILE",
        "cpu",
    ),
    "no backward": (
        "NO_COMPATIBLE_MODE",
        lambda side: {"cpu": Source(kernel_class(3, has_backward=False))},
        "TRAINING",
        "cpu",
    ),
    "not for torch.compile": (
        "NO_COMPATIBLE_MODE",
        lambda side: {"cpu": Source(kernel_class(3))},
        "INFERENCE|TORCH_COMPILE",
        "cpu",
    ),
    "files that are not there": (
        "CANNOT_LOAD",
        lambda side: {"cpu": Source(FileNotFoundError("no build"))},
        "INFERENCE",
        "cpu",
    ),
}


def kernelized(side: Side, situation: Situation, use_fallback: Any) -> float | str:
    """Kernelize one layer in a situation; return its behaviour then, or that it was refused."""
    _, sources, mode, device = situation
    layer = side.layer()
    model, devices = layer(), sources(side)
    try:
        value = side.freeze(
            model,
            {} if devices is None else {layer.kernel_layer_name: devices},
            mode,
            device=device,
            use_fallback=use_fallback,
        )
    except (ValueError, FileNotFoundError) as error:
        if not isinstance(error, ValueError) and situation[0] != "CANNOT_LOAD":
            raise
        return "refused"
    return value


@pytest.mark.filterwarnings("ignore::kernels_core.KernelsWarning")
@pytest.mark.parametrize("what", list(SITUATIONS))
def test_every_flag(both: Both, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """With every set of flags, both keep the reference exactly where the flag of the situation is among them."""
    situation = SITUATIONS[what]
    with capability(monkeypatch, 90):
        for flags in SUBSETS:
            pair = both.run(lambda side, flags=flags: kernelized(side, situation, side.fallback(*flags)))
            pair.agree(REFERENCE if situation[0] in flags else "refused")


@pytest.mark.filterwarnings("ignore::kernels_core.KernelsWarning")
@pytest.mark.parametrize("use_fallback", [True, False])
@pytest.mark.parametrize("what", list(SITUATIONS))
def test_true_and_false(both: Both, monkeypatch: pytest.MonkeyPatch, what: str, use_fallback: bool) -> None:
    """To both, True means all but a failed load, and False means nothing."""
    situation = SITUATIONS[what]
    keeps = use_fallback and situation[0] != "CANNOT_LOAD"
    with capability(monkeypatch, 90):
        pair = both.run(lambda side: kernelized(side, situation, use_fallback))
        pair.agree(REFERENCE if keeps else "refused")


def test_nothing_to_say_without_a_mapping() -> None:
    """A model without offered kernels is kernelized without a warning of ours."""
    outcome = play(OURS, lambda side: kernelized(side, SITUATIONS["no mapping"], True))
    assert (outcome.value, outcome.said) == (REFERENCE, [])


_KINDS = st.builds(
    lambda number, back, compiles: (3.0 + number, back, compiles), st.integers(0, 20), st.booleans(), st.booleans()
)
_REGISTERED = ("INFERENCE", "TRAINING", "INFERENCE|TORCH_COMPILE", "TRAINING|TORCH_COMPILE", "FALLBACK")


@pytest.mark.filterwarnings("ignore::kernels_core.KernelsWarning")
@settings(max_examples=150, deadline=None)
@given(
    registered=st.dictionaries(st.sampled_from(_REGISTERED), _KINDS, max_size=5),
    mode=st.sampled_from(_REGISTERED[:4]),
    flags=st.sampled_from(SUBSETS),
)
def test_any_mapping(registered: dict[str, tuple[float, bool, bool]], mode: str, flags: tuple[str, ...]) -> None:
    """Of any mapping, whatever the kernels declare: where theirs has a kernel, so has ours, and the same one."""

    def scenario(side: Side) -> float:
        layer = side.layer()
        sources = {
            side.mode(wanted): Source(kernel_class(factor, has_backward=back, can_torch_compile=compiles))
            for wanted, (factor, back, compiles) in registered.items()
        }
        mapping = {layer.kernel_layer_name: {"cpu": sources}} if sources else {}
        return side.freeze(layer(), mapping, mode, use_fallback=side.fallback(*flags))

    theirs, ours = play(THEIRS, scenario), play(OURS, scenario)
    for outcome in (theirs, ours):
        assert outcome.error is None or isinstance(outcome.error, ValueError)
    if theirs.error is None and theirs.value != REFERENCE:
        assert ours.get() == theirs.value
    elif theirs.error is None and ours.error is None:
        # Where the best one cannot do it, theirs asks no other.
        able_ones = {factor for factor, back, _ in registered.values() if back or "TRAINING" not in mode}
        assert ours.value in {REFERENCE, *able_ones}
    elif theirs.error is None:
        raise AssertionError(f"only ours raises: {ours.why}")


# --- What is raised ------------------------------------------------------------------------------


def test_device_must_be_known(both: Both) -> None:
    """Both ask for the device of a model that has no parameters."""

    def scenario(side: Side) -> object:
        return side.lib.kernelize(side.layer()(), mode=side.lib.Mode.INFERENCE)

    both.run(scenario).refuse(ValueError)


def test_device_must_exist(both: Both) -> None:
    """Both refuse to kernelize for a device that there is not."""
    both.run(lambda side: side.served(able(3), device="abacus")).refuse(ValueError)


class Other(nn.Module):
    """A kernel of another signature."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x


class Made(nn.Module):
    """A kernel with a constructor."""

    def __init__(self) -> None:
        super().__init__()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Extended(nn.Module):
    """A kernel with a member of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.helper(x)

    def helper(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Keyword(nn.Module):
    """A kernel whose parameter is of another kind."""

    def forward(self, *, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.parametrize("kernel", [Other, Made, Extended, Keyword, dict])
def test_contract(both: Both, kernel: type) -> None:
    """Both refuse a kernel that does not fit the layer, whatever other fallback is allowed."""
    pair = both.run(lambda side: side.served(Source(kernel), use_fallback=True))
    assert isinstance(pair.theirs.error, TypeError)
    assert isinstance(pair.ours.error, ValueError | TypeError)


# --- What it does to a model ---------------------------------------------------------------------


def test_all_modules(both: Both) -> None:
    """Both find decorated layers at any depth, change them in place, and return the model."""

    def scenario(side: Side) -> list[object]:
        first, second = side.layer(), side.layer()
        shared = second()
        plain = nn.Identity()
        model = nn.Sequential(first(), nn.Sequential(plain, nn.ModuleDict({"a": shared})["a"]), shared, nn.ReLU())
        mapping = {first.kernel_layer_name: {"cpu": able(3)}, second.kernel_layer_name: {"cpu": able(5)}}
        with side.lib.use_kernel_mapping(mapping):
            returned = side.lib.kernelize(model, mode=side.lib.Mode.INFERENCE, device="cpu")
        return [returned is model, call(model), model[1][0] is plain, isinstance(model[0], first)]

    both.run(scenario).agree([True, 75.0, True, True])


def test_device_of_the_parameters(both: Both) -> None:
    """Both take the device of the model's parameters where none is given."""

    def scenario(side: Side) -> float:
        layer = side.layer()
        model = nn.Sequential(layer(), nn.Linear(1, 1, bias=False))
        nn.init.ones_(model[1].weight)
        return side.freeze(model, {layer.kernel_layer_name: {"cpu": able(3)}}, device=None)

    both.run(scenario).agree(3.0)


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps", "rocm", "xpu"])
def test_for_another_machine(both: Both, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """Both kernelize for each device that this PyTorch knows, whether or not this machine has one."""

    def scenario(side: Side) -> float:
        layer = side.layer()
        return side.freeze(layer(), {layer.kernel_layer_name: {device: able(3)}}, device=device)

    with capability(monkeypatch, 90, hip=device == "rocm"):
        both.run(scenario).agree(3.0)


def test_torch_device(both: Both) -> None:
    """Both take a `torch.device`."""
    both.run(lambda side: side.served(able(3), device=torch.device("cpu"))).agree(3.0)


def test_choices_outlive_the_scope(both: Both) -> None:
    """Both keep the choice when the scope is left, or another mapping is registered."""

    def scenario(side: Side) -> list[float]:
        layer = side.layer()
        model = layer()
        first = side.freeze(model, {layer.kernel_layer_name: {"cpu": able(3)}})
        side.lib.register_kernel_mapping({layer.kernel_layer_name: {"cpu": able(5)}})
        return [first, call(model)]

    both.run(scenario).agree([3.0, 3.0])


def test_again(both: Both) -> None:
    """Both choose anew when a model is kernelized again, and go back to the reference where nothing is offered."""

    def scenario(side: Side) -> list[float]:
        layer = side.layer()
        name, model = layer.kernel_layer_name, layer()
        return [
            side.freeze(model, {name: {"cpu": able(3)}}),
            side.freeze(model, {name: {"cpu": able(5)}}),
            side.freeze(model, {}),
        ]

    both.run(scenario).agree([3.0, 5.0, REFERENCE])


def test_the_kernel_runs_on_the_module(both: Both) -> None:
    """Both run a kernel's forward on the module that it serves: its parameters and attributes are there."""

    class Weighted(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.weight * self.factor

    def scenario(side: Side) -> float:
        layer = side.layer()
        model = layer()
        model.weight = nn.Parameter(torch.full((1,), 7.0))
        model.factor = 3
        return side.freeze(model, {layer.kernel_layer_name: {"cpu": Source(Weighted)}})

    both.run(scenario).agree(21.0)


def test_one_load_for_equal_sources(both: Both) -> None:
    """Both load a source once for all modules that it serves."""

    def scenario(side: Side) -> list[float]:
        layer, source = side.layer(), able(3)
        model = nn.Sequential(*(layer() for _ in range(4)))
        return [side.freeze(model, {layer.kernel_layer_name: {"cpu": source}}), source.loads]

    both.run(scenario).agree([81.0, 1])


def test_the_rest_of_a_model_is_as_it_was(both: Both) -> None:
    """Both leave state, hooks, training flags and the signature of a kernelized module alone."""

    def scenario(side: Side) -> list[object]:
        layer = side.layer()
        model = nn.Sequential(layer(), nn.Linear(1, 1))
        model[0].register_buffer("buffer", torch.zeros(1))
        calls: list[str] = []
        model[0].register_forward_pre_hook(lambda *_: calls.append("before"))
        model[0].register_forward_hook(lambda *_: calls.append("after"))
        side.freeze(model, {layer.kernel_layer_name: {"cpu": able(3)}})
        return [
            calls,
            sorted(model.state_dict()),
            [name for name, _ in model.named_modules()],
            isinstance(model[0], layer),
            type(model[0]).__name__,
            model.training,
            str(inspect.signature(model[0].forward)).startswith("(x: 'torch.Tensor'"),
        ]

    expected = [["before", "after"], ["0.buffer", "1.bias", "1.weight"], ["", "0", "1"], True, "Layer", True, True]
    both.run(scenario).agree(expected)


def test_copies_are_kernelized(both: Both) -> None:
    """To both, a deep copy of a kernelized model has its kernels, and its own parameters."""

    class Weighted(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.weight * 3

    def scenario(side: Side) -> list[float]:
        layer = side.layer()
        model = layer()
        model.weight = nn.Parameter(torch.ones(1))
        side.freeze(model, {layer.kernel_layer_name: {"cpu": Source(Weighted)}})
        clone = copy.deepcopy(model)
        with torch.no_grad():
            model.weight.fill_(5)
        return [call(clone), call(model)]

    both.run(scenario).agree([3.0, 15.0])


def test_compiled(both: Both) -> None:
    """Both give a kernelized model that compiles without a graph break, to the kernel."""

    def scenario(side: Side) -> float:
        layer = side.layer()
        model = nn.Sequential(layer())
        with side.lib.use_kernel_mapping({layer.kernel_layer_name: {"cpu": able(3)}}):
            side.lib.kernelize(model, mode=side.mode("INFERENCE|TORCH_COMPILE"), device="cpu")
        torch._dynamo.reset()
        with torch.no_grad():
            return call(torch.compile(model, fullgraph=True, backend="eager"))  # type: ignore[arg-type]

    both.run(scenario).agree(3.0)


def test_training(both: Both) -> None:
    """Both train a kernelized model with the kernel's own gradients."""

    def scenario(side: Side) -> list[float]:
        layer = side.layer()
        model = nn.Sequential(nn.Linear(1, 1, bias=False), layer())
        nn.init.ones_(model[0].weight)
        value = side.freeze(model, {layer.kernel_layer_name: {"cpu": able(3)}}, "TRAINING")
        model(torch.ones(1)).backward()
        return [value, float(model[0].weight.grad.item())]

    both.run(scenario).agree([3.0, 3.0])


# --- Mappings ------------------------------------------------------------------------------------


def test_scopes_nest(both: Both) -> None:
    """Both let an inner scope add to the outer one, or replace it, and restore the outer one at its end."""

    def scenario(side: Side) -> list[float]:
        a, b = side.layer(), side.layer()
        first, second = ({layer.kernel_layer_name: {"cpu": able(n)}} for layer, n in ((a, 3), (b, 5)))
        override = {a.kernel_layer_name: {"cpu": able(7)}}
        side.lib.register_kernel_mapping(first)
        found = [side.freeze(nn.Sequential(a(), b()), mapping) for mapping in ({}, second, override)]
        with side.lib.use_kernel_mapping(second, inherit_mapping=False):
            model = side.lib.kernelize(nn.Sequential(a(), b()), mode=side.lib.Mode.INFERENCE, device="cpu")
        return [*found, call(model), side.freeze(nn.Sequential(a(), b()), {})]

    both.run(scenario).agree([6.0, 15.0, 14.0, 10.0, 6.0])


def test_register_instead(both: Both) -> None:
    """In both, `register_kernel_mapping(..., inherit_mapping=False)` drops earlier registrations."""

    def scenario(side: Side) -> float:
        a, b = side.layer(), side.layer()
        side.lib.register_kernel_mapping({a.kernel_layer_name: {"cpu": able(3)}})
        side.lib.register_kernel_mapping({b.kernel_layer_name: {"cpu": able(5)}}, inherit_mapping=False)
        return side.freeze(nn.Sequential(a(), b()), {})

    both.run(scenario).agree(10.0)


@pytest.mark.parametrize("how", ["register_kernel_mapping", "use_kernel_mapping"])
def test_mapping_for_an_unknown_device(both: Both, how: str) -> None:
    """Both refuse a mapping for a device that there is not, and register nothing of it."""

    def scenario(side: Side) -> float:
        layer = side.layer()
        name = layer.kernel_layer_name
        with pytest.raises(ValueError, match="abacus"), contextlib.ExitStack() as stack:
            scope = getattr(side.lib, how)({name + " of others": {"abacus": able(5)}})
            stack.enter_context(scope)
        return side.freeze(layer(), {name: {"cpu": able(3)}})

    both.run(scenario).agree(3.0)


@pytest.mark.parametrize("first", ["FALLBACK", "INFERENCE", "TRAINING"])
@pytest.mark.parametrize("second", ["FALLBACK", "INFERENCE", "TRAINING"])
def test_what_is_registered_last_serves(both: Both, first: str, second: str) -> None:
    """Of two registrations for one layer and device, both let the second serve inference."""

    def scenario(side: Side) -> float:
        layer = side.layer()
        for mode, factor in ((first, 3), (second, 5)):
            side.lib.register_kernel_mapping({layer.kernel_layer_name: {"cpu": {side.lib.Mode[mode]: able(factor)}}})
        return side.freeze(layer(), {})

    both.run(scenario).agree(5.0)


# --- Functions -----------------------------------------------------------------------------------


def test_function_alone(both: Both) -> None:
    """Both leave a decorated function callable, and tell its layer name."""

    def scenario(side: Side) -> list[object]:
        name, scale, _ = side.function()
        return [call(scale), scale.kernel_layer_name == name]  # type: ignore[arg-type,attr-defined]

    both.run(scenario).agree([REFERENCE, True])


def test_function_kernelized(both: Both) -> None:
    """Both serve the function that a class declares to call, by a kernel class."""

    def scenario(side: Side) -> float:
        name, _, model = side.function()
        return side.freeze(model(), {name: {"cpu": able(3)}})

    both.run(scenario).agree(3.0)


def test_function_of_a_class_with_a_constructor(both: Both) -> None:
    """Both keep the constructor of such a class, its arguments and its state."""

    def scenario(side: Side) -> list[object]:
        _, scale, _ = side.function()

        @side.lib.use_kernelized_func(scale)
        class Built(nn.Module):
            def __init__(self, size: int, *, bias: bool = True) -> None:
                super().__init__()
                self.linear = nn.Linear(size, size, bias=bias)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return scale(self.linear(x))

        return [sorted(Built(2, bias=False).state_dict()), len(list(Built(2).modules()))]

    both.run(scenario).agree([["linear.weight"], 2])


def test_function_kernels_of_children(both: Both) -> None:
    """Both serve functions that classes deeper in the model call, and several of one class."""

    def scenario(side: Side) -> float:
        one, first, _ = side.function()
        two, second, _ = side.function()

        @side.lib.use_kernelized_func(first, second)
        class Calls(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return first(second(x))

        return side.freeze(nn.Sequential(nn.Sequential(Calls())), {one: {"cpu": able(3)}, two: {"cpu": able(5)}})

    both.run(scenario).agree(15.0)


def test_function_must_be_decorated(both: Both) -> None:
    """Both refuse to attach a function that is not decorated."""

    def plain(x: torch.Tensor) -> torch.Tensor:
        return x

    both.run(lambda side: side.lib.use_kernelized_func(plain)(nn.Identity)).refuse(ValueError)


def test_only_classes_and_functions(both: Both) -> None:
    """Both refuse to decorate anything else."""
    both.run(lambda side: side.lib.use_kernel_forward_from_hub("Name")(3)).refuse(TypeError)


def test_function_that_declares(both: Both) -> None:
    """Both obey the declarations of a kernel for a function."""

    def scenario(side: Side) -> list[float]:
        name, _, model = side.function()
        unable = Source(kernel_class(3, has_backward=False))
        return [side.freeze(model(), {name: {"cpu": unable}}, mode) for mode in ("INFERENCE", "TRAINING")]

    both.run(scenario).agree([3.0, REFERENCE])


# --- Conditions, and classes of others -----------------------------------------------------------


def test_condition(both: Both) -> None:
    """Both ask the condition with the module, for each module."""

    def scenario(side: Side) -> list[object]:
        seen: list[nn.Module] = []

        def wanted(module: nn.Module) -> bool:
            seen.append(module)
            return bool(module.training)

        layer = side.layer(condition=wanted)
        model = nn.Sequential(layer(), layer())
        model[1].eval()
        return [
            side.freeze(model, {layer.kernel_layer_name: {"cpu": able(3)}}),
            {id(module) for module in seen} == {id(module) for module in model},
        ]

    both.run(scenario).agree([6.0, True])


def test_condition_by_position(both: Both) -> None:
    """Both take the condition as the second argument of both decorators."""

    def scenario(side: Side) -> float:
        class Theirs(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x * REFERENCE

        side.lib.replace_kernel_forward_from_hub(Theirs, "Positional", lambda module: False)
        never = side.lib.use_kernel_forward_from_hub("Positional", lambda module: False)(Theirs)
        return side.freeze(never(), {"Positional": {"cpu": able(3)}})

    both.run(scenario).agree(REFERENCE)


def test_replace(both: Both) -> None:
    """Both make a class of another library dispatch, by name or position of the arguments."""

    def scenario(side: Side) -> list[object]:
        class Theirs(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x * REFERENCE

        returned = side.lib.replace_kernel_forward_from_hub(cls=Theirs, layer_name="Replaced", condition=None)
        return [
            returned,
            call(Theirs()),
            side.freeze(Theirs(), {"Replaced": {"cpu": able(3)}}),
            Theirs.kernel_layer_name,  # type: ignore[attr-defined]
        ]

    both.run(scenario).agree([None, REFERENCE, 3.0, "Replaced"])


def test_subclasses_are_served(both: Both) -> None:
    """Both serve a subclass that has no forward of its own."""

    def scenario(side: Side) -> float:
        layer = side.layer()
        child = type("Child", (layer,), {})
        return side.freeze(child(), {layer.kernel_layer_name: {"cpu": able(3)}})

    both.run(scenario).agree(3.0)


@pytest.mark.parametrize("value", ["0", "1"])
def test_mapping_switched_off(both: Both, value: str) -> None:
    """Both run the reference where DISABLE_KERNEL_MAPPING is 1, and kernels where it is 0."""
    code = """
    class Fast(torch.nn.Module):
        def forward(self, x):
            return x * 3.0

    class Source:
        def load(self):
            return Fast

    tell(served(Source()))
    """
    values = [both.process(side, code, DISABLE_KERNEL_MAPPING=value) for side in SIDES]
    assert values == [REFERENCE if value == "1" else 3.0] * 2


def test_exactly_the_reference_is_restored() -> None:
    """Only in ours: `unkernelize` restores the class, the forward and the state of every module."""
    assert not hasattr(THEIRS.lib, "unkernelize")
    layer = OURS.layer()
    model = nn.Sequential(layer(), nn.Linear(1, 1))
    before = [(type(module), dict(vars(module))) for module in model.modules()]
    with OURS.lib.use_kernel_mapping({layer.kernel_layer_name: {"cpu": able(3)}}):
        OURS.lib.kernelize(model, mode=OURS.lib.Mode.INFERENCE)
    assert call(model[0]) == 3.0
    assert OURS.lib.unkernelize(model) is model
    assert call(model[0]) == REFERENCE
    assert [(type(module), dict(vars(module))) for module in model.modules()] == before
