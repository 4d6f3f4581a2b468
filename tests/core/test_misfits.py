"""Misfits: kernels that are offered for a layer, but for another device or mode. They are reported, never tried."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from warned import never

from kernels_core import (
    Candidate,
    Cause,
    CUDAProperties,
    Device,
    KernelizeError,
    LayerRequest,
    Mode,
    NoKernelError,
    PluginManager,
    Refusal,
    cli,
    hookimpl,
    kernelize,
    receipt,
    resolve,
    use_kernel_forward_from_hub,
)
from kernels_plugins.mapping import register_kernel_mapping, use_kernel_mapping

X = torch.ones(2)


@use_kernel_forward_from_hub("Add")
class Add(nn.Module):
    """Adds one."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add."""
        return x + 1


@use_kernel_forward_from_hub("Add", use_fallback=False)
class Insists(nn.Module):
    """Adds one, and wants a kernel for that."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add."""
        return x + 1


class Fast(nn.Module):
    """A kernel."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add."""
        return 1 + x


class Never:
    """A source that must not be loaded."""

    def __init__(self, name: str) -> None:
        self.name = name

    def load(self) -> Any:
        """Fail the test."""
        pytest.fail(f"{self.name} was loaded")

    def __repr__(self) -> str:
        return self.name


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """A misfit is no fault: nothing here may warn."""
    with never():
        yield


def misfits(device: str = "cpu", mode: Mode = Mode.INFERENCE) -> list[str]:
    """Return the misfits that are reported for the layer."""
    return [str(misfit) for misfit in resolve(Add, device=device, mode=mode).misfits]


def test_each_source_is_told_with_its_reason_and_none_is_loaded() -> None:
    """Of several sources and devices, each is one misfit; names of other layers are not looked at."""
    mapping = {"Add": {"cuda": [Never("a"), Never("b")], "mps": Never("c")}, "Other": {"cuda": Never("d")}}
    with use_kernel_mapping(mapping):
        assert misfits() == [
            "a: it is mapped for cuda, and this call is on cpu",
            "b: it is mapped for cuda, and this call is on cpu",
            "c: it is mapped for mps, and this call is on cpu",
        ]
        assert Add()(X).tolist() == [2, 2]


@pytest.mark.parametrize(
    ("entry", "device", "mode", "cause", "reason"),
    [
        ({"cuda": Fast}, "cpu", Mode.INFERENCE, Cause.DEVICE, "it is mapped for cuda, and this call is on cpu"),
        ({"cpu": Fast}, "meta", Mode.INFERENCE, Cause.DEVICE, "it is mapped for cpu, and this call is on meta"),
        (
            {Device("cuda", CUDAProperties(1, 2)): Fast},
            "cuda",
            Mode.INFERENCE,
            Cause.PROPERTIES,
            "it is mapped for CUDAProperties(min_capability=1, max_capability=2), and the capability of cuda",
        ),
        (
            {"cpu": {Mode.INFERENCE: Fast}},
            "cpu",
            Mode.TRAINING,
            Cause.MODE,
            "it is mapped for Mode.INFERENCE, and this call is Mode.TRAINING",
        ),
        (
            {"cpu": {Mode.TRAINING: Fast}},
            "cpu",
            Mode.TRAINING | Mode.TORCH_COMPILE,
            Cause.MODE,
            "it is mapped for Mode.TRAINING, and this call is Mode.TRAINING|TORCH_COMPILE",
        ),
        (  # of two reasons, the device is the first
            {"cuda": {Mode.TRAINING: Fast}},
            "cpu",
            Mode.INFERENCE,
            Cause.DEVICE,
            "it is mapped for cuda, and this call is on cpu",
        ),
    ],
)
@pytest.mark.skipif(torch.version.hip is not None, reason="cuda is not a device there")
def test_reasons(entry: Any, device: str, mode: Mode, cause: Cause, reason: str) -> None:
    """Device, capability and mode, in this order."""
    with use_kernel_mapping({"Add": entry}):
        (misfit,) = resolve(Add, device=device, mode=mode).misfits
    assert misfit.cause is cause
    assert misfit.reason.startswith(reason)
    assert misfit.candidate is not None and misfit.plugin == "mapping"


def test_stand_ins_are_no_misfits() -> None:
    """A kernel for another mode that may stand in serves."""
    with use_kernel_mapping({"Add": {"cpu": {Mode.TRAINING: Fast}}}):
        assert misfits() == []
        assert not resolve(Add, device="cpu", mode=Mode.INFERENCE).is_reference


