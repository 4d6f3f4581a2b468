"""The only file of both packages that uses private names of PyTorch. It may change with every PyTorch.

PyTorch may rename or drop a private name in any release. So each stands here, in an entry of its own, with a
fallback that is slower or more cautious, and never raises. `_find` asks for a name: the argument is always a
literal, so that the tests can list all names and delete one at a time.

*Private* is what starts with an underscore in or under `torch`, and what PyTorch does not document (`TraceError`).
The dictionaries of `nn.Module` (`_parameters`, `_buffers`, `_modules`, `_forward_hooks` and their kin) and `_apply`
are not: they stand in every pickled module, and subclasses override them, so PyTorch cannot rename them. Other files
may use them.

Unless an entry says otherwise, its name was tried with PyTorch 2.6 to 2.13.
"""

from __future__ import annotations

import contextlib
import functools
import pkgutil
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
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


# --- Versions ----------------------------------------------------------------------------------------

_found = re.match(r"(\d+)\.(\d+)", torch.__version__)
release: tuple[int, int] = (int(_found[1]), int(_found[2])) if _found else (0, 0)
"""Major and minor version of this PyTorch; `(0, 0)`, so older than all others, where it has no such numbers."""

DYNAMO_LISTS_ATTRIBUTES: bool = release >= (2, 13)
"""Whether Dynamo can go through the attributes of an instance, and take any object as a constant; 2.11 cannot."""


# --- What generated functions read ---------------------------------------------------------------------


class _Compiling:
    """Stands in for a flag that this PyTorch does not have: slower, for it calls functions."""

    @property
    def flag(self) -> bool:
        """Whether `torch.compile` or `torch.export` traces."""
        try:
            return torch.compiler.is_compiling()
        except (AttributeError, NameError):  # the public function reads the flag, too
            return torch.compiler.is_dynamo_compiling()


class _ForwardLevel:
    """Stands in for the level of forward-mode differentiation: slower, and always 0 for Dynamo, which guards on it."""

    _probe = torch.empty(())

    @property
    def level(self) -> int:
        """0 or more within `forward_ad.dual_level`, or where that cannot be found out: a training kernel serves."""
        if torch.compiler.is_dynamo_compiling():
            return 0
        try:  # outside of all levels, this returns what it was given
            return -1 if cast(Any, forward_ad).unpack_dual(self._probe).primal is self._probe else 0
        except (AttributeError, NameError):
            return 0


def _marker() -> None:
    """Tracing marker: Dynamo replaces this function by the next, so comparing both is true only while it traces."""


def _marker_in_dynamo() -> None:
    """Replace `_marker` in traced code."""


_INLINE_TRIED = ((2, 13),)
"""Versions whose Dynamo follows the attribute `_torchdynamo_inline` of a function (2.11 does not). In others, generated
functions call `torch.compiler.is_dynamo_compiling`, which takes twice as long."""

_marker.__dict__["_torchdynamo_inline"] = _marker_in_dynamo

_has_flag = _find("torch.compiler:_is_compiling_flag") is not None
_has_level = _find("torch.autograd.forward_ad:_current_level") is not None

IS_TRACED: str = (
    ("_kernels_marker is _kernels_marker_in_dynamo" if release in _INLINE_TRIED else "_kernels_is_dynamo_compiling()")
    + " or "
    + ("_kernels_compiler._is_compiling_flag" if _has_flag else "_kernels_compiler.flag")
)
"""Expression that is true while a call is traced. Dynamo, which finds the first half true, does not read the second."""

FORWARD_LEVEL: str = "_kernels_forward_ad._current_level" if _has_level else "_kernels_forward_ad.level"
"""Expression for the level of forward-mode differentiation, -1 outside; `no_grad` does not switch it off."""

EXPRESSION_NAMES: Mapping[str, object] = {
    "_kernels_marker": _marker,
    "_kernels_marker_in_dynamo": _marker_in_dynamo,
    "_kernels_is_dynamo_compiling": torch.compiler.is_dynamo_compiling,
    "_kernels_compiler": torch.compiler if _has_flag else _Compiling(),
    "_kernels_forward_ad": forward_ad if _has_level else _ForwardLevel(),
}
"""The global names that `IS_TRACED` and `FORWARD_LEVEL` need."""


def in_forward_ad() -> bool:
    """Whether forward-mode differentiation is on."""
    module: Any = EXPRESSION_NAMES["_kernels_forward_ad"]
    return bool((module._current_level if _has_level else module.level) >= 0)


# --- Who looks at a call -------------------------------------------------------------------------------


