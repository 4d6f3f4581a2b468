"""The errors of kernels-core.

```
KernelsError
├── ArgumentError (ValueError)        a value that cannot be used
│   └── ConfigurationError            .file, .line: a setting in a configuration file
├── ArgumentTypeError (TypeError)     an object of the wrong type
├── ScopeError (RuntimeError)         scopes left in another order than entered
├── CanaryError                       a kernel disagrees with its reference, in a live model
├── DisagreementError                 .layers: ranks of a process group decide differently
├── RequirementError                  .rows: the layers that a receipt was required to show otherwise
├── VerificationError                 .rows: the comparisons in which a kernel is wrong
├── PluginError                       .plugin: the plugin at fault
│   ├── PluginLoadError               cannot be imported, or is not a plugin
│   └── PluginConflictError           two distributions, one plugin name
└── ResolutionError                   .request, .refusals: the whole decision
    ├── NoKernelError                 no kernel may serve, and the reference must not
    │   ├── DecisionError             .layer, .expected, .found: a decision file does not hold here
    │   └── KernelizeError (ValueError)   the same for a whole model, which was not changed
    ├── LoadError                     a source could not be turned into a layer
    ├── ContractError                 the kernel does not fit the layer or the mode
    ├── UntrustedError                policy does not let this publisher's code run
    └── IntegrityError                the bytes are not those that were promised
```

Of the kinds of `ResolutionError`, a call raises only `NoKernelError`; the others are found in
`Refusal.error`, and are raised where a source is loaded directly.

`KernelsWarning` is the category of every warning: filter it to silence or to raise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .text import cleaned

if TYPE_CHECKING:
    from .models.receipt_row import ReceiptRow
    from .resolution import LayerRequest, Refusal


_LONGEST = 20_000
"""Characters of a message that are kept: a receipt of a large model has thousands."""


def _cleaned(args: tuple[object, ...]) -> tuple[object, ...]:
    """Clean the text of others in a message: here, before it reaches a terminal, a log or a page."""
    return tuple(cleaned(arg, _LONGEST) if isinstance(arg, str) else arg for arg in args)


class KernelsWarning(UserWarning):
    """A request was not met in full: the reference serves, or a part is left out."""

    def __init__(self, *args: object) -> None:
        """Take a message."""
        self.args = _cleaned(args)


class KernelsError(Exception):
    """Base of every error raised by kernels-core and its plugins."""

    def __init__(self, *args: object) -> None:
        """Take a message."""
        self.args = _cleaned(args)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle without the constructor, which may need keywords."""
        return _remade, (type(self), self.args), vars(self)


def _remade(kind: type[KernelsError], args: tuple[object, ...]) -> KernelsError:
    error = kind.__new__(kind, *args)
    error.args = args
    return error


class ArgumentError(KernelsError, ValueError):
    """An argument or setting has a value that cannot be used."""


class ConfigurationError(ArgumentError):
    """A configuration file cannot be read, or has a setting that cannot be used.

    Attributes:
        file: The path of the file.
        line: The line, counted from 1; 0 where it is about the whole file.
    """

    def __init__(self, message: str, *, file: str, line: int) -> None:
        """Describe the problem, its place, and what to do."""
        super().__init__(message)
        self.file, self.line = file, line


class ArgumentTypeError(KernelsError, TypeError):
    """An argument has a type that cannot be used."""


def is_transient(error: object) -> bool:
    """Return whether an error may be gone by itself the next time: the network was down, or too slow."""
    return isinstance(error, ConnectionError | TimeoutError)


def require_type(value: object, kind: type | tuple[type, ...], name: str) -> None:
    """Refuse an argument of another type.

    Raises:
        ArgumentTypeError: If it has none of the types.

    Example:
        >>> require_type("yes", bool, "check_arch")
        Traceback (most recent call last):
        ...
        kernels_core.ArgumentTypeError: check_arch is a bool, not 'yes'.
    """
    if not isinstance(value, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        raise ArgumentTypeError(f"{name} is a {' or '.join(each.__name__ for each in kinds)}, not {value!r}.")


class ScopeError(KernelsError, RuntimeError):
    """A scope was left that is not the innermost one."""


class CanaryError(KernelsError):
    """A canary found that a kernel disagrees with its reference."""


class DisagreementError(KernelsError):
    """The ranks of a process group would run different kernels, or one of them did not answer.

    Attributes:
        layers: The paths of the layers that differ; none where a rank failed or did not answer.
    """

    def __init__(self, message: str, *, layers: Sequence[str] = ()) -> None:
        """List the layers that differ, with ranks and reasons."""
        super().__init__(message)
        self.layers = tuple(layers)


class RequirementError(KernelsError):
    """Layers are not served as was required.

    Attributes:
        rows: The rows of the receipt that fail.
    """

    def __init__(self, message: str, *, rows: Sequence[ReceiptRow] = ()) -> None:
        """List the layers that fail, and why."""
        super().__init__(message)
        self.rows = tuple(rows)


class VerificationError(KernelsError):
    """A kernel disagrees with its reference.

    Attributes:
        rows: The rows of the report in which it does.
    """

    def __init__(self, message: str, *, rows: Sequence[Any] = ()) -> None:
        """List the kernels that are wrong, where, and by how much."""
        super().__init__(message)
        self.rows = tuple(rows)


class PluginError(KernelsError):
    """A plugin misbehaved.

    Attributes:
        plugin: Name of the plugin at fault.
    """

    def __init__(self, message: str, *, plugin: str) -> None:
        """Describe the fault of a plugin."""
        super().__init__(message)
        self.plugin = plugin


class PluginLoadError(PluginError):
    """A plugin could not be imported, or the imported object is no plugin."""


class PluginConflictError(PluginError):
    """Two distributions declare a plugin under one name."""


class ResolutionError(KernelsError):
    """A kernel could not be used.

    Attributes:
        request: The request that was being resolved, where known.
        refusals: Every candidate that was refused on the way, with its reason.
    """

    def __init__(self, message: str, *, request: LayerRequest | None = None, refusals: Sequence[Refusal] = ()) -> None:
        """Describe the request, and why each candidate was refused."""
        super().__init__(message)
        self.request = request
        self.refusals = tuple(refusals)
        # `raise` without `from` keeps it: whoever raises this shows the traceback of the first kernel that failed.
        self.__cause__ = next((refusal.error for refusal in refusals if refusal.error is not None), None)


class NoKernelError(ResolutionError):
    """No kernel may serve, and falling back to the reference is not allowed."""


class DecisionError(NoKernelError):
    """A decision file does not hold here, or decisions cannot be frozen, or shared by ranks: nothing else serves.

    Attributes:
        layer: The name of the layer; empty where the file cannot be used at all.
        expected: The decision in the file; empty where it has none.
        found: What there is instead.
    """

    def __init__(
        self, message: str, *, layer: str = "", expected: str = "", found: str = "", request: LayerRequest | None = None
    ) -> None:
        """Describe the difference, and what to do."""
        super().__init__(message, request=request)
        self.layer, self.expected, self.found = layer, expected, found


class KernelizeError(NoKernelError, ValueError):
    """A model cannot be kernelized as asked; it was not changed."""


class LoadError(ResolutionError):
    """A source could not be turned into a kernel layer."""


class ContractError(ResolutionError):
    """A kernel layer may not serve a layer: members or signature differ."""


class UntrustedError(ResolutionError):
    """Policy does not allow this publisher's code to run here."""


class IntegrityError(ResolutionError):
    """Files on disk differ from the ones that were announced."""
