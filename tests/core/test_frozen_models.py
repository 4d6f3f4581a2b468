"""Kernelized models: what is chosen, what is noticed, and what is undone."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from kernels_core import (
    ArgumentError,
    ArgumentTypeError,
    KernelizeError,
    KernelizeFallback,
    KernelsWarning,
    Mode,
    decorated_layer,
    find_layer,
    frozen_choice,
    hookimpl,
    kernelize,
    plugin_manager,
    quarantine,
    release,
    resolve,
    unkernelize,
    use_kernel_forward_from_hub,
    use_kernelized_func,
)
from kernels_plugins.mapping import use_kernel_mapping

Make = Callable[..., Any]
X = torch.zeros(2)


@use_kernel_forward_from_hub("FrozenScale")
class Scale(nn.Module):
    """A layer that can be pickled, with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, x: torch.Tensor, more: float = 1.0) -> torch.Tensor:
        return x * self.weight + more


class Kernel(nn.Module):
    """Adds ten; other names and another default."""

    can_torch_compile = True

    def forward(self, y: torch.Tensor, by: float = 99.0) -> torch.Tensor:
        return y * self.weight + 10 * by


MAPPING = {"FrozenScale": {"cpu": Kernel}}


def frozen(mode: Mode = Mode.INFERENCE) -> nn.Module:
    """Kernelize a model in a scope, and leave the scope."""
    with use_kernel_mapping(MAPPING):
        return kernelize(nn.Sequential(Scale(), nn.Sequential(Scale())), mode=mode)


def test_choices_outlive_the_scope_and_cost_no_wrapper(make_layer: Make, make_kernel: Make) -> None:
    """The forward of a kernelized module is the kernel's own function, and stays so outside of the scope."""
    kernel = make_kernel(10)
    with use_kernel_mapping({"Add": {"cpu": kernel}}):
        model = kernelize(make_layer()(), mode=Mode.INFERENCE, device="cpu")
    assert type(model).forward is kernel.forward
    assert model(X)[0] == 10


def test_names_and_defaults_stay_those_of_the_layer() -> None:
    """Callers of a kernelized module use the layer's names and get its defaults, whatever the kernel's are."""
    model = frozen()[0]
    assert model(X)[0] == 10 and model(x=X, more=2.0)[0] == 20


def test_unkernelize_restores_exactly() -> None:
    """Class, dictionary and results are those of before."""
    model = nn.Sequential(Scale(), nn.Linear(2, 2))
    before = [(type(module), dict(module.__dict__)) for module in model.modules()]
    with use_kernel_mapping(MAPPING):
        kernelize(model, mode=Mode.INFERENCE)
    assert type(model[0]) is not Scale and isinstance(model[0], Scale) and repr(model[0]) == "Scale()"
    unkernelize(model)
    assert [(type(module), dict(module.__dict__)) for module in model.modules()] == before


def test_only_this_model_is_changed() -> None:
    """Another model of the same classes, and a copy made before, stay as they were."""
    other = Scale()
    model = frozen()
    assert model[0](X)[0] == 10 and other(X)[0] == 1


@pytest.mark.parametrize("broken", ["load", "class"])
def test_failure_midway_changes_nothing(make_layer: Make, make_kernel: Make, broken: str) -> None:
    """A kernel that fails to load for the last layer, or a class that cannot be changed: no module is changed."""

    class Gone:
        def load(self) -> Any:
            raise OSError("gone")

    first, last = make_layer("First")(), make_layer("Last")()
    model = nn.Sequential(first, last)
    source: Any = Gone() if broken == "load" else make_kernel(20)
    if broken == "class":

        class Stubborn(type(last)):  # type: ignore[misc]
            def __init_subclass__(cls) -> None:
                raise TypeError("final")

        model[1] = Stubborn()
    before = [type(module) for module in model.modules()]
    with use_kernel_mapping({"First": {"cpu": make_kernel(10)}, "Last": {"cpu": source}}):
        with pytest.raises((KernelizeError, TypeError)):
            kernelize(model, mode=Mode.INFERENCE, device="cpu")
    assert [type(module) for module in model.modules()] == before


