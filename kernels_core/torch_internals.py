"""The only file of both packages that uses private names of PyTorch. It may change with every PyTorch.

Each name stands in an entry of its own, with a fallback that is slower or more cautious, and never raises. `_find`
takes a literal, so that the tests can list all names and delete one. Tried: PyTorch 2.6 to 2.13, or as it says.

*Private* is a name in or under `torch` that starts with an underscore, or is not documented (`TraceError`).
The dictionaries of `nn.Module` (`_parameters`, `_buffers`, `_modules`, `_forward_hooks` and their kin) and `_apply`
are not, and other files use them: they stand in every pickled module, or subclasses override them.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import pkgutil
import re
import sys
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch.autograd import forward_ad

AnyFunction = TypeVar("AnyFunction", bound=Callable[..., Any])
Hooks = tuple[Callable[..., Any], Callable[..., Any]]


def _find(path: str) -> Any:
    """Return a private object of PyTorch, None where this version has none of that name."""
    try:
        return pkgutil.resolve_name(path)
    except (ImportError, AttributeError):
        return None


_found = re.match(r"(\d+)\.(\d+)", torch.__version__)
release: tuple[int, int] = (int(_found[1]), int(_found[2])) if _found else (0, 0)
"""Major and minor version of this PyTorch; `(0, 0)`, so older than all others, where it has no such numbers."""

DYNAMO_LISTS_ATTRIBUTES: bool = release >= (2, 13)
"""Whether Dynamo can go through the attributes of an instance, and take any object as a constant; 2.11 cannot."""


# --- What generated functions read ---------------------------------------------------------------------


class _ForwardLevel:
    """Stands in for the level of forward-mode differentiation: slower, and 0 for Dynamo, which cannot guard on it."""

    def __init__(self) -> None:
        self._probe = torch.empty((), device="cpu")

    @property
    def level(self) -> int:
        """0 or more within `forward_ad.dual_level`, or where that cannot be found out: a training kernel serves."""
        if torch.compiler.is_dynamo_compiling():  # no guard could hold for the probe, so the kernel for training
            return 0
        try:  # outside of all levels, this returns its argument
            return -1 if cast(Any, forward_ad).unpack_dual(self._probe).primal is self._probe else 0
        except (AttributeError, NameError):
            return 0


def _marker() -> None:
    """Tracing marker: Dynamo replaces this function by the next, so comparing both is true only while it traces."""


def _marker_in_dynamo() -> None:
    """Replace `_marker` in traced code."""


_marker.__dict__["_torchdynamo_inline"] = _marker_in_dynamo

_fx: Any = sys.modules.get("torch.fx._symbolic_trace")  # `import torch` has loaded it
_has_flag = _find("torch.fx._symbolic_trace:_is_fx_tracing_flag") is not None
_is_fx_tracing = _find("torch.fx._symbolic_trace:_get_is_fx_tracing")  # in its place in PyTorch 2.15
_has_level = _find("torch.autograd.forward_ad:_current_level") is not None
_held = "_kernels_held.marker is _kernels_marker_in_dynamo"  # older ones replace what they find in an attribute only
_TRIED = {(2, 6): _held, (2, 11): _held, (2, 13): "_kernels_marker is _kernels_marker_in_dynamo"}
IS_TRACED: str = _TRIED.get(release, "_kernels_is_dynamo_compiling()")  # as in 2.15; the call takes 14 ns longer
"""Expression that is true while Dynamo traces a call."""

IS_RECORDED: str = "_kernels_jit() or " + ("_kernels_fx._is_fx_tracing_flag" if _has_flag else "_kernels_fx_tracing()")
"""Expression that is true while `torch.jit.trace` or `torch.fx` may record a call; `is_traced` decides."""

FORWARD_LEVEL: str = "_kernels_forward_ad._current_level" if _has_level else "_kernels_forward_ad.level"
"""Expression for the level of forward-mode differentiation, -1 outside; `no_grad` does not switch it off."""

_forward_ad: Any = forward_ad if _has_level else _ForwardLevel()


def in_forward_ad() -> bool:
    """Whether forward-mode differentiation is on."""
    return bool((_forward_ad._current_level if _has_level else _forward_ad.level) >= 0)


forward_grad_enabled: Callable[[], bool] | None = _find("torch._C:_is_fwd_grad_enabled")
"""False in the `forward` of a `torch.autograd.Function` and in inference mode, but not in `no_grad`. Without the name,
`scope` looks for such a forward in the stack."""

_transform: Callable[[], object] = _find("torch._C._functorch:peek_interpreter_stack") or (lambda: "unknown")
in_transform: Callable[[], bool] = _find("torch._C:_are_functorch_transforms_active") or (
    lambda: _transform() is not None
)
"""Whether a transform of `torch.func` runs. Without the names, one is assumed: the reference answers for a kernel at
fault, which goes into no quarantine."""

_mode_stack = _find("torch.utils._python_dispatch:_get_current_dispatch_mode_stack")
dispatch_mode_count: Callable[[], int] = _find("torch._C:_len_torch_dispatch_stack") or (
    lambda: len(_mode_stack()) if _mode_stack else int(type(torch.empty(0, device="cpu")) is not torch.Tensor)
)
"""Return how many dispatch modes are active. Without either name, only those that make fake tensors are found."""

_is_jit_tracing: Callable[[], bool] = _find("torch._C:_is_tracing") or cast(Any, torch.jit).is_tracing

EXPRESSION_NAMES: Mapping[str, object] = {
    "_kernels_marker": _marker,
    "_kernels_held": argparse.Namespace(marker=_marker),  # CPython reads it in half the time of a SimpleNamespace
    "_kernels_marker_in_dynamo": _marker_in_dynamo,
    "_kernels_is_dynamo_compiling": torch.compiler.is_dynamo_compiling,
    "_kernels_forward_ad": _forward_ad,
    "_kernels_jit": _is_jit_tracing,
    "_kernels_fx": _fx,
    "_kernels_fx_tracing": _is_fx_tracing or dispatch_mode_count,
}
"""The global names of these expressions."""


def is_watched() -> bool:
    """Whether a compiler, `torch.jit.trace`, a transform of `torch.func` or a dispatch mode sees this call."""
    return bool(torch.compiler.is_compiling() or _is_jit_tracing() or in_transform() or dispatch_mode_count())


def is_recorded() -> bool:
    """Whether `torch.jit.trace` or `torch.fx` records this call."""
    return bool(_is_jit_tracing() or (_fx._is_fx_tracing_flag if _has_flag else _is_fx_tracing and _is_fx_tracing()))


def is_traced(classes: Iterable[type[Any]] = ()) -> bool:
    """Whether a tracer records this call, and not only counts or replays its operators; `classes`: of its tensors."""
    if torch.compiler.is_compiling() or is_recorded():  # also in exports without Dynamo
        return True
    modes = map(type, _mode_stack()) if _mode_stack is not None and dispatch_mode_count() else ()
    tracers = ("torch._subclasses.", "torch.fx.experimental.")  # the other modes count operators, or cache results
    return any([kind.__module__.startswith(tracers) for kind in (*classes, *modes)])


def no_dispatch_modes() -> AbstractContextManager[object]:
    """Leave all dispatch modes. Without the names, they stay: a kernel that is imported then may fail to load."""
    leave = _find("torch.utils._python_dispatch:_disable_current_modes") or _find("torch._C:_DisableTorchDispatch")
    return cast("AbstractContextManager[object]", (leave or contextlib.nullcontext)())


def no_torch_function() -> AbstractContextManager[object]:
    """Leave modes such as that of `with torch.device(...)`. Without the name, they stay."""
    return cast("AbstractContextManager[object]", (_find("torch._C:DisableTorchFunction") or contextlib.nullcontext)())


_top_hooks = _find("torch._C._autograd:_top_saved_tensors_default_hooks")


def saved_tensors_hooks() -> Hooks | None:
    """Return the innermost `torch.autograd.graph.saved_tensors_hooks`; None without, and before PyTorch 2.7."""
    return cast("Hooks | None", _top_hooks(False)) if _top_hooks is not None else None


def has_saved_tensors_hooks() -> bool:
    """Whether there are such hooks; true where it cannot be found out."""
    return _top_hooks is None or _top_hooks(False) is not None


graph_task: Callable[[], int] = _find("torch._C:_current_graph_task_id") or (lambda: -1)
"""The number of the backward that makes this call, else -1. Without the name, a scope serves no other thread's."""
_carry, _drop = _find("torch._C:_stash_obj_in_tls"), _find("torch._C:_remove_obj_from_tls")  # the last from 2.13 on
_is_carried, _carried = _find("torch._C:_is_key_in_tls"), _find("torch._C:_get_obj_in_tls")


