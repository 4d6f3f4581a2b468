"""`verify`: every kernel that is offered for a layer, compared with the layer's own forward."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from types import NoneType
from typing import Any

import torch
from torch import nn

from kernels_core import (
    ArgumentError,
    ArgumentTypeError,
    error_text,
    find_layer,
    references,
    require_type,
    set_module,
    source_label,
)
from kernels_core.replay import Call, ModelState
from kernels_core.torch_internals import dynamo_is_imported

from ..comparison import Tolerances, check_tolerances
from ..comparison.ranks import mesh_of, together
from ..numerics.judge import numeric_rows
from ..numerics.properties import check_names
from .inputs import Recorded, decorated, record
from .report import VerifyReport, VerifyRow
from .subject import Plan, Subject


def verify(
    model_or_layer: nn.Module | Callable[..., Any],
    *inputs: Any,
    gradients: bool = True,
    dtypes: Sequence[torch.dtype] | None = None,
    tolerances: Tolerances | None = None,
    numerics: Collection[str] = (),
    every_size: bool = False,
    **named_inputs: Any,
) -> VerifyReport:
    """Compare every kernel that is offered for a layer with the layer's own forward.

    Every candidate is tried, not only the one that would serve: on the given inputs, and on others that are
    derived from them (other values, dtypes, layouts and sizes, autocast), for inference and for training. May
    download and import kernels. Nothing is changed: parameters, buffers, gradients, random numbers and inputs
    are as before, whatever fails.

    Args:
        model_or_layer: A model, which runs once on its references, so that the inputs of its layers are known;
            or a decorated layer or function.
        *inputs: Its positional arguments.
        gradients: Whether to compare training, too: outputs, and the gradients of inputs and parameters.
        dtypes: Compare only in these dtypes: inputs and parameters of another are converted. None for that of the
            inputs, with all cases, and one case in each other.
        tolerances: Relative and absolute tolerance, or these per dtype; by default those of `torch.testing`,
            around a reference in float64 where the layer can be run in it.
        numerics: Properties to find out bit by bit, of each kernel and of the reference: names of `NUMERICS`. Those
            that a kernel declares are found out in any case. Decisions and receipts have the findings from then on.
        every_size: Whether to try every number of rows for `batch_invariant`, as for `check_kernel`.
        **named_inputs: Its keyword arguments.

    Returns:
        A report with a row for each comparison.

    Raises:
        ArgumentError: If the model cannot be run with the inputs, a tolerance is below 0, or there is no such property.
        ArgumentTypeError: If it is neither a module nor a decorated function, or tolerances are not pairs of numbers.

    Example:
        >>> @use_kernel_forward_from_hub("Double")
        ... def double(x):
        ...     return x + x
        >>> def kernel(x):
        ...     return x * 2
        >>> with use_kernel_mapping({"Double": {"cpu": kernel}}):
        ...     verify(double, torch.randn(4, 8)).ok
        True
    """
    check_tolerances(tolerances)
    require_type(gradients, bool, "gradients")
    require_type(dtypes, (Sequence, NoneType), "dtypes")
    for dtype in dtypes or ():
        require_type(dtype, torch.dtype, "each of dtypes")
    require_type(every_size, bool, "every_size")
    plan = Plan(gradients, dtypes, tolerances, check_names(numerics, "numerics"), every_size)
    return VerifyReport(tuple(verify_each(model_or_layer, inputs, named_inputs, plan)))


def verify_each(
    model_or_layer: Any, inputs: Sequence[Any], named_inputs: Mapping[str, Any], plan: Plan
) -> Iterator[VerifyRow]:
    """Yield each row of the report of `verify` when it is known."""
    layer = find_layer(model_or_layer)
    module = model_or_layer if isinstance(model_or_layer, nn.Module) else None
    if module is None and (layer is None or isinstance(model_or_layer, type)):
        raise ArgumentTypeError(
            f"verify takes a module or a decorated function, not {source_label(model_or_layer)}: "
            "make an instance of a class, and decorate a function with @use_kernel_forward_from_hub(name)."
        )
    call = Call(module, tuple(inputs), named_inputs, layer.signature if layer is not None else None).snapshot()
    _check_devices(call)
    known: set[object] = set()
    with ModelState(module).kept() if module is not None else contextlib.nullcontext():
        if module is None and layer is not None:
            recorded = [Recorded(layer.qualname.rpartition(".")[2], layer, call)]
        else:
            recorded = _recorded(model_or_layer, call, plan.gradients)
        for one in recorded:
            described = (one.layer.number, tuple((t.shape, t.dtype, t.device) for t in one.call.inputs.values()))
            subject = Subject(one, plan)
            yield from subject.rows(derived=described not in known)
            if described not in known:
                yield from numeric_rows(one, subject, plan.numerics, every=plan.every_size)
            known.add(described)
    if module is not None:
        called = {one.path for one in recorded}
        for path, _, uncalled in decorated(module):
            if path not in called:
                reason = "the model does not call it with these inputs"
                yield VerifyRow(path, uncalled.name, "not called", reason=reason)


def _check_devices(call: Call) -> None:
    """Refuse inputs and models on different devices: PyTorch's own message names neither."""
    where = {name: tensor.device for name, tensor in call.inputs.items() if tensor.dim()}
    tensors = (*call.module.parameters(), *call.module.buffers()) if call.module is not None else ()
    state = {tensor.device for tensor in tensors}
    if len(state) == 1 and not state.issuperset(where.values()):
        places = ", ".join(f"{name} on {device}" for name, device in where.items() if device not in state)
        raise ArgumentError(f"The model is on {state.pop()}, but its inputs are not: {places}. Move one to the other.")
    if call.module is None and len(set(where.values())) > 1:
        places = ", ".join(f"{name} on {device}" for name, device in where.items())
        raise ArgumentError(f"The inputs are on several devices: {places}. Move them to one.")


def _recorded(model: Any, call: Call, gradients: bool) -> list[Recorded]:
    """Run the model once, and return the calls of its layers."""
    with record(model) as calls, references(model), contextlib.ExitStack() as stack:
        if gradients:
            stack.enter_context(torch.enable_grad())
        if dynamo_is_imported():  # compiled layers, and compiled parts of them, run as they were written
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        held = (*call.inputs.values(), *(call.module.parameters() if call.module is not None else ()))
        try:
            together(mesh_of(held), lambda: model(*call.args, **call.kwargs))
        except Exception as error:
            raise ArgumentError(
                f"The model cannot be run with these inputs, on its references: {error_text(error)}"
            ) from error
    return calls


set_module("kernels_plugins", globals())
