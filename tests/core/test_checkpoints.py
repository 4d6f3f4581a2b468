"""Calls that are made again in a backward: output and gradient are of one function."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from warned import never, noted

from kernels_core import (
    ArgumentTypeError,
    KernelsWarning,
    Mode,
    checkpoint_scopes,
    kernelize,
    use_kernel_forward_from_hub,
)
from kernels_core.guards.functions import function_contexts, in_function
from kernels_core.scopes.frame import here, root
from kernels_core.torch_internals import DispatchMode, saved_tensors_hooks
from kernels_plugins.mapping import register_kernel_mapping, use_kernel_mapping

pytestmark = pytest.mark.filterwarnings("ignore::kernels_core.KernelsWarning")


def times(factor: float, **declared: bool) -> type[nn.Module]:
    """Return a kernel whose output and gradient show its factor."""
    forward: Any = lambda self, x: x * factor  # noqa: E731
    return type(f"Times{factor:g}", (nn.Module,), {"forward": forward, "can_torch_compile": True, **declared})


@pytest.fixture
def layer() -> nn.Module:
    """Return a layer that doubles."""

    @use_kernel_forward_from_hub("Times")
    class Times(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2

    return Times()


@pytest.fixture(autouse=True)
def _nothing_registered() -> Iterator[None]:
    yield
    register_kernel_mapping({}, inherit_mapping=False)


class Recomputing(torch.autograd.Function):
    """A reentrant checkpoint as other libraries write it; the function is kept under a name that is not theirs."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Any], x: torch.Tensor) -> Any:
        ctx.function, ctx.x = function, x
        return function(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        x = ctx.x.detach().requires_grad_()
        with torch.enable_grad():
            return None, torch.autograd.grad(ctx.function(x), x, gradient)[0]


def reentrant(function: Callable[..., Any], x: torch.Tensor) -> Any:
    return checkpoint(function, x, use_reentrant=True)


def derived_elsewhere(y: torch.Tensor, x: torch.Tensor) -> tuple[float, float]:
    """Return the factors of output and gradient; the backward runs in a thread of its own, as on a GPU."""
    frames = []

    def backward() -> None:
        y.backward(retain_graph=True)
        frames.append(here())

    thread = threading.Thread(target=backward)
    thread.start()
    thread.join()
    assert frames == [root] and x.grad is not None
    return y.item(), x.grad.item()


@pytest.mark.parametrize("function", [reentrant, Recomputing.apply])
@pytest.mark.parametrize("by_mode", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_first_pass_is_training(layer: nn.Module, function: Any, by_mode: bool, compiled: bool) -> None:
    """A kernel for inference serves neither pass: not one that declares it, nor one that is mapped for it."""
    traced = Mode.TORCH_COMPILE  # a source for eager calls alone would not serve compiled code
    modes = {m | t: times(f) for m, f in ((Mode.INFERENCE, 3), (Mode.TRAINING, 4)) for t in (m, traced)}
    register_kernel_mapping({"Times": {"cpu": modes if by_mode else times(3, has_backward=False)}})
    layer = torch.compile(layer, backend="eager") if compiled else layer
    expected = 4 if by_mode else 2
    for _ in range(2):  # cold, then warm
        x = torch.ones(1, requires_grad=True)
        assert derived_elsewhere(function(layer, x), x) == (expected, expected)
    with torch.no_grad():
        assert layer(torch.ones(1)).item() == 3
    with torch.inference_mode():
        assert layer(torch.ones(1)).item() == 3


@pytest.mark.parametrize("function", [reentrant, Recomputing.apply])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_first_pass_of_a_model_that_is_kernelized_for_inference(
    layer: nn.Module, function: Any, compiled: bool
) -> None:
    """A kernel without a backward serves neither pass; it serves outside of the checkpoint."""
    with use_kernel_mapping({"Times": {"cpu": times(3, has_backward=False)}}):
        mode = Mode.INFERENCE | Mode.TORCH_COMPILE if compiled else Mode.INFERENCE
        kernelize(layer, mode=mode, device="cpu")
    layer = torch.compile(layer, backend="eager") if compiled else layer
    for _ in range(2):
        with torch.no_grad():
            assert layer(torch.ones(1)).item() == 3
        x = torch.ones(1, requires_grad=True)
        assert derived_elsewhere(function(layer, x), x) == (2, 2)


BLOCKS: dict[str, Callable[[nn.Module], Any]] = {
    "layer": lambda layer: layer,
    "model": lambda layer: nn.Sequential(nn.Identity(), layer),
    "nested": lambda layer: lambda x: reentrant(layer, x),
    "compiled": lambda layer: torch.compile(layer, backend="eager"),
}


@pytest.mark.parametrize("block", BLOCKS)
def test_a_reentrant_checkpoint_recomputes_in_its_scopes(layer: nn.Module, block: str) -> None:
    """In another thread, after the scopes were left and their objects dropped, the kernel of the forward serves."""
    for kernel, factor in ((times(3), 3), (times(4, has_backward=False), 2)):
        function = BLOCKS[block](layer)
        for _ in range(2):
            x = torch.ones(1, requires_grad=True)
            with use_kernel_mapping({}), use_kernel_mapping({"Times": {"cpu": kernel}}):
                y = reentrant(function, x)
            assert derived_elsewhere(y, x) == (factor, factor)


def test_a_scope_inside_of_a_checkpoint_stays_inside(layer: nn.Module) -> None:
    """A layer that is called beside that scope is recomputed outside of it, too."""

    def function(x: torch.Tensor) -> Any:
        with use_kernel_mapping({"Times": {"cpu": times(3)}}):
            x = layer(x)
        return layer(x)

    x = torch.ones(1, requires_grad=True)
    assert derived_elsewhere(reentrant(function, x), x) == (6, 6)


def test_an_error_in_a_recomputation_leaves_the_scopes(layer: nn.Module) -> None:
    """The thread that runs a backward is in no scope after an error."""
    calls: list[int] = []

    def function(x: torch.Tensor) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise ValueError("second call")
        return layer(x)

    with use_kernel_mapping({"Times": {"cpu": times(3)}}):
        y = reentrant(function, torch.ones(1, requires_grad=True))
    with pytest.raises(ValueError, match="second call"):
        y.backward()
    assert here() is root


def test_a_function_that_cannot_be_brought_into_its_scopes_is_reported(layer: nn.Module) -> None:
    """In a scope, a checkpoint of unknown kind issues a warning that names it; at the root, none."""
    for scoped in (False, True):
        with noted() as caught:
            mapping = {"Times": {"cpu": times(3)}}
            with use_kernel_mapping(mapping) if scoped else contextlib.nullcontext():
                Recomputing.apply(layer, torch.ones(1, requires_grad=True))
        told = [str(w.message) for w in caught if issubclass(w.category, KernelsWarning)]
        assert len(told) == scoped and all("Recomputing" in text for text in told)


class SetsUp(torch.autograd.Function):
    """A checkpoint whose forward gets no context."""

    generate_vmap_rule = True

    @staticmethod
    def forward(layer: Any, x: torch.Tensor) -> Any:
        return layer(x.detach())

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.layer, x = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        return None, *torch.func.vjp(ctx.layer, *ctx.saved_tensors)[1](gradient)


@pytest.mark.parametrize("by_mode", [False, True])
@pytest.mark.parametrize("transformed", [False, True])
def test_functions_with_setup_context(layer: nn.Module, by_mode: bool, transformed: bool) -> None:
    """They get the kernel for training in both passes, under `torch.func`, too; in a scope, a warning names them."""
    mapping: Any = {"Times": {"cpu": times(3)}}
    if by_mode:
        mapping = {"Times": {"cpu": {Mode.INFERENCE: times(5), Mode.TRAINING: times(3)}}}

    def derived(x: torch.Tensor) -> tuple[float, float]:
        if transformed:
            gradient, y = torch.func.grad_and_value(lambda x: SetsUp.apply(layer, x).sum())(x)
            return y.item(), gradient.item()
        x = x.clone().requires_grad_()
        y = SetsUp.apply(layer, x)
        y.backward()
        return y.item(), x.grad.item()  # type: ignore[union-attr]

    with (
        pytest.warns(KernelsWarning, match="in the forward of SetsUp, a custom") as caught,
        use_kernel_mapping(mapping),
    ):
        assert [derived(torch.ones(1)) for _ in range(3)] == [(3, 3)] * 3
    assert len([w for w in caught if issubclass(w.category, KernelsWarning)]) == 1
    register_kernel_mapping(mapping)
    with never(KernelsWarning):
        assert derived(torch.ones(1)) == (3, 3)


def test_checkpoint_scopes(layer: nn.Module) -> None:
    """With this `context_fn`, a checkpoint that is not reentrant recomputes in its scopes, again and again."""
    x = torch.ones(1, requires_grad=True)
    with use_kernel_mapping({"Times": {"cpu": times(3)}}):
        y = checkpoint(lambda x: layer(x).sin(), x, use_reentrant=False, context_fn=checkpoint_scopes)
    assert derived_elsewhere(y, x)[1] == pytest.approx(3 * torch.tensor(3.0).cos().item())
    assert here() is root
    y.backward()
    assert x.grad is not None and x.grad.item() == pytest.approx(6 * torch.tensor(3.0).cos().item())


def test_checkpoint_scopes_around_other_contexts(layer: nn.Module) -> None:
    """Around a selective `context_fn`, kernels are recomputed in their scopes, but not the operators that it keeps."""
    operators: list[str] = []

    class Watch(DispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            operators.append(func.__name__)
            return func(*args, **(kwargs or {}))

    class Product(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.mm(x, x) * 3

    kept = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])
    x, recomputed = torch.ones(1, 1, requires_grad=True), []
    contexts: list[Any] = [checkpoint_scopes, checkpoint_scopes(inner=kept)]
    for context_fn in contexts:
        with use_kernel_mapping({"Times": {"cpu": Product}}):
            layer(x)  # proven to keep gradients
            y: Any = checkpoint(lambda x: layer(x).sin().sin(), x, use_reentrant=False, context_fn=context_fn)
        x.grad = None
        with Watch():  # type: ignore[no-untyped-call]
            y.backward()
        recomputed.append(operators.count("mm.default") - 2)  # the backward of a product has two
        operators.clear()
        expected = 6 * torch.tensor(3.0).cos() * torch.tensor(3.0).sin().cos()
        assert x.grad is not None and x.grad.item() == pytest.approx(expected.item())
    assert recomputed == [1, 0]
    with pytest.raises(ArgumentTypeError, match="inner is a context_fn"):
        checkpoint_scopes(inner=[])  # type: ignore[call-overload]
    for made in (3, None, (1, 2), (contextlib.nullcontext(),)):
        wrong: Any = checkpoint_scopes(inner=lambda made=made: made)  # type: ignore[call-overload]
        with pytest.raises(ArgumentTypeError, match="returns two context managers; it has returned"):
            checkpoint(lambda x: layer(x), x, use_reentrant=False, context_fn=wrong)


@pytest.mark.parametrize("selective", [False, True])
def test_checkpoint_scopes_in_compiled_code(layer: nn.Module, selective: bool) -> None:
    """Where a checkpoint is compiled, its graph has the kernels of its scopes, and is recomputed as one."""
    kept = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.sin.default])
    context_fn: Any = checkpoint_scopes(inner=kept) if selective else checkpoint_scopes
    torch._dynamo.reset()

    def run(x: torch.Tensor) -> Any:
        return checkpoint(lambda x: layer(x).sin().sin(), x, use_reentrant=False, context_fn=context_fn)

    x = torch.ones(1, requires_grad=True)
    with use_kernel_mapping({"Times": {"cpu": times(3)}}):
        y = torch.compile(run, backend="aot_eager", fullgraph=True)(x)
    y.backward()
    expected = 3 * torch.tensor(3.0).cos() * torch.tensor(3.0).sin().cos()
    assert x.grad is not None and x.grad.item() == pytest.approx(expected.item())