def carry(key: str, value: object) -> None:
    """Let the threads in which autograd runs what this thread starts find an object; None for none."""
    if value is None and _drop is not None:
        _drop(key)  # a thread that ends with one needs the interpreter's lock, so keep none for nothing
    elif _carry is not None:
        if _drop is None:  # 2.6 to 2.11 drop a reference that they did not take
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(value))
        _carry(key, value)


def carried(key: str) -> Any:
    """Return such an object; None if there is none."""
    return _carried(key) if _is_carried is not None and _carried is not None and _is_carried(key) else None


_hooks = [_find("torch.nn.modules.module:_global_forward_hooks")]
_hooks += [_find("torch.nn.modules.module:_global_backward_hooks")]
_hooks += [_find("torch.nn.modules.module:_global_forward_pre_hooks")]
_hooks += [_find("torch.nn.modules.module:_global_backward_pre_hooks")]
has_global_hooks: Callable[[], bool] = functools.partial(any, _hooks)
"""Whether hooks of all modules are registered; without the names, kernels that read past a part ignore them."""
TraceError: type[Exception] = _find("torch.fx.proxy:TraceError") or ValueError
"""Raised by proxies of `torch.fx` that are used as conditions; without the name, its base class."""


# --- Tensors, nested values and operators ----------------------------------------------------------------


