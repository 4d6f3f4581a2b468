"""The text of generated functions, as a function of the signature that they take.

Nothing here knows a layer, a device or PyTorch: the same signature gives the same text. All names that a text uses
besides the parameters start with `_kernel`; a signature with such a parameter is passed on as `*args, **kwargs`.
"""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

PLAIN = frozenset({bool, int, float, complex, str, bytes, type(None), type(Ellipsis)})
"""Types of values that cannot hold a tensor."""

_IN_CALL: dict[Any, str] = {
    inspect.Parameter.VAR_POSITIONAL: "*{0}",
    inspect.Parameter.KEYWORD_ONLY: "{0}={0}",
    inspect.Parameter.VAR_KEYWORD: "**{0}",
}
_IN_VALUES: dict[Any, str] = {
    inspect.Parameter.VAR_POSITIONAL: "*{0}",
    inspect.Parameter.VAR_KEYWORD: "*{0}.values()",
}
"""How a parameter is written, if not as its name: in a call that passes it on, and in a tuple of all values."""

# The next candidate is called after the `try`: an error that it raises is no fault of this kernel.
_FORWARD = """\
def forward{signature}:
    {condition}
    if {is_traced}:
        return _kernels_answer(_kernels_traced({module}, {values})({call}), _kernels_next, {call})
    {find}
    try:
        _kernel_output = _kernel({call})
    except _kernels_exception as _kernel_error:
        _kernel = _kernels_failed(_kernel_error, {module}, {values})
        if _kernel is None:
            raise
    else:
        if _kernel_output is not _kernels_passed_on or _kernel is _kernels_reference:
            return _kernel_output
        _kernel = _kernels_next()
    return _kernel({call})
"""
"""The forward of a layer; `docs/path-of-a-call.md` explains it."""

_CONDITION = """\
if not _kernels_condition({asked}):
    return _kernels_reference({call})
"""

# The `try` only looks a kernel up: an AttributeError of the kernel itself must not look like a cold frame.
_FIND = """\
try:
    _kernel_frame = _kernels_frame()
    if _kernel_frame.parent and not _kernels_outside_functions():
        _kernels_keep_scopes()
    {answer}
    if _kernels_watched:
        {unfit}
        if _kernels_unproven and ({forward_level} >= 0 or {records}):
            _kernel = _kernels_find_proving(_kernel) or _kernel
except _kernels_absent:
    _kernel = _kernels_cold({module}, {values})
"""

_UNFIT = """\
if _kernels_unfit and ({tests}):
    _kernel = _kernels_cold({module}, {values})
"""
"""Rare calls that a kernel may be unfit for: only where one serves that does not declare to be fit."""

_ONLY_COLD = "_kernel = _kernels_cold({module}, {values})"

_ON_CPU = """\
_kernel = _kernel_frame.{layer}_cpu
if {not_plain}not {first}.is_cpu:
    _kernel = _kernels_cold({module}, {values})
"""

_ON_ACCELERATOR = """\
if {odd}:
    _kernel = _kernels_cold({module}, {values})
elif not (_kernel_count := _kernels_hardware.accelerators):
    {on_cpu}
elif _kernel_count == 1:
    if {first}.is_{accelerator}:
        _kernel = _kernel_frame.{layer}_{accelerator}_0
    else:
        {on_cpu}
else:
    _kernel_index = {first}.get_device()
    if _kernel_index >= 0:
        _kernel = _kernels_getattr(_kernel_frame, _kernels_names[_kernel_index])
    else:
        {on_cpu}
"""
"""With one accelerator, no tensor is asked for its index; with none, only whether it is on the CPU."""

_FROZEN = """\
def frozen{signature}:
    if {module}.__class__ is not _kernels_class and not _kernels_isinstance({module}, _kernels_class):
        return _kernels_elsewhere({call})
    if {is_traced}:
        _kernel = _kernels_first
        if _kernels_is_odd_traced({values}):
            return _kernels_dispatched({call})
        if _kernels_lossy and (
            {forward_level} >= 0 or _kernels_grad() and ({records_traced}) or _kernels_root.in_function
        ):
            _kernel = _kernels_proving
        return _kernels_answer(_kernel({call}), _kernels_next, {call})
    _kernel = _kernels_kernel
    if {odd} or {tests}:
        _kernel = _kernels_unfit({module}, {values})
    elif _kernels_unproven and ({forward_level} >= 0 or {records} or _kernels_lossy and {in_function}):
        _kernel = _kernels_proving
    _kernel_output = _kernel({call})
    if _kernel_output is _kernels_passed_on:
        return _kernels_next()({call})
    return _kernel_output
"""
"""The forward of a kernelized class; its names are changed while it lives, and others may have kept it.

`_kernels_kernel` may call the next kernel by itself, as it was decided for eager calls: `_kernels_first` does not.
"""