def test_fallback_flags(make_layer: Make, make_kernel: Make) -> None:
    """Each reason to keep the reference is allowed by its flag, and by no other; a refused one says why."""
    kernel = make_kernel(10)

    class Gone:
        def load(self) -> Any:
            raise OSError("gone")

    cases = {
        KernelizeFallback.NO_LAYER: {},
        KernelizeFallback.NO_DEVICE: {"Add": {"cuda": kernel}},
        KernelizeFallback.NO_COMPATIBLE_MODE: {"Add": {"cpu": {Mode.TRAINING: kernel}}},
        KernelizeFallback.CANNOT_LOAD: {"Add": {"cpu": Gone()}},
    }
    for wanted, mapping in cases.items():
        for flag in cases:
            model = make_layer()()
            with use_kernel_mapping(mapping), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                mode = Mode.INFERENCE | Mode.TORCH_COMPILE
                if flag is wanted:
                    assert kernelize(model, mode=mode, device="cpu", use_fallback=flag)(X)[0] == 1
                else:
                    with pytest.raises(KernelizeError, match=f"KernelizeFallback.{wanted.name}"):
                        kernelize(model, mode=mode, device="cpu", use_fallback=flag)


def test_policy_does_not_stop_an_application(make_layer: Make, make_kernel: Make, isolated_plugins: Any) -> None:
    """A veto or a quarantine keeps the reference with one warning by default, and raises where no reference may be."""

    class Policy:
        @hookimpl
        def kernels_authorize(self, request: Any, candidate: Any) -> str | None:
            return "the house says no" if request.layer_name == "Vetoed" else None

    plugin_manager().register(Policy(), "policy")
    vetoed, bad, kernel = make_layer("Vetoed"), make_layer("Bad"), make_kernel(10)
    quarantine(decorated_layer(bad), kernel.forward, kernel="k", reason="it is wrong")
    model = nn.Sequential(vetoed(), bad())
    with use_kernel_mapping({"Vetoed": {"cpu": kernel}, "Bad": {"cpu": kernel}}):
        with pytest.warns(KernelsWarning, match=r"(?s)of 2 layers.*policy lets.*the house says no.*it is wrong"):
            kernelize(model, mode=Mode.INFERENCE, device="cpu")
        assert model(X)[0] == 2 and type(unkernelize(model)[0]) is vetoed
        for name, layer in (("the house says no", model[0]), ("it is wrong", model[1])):
            with pytest.raises(KernelizeError, match=f"(?s){name}.*KernelizeFallback.NO_LAYER"):
                kernelize(layer, mode=Mode.INFERENCE, device="cpu", use_fallback=False)
    release()


def test_train_rests_and_eval_wakes() -> None:
    """train() after a choice for inference is said once; calls decide by themselves until eval()."""
    model = frozen()
    with pytest.warns(KernelsWarning, match=r"train\(\) on a model that was kernelized") as said:
        model.train()
    assert len(said) == 1 and model[0](X)[0] == 1
    model.eval()
    assert model[0](X)[0] == 10
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frozen(Mode.TRAINING).train()


def test_moves_are_noticed() -> None:
    """A move to another device drops the choice and says so; another dtype does not."""
    model = frozen()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.half().float()
    assert type(model[0]) is not Scale
    with use_kernel_mapping({"FrozenScale": {"cuda": Kernel}}):
        moved = kernelize(Scale(), mode=Mode.INFERENCE, device="cuda")
    with pytest.warns(KernelsWarning, match="was moved to cpu"):
        moved.to("cpu")
    assert type(moved) is Scale


@pytest.mark.parametrize("asleep", [False, True])
def test_copies_are_kernelized_and_pickles_are_not(asleep: bool) -> None:
    """Copy and deepcopy keep the choice; pickle and torch.save give the original class back, and say so."""
    model = frozen()
    if asleep:
        with pytest.warns(KernelsWarning):
            model.train()
    for clone in (copy.deepcopy(model), nn.Sequential(copy.copy(model[0]))):
        assert type(clone[0]) is type(model[0]) and clone[0](X)[0] == (1 if asleep else 10)
        clone.eval()
        assert clone[0](X)[0] == 10 and clone[0] is not model[0]
    with pytest.warns(KernelsWarning, match="Choices are not saved") as said:
        loaded = pickle.loads(pickle.dumps(model))
    assert len(said) == 1 and type(loaded[0]) is Scale and "forward" not in loaded[0].__dict__
    with use_kernel_mapping(MAPPING):
        assert loaded[0](X)[0] == 10  # as any decorated layer
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert type(torch.load(buffer, weights_only=False)[0]) is Scale