def test_a_checkpoint_that_keeps_no_scopes_is_reported(layer: nn.Module) -> None:
    """The first recorded call in a scope and in such a checkpoint warns, once; a call in any other one does not."""

    def told(function: Any, scope: Any, **options: Any) -> list[str]:
        with noted() as caught, scope:
            y: Any = checkpoint(function, torch.ones(1, requires_grad=True), **{"use_reentrant": False, **options})
            y.backward()
            layer(torch.ones(1, requires_grad=True))
        return [str(w.message) for w in caught if issubclass(w.category, KernelsWarning)]

    def fresh() -> use_kernel_mapping:
        return use_kernel_mapping({"Times": {"cpu": times(3)}})

    def scoped(x: torch.Tensor) -> Any:
        with fresh():
            return layer(x)

    with torch.autograd.graph.saved_tensors_hooks(str, str):
        known = saved_tensors_hooks() is not None  # not before PyTorch 2.7
    assert not told(layer, contextlib.nullcontext())
    assert not told(scoped, contextlib.nullcontext())
    assert not told(layer, fresh(), context_fn=checkpoint_scopes)
    assert not told(layer, fresh(), use_reentrant=True)
    assert not told(lambda x: checkpoint(layer, x, use_reentrant=True), fresh(), context_fn=checkpoint_scopes)
    texts = told(layer, fresh()) + told(layer, fresh())
    assert len(texts) == known and all("context_fn=kernels_core.checkpoint_scopes" in text for text in texts)


def test_the_forward_of_a_function_is_found_without_private_names() -> None:
    """The stack shows it, too, where PyTorch has no name for it; no other forward does."""
    found: list[tuple[bool, int]] = []

    class Look(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found.append((in_function(), len(list(function_contexts()))))
            return x * 1

    x = torch.ones(1, requires_grad=True)
    with torch.no_grad():
        Look()(x)
    reentrant(lambda x: reentrant(Look(), x), x)
    assert found == [(False, 0), (True, 2)]