# The name is set before the read that may fail: the cold path then decides for that mode only.
_SELECT = """\
def select{signature}:
    _kernel_name = {inference!r}
    try:
        if {forward_level} >= 0 or {records} or {in_function}:
            _kernel_name = {training!r}
            _kernel = _kernels_frame().{training}
            if _kernels_unproven:
                _kernel = _kernels_find_proving(_kernel) or _kernel
        else:
            _kernel = _kernels_frame().{inference}
    except _kernels_absent:
        _kernel = _kernels_published(_kernel_name)
    return _kernel({call})
"""

_SELECT_TRACED = """\
def select_traced{signature}:
    if {forward_level} >= 0 or _kernels_grad() and ({records_traced}) or _kernels_root.in_function:
        return _kernels_root.active.{training}({call})
    return _kernels_root.active.{inference}({call})
"""

_ADAPTED = """\
def adapted{signature}:
    return _kernels_kernel({call})
"""


@dataclass(frozen=True)
class ForwardSource:
    """Writes the functions of a layer.

    Attributes:
        parameters: The parameters of the reference, `self` included.
        is_function: Whether there is no `self`.
        reads_module: Whether the reference may use tensors of the module.
        is_traced: Expression that is true while Dynamo traces a call.
        forward_level: Expression for the level of forward-mode differentiation, negative outside of it.
        is_recorded: Expression that is true while another tracer records a call of plain tensors.
        kind: `"coroutine"`, `"generator"` or `"async generator"` if the layer is one.
    """

    parameters: tuple[inspect.Parameter, ...]
    is_function: bool
    reads_module: bool = True
    is_traced: str = "False"
    forward_level: str = "-1"
    is_recorded: str = "False"
    kind: str = ""

    # --- The functions --------------------------------------------------------------------------

    def forward(self, layer: str, *, accelerator: str | None = None, has_condition: bool = False) -> str:
        """Write the function that stands where a decorated forward stood.

        Args:
            layer: Prefix of the attributes of a frame in which the answers for this layer are found.
            accelerator: Type of the accelerators that this PyTorch is built for, such as `"cuda"`.
            has_condition: Whether `_kernels_condition` decides first whether kernels may serve.
        """
        pieces = {**self._pieces, "layer": layer, "accelerator": accelerator, "first": self._first}
        pieces["odd"] = self._odd(exact=False)
        pieces["not_plain"] = f"{pieces['odd']} or " if accelerator is None else ""
        pieces["on_cpu"] = _ON_CPU.format(**pieces)
        pieces["answer"] = pieces["on_cpu"] if accelerator is None else _fill(_ON_ACCELERATOR, pieces)
        kind = f"{self._first}.__class__"  # another has gone the cold path by now, which looks at the module, too
        plain = f"({kind} is _kernels_tensor or {kind} is _kernels_parameter) and "
        pieces["unfit"] = _UNFIT.format(**{**pieces, "tests": self._unfit_tests(plain)})
        pieces["records"] = self._records(exact=False, first_is_tensor=True)
        pieces["find"] = _fill(_FIND if self._first is not None else _ONLY_COLD, pieces)
        pieces["asked"] = self.call if self.is_function else self.module
        pieces["condition"] = _CONDITION.format(**pieces) if has_condition else ""
        return _of_kind(self.kind, _fill(_FORWARD, pieces))

    def frozen(self) -> str:
        """Write the function that calls `_kernels_kernel`, or another one in calls that it is unfit for."""
        return _of_kind(self.kind, _fill(_FROZEN, {**self._pieces, "records": self._records(exact=False)}))

    def select(self, inference: str, training: str) -> str:
        """Write the function that calls one of two kernels, by mode; the arguments are attributes of a frame."""
        pieces = {**self._pieces, "inference": inference, "training": training}
        return _fill(_SELECT, {**pieces, "records": self._records(exact=True)})

    def select_traced(self, inference: str, training: str) -> str:
        """Write the same for calls that are traced."""
        pieces = {**self._pieces, "inference": inference, "training": training}
        if self._first is not None and self._first.isidentifier():  # Dynamo need not guard on all tensors then
            first = f"_kernels_getattr({self._first}, 'requires_grad', False) is True"
            pieces["records_traced"] = f"{first} or {pieces['records_traced']}"
        return _fill(_SELECT_TRACED, pieces)

    def adapted(self) -> str:
        """Write the function that calls another one, with these parameters."""
        return _fill(_ADAPTED, self._pieces)

    # --- Pieces ---------------------------------------------------------------------------------

    @cached_property
    def _pieces(self) -> dict[str, Any]:
        return {
            "signature": self.signature,
            "call": self.call,
            "module": self.module,
            "values": self.values,
            "is_traced": self.is_traced,
            "forward_level": self.forward_level,
            "in_function": "not _kernels_outside_functions() and _kernels_root.in_function",
            "odd": self._odd(exact=True),
            "records_traced": f"_kernels_records({self.module}, {self.values}) or _kernels_is_transformed()",
            "tests": self._unfit_tests(""),
        }

    @cached_property
    def signature(self) -> str:
        """All parameters, without annotations; defaults are set on the function (`set_defaults`)."""
        bare = [
            p.replace(annotation=p.empty, default=None if p.default is not p.empty else p.empty)
            for p in self.parameters
        ]
        return str(inspect.Signature(bare))

    @cached_property
    def call(self) -> str:
        """The arguments of a call that passes everything on."""
        return ", ".join(_IN_CALL.get(p.kind, "{0}").format(p.name) for p in self.parameters)

    @cached_property
    def module(self) -> str:
        """The module; `None` for a function."""
        if self.is_function:
            return "None"
        return self.parameters[0].name + ("[0]" if self._self_is_packed else "")

    @cached_property
    def values(self) -> str:
        """A tuple of all arguments, without the module, in the order of the signature."""
        written = [_IN_VALUES.get(p.kind, "{0}").format(p.name) for p in self._arguments]
        if self._self_is_packed:
            written[0] += "[1:]"
        return "(" + "".join(f"{each}, " for each in written) + ")"  # of one value, too, a tuple

    @cached_property
    def _first(self) -> str | None:
        """The first argument, which is mostly the tensor that shows the device of a call; None without one."""
        if not self._arguments or self._arguments[0].kind is inspect.Parameter.VAR_KEYWORD:
            return None
        first = self._arguments[0]
        return f"{first.name}[{int(self._self_is_packed)}]" if first.kind is first.VAR_POSITIONAL else first.name

    def _odd(self, *, exact: bool) -> str:
        """Write a test whether an argument is a tensor of a subclass.

        Where it need not be exact, the first argument is also odd if it is no tensor: the cold path finds the device.
        Arguments whose default is a plain value are not tested.
        """
        if self._first is None or (exact and not self._first.isidentifier()):
            return f"_kernels_is_odd({self.values})"
        first = f"{self._first}.__class__"  # `type(...)` is a call, and takes 2 ns longer
        tests = [] if exact else [f"{first} is not _kernels_tensor and {first} is not _kernels_parameter"]
        for p in self._arguments:
            written = _IN_VALUES.get(p.kind, "{0}").format(p.name).lstrip("*")
            if p.kind in _IN_VALUES:
                if written == self._first.partition("[")[0]:
                    written += f"[{1 + self._self_is_packed}:]"
                tests.append(f"{written if '[' in written else p.name} and _kernels_is_odd({written})")
            elif (exact or p.name != self._first) and (p.default is None or type(p.default) not in PLAIN):
                kind = f"{p.name}.__class__"
                known = f"{kind} is not _kernels_tensor and {kind} not in _kernels_plain"
                tests.append(f"{known} and _kernels_is_odd(({p.name},))")
        return " or ".join(tests) or "False"

    def _unfit_tests(self, plain: str) -> str:
        """Write a test whether a tracer records the call, or the module has a tensor that is not plain."""
        odd_module = f" or _kernels_odd_parameters and {plain}_kernels_is_odd_module({self.module})"
        return f"_kernels_untraceable and ({self.is_recorded})" + (odd_module if not self.is_function else "")

    def _records(self, *, exact: bool, first_is_tensor: bool = False) -> str:
        """Write a test whether autograd records a call; where it need not be exact, for what the reference may use.

        Transforms are asked for, too: of a tensor in `vmap`, or one that an inner `grad` does not derive, only the
        wrapped tensor shows what derives it. They come last, for calls that are recorded need not know, and after the
        mode, so that calls under `no_grad` do not pay for them.
        """
        if self._first is None or any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in self.parameters):
            return f"_kernels_is_recorded({self.module}, {self.values})"
        tests: list[str] = []
        for p in self._arguments:
            if first_is_tensor and not tests:
                tests.append(f"{p.name}.requires_grad")
            elif type(p.default) in PLAIN:
                tests.append(f"{p.name}.__class__ not in _kernels_plain and _kernels_requires_grad({p.name})")
            else:
                asked = f"{p.name}.requires_grad if {p.name}.__class__ is _kernels_tensor"
                tests.append(f"({asked} else _kernels_requires_grad({p.name}))")
        if not self.is_function and (exact or self.reads_module):
            tests.append(f"_kernels_{'has' if exact else 'reads'}_trainable({self.module})")
        joined = "\n    or ".join([*tests, "_kernels_in_transform()"])
        return f"_kernels_grad() and (\n    {joined}\n)"

    @property
    def _arguments(self) -> tuple[inspect.Parameter, ...]:
        """The parameters that a caller fills: all but `self`."""
        return self.parameters[0 if self._self_is_packed or self.is_function else 1 :]

    @property
    def _self_is_packed(self) -> bool:
        """Whether a method takes its `self` as the first of `*args`."""
        return not self.is_function and self.parameters[0].kind is inspect.Parameter.VAR_POSITIONAL