def test_functions_are_frozen_per_model() -> None:
    """A function that a class names is frozen for the model, for no other, in threads of its own too."""

    @use_kernel_forward_from_hub("frozen_function")
    def function(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    @use_kernelized_func(function)
    class Uses(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return function(x)

    model, other = Uses(), Uses()
    with use_kernel_mapping({"frozen_function": {"cpu": lambda x: x + 10}}):
        kernelize(model, mode=Mode.INFERENCE, device="cpu")
    assert (model(X)[0], other(X)[0], function(X)[0]) == (10, 1, 1)


def test_frozen_models_compile(compiled: Make) -> None:
    """A kernelized model compiles without a graph break, and with the kernel."""
    model = frozen(Mode.INFERENCE | Mode.TORCH_COMPILE)
    run, counter = compiled(model)
    with torch.no_grad():
        assert torch.equal(run(X), model(X)) and counter.frame_count == 1


def test_another_forward_on_the_instance_stays(make_layer: Make, make_kernel: Make) -> None:
    """A forward that another library put on a module is left there; it goes on to a dispatched one."""
    layer = make_layer()()
    inner = layer.forward
    layer.forward = lambda x: inner(x) * 2
    with use_kernel_mapping({"Add": {"cpu": make_kernel(10)}}):
        kernelize(layer, mode=Mode.INFERENCE, device="cpu")
        assert layer(X)[0] == 20
    assert layer(X)[0] == 2


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"mode": Mode.FALLBACK}, ArgumentError),
        ({"mode": Mode.TORCH_COMPILE}, ArgumentError),
        ({"mode": Mode.INFERENCE, "device": "nowhere"}, ArgumentError),
        ({"mode": Mode.INFERENCE, "use_fallback": "yes"}, ArgumentTypeError),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception]) -> None:
    """What no call can have is refused at once."""
    with pytest.raises(error):
        kernelize(Scale(), **arguments)
    with pytest.raises(ArgumentError, match=r"The device of the model is unknown.*kernelize\(..., device='cuda'\)"):
        kernelize(nn.Sequential(), mode=Mode.INFERENCE)
    with pytest.raises(ArgumentTypeError):
        kernelize(3, mode=Mode.INFERENCE)  # type: ignore[type-var]
    with pytest.raises(ArgumentTypeError, match=r"unkernelize takes an nn.Module, not 3"):
        unkernelize(3)  # type: ignore[type-var]
    with pytest.raises(ArgumentError, match="'inference' is not the mode of a call"):
        kernelize(Scale(), mode="inference")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="is not a decorated function"):
        use_kernelized_func(len)


def test_the_choice_of_a_kernelized_module_is_public(make_layer: Make, make_kernel: Make) -> None:
    """`frozen_choice` and `find_layer` answer for kernelized, plain, suspended and undecorated modules alike."""
    cls, kernel = make_layer(), make_kernel(10)
    assert frozen_choice(cls()) is None and find_layer(cls()) is find_layer(cls) is decorated_layer(cls)
    with use_kernel_mapping({"Add": {"cpu": kernel}}):
        model = kernelize(cls(), mode=Mode.INFERENCE, device="cpu")
    choice = frozen_choice(model)
    assert choice is not None and choice.original is cls and choice.resolution is not None
    assert choice.resolution.implementation is kernel.forward
    assert choice.serves(model) and not choice.serves(model.train())
    assert find_layer(model) is choice.layer is decorated_layer(model) is decorated_layer(cls)
    assert resolve(model, device="cpu", mode=Mode.INFERENCE).request.layer is choice.layer
    assert resolve(decorated_layer(cls), device="cpu", mode=Mode.INFERENCE).request.layer is choice.layer
    for other in (nn.Linear, nn.Linear(1, 1), 3, None, len):
        assert find_layer(other) is None
