"""Wrong arguments at every public function of both packages: errors of ours, never those from inside."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import kernels_core
import kernels_plugins
from kernels_core import (
    Candidate,
    KernelsError,
    Mode,
    PluginManager,
    decorated_layer,
    receipt,
    resolve,
    use_kernel_forward_from_hub,
)
from kernels_plugins import Choice
from kernels_plugins.local_hub.server import LocalHub

pytest_plugins = ["kernels_plugins.hub.testing"]


class Hostile:
    """An object without a hash, whose truth cannot be asked, as that of an array."""

    __hash__ = None  # type: ignore[assignment]

    def __bool__(self) -> bool:
        raise RuntimeError("no truth")


ZOO: dict[str, Any] = {
    "none": None,
    "true": True,
    "number": 5,
    "negative": -1,
    "huge": 10**400,
    "nan": float("nan"),
    "text": "no such thing",
    "empty": "",
    "nul": "a\0b/c",
    "long": "x" * 5000,
    "surrogate": "\ud800/\udfff",
    "path": Path("a\0b"),
    "bytes": b"cpu",
    "list": [],
    "nested": [[], {}],
    "dict": {},
    "keys": {None: [None], "cpu": {}},
    "set": {1},
    "class": int,
    "function": len,
    "tensor": torch.ones(2),
    "mode": Mode.FALLBACK,
    "object": object(),
    "hostile": Hostile(),
}


@use_kernel_forward_from_hub("Shift")
class Shift(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1


@use_kernel_forward_from_hub("shift")
def shift(x: torch.Tensor) -> torch.Tensor:
    return x + 1


def one(x: torch.Tensor) -> torch.Tensor:
    return x + 1


def mean(model: nn.Module) -> float:
    return float(model(torch.ones(2)).mean())


HUB = {"repo_id": "acme/kernels", "version": 1, "trust_remote_code": False}
CPU = {"device": "cpu", "mode": Mode.INFERENCE}

VALID: dict[str, dict[str, Any]] = {
    "CUDAProperties": {"min_capability": 75, "max_capability": 90},
    "ROCMProperties": {"min_capability": 75, "max_capability": 90},
    "Device": {"type": "cuda", "properties": None},
    "Device.matches": {"device": torch.device("cpu"), "capability": None},
    "Scope": {"payload": 1},
    "authorize": {"source": "acme/silu", "plugin": "hub"},
    "alone_in": {"folder": Path("folder")},
    "as_json": {"value": 1, "indent": 2},
    "checkpoint_scopes": {},
    "configuration": {},
    "configured": {"key": "choice"},
    "content_of": {"kernel": one},
    "check_registered_mode": {"mode": Mode.INFERENCE},
    "count_calls": {},
    "decorated_layer": {"decorated": shift},
    "device_capability": {"device": torch.device("cpu")},
    "error_text": {"error": ValueError("text")},
    "find_candidates": {"layer_or_name": Shift, **CPU},
    "find_layer": {"decorated": shift},
    "forget": {},
    "held_back": {},
    "frozen_choice": {"module": Shift()},
    "functions_of": {"module": Shift()},
    "module_paths": {"model": Shift()},
    "add_rms_norm": {
        **{"x": torch.ones(2), "residual": torch.ones(2), "weight": torch.ones(2)},
        **{"eps": 1e-6, "offset": 0.0},
    },
    "adopt": {"model": Shift(), "rules": []},
    "adopted_rule": {"layer": None},
    "change_class": {"module": Shift(), "cls": Shift},
    "agree": {"model": Shift(), **CPU, "group": None, "on_difference": "warn", "timeout": 1.0},
    "kernelize": {"model": Shift(), **CPU, "use_fallback": True, "group": None},
    "plugin_manager": {},
    "quarantine": {
        "layer": decorated_layer(Shift),
        "implementation": one,
        "kernel": "k",
        "reason": "r",
        "dtype": None,
        "now": True,
        **CPU,
    },
    "quarantined": {},
    "receipt": {"model": Shift(), **CPU},
    "Receipt.require": {"pattern": "*", "origin": "reference", "batch_invariant": False},
    "Receipt.diff": {"other": receipt(Shift(), device="cpu")},
    "Receipt.freeze": {"path": "kernels.decisions.json"},
    "Receipt.to_json": {"indent": 2},
    "DecisionFile.diff": {"other": kernels_core.DecisionFile()},
    "DecisionFile.from_file": {"path": "kernels.decisions.json"},
    "DecisionFile.from_json": {"value": {"decisions": 1, "models": []}},
    "DecisionFile.merged": {"newer": kernels_core.DecisionFile()},
    "DecisionFile.save": {"path": "kernels.decisions.json"},
    "references": {"models": Shift(), "layers": [decorated_layer(Shift)], "mode": Mode.INFERENCE},
    "release": {"entries": None},
    "require_type": {"value": 1, "kind": int, "name": "x"},
    "replace_kernel_forward_from_hub": {
        "cls": type("Linear", (nn.Linear,), {}),
        "layer_name": "Linear",
        "condition": None,
        "use_fallback": True,
    },
    "resolve": {"layer_or_name": Shift, **CPU, "candidate": Candidate(one)},
    "set_module": {"package": "kernels_core", "namespace": {}, "names": []},
    "serving_forward": {"resolution": resolve(Shift, device="cpu", mode=Mode.INFERENCE)},
    "setting": {"name": "KERNELS_CANARY"},
    "switch": {"name": "KERNELS_STRICT"},
    "source_label": {"source": one},
    "strict": {},
    "unkernelize": {"model": Shift()},
    "use_kernel_forward_from_hub": {"layer_name": "Shift", "condition": None, "use_fallback": True},
    "use_kernelized_func": {"functions": shift, "computes": None},
    "visible": {"text": "text", "limit": 5},
    "of_format": {"value": {"one": 1}, "key": "one", "version": 1, "make": dict},
    "read_json": {"path": Path("gone.json"), "parse": dict, "what": "list", "remedy": "Write one"},
    "write_file": {"path": Path("file.txt"), "text": "text"},
    "warn_once": {"message": "wrong arguments", "key": "wrong arguments", "stacklevel": 1, "logger": None},
    "PluginManager": {"discover": False},
    "PluginManager.register": {"plugin": object(), "name": "x", "trusted": False},
    "PluginManager.unregister": {"plugin": "x", "name": None},
    "FuncRepository": {**HUB, "func_name": "f"},
    "LayerRepository": {**HUB, "layer_name": "f", "user_agent": None},
    "LocalFuncRepository": {"repo_path": ".", "func_name": "f"},
    "LocalLayerRepository": {"repo_path": ".", "layer_name": "f"},
    "LockedFuncRepository": {
        "repo_id": "acme/kernels",
        "lockfile": "x.lock",
        "func_name": "f",
        "trust_remote_code": True,
    },
    "LockedLayerRepository": {
        "repo_id": "acme/kernels",
        "lockfile": "x.lock",
        "layer_name": "f",
        "trust_remote_code": True,
    },
    "Metadata.from_bytes": {"content": b"{}"},
    "Metadata.read_from_file": {"metadata_path": "metadata.json"},
    "PrometheusCounters": {"registry": None},
    "bench": {
        "model_or_layer": Shift(),
        "inputs": torch.ones(2),
        "rows": None,
        "layers": ["Shift"],
        "modes": ["inference"],
        "contexts": ["eager"],
        "seconds": 0.001,
    },
    "consistency": {"a": Shift(), "b": Shift(), "inputs": torch.ones(1)},
    "bisect": {"model": Shift(), "metric": mean, "tolerance": 0.1, "relative": 0.0},
    "canary": {"first": 1, "every": 2, "action": "warn"},
    "choosing": {"save": None, "contexts": ("eager",), "seconds": 0.1, "progress": None},
    "use_choice": {"choice": Choice(), "strict": False},
    "Choice.cells_on": {"device": "cpu", "strict": False},
    "check_kernel": {
        "kernel": one,
        "reference": one,
        "inputs": "no tensor",
        "ignore": (),
        "tolerances": None,
        "numerics": (),
    },
    "get_kernel": {**HUB, "backend": None, "user_agent": None, "check_arch": True},
    "get_kernel_dep": {"repo_id": "acme/kernels"},
    "get_kernel_variants": {"repo_id": "acme/kernels", "version": 1, "backend": None},
    "get_loaded_kernels": {},
    "get_local_kernel": {"repo_path": ".", "backend": None, "trust_remote_code": False, "user_agent": None},
    "get_locked_kernel": {"repo_id": "acme/kernels", "lockfile": "x", "trust_remote_code": False, "user_agent": None},
    "has_kernel": {**HUB, "backend": None, "check_arch": True},
    "install_kernel": {**HUB, "backend": None, "local_files_only": False, "user_agent": None},
    "linear_cross_entropy": {
        **{"hidden": torch.ones(1, 2), "weight": torch.ones(3, 2), "labels": torch.zeros(1, dtype=torch.int64)},
        **{"bias": None, "ignore_index": -100, "reduction": "mean", "num_items": None},
    },
    "load_kernel": {"repo_id": "acme/kernels", "lockfile": "x.lock", "backend": None},
    "numerics": {"names": "batch_invariant"},
    "register_numerics": {"names": "deterministic"},
    "opaque": {"source": one},
    "probing": {},
    "reference_backward": {"source": one},
    "register_kernel_mapping": {"mapping": {"Shift": {"cpu": one}}, "inherit_mapping": True},
    "use_kernel_func_from_hub": {"func_name": "f"},
    "use_kernel_mapping": {"mapping": {"Shift": {"cpu": one}}, "inherit_mapping": True},
    "verify": {
        "model_or_layer": Shift(),
        "inputs": torch.ones(2),
        "gradients": False,
        "tolerances": None,
        "numerics": (),
    },
}


POSITIONAL = {
    "numerics": ("names",),
    "register_numerics": ("names",),
    "bench": ("model_or_layer", "inputs"),
    "check_kernel": ("kernel", "reference", "inputs"),
    "references": ("models",),
    "use_kernelized_func": ("functions",),
    "verify": ("model_or_layer", "inputs"),
}
"""Parameters that take no keywords, with those before them."""


LEFT_OUT = {
    "check_kernel": {"inputs"},  # anything that the kernel takes
    "require_type": {"kind"},  # of the code that checks, not of a user
}
"""Parameters for which there is no wrong value, or none of a user."""

EXPECTED: dict[str, tuple[type[Exception], ...]] = {
    "check_kernel": (AssertionError,),  # the kernel or the reference fails for these inputs
    **dict.fromkeys(("alone_in", "write_file"), (OSError, ValueError)),  # those who write files name them in errors
}


def public(name: str) -> Callable[..., Any]:
    """Return a public function, or a method of an example of its class."""
    owner, _, method = name.partition(".")
    found = getattr(kernels_core, owner, None) or getattr(kernels_plugins, owner)
    examples = {
        "Choice": Choice(),
        "DecisionFile": kernels_core.DecisionFile(),
        "Device": kernels_core.Device("cpu"),
        "PluginManager": PluginManager(discover=False),
        "Receipt": receipt(Shift(), device="cpu"),
    }
    return getattr(examples.get(owner, found), method) if method else found


def use(made: Any) -> None:
    """Enter a context manager, and apply a decorator."""
    if hasattr(made, "__enter__"):
        with made:
            pass
    elif getattr(made, "__name__", "") == "decorate":
        made(type("Decorated", (nn.Linear,), {}))


def faults(name: str) -> Iterator[str]:
    """Call a public function once for each parameter and wrong value; yield the errors that are not ours."""
    function, valid = public(name), VALID[name]
    for parameter in [each for each in valid if each not in LEFT_OUT.get(name, ())]:
        for label, value in ZOO.items():
            if (parameter, label) == ("lockfile", "none"):  # the default, for which all installed packages are searched
                continue
            arguments = {**valid, parameter: value}
            positional = [arguments.pop(each) for each in POSITIONAL.get(name, ())]
            try:
                use(function(*positional, **arguments))
            except (KernelsError, *EXPECTED.get(name, ())):
                pass
            except Exception as error:
                yield f"{name}({parameter}={label}): {type(error).__name__}: {error}"


def test_every_public_function_is_here() -> None:
    """Each function in `__all__` of the packages has valid arguments above, so that wrong ones can replace them."""
    named = {
        name
        for package in (kernels_core, kernels_plugins)
        for name in package.__all__
        if inspect.isfunction(getattr(package, name))
    }
    assert named - VALID.keys() == set()


@pytest.mark.filterwarnings("ignore")
def test_wrong_arguments_are_errors_of_ours(
    local_hub: LocalHub, kernel_repository: Callable[..., object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each wrong value for each parameter of each public function is accepted, or refused by a `KernelsError`."""
    kernel_repository("acme/kernels", "").branch("v1")
    monkeypatch.chdir(tmp_path)
    assert [fault for name in VALID for fault in faults(name)] == []