_RUNS = {
    "coroutine": r"\1\2 await \3",
    "generator": r"\1\2 (yield from \3)",
    "async generator": r"\1async for _kernel_item in \3:\n\1    yield _kernel_item\n\1return",
}
"""How a function of a kind runs another one, for the indentation, the start of the statement, and the call."""


def _of_kind(kind: str, text: str) -> str:
    """Turn a function into one of the kind of the layer, for callers ask `inspect` for it."""
    if not kind:
        return text
    text = re.sub(r"^( +)(return|_kernel_output =) (.+\))$", _RUNS[kind], text, flags=re.MULTILINE)
    if kind == "async generator":  # it returns nothing, so it passes nothing on
        text = text.replace("return _kernel_output", "return")
    return text if kind == "generator" else f"async {text}"


def _fill(template: str, pieces: Mapping[str, Any]) -> str:
    """Fill a template; a piece of several lines gets the indentation of its place, and an empty one leaves no line."""
    lines = []
    for line in template.splitlines():
        filled = line.strip().format_map(pieces)
        indent = line[: len(line) - len(line.lstrip())]
        lines += [f"{indent}{each}\n" for each in filled.splitlines()]
    return "".join(lines)


def read_parameters(reference: Callable[..., Any]) -> tuple[inspect.Parameter, ...]:
    """Return the parameters that a reference has; `*args, **kwargs` if they cannot be read, or have names of ours."""
    packed = inspect.signature(lambda *args, **kwargs: None)
    try:
        signature = own_signature(reference)
    except (TypeError, ValueError):
        signature = packed
    # They would hide the names that the text reads.
    taken = any(name.startswith("_kernel") for name in signature.parameters)
    return tuple((packed if taken else signature).parameters.values())


def own_signature(function: Callable[..., Any]) -> inspect.Signature:
    """Return the signature by which Python binds arguments: `__wrapped__` and `__signature__` are for readers."""
    if isinstance(function, types.FunctionType) and "__signature__" in vars(function):
        function, shown = types.FunctionType(function.__code__, {}, closure=function.__closure__), function
        function.__defaults__, function.__kwdefaults__ = shown.__defaults__, shown.__kwdefaults__
    return inspect.signature(function, follow_wrapped=False)


def set_defaults(function: Callable[..., Any], parameters: Iterable[inspect.Parameter]) -> None:
    """Give a function the defaults of parameters, the same objects."""
    given = [p for p in parameters if p.default is not p.empty]
    # Not in the text: a default may be any object, and the reference may compare it by identity.
    changed: Any = function
    changed.__defaults__ = tuple(p.default for p in given if p.kind is not p.KEYWORD_ONLY)
    changed.__kwdefaults__ = {p.name: p.default for p in given if p.kind is p.KEYWORD_ONLY}
