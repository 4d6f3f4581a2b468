"""`check_kernel`: the probes for the authors of kernels, as one assertion."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn

from kernels_core import (
    NUMERICS,
    ArgumentError,
    ArgumentTypeError,
    Candidate,
    Layer,
    LayerRequest,
    Mode,
    Resolution,
    find_layer,
    require_type,
    set_module,
    source_label,
)
from kernels_core.replay import Call

from ..comparison import Tolerances, check_tolerances
from ..numerics.properties import check_names, declared_by, taken_away
from .inputs import Recorded
from .probe import ProbeReport, implementation_of, probe


def check_kernel(
    kernel: type[nn.Module] | Callable[..., Any],
    reference: nn.Module | Callable[..., Any],
    *inputs: Any,
    ignore: Collection[str] = (),
    tolerances: Tolerances | None = None,
    numerics: Collection[str] = (),
    every_size: bool = False,
    **named_inputs: Any,
) -> ProbeReport:
    """Assert that a kernel computes the same as a reference, on some inputs and on others that are derived from them.

    Outputs and gradients, other dtypes, layouts and sizes, autocast, `torch.compile` without graph breaks and, on
    a GPU, capture in a CUDA graph. For a test of a kernel, with pytest or without.

    Bit by bit, a kernel has to be `deterministic` and `batch_invariant` where the reference is, and in any case if it
    declares to be, or `numerics` asks for it. `recompute_equal` is found out only then, for that compiles.

    Args:
        kernel: A kernel class, whose `forward` runs on the module that it serves, or a function.
        reference: The module that it serves, decorated or not, or a function.
        *inputs: Positional arguments for both.
        ignore: Probes that need not pass, such as `{"compile", "gradients"}`, with the reason in your test.
        tolerances: As for `verify`.
        numerics: Properties that the kernel must have, whatever the reference has: names of `NUMERICS`.
        every_size: Whether to try every number of rows for `batch_invariant`, which may take minutes; else
            some hundred, where kernels change their way.
        **named_inputs: Keyword arguments for both.

    Returns:
        The results of all probes.

    Raises:
        AssertionError: That lists every probe that failed.
        ArgumentError: If `ignore` names an unknown probe, or `numerics` an unknown property.
        ArgumentTypeError: If kernel and reference are not both for modules, or both functions with a signature.

    Example:
        >>> def kernel(x):
        ...     return torch.nn.functional.silu(x)
        >>> def reference(x):
        ...     return x * torch.sigmoid(x)
        >>> check_kernel(kernel, reference, torch.randn(4, 8)).can("compile")
        True
    """
    module = reference if isinstance(reference, nn.Module) else None
    is_function = module is None
    if is_function and (isinstance(reference, type) or not callable(reference)):
        raise ArgumentTypeError(f"The reference is a module or a function, not {source_label(reference)}.")
    if not callable(kernel) or (isinstance(kernel, type) and not issubclass(kernel, nn.Module)):
        raise ArgumentTypeError(f"The kernel is an nn.Module class or a function, not {source_label(kernel)}.")
    if not is_function and not isinstance(kernel, type):
        raise ArgumentTypeError(f"A kernel for a module is a class with a forward, not {source_label(kernel)}.")
    require_type(ignore, Collection, "ignore")
    for probe_name in ignore:
        require_type(probe_name, str, "A probe in ignore")
    check_tolerances(tolerances)
    require_type(every_size, bool, "every_size")
    asked = check_names(numerics, "numerics")
    forward: Any = type(module).forward if module is not None else reference
    name = type(module).__name__ if module is not None else getattr(forward, "__name__", source_label(forward))
    place = f"{getattr(forward, '__module__', '?')}.{getattr(forward, '__qualname__', repr(forward))}"
    layer = find_layer(reference) or Layer(name, place, forward, is_function)
    call = Call(module, inputs, named_inputs, layer.signature).snapshot()
    device = (call.devices or [torch.device("cpu")])[0]
    implementation = implementation_of(kernel, function=is_function)
    resolution = Resolution(
        LayerRequest(layer.name, device, Mode.INFERENCE, layer),
        implementation,
        Candidate(kernel),
        source_label(kernel),
    )
    wanted = {*asked, *declared_by(kernel)}
    names = {"deterministic", "batch_invariant", *wanted}
    report = probe(Recorded("", layer, call), resolution, tolerances=tolerances, numerics=names, every_size=every_size)
    if unknown := sorted(set(ignore) - report.probes.keys() - {"gradients", "compile", "cuda graph", *NUMERICS}):
        raise ArgumentError(f"ignore names {', '.join(unknown)}: there are {', '.join(report.probes)}.")
    failed = {
        name: f"it declares {name} = True, and that is not so: {reason}" if name in declared_by(kernel) else reason
        for name, reason in report.failed.items()
        if name not in ignore
        and (
            name not in NUMERICS
            or name in wanted
            or taken_away(call, implementation, layer.reference, name, every=every_size)
        )
    }
    must = {"undecided", "forward", *wanted} - set(ignore)
    undecided = {name: one.reason for name, one in report.probes.items() if one.ok is None and name in must}
    if failed or undecided:
        lines = "\n".join(f"  {name}: {reason}" for name, reason in {**failed, **undecided}.items())
        raise AssertionError(
            f"{source_label(kernel)} does not compute the same as {layer.qualname}, in "
            f"{len(failed) or len(undecided)} of {len(report.probes)} probes:\n{lines}"
        )
    return report


set_module("kernels_plugins", globals())
