"""The properties, each found out by running an implementation on a call: it is its own oracle."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from kernels_core import NUMERICS, ArgumentError, ArgumentTypeError, Numeric, references
from kernels_core.replay import Call, Outcome, each_tensor, mapped

from ..oracle.inputs import with_gradients
from ..oracle.subject import stop_if_broken
from .bits import difference
from .invariance import BACKWARD, NOT_TAKEN, PASSED_ON, Judgement, backward_invariant, batch_invariant, short
from .numbers import telling
from .rows import EMPTY, SPREAD, Forward, NotTaken, Rows, rows_of

RUNS = 4


def check_names(names: object, where: str) -> tuple[Numeric, ...]:
    """Return the names of properties, each once.

    Raises:
        ArgumentError: For an unknown one.
        ArgumentTypeError: If it is no sequence of texts.
    """
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise ArgumentTypeError(f"{where} takes names of properties such as 'batch_invariant', not {names!r}.")
    found = tuple(names)
    for name in found:
        if not isinstance(name, str):
            raise ArgumentTypeError(f"{where} takes names of properties such as 'batch_invariant', not {name!r}.")
        if name not in NUMERICS:
            raise ArgumentError(f"{where} names {name!r}: there are {', '.join(NUMERICS)}.")
    return tuple(name for name in NUMERICS if name in found)


def declared_by(kernel: object) -> list[str]:
    """Return the properties that a kernel declares to have."""
    return [name for name in NUMERICS if getattr(kernel, name, False) is True]


def find(
    call: Call,
    forward: Forward,
    reference: Forward,
    names: Iterable[str],
    *,
    compiles: bool = True,
    every: bool = False,
) -> dict[str, Judgement]:
    """Find out whether an implementation has some properties, on a call and on others like it.

    Args:
        call: The call; nothing of it is changed.
        forward: The implementation: a kernel, or the reference.
        reference: The layer's own forward, which shows where the rows are.
        names: The properties; and `BACKWARD`, whether gradients of inputs are batch-invariant, too.
        compiles: Whether it serves compiled calls, too.
        every: Whether to try every number of rows for `batch_invariant`.

    Returns:
        A finding for each name.

    Example:
        >>> call = Call(None, (torch.randn(8, 16),))
        >>> find(call, torch.square, torch.square, ["batch_invariant"])["batch_invariant"].has
        True
    """
    names = list(names)
    wanted = [*check_names([name for name in names if name != BACKWARD], "find"), *([BACKWARD] * (BACKWARD in names))]
    if any(tensor.device.type == "meta" for tensor in call.tensors.values()):
        return dict.fromkeys(wanted, Judgement(None, "tensors on meta hold no numbers"))
    call = _with_gradients(call, forward) if wanted else call
    rows = rows_of(call, reference) if wanted else ""
    if rows in (EMPTY, SPREAD):
        return dict.fromkeys(wanted, Judgement(None, str(rows)))
    if {"deterministic", "recompute_equal"} & {*wanted}:
        call = telling(call)
    with contextlib.suppress(Exception), references():  # one that raises is judged, and reported, below
        if call.run(forward, gradients=False, mutations=False).outputs is NotImplemented:
            return dict.fromkeys(wanted, Judgement(None, NOT_TAKEN))
    found: dict[str, Judgement] = {}
    for name in wanted:
        if name == BACKWARD and "batch_invariant" in found and found["batch_invariant"].has is False:
            found[name] = Judgement(None, "outputs are not batch_invariant")
            continue
        try:
            if name == "deterministic":
                found[name] = _deterministic(call, forward, rows)
            elif name == "batch_invariant":
                found[name] = batch_invariant(rows, forward, every=every)
            elif name == BACKWARD:
                found[name] = backward_invariant(rows, forward, every=every)
            else:
                found[name] = _recompute_equal(call, forward, rows, compiles)
        except NotTaken:
            found[name] = Judgement(None, PASSED_ON)
        except Exception as error:
            stop_if_broken(error)
            found[name] = Judgement(None, f"it raises {short(error)}")
    return found


def _with_gradients(call: Call, forward: Forward) -> Call:
    """Return a call whose inputs require grad, where none of them does: all floating ones, or the first of these.

    A kernel may pass on calls that ask for gradients which no model needs, such as those of angles.
    """
    names = [name for name, tensor in call.inputs.items() if tensor.is_floating_point()]
    while names and not any(tensor.requires_grad for tensor in call.inputs.values()):
        first = call.replaced(partial(_trained, tuple(names)))
        try:
            _run(first, forward, gradients=True)
            return first
        except NotTaken:
            names.pop()
        except Exception:  # which is judged, and reported, elsewhere
            break
    return call


def _trained(names: Collection[str], name: str, leaf: Any) -> Any:
    return leaf.detach().requires_grad_() if name in names else leaf


def taken_away(call: Call, forward: Forward, reference: Forward, name: str, *, every: bool = False) -> str:
    """Return why a kernel lacks a property that the reference has in the same case; empty if it takes nothing away.

    On a CPU, PyTorch computes the last few elements of a tensor otherwise than those before, in whole vectors: kernels
    that consist of its operators are not blamed for that here.
    """
    if name != "batch_invariant":
        finding, other = (find(call, each, reference, [name])[name] for each in (forward, reference))
        return finding.why if finding.has is False and other.has else ""
    rows = rows_of(call, reference)
    on_cpu = all(device.type == "cpu" for device in call.devices)
    finding = batch_invariant(rows, forward, whole_vectors=on_cpu, every=every)
    if finding.has is False and finding.case is not None:
        other = batch_invariant(rows, reference, finding.case, whole_vectors=on_cpu, every=every)
    else:
        finding, other = (
            backward_invariant(rows, each, whole_vectors=on_cpu, every=every) for each in (forward, reference)
        )
    return finding.why if finding.has is False and other.has else ""


def _smaller(call: Call, rows: Rows | str) -> Iterator[Call]:
    """Yield calls with few rows, then the call itself: the first that shows a fault is the smallest of these."""
    if isinstance(rows, Rows):
        yield from (rows.of(slice(count)) for count in (1, 2, 4, 16, 64) if count < min(rows.count, _count(call)))
    yield call


def _count(call: Call) -> int:
    return max((t[..., 0].numel() for t in call.inputs.values() if t.dim() and t.shape[-1]), default=1)


def _shapes(call: Call) -> str:
    return ", ".join(
        f"{name} {'x'.join(map(str, t.shape)) or 'scalar'} {str(t.dtype).removeprefix('torch.')}"
        for name, t in call.inputs.items()
    )


def _run(call: Call, forward: Forward, *, gradients: bool) -> Outcome:
    with references():
        run = call.run(forward, gradients=gradients)
    if run.outputs is NotImplemented:
        raise NotTaken
    return run


# --- Run to run ------------------------------------------------------------------------------------


def _deterministic(call: Call, forward: Forward, rows: Rows | str) -> Judgement:
    """Run the same call several times, from the same random numbers, forward and backward."""
    calls = [call]
    if isinstance(rows, Rows):  # many rows meet in the sums of a backward: that is where atomic additions differ
        calls.append(rows.of(slice(None)))
    backward = True
    for each in calls:
        backward &= (fault := _varies(each, forward)) is not None
        if fault:
            small = next((one for one in _smaller(each, rows) if _varies(one, forward)), each)
            return Judgement(False, f"{fault}, between equal calls; smallest input: {_shapes(small)}")
    only = "" if backward else "; forward only, for its backward raises"
    return Judgement(True, f"in {RUNS} runs each of {' and of '.join(map(_shapes, calls))}{only}")


def _varies(call: Call, forward: Forward) -> str | None:
    """Return how equal calls differ; empty if they do not, None if they do not and only the forward could be run."""
    training, first = with_gradients(call), None
    gradients = True
    for _ in range(RUNS):
        try:
            run = _run(training, forward, gradients=gradients)
        except NotTaken:
            raise
        except Exception:
            if not gradients:
                raise
            gradients, first = False, None  # from the start: a recorded forward may have other bits
            run = _run(call, forward, gradients=False)
        if first is None:
            first = run
        elif text := difference(run.outputs, first.outputs):
            return f"forward: {text}"
        elif text := difference(dict(run.gradients), dict(first.gradients)):
            return f"backward: {text}"
        elif text := difference(dict(run.mutated), dict(first.mutated)):
            return f"changed in place: {text}"
        # Memory that is free now, and that the next run may take without writing to it, holds other numbers then.
        mapped(run.outputs, each_tensor(lambda t: torch.full_like(t, torch.nan) if t.is_floating_point() else t))
    return "" if gradients else None


# --- Recomputed ------------------------------------------------------------------------------------


def _recompute_equal(call: Call, forward: Forward, rows: Rows | str, compiles: bool) -> Judgement:
    """Compare the forward without gradients, recorded, recomputed by a checkpoint, and compiled."""
    left_out = [] if compiles else ["compiled, for it does not declare can_torch_compile = True"]
    faults = _unequal(call, forward, left_out, compiles)
    if not faults:
        about = f"without gradients, recorded, recomputed{', compiled' if not left_out else ''}: {_shapes(call)}"
        if compiles and left_out:
            return Judgement(None, f"not {', '.join(left_out)}; otherwise {about}")
        return Judgement(True, about + (f"; not {', '.join(left_out)}" if left_out else ""))
    only_compiled = set(faults) <= {"compiled", "compiled and recorded"}
    smaller = itertools.islice(_smaller(call, rows), 1 if only_compiled else None)  # compiling takes seconds
    for small in smaller:
        if small is not call and (found := _unequal(small, forward, [], only_compiled)):
            return Judgement(False, f"{_listed(found)}; smallest input: {_shapes(small)}")
    return Judgement(False, f"{_listed(faults)}; input: {_shapes(call)}")


def _listed(faults: dict[str, str]) -> str:
    return "; ".join(f"{name}: {text}" for name, text in faults.items())


def _unequal(call: Call, forward: Forward, left_out: list[str], compiles: bool) -> dict[str, str]:
    """Return how each way to run differs from the forward without gradients."""
    training = with_gradients(call)
    expected = _run(call, forward, gradients=False).outputs
    ways: dict[str, Callable[[], Iterable[Any]]] = {
        "recorded": lambda: [_run(training, forward, gradients=True).outputs],
        "recomputed": lambda: _recomputed(training, forward),
    }
    if compiles:
        ways["compiled"] = lambda: [_run(call, _compiled(forward), gradients=False).outputs]
        ways["compiled and recorded"] = lambda: [_run(training, _compiled(forward), gradients=True).outputs]
    faults = {}
    for name, run in ways.items():
        try:
            found = list(run())
        except Exception as error:  # such as a kernel without a backward, which serves no training
            left_out.append(f"{name}, which raises {short(error)}")
            continue
        if text := next(filter(None, (difference(one, expected) for one in found)), ""):
            faults[name] = text
    return faults


def _recomputed(call: Call, forward: Forward) -> list[Any]:
    """Return what the forward returned in each of its runs under a checkpoint."""
    seen: list[Any] = []

    def noted(*args: Any, **kwargs: Any) -> Any:
        outputs = forward(*args, **kwargs)
        seen.append(mapped(outputs, each_tensor(lambda t: t.detach().clone())))
        return outputs

    def checkpointed(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(noted, *args, use_reentrant=False, **kwargs)

    with set_checkpoint_early_stop(False):  # a recomputation that stops early returns nothing to compare
        _run(call, checkpointed, gradients=True)
    return seen


def _compiled(forward: Forward) -> Forward:
    """Return a forward as `torch.compile` makes it by default; a copy of the code leaves other variants alone."""

    def inlined(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    inlined.__code__ = inlined.__code__.replace()
    compiled: Forward = torch.compile(inlined, dynamic=False)
    return compiled