def _find_transform() -> Callable[[], object]:
    peek = _find("torch._C._functorch:peek_interpreter_stack")
    if peek is not None:
        return cast(Callable[[], object], peek)
    level = _find("torch._C._functorch:maybe_current_level")
    return level if level is not None else lambda: True


current_transform: Callable[[], object] = _find_transform()
"""Return the innermost transform of `torch.func` that runs, such as `grad` or `vmap`; None outside of them.

Without either name, some transform is assumed: no kernel is tried or compared, so none is taken out for what a
transform did.
"""


def _find_mode_count() -> Callable[[], int]:
    count = _find("torch._C:_len_torch_dispatch_stack")
    if count is not None:
        return cast(Callable[[], int], count)
    stack = _find("torch.utils._python_dispatch:_get_current_dispatch_mode_stack")
    if stack is not None:
        return lambda: len(stack())
    return lambda: int(type(torch.empty(0)) is not torch.Tensor)


dispatch_mode_count: Callable[[], int] = _find_mode_count()
"""Return how many dispatch modes are active, such as those of `torch.export`.

Without either name, a new tensor shows modes that make tensors of their own (fake tensors); others are missed.
"""


def is_watched() -> bool:
    """Whether `torch.jit.trace`, a transform of `torch.func` or a dispatch mode sees the operators of this call."""
    return bool(cast(Any, torch.jit).is_tracing() or current_transform() is not None or dispatch_mode_count())


@contextlib.contextmanager
def no_dispatch_modes() -> Iterator[None]:
    """Leave all dispatch modes. Without the names, they stay: a kernel that is imported then may fail to load."""
    disable = _find("torch.utils._python_dispatch:_disable_current_modes") or _find("torch._C:_DisableTorchDispatch")
    with disable() if disable is not None else contextlib.nullcontext():
        yield


def no_torch_function() -> AbstractContextManager[object]:
    """Leave modes such as that of `with torch.device(...)`. Without the name, they stay."""
    disable = _find("torch._C:DisableTorchFunction")
    return cast("AbstractContextManager[object]", disable() if disable is not None else contextlib.nullcontext())


_top_hooks = _find("torch._C._autograd:_top_saved_tensors_default_hooks")


def saved_tensors_hooks() -> Hooks | None:
    """Return the innermost `torch.autograd.graph.saved_tensors_hooks`; None without, and before PyTorch 2.7."""
    return cast("Hooks | None", _top_hooks(False)) if _top_hooks is not None else None


def has_saved_tensors_hooks() -> bool:
    """Whether there are such hooks; true where it cannot be found out."""
    return _top_hooks is None or _top_hooks(False) is not None


TraceError: type[Exception] = _find("torch.fx.proxy:TraceError") or ValueError
"""Raised by proxies of `torch.fx` that are used as conditions; without the name, its base class."""


# --- Tensors -------------------------------------------------------------------------------------------


def version(tensor: torch.Tensor) -> int:
    """Return how often a tensor was changed in place; -1 if it is not counted, as in inference mode, or unknown."""
    try:
        return tensor._version
    except (AttributeError, RuntimeError):
        return -1


def storage_key(tensor: torch.Tensor) -> int:
    """Return a number that tensors share whose memory is the same, fake ones included."""
    storage = tensor.untyped_storage()
    return int(getattr(storage, "_cdata", id(storage)))  # PyTorch keeps one Python object for each storage


def is_fake_class(cls: type[Any]) -> bool:
    """Whether tensors of a class replace plain ones while a call is traced."""
    return cls.__module__.startswith("torch._subclasses.")