def test_one_source_for_several_devices_is_told_once() -> None:
    """A source that was tried here, and is mapped for other devices as well, is no misfit besides."""
    with use_kernel_mapping({"Add": "/nowhere:Add"}):  # for all devices
        resolution = resolve(Add, device="cpu", mode=Mode.INFERENCE)
    assert len(resolution.refusals) == 1 and resolution.misfits == ()


def test_scopes_registrations_and_inheritance() -> None:
    """Misfits of each place that applies are reported, innermost first; none of a place that does not."""
    register_kernel_mapping({"Add": {"cuda": Never("registered")}})
    with use_kernel_mapping({"Add": {"cuda": Never("outer")}}), use_kernel_mapping({"Add": {"cuda": Never("inner")}}):
        assert [told.partition(":")[0] for told in misfits()] == ["inner", "outer", "registered"]
        with use_kernel_mapping({"Add": {"mps": Never("alone")}}, inherit_mapping=False):
            assert [told.partition(":")[0] for told in misfits()] == ["alone"]


def test_they_are_told_where_the_reference_runs_and_kept_where_a_kernel_serves() -> None:
    """Text has them only if they may be why; receipts and JSON have them always."""
    with use_kernel_mapping({"Add": {"cuda": Never("a")}}):
        assert "not for this call: a: it is mapped for cuda" in str(resolve(Add, device="cpu", mode=Mode.INFERENCE))
        assert "not for this call: a: it is mapped for cuda" in str(receipt(Add(), device="cpu"))
    with use_kernel_mapping({"Add": {"cuda": Never("a"), "cpu": Fast}}):
        resolution = resolve(Add, device="cpu", mode=Mode.INFERENCE)
        assert len(resolution.misfits) == 1 and "not for this call" not in str(resolution)
        assert "not for this call" not in str(receipt(Add(), device="cpu"))
        (row,) = json.loads(receipt(Add(), device="cpu").to_json())
        assert row["misfits"] == [{"candidate": "a", "reason": "it is mapped for cuda, and this call is on cpu"}]


def test_the_command_line_has_them(capsys: pytest.CaptureFixture[str]) -> None:
    """`resolve --json` is the whole decision."""
    register_kernel_mapping({"Add": {"cuda": Never("a")}})
    with pytest.raises(SystemExit):
        cli.command_line()(["resolve", "Add", "--json"])
    (misfit,) = json.loads(capsys.readouterr().out)["misfits"]
    assert misfit["candidate"] == "a" and "mapped for cuda" in misfit["reason"]


def test_a_misfit_is_no_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Strict mode raises where an offered kernel was refused; one for another device was not refused."""
    monkeypatch.setenv("KERNELS_STRICT", "1")
    with use_kernel_mapping({"Add": {"cuda": Never("a")}}):
        assert Add()(X).tolist() == [2, 2]


def test_a_layer_that_insists_says_what_there_is_elsewhere() -> None:
    """An error for want of a kernel names those that are for other devices or modes."""
    with use_kernel_mapping({"Add": {"cuda": Never("a"), "cpu": {Mode.TRAINING | Mode.TORCH_COMPILE: Fast}}}):
        Insists()(X)  # what can be traced can serve a call that is not
    with use_kernel_mapping({"Add": {"cuda": Never("a")}}):
        with pytest.raises(NoKernelError, match="not for this call: a: it is mapped for cuda, and this call is on cpu"):
            Insists()(X)
        with pytest.raises(KernelizeError, match="a: it is mapped for cuda, and this call is on cpu") as raised:
            kernelize(Insists(), mode=Mode.INFERENCE, device="cpu")
    assert str(raised.value).endswith("Register a kernel that fits.")  # it cannot be allowed the reference


def test_plugins_may_tell_of_misfits(isolated_plugins: PluginManager) -> None:
    """A refusal with a candidate among the offers of a plugin is a misfit."""

    class Plugin:
        @hookimpl
        def kernels_find_candidates(self, request: LayerRequest) -> list[Any]:
            return [Refusal("it is for winter", Candidate(Never("a")), cause=Cause.MODE), Candidate(Fast)]

    isolated_plugins.register(Plugin(), "seasons")
    resolution = resolve(Add, device="cpu", mode=Mode.INFERENCE)
    assert [(m.plugin, m.reason) for m in resolution.misfits] == [("seasons", "it is for winter")]
    assert resolution.plugin == "seasons" and not resolution.refusals


def test_what_is_off_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """With DISABLE_KERNEL_MAPPING no plugin is asked, so no misfit is reported."""
    monkeypatch.setenv("DISABLE_KERNEL_MAPPING", "1")
    with use_kernel_mapping({"Add": {"cuda": Never("a")}}):
        assert misfits() == []
