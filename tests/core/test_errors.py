"""The tree of errors: the base classes by which each can be caught."""

from __future__ import annotations

import pickle
import re

import pytest
import torch

import kernels_core
from kernels_core import (
    ArgumentError,
    ArgumentTypeError,
    CanaryError,
    Candidate,
    ConfigurationError,
    ContractError,
    DecisionError,
    DisagreementError,
    IntegrityError,
    KernelizeError,
    KernelsError,
    KernelsWarning,
    LayerRequest,
    LoadError,
    Mode,
    NoKernelError,
    PluginConflictError,
    PluginError,
    PluginLoadError,
    Refusal,
    RequirementError,
    ResolutionError,
    ScopeError,
    UntrustedError,
    VerificationError,
    errors,
)

TREE = {
    ArgumentError: (KernelsError, ValueError),
    ArgumentTypeError: (KernelsError, TypeError),
    ConfigurationError: (ArgumentError,),
    ScopeError: (KernelsError, RuntimeError),
    CanaryError: (KernelsError,),
    DisagreementError: (KernelsError,),
    RequirementError: (KernelsError,),
    VerificationError: (KernelsError,),
    PluginError: (KernelsError,),
    PluginLoadError: (PluginError,),
    PluginConflictError: (PluginError,),
    ResolutionError: (KernelsError,),
    NoKernelError: (ResolutionError,),
    DecisionError: (NoKernelError,),
    KernelizeError: (NoKernelError, ValueError),
    LoadError: (ResolutionError,),
    ContractError: (ResolutionError,),
    UntrustedError: (ResolutionError,),
    IntegrityError: (ResolutionError,),
}


@pytest.mark.parametrize("error", TREE, ids=lambda error: error.__name__)
def test_bases(error: type[Exception]) -> None:
    """Each error has the bases that the tree says, is public, and has a docstring."""
    assert error.__bases__ == TREE[error]
    assert error.__name__ in kernels_core.__all__
    assert error.__doc__


def test_tree_is_whole() -> None:
    """There is no error besides those of the tree, and the drawing in the module's docstring shows each."""
    defined = {value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)}
    assert defined == {*TREE, KernelsError, KernelsWarning}
    drawn = set(re.findall(r"\w+Error(?= |$)", errors.__doc__ or "", re.MULTILINE))
    assert {error.__name__ for error in (*TREE, KernelsError)} <= drawn


def test_warning_is_a_user_warning() -> None:
    """The category of our warnings is shown by default."""
    assert issubclass(KernelsWarning, UserWarning)


def test_plugin_error_names_the_plugin() -> None:
    """The plugin at fault is an attribute."""
    assert PluginLoadError("broken", plugin="acme").plugin == "acme"


def test_resolution_error_carries_the_decision() -> None:
    """Request and refusals are attributes; without them there are none."""
    request = LayerRequest("Add", torch.device("cpu"), Mode.INFERENCE)
    refusal = Refusal("no", Candidate(3))
    error = NoKernelError("no kernel", request=request, refusals=[refusal])
    assert (str(error), error.request, error.refusals) == ("no kernel", request, (refusal,))
    assert (LoadError("x").request, LoadError("x").refusals) == (None, ())


@pytest.mark.parametrize(
    "error",
    [
        PluginError("broken", plugin="acme"),
        NoKernelError("none", refusals=[Refusal("no", plugin="acme")]),
        ScopeError("x"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_survive_pickle(error: KernelsError) -> None:
    """Errors come back whole from a worker process: DataLoader and multiprocessing pickle them."""
    twin = pickle.loads(pickle.dumps(error))
    assert type(twin) is type(error)
    assert str(twin) == str(error)
    assert vars(twin) == vars(error)


def test_text_of_others_is_made_fit_to_be_shown() -> None:
    """No message of ours drives a terminal, has a password or token in it, or is endless; it stays so when pickled."""
    foreign = "\x1b[2J http://me:PASSWORD@hub 'Bearer hf_SECRET' " + "x" * 5_000_000
    resolution = Refusal(foreign)
    for shown in (
        str(KernelsError(foreign)),
        str(KernelsWarning(foreign)),
        str(PluginLoadError(foreign, plugin="acme")),
        str(pickle.loads(pickle.dumps(KernelsError(foreign)))),
        resolution.reason,
    ):
        assert shown.startswith(r"\x1b[2J http://***@hub 'Bearer ***'") and len(shown) < 50_000, shown[:200]


@pytest.mark.parametrize("url", ["http://bob:hun@ter2@hub.local", "bob:hunter2@hub.local", "https://bob:hunter2@h/x"])
def test_no_part_of_a_password_is_left_in_a_url(url: str) -> None:
    """A password with an `@` in it, and one in a URL without a scheme, are left out of messages."""
    assert "ter2" not in str(kernels_core.KernelsError(f"{url} cannot be reached"))