@contextlib.contextmanager
def fake_copies(tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Give copies of tensors without data, and the mode in which they can be computed with; else, real copies."""
    mode = _find("torch._subclasses.fake_tensor:FakeTensorMode")
    if mode is None:
        yield [tensor.detach().clone() for tensor in tensors]
        return
    with mode(allow_non_fake_inputs=True) as entered:
        yield [entered.from_tensor(tensor.detach()) for tensor in tensors]


# --- Nested values ---------------------------------------------------------------------------------------


_tree_map = _find("torch.utils._pytree:tree_map")
_tree_leaves = _find("torch.utils._pytree:tree_leaves")
_registered = _find("torch.utils._pytree:SUPPORTED_NODES")


def tree_map(function: Callable[[Any], Any], tree: Any) -> Any:
    """Return a nested value with each leaf replaced. The fallback does not open registered classes."""
    if _tree_map is not None:
        return _tree_map(function, tree)
    if isinstance(tree, dict):
        changed = {key: tree_map(function, child) for key, child in tree.items()}
        return changed if type(tree) is dict else type(tree)(changed)
    if isinstance(tree, (list, tuple)):
        children = [tree_map(function, child) for child in tree]
        return type(tree)(*children) if hasattr(tree, "_fields") else type(tree)(children)
    return function(tree)


def tree_leaves(tree: Any) -> list[Any]:
    """Return the leaves of a nested value. The fallback does not open registered classes."""
    if _tree_leaves is not None:
        return cast("list[Any]", _tree_leaves(tree))
    if isinstance(tree, (dict, list, tuple)):
        return [leaf for child in (tree.values() if isinstance(tree, dict) else tree) for leaf in tree_leaves(child)]
    return [tree]


def registered_node(kind: type[Any]) -> Any:
    """Return `flatten_fn` and `unflatten_fn` of a class that was registered with PyTorch; None if it was not."""
    return _registered.get(kind) if _registered is not None else None


# --- Operators -------------------------------------------------------------------------------------------


class _NoDispatchMode:
    """Refuses to watch, so that what would be watched is not trusted."""

    def __enter__(self) -> Any:
        raise RuntimeError("operators cannot be watched with this version of PyTorch")

    def __exit__(self, *error: object) -> None:
        pass


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
    listed = getattr(namespace, "_dir", None)
    if isinstance(listed, list):
        listed[:] = [name for name in listed if name not in names]


def destroy_library(library: Any) -> None:
    """Withdraw the operators of a `torch.library.Library`; without the name, it does so when it is collected."""
    destroy = getattr(library, "_destroy", None)
    if destroy is not None:
        destroy()


# --- Dynamo ----------------------------------------------------------------------------------------------


@functools.cache
def _dynamo_reads(marker: str) -> bool:
    """Whether the source of Dynamo's decorators names an attribute; to ask the decorators would import Dynamo."""
    try:
        return marker.encode() in (pkgutil.get_data("torch", "_dynamo/decorators.py") or b"")
    except (OSError, ValueError):
        return False


def constant_result(function: AnyFunction) -> AnyFunction:
    """Let Dynamo call a function at trace time and take the result for a constant.

    The same as `torch.compiler.assume_constant_result`, which would import Dynamo now, and that takes a second. It
    does if Dynamo reads another attribute.
    """
    if not _dynamo_reads("_dynamo_marked_constant"):
        return cast(AnyFunction, cast(Any, torch.compiler).assume_constant_result(function))
    function.__dict__["_dynamo_marked_constant"] = True
    return function


def not_traced(function: AnyFunction, *, reason: str) -> AnyFunction:
    """Let Dynamo call a function without tracing it; where that is an error, it shows the reason.

    The same as `torch.compiler.disable` without importing Dynamo now, unless Dynamo reads another attribute.
    """
    if not _dynamo_reads("_torchdynamo_disable"):
        return cast(AnyFunction, cast(Any, torch.compiler).disable(function))
    function.__dict__.update(_torchdynamo_disable=True, _torchdynamo_disable_msg=reason)
    return function


def not_traced_inside(function: AnyFunction) -> AnyFunction:
    """Keep Dynamo out of a function and all that it calls; imports Dynamo at the first call, else now."""
    disable = _find("torch:_disable_dynamo") or cast(Any, torch.compiler).disable
    return cast(AnyFunction, disable(function))


def dynamo_is_imported() -> bool:
    """Whether Dynamo is there: importing it takes a second, and nothing was compiled before."""
    return "torch._dynamo" in sys.modules


def many_compilations() -> AbstractContextManager[object]:
    """Let Dynamo compile as often as code changes: beyond its limit, it would run eagerly. Else, its limit stands."""
    config = _find("torch._dynamo.config") if dynamo_is_imported() else None
    for kind in ("recompile", "cache_size"):  # the second before PyTorch 2.7
        limits = {f"{kind}_limit": 1_000_000, f"accumulated_{kind}_limit": 1_000_000}
        if all(hasattr(config, name) for name in limits):
            return cast("AbstractContextManager[object]", cast(Any, config).patch(limits))
    return contextlib.nullcontext()


# --- Devices ---------------------------------------------------------------------------------------------


def on_cuda_start(function: Callable[[], object]) -> bool:
    """Call a function when CUDA starts, or now if it has; return False where PyTorch offers nothing for that."""
    call = _find("torch.cuda:_lazy_call")
    if call is not None:
        call(function)
    return call is not None


def extension_backend() -> str:
    """Return the type of the devices that an extension brings, such as "npu"; "privateuseone" without one."""
    return torch.device("privateuseone").type
