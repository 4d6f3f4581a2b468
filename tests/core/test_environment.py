"""The settings that the core obeys: their values, and that they are read when needed."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels_core import ArgumentError, KernelsWarning, NoKernelError
from kernels_core.environment import mapping_disabled, plugin_choice, setting, strict, switch
from kernels_plugins.mapping import register_kernel_mapping, use_kernel_mapping

Make = Callable[..., Any]
X = torch.zeros(2)
ON = ["1", "true", "True", "TRUE", "yes", " YES ", "on"]
OFF = ["0", "false", "no", "off", "", "  ", None]
BAD = ["2", "maybe", "y", "enable", "truee"]


@pytest.mark.parametrize("name", ["KERNELS_STRICT", "DISABLE_KERNEL_MAPPING"])
@pytest.mark.parametrize("value", ON + OFF)
def test_switches(monkeypatch: pytest.MonkeyPatch, name: str, value: str | None) -> None:
    """Yes and no can be written in the usual ways, in any case; unset and empty are no."""
    if value is not None:
        monkeypatch.setenv(name, value)
    read = strict if name == "KERNELS_STRICT" else mapping_disabled
    assert read() is switch(name) is (value in ON)


@pytest.mark.parametrize("name", ["KERNELS_STRICT", "DISABLE_KERNEL_MAPPING"])
@pytest.mark.parametrize("value", BAD)
def test_bad_values_say_so(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    """Any other value is an error that names variable, value, and the values that are allowed."""
    monkeypatch.setenv(name, value)
    with pytest.raises(ArgumentError, match=f"{name}='{value}'.*1, true or yes"):
        switch(name)


@pytest.mark.parametrize("value", [*ON, *OFF, *BAD, " Cached "])
def test_settings_with_other_values(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    """The words for on and off are the same where other words are allowed, and these are returned as they are."""
    if value is not None:
        monkeypatch.setenv("ACME_TUNING", value)
    assert setting("ACME_TUNING") == (True if value in ON else False if value in OFF else str(value).strip())


@pytest.mark.parametrize("value", BAD[:2])
def test_bad_value_reaches_the_call(monkeypatch: pytest.MonkeyPatch, make_layer: Make, value: str) -> None:
    """A call with a bad DISABLE_KERNEL_MAPPING says so, each time, and does not guess."""
    layer = make_layer()()
    monkeypatch.setenv("DISABLE_KERNEL_MAPPING", value)
    for _ in range(2):
        with pytest.raises(ArgumentError, match="DISABLE_KERNEL_MAPPING"):
            layer(X)


@pytest.mark.parametrize("value", ["1", "true", "yes", "0", "false", "no"])
def test_disable_kernel_mapping(
    monkeypatch: pytest.MonkeyPatch, make_layer: Make, make_kernel: Make, value: str
) -> None:
    """Switched on, everything runs on the reference: scopes, registered mappings and functions."""
    from kernels_core import use_kernel_forward_from_hub

    @use_kernel_forward_from_hub("double")
    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    monkeypatch.setenv("DISABLE_KERNEL_MAPPING", value)
    register_kernel_mapping({"double": {"cpu": lambda x: x * 30}})
    off = value in ("1", "true", "yes")
    with use_kernel_mapping({"Add": {"cpu": make_kernel(10)}}):
        assert make_layer()()(X)[0] == (1 if off else 10)
        assert double(torch.ones(1)) == (2 if off else 30)


def test_disable_kernel_mapping_in_a_real_process(python: Make) -> None:
    """The variable counts in a fresh process, with a bad value named in the error."""
    code = """
        import torch
        from kernels_core import use_kernel_forward_from_hub
        from kernels_plugins.mapping import register_kernel_mapping
        @use_kernel_forward_from_hub("double")
        def double(x):
            return x * 2
        register_kernel_mapping({"double": {"cpu": lambda x: x * 30}})
        print(double(torch.ones(1)).item())
    """
    choice = {"KERNELS_PLUGINS": "mapping"}
    assert python(code, {**choice, "DISABLE_KERNEL_MAPPING": "yes"}).stdout == "2.0\n"
    bad = python(code, {**choice, "DISABLE_KERNEL_MAPPING": "perhaps"}, check=False)
    assert bad.returncode == 1 and "DISABLE_KERNEL_MAPPING='perhaps'" in bad.stderr


def test_strict_is_read_at_each_resolution(monkeypatch: pytest.MonkeyPatch, make_layer: Make) -> None:
    """A layer that warned before raises once strict mode is on and a mapping changed, and the other way round."""
    layer = make_layer()()
    unfit = type("Unfit", (torch.nn.Module,), {"forward": lambda self: 0})
    with pytest.warns(KernelsWarning), use_kernel_mapping({"Add": {"cpu": unfit}}):
        assert layer(X)[0] == 1
    monkeypatch.setenv("KERNELS_STRICT", "1")
    with pytest.raises(NoKernelError), use_kernel_mapping({"Add": {"cpu": unfit}}):
        layer(X)
    monkeypatch.setenv("KERNELS_STRICT", "0")
    with use_kernel_mapping({"Add": {"cpu": unfit}}):
        assert layer(X)[0] == 1


@pytest.mark.parametrize(
    ("value", "allowed", "blocked"),
    [
        ("", None, set()),
        (" , ", None, set()),
        ("a", {"a"}, set()),
        ("a,b", {"a", "b"}, set()),
        (" a , b ,", {"a", "b"}, set()),
        ("-c", None, {"c"}),
        ("-c, - d", None, {"c", "d"}),
        ("a,-c", {"a"}, {"c"}),
    ],
)
def test_plugin_choice(
    monkeypatch: pytest.MonkeyPatch, value: str, allowed: set[str] | None, blocked: set[str]
) -> None:
    """KERNELS_PLUGINS lists plugins to allow, and with a minus, to block."""
    monkeypatch.setenv("KERNELS_PLUGINS", value)
    assert plugin_choice() == (allowed, blocked)


def test_the_page_lists_every_variable() -> None:
    """docs/environment.md has a row for each variable whose name is a text in the code; the local Hub is for tests."""
    root = Path(__file__).parents[2]
    variable = re.compile(r"(KERNELS|HF|XDG|LOCAL|DISABLE|TRANSFORMERS|DO_NOT)_[A-Z_]+|CXX")
    named = {
        node.value
        for package in ("kernels_core", "kernels_plugins")
        for file in (root / package).rglob("*.py")
        if "local_hub" not in file.parts
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and variable.fullmatch(node.value)
    }
    assert {"KERNELS_STRICT", "KERNELS_REQUIRE_PLUGINS", "LOCAL_KERNELS", "HF_HUB_OFFLINE"} <= named
    rows = set(
        re.findall(
            r"`([A-Z_]+)`", "".join(re.findall(r"^\|([^|]*)\|", (root / "docs/environment.md").read_text(), re.M))
        )
    )
    assert not named - rows