def version(tensor: torch.Tensor) -> int:
    """Return how often a tensor was changed in place; -1 if it is not counted, as in inference mode, or unknown."""
    try:
        return tensor._version
    except (AttributeError, RuntimeError):
        return -1


def storage_key(tensor: torch.Tensor) -> int:
    """Return a number that tensors share whose memory is the same, fake ones included."""
    return int(getattr(storage := tensor.untyped_storage(), "_cdata", id(storage)))  # it has one Python object


def is_fake_class(cls: type[Any]) -> bool:
    """Whether tensors of a class replace plain ones while a call is traced."""
    return cls.__module__.startswith("torch._subclasses.")


@contextlib.contextmanager
def fake_copies(tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Give copies of tensors without data, and the mode in which they can be computed with; else, real copies."""
    mode = _find("torch._subclasses.fake_tensor:FakeTensorMode")
    with contextlib.nullcontext() if mode is None else mode(allow_non_fake_inputs=True) as entered:
        yield [entered.from_tensor(t.detach()) if entered is not None else t.detach().clone() for t in tensors]


_tree_map, _registered = _find("torch.utils._pytree:tree_map"), _find("torch.utils._pytree:SUPPORTED_NODES")
_tree_leaves = _find("torch.utils._pytree:tree_leaves")  # `tree_map` also makes a tree of the results


def _opened(tree: Any) -> tuple[list[Any], Callable[[list[Any]], Any]] | None:
    """Return the children of a container, and a function that makes one of others; None for a leaf."""
    if (kind := type(tree)) in (dict, OrderedDict, defaultdict):
        empty: Any = defaultdict(tree.default_factory) if kind is defaultdict else kind()
        return list(tree.values()), lambda new: empty.update(zip(tree, new, strict=True)) or empty
    named = getattr(kind, "_make", None) if isinstance(tree, tuple) else None
    return (list(tree), named or kind) if named or kind in (list, tuple, deque) else None


def tree_map(function: Callable[[Any], Any], tree: Any) -> Any:
    """Return a nested value with each leaf replaced. The fallback does not open registered classes."""
    if _tree_map is not None:
        return _tree_map(function, tree)
    opened = _opened(tree)
    return function(tree) if opened is None else opened[1]([tree_map(function, child) for child in opened[0]])


def tree_leaves(tree: Any) -> list[Any]:
    """Return the leaves of a nested value. The fallback does not open registered classes."""
    found: list[Any] = [] if _tree_leaves is None else _tree_leaves(tree)
    if _tree_leaves is None:
        tree_map(found.append, tree)
    return found


def registered_node(kind: type[Any]) -> Any:
    """Return `flatten_fn` and `unflatten_fn` of a class that was registered with PyTorch; None if it was not."""
    return _registered.get(kind) if _registered is not None else None


def dtensor_parts(t: Any) -> tuple[Any, Any]:
    """Return this rank's shard of a `DTensor`, without a history; and what is equal for all that look alike."""
    shard, look = getattr(t, "_local_tensor", None), getattr(t, "_spec", None)
    look = look or (t.device_mesh, t.placements, t.shape, t.stride(), t.dtype)
    return t.detach().to_local() if shard is None else shard, look


class _NoDispatchMode:
    """Refuses to watch: a reference that cannot be watched is not trusted."""

    def __enter__(self) -> Any:
        raise RuntimeError("operators cannot be watched with this version of PyTorch")

    def __exit__(self, *error: object) -> None: ...


if TYPE_CHECKING:
    from torch.utils._python_dispatch import TorchDispatchMode

    DispatchMode = TorchDispatchMode
else:
    DispatchMode = _find("torch.utils._python_dispatch:TorchDispatchMode") or _NoDispatchMode
    """Base of modes that see each operator that is called. Without it, entering one raises `RuntimeError`."""


def written_arguments(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    """Yield the tensors that an operator writes to. Without its schema: all, if its name ends as those in place."""
    schema = getattr(function, "_schema", None)
    if schema is None:
        name, _, overload = str(function).removeprefix("aten.").partition(".")
        written = [*args, *kwargs.values()] if name.endswith("_") or "out" in overload else []
    else:
        written = [
            args[position] if position < len(args) else kwargs.get(argument.name)
            for position, argument in enumerate(schema.arguments if schema.is_mutable else ())
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
    for value in written:
        yield from (tensor for tensor in tree_leaves(value) if isinstance(tensor, torch.Tensor))


def forget_operators(namespace: Any, *names: str) -> None:
    """Let PyTorch forget operators that it has looked up, also in the list that a namespace has of them."""
    for name in names:
        vars(namespace).pop(name, None)
    if isinstance(listed := getattr(namespace, "_dir", None), list):
        listed[:] = [name for name in listed if name not in names]


def destroy_library(library: Any) -> None:
    """Withdraw the operators of a `torch.library.Library`; without the name, it does so when it is collected."""
    getattr(library, "_destroy", lambda: None)()


python_operators: Iterable[str] = _find("torch.library:_impls") or ()
"""The operators that Python code implements now, such as `aten/silu/CPU`; without the name, none."""
operator_registrations: Callable[[str], str] = _find("torch._C:_dispatch_dump") or (lambda name: "")
"""Describe the functions of an operator, a line each with the place in the source; without the name, empty."""


# --- Dynamo, devices, processes ----------------------------------------------------------------------------


@functools.cache
def _dynamo_reads(marker: str) -> bool:
    """Whether the source of Dynamo's decorators names an attribute; to ask the decorators would import Dynamo."""
    try:
        return marker.encode() in (pkgutil.get_data("torch", "_dynamo/decorators.py") or b"")
    except (OSError, ValueError):
        return False


def constant_result(function: AnyFunction) -> AnyFunction:
    """Let Dynamo call a function at trace time and take the result for a constant.

    As `torch.compiler.assume_constant_result`, which imports Dynamo: a second. So it is if Dynamo reads another name.
    """
    if not _dynamo_reads("_dynamo_marked_constant"):
        return cast(AnyFunction, cast(Any, torch.compiler).assume_constant_result(function))
    function.__dict__["_dynamo_marked_constant"] = True
    return function


def disabled(function: AnyFunction, *, reason: str) -> AnyFunction:
    """Keep Dynamo out of a function; from PyTorch 2.7 on, it shows the reason where that is an error."""
    disable: Any = torch.compiler.disable
    return cast(AnyFunction, disable(function, reason=reason) if release >= (2, 7) else disable(function))


def disabled_lazily(function: AnyFunction, *, reason: str) -> AnyFunction:
    """Do the same without importing Dynamo now, unless Dynamo reads another attribute."""
    if not _dynamo_reads("_torchdynamo_disable"):
        return disabled(function, reason=reason)
    function.__dict__.update(_torchdynamo_disable=True, _torchdynamo_disable_msg=reason)
    return function


def disabled_when_called(function: AnyFunction) -> AnyFunction:
    """Keep Dynamo out of a function and all that it calls; imports Dynamo at the first call, else now."""
    return cast(AnyFunction, (_find("torch:_disable_dynamo") or cast(Any, torch.compiler).disable)(function))


def dynamo_is_imported() -> bool:
    """Whether Dynamo is there: importing it takes a second, and nothing was compiled before."""
    return "torch._dynamo" in sys.modules


def run_only(function: AnyFunction) -> AnyFunction:
    """Return a function that runs code compiled for it before, else eagerly; without the name, always eagerly."""
    return cast(
        AnyFunction, (_find("torch._dynamo.eval_frame:RunOnlyContext") or (lambda: lambda same: same))()(function)
    )


def many_compilations() -> AbstractContextManager[object]:
    """Let Dynamo compile as often as code changes: beyond its limit, it would run eagerly. Else, its limit stands."""
    config = sys.modules.get("torch._dynamo.config")
    limits = ("recompile_limit", "accumulated_recompile_limit", "cache_size_limit", "accumulated_cache_size_limit")
    known = {name: 1_000_000 for name in limits if hasattr(config, name)}  # the last two before PyTorch 2.7
    patch = _find("torch._dynamo.config:patch") if known else None
    return cast("AbstractContextManager[object]", patch(known) if patch else contextlib.nullcontext())


default_store: Callable[[], Any] = _find("torch.distributed.distributed_c10d:_get_default_store") or (lambda: None)
"""Return the store of the default process group; without the name, ranks share only what lies in one cache."""


def on_cuda_start(function: Callable[[], object]) -> bool:
    """Call a function when CUDA starts, or now if it has; return False where PyTorch offers nothing for that."""
    call = _find("torch.cuda:_lazy_call")
    return call is not None and call(function) is None  # it returns nothing
