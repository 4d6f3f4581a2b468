"""Devices in mappings, and the devices of calls that they match."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels_core import (
    ArgumentError,
    ArgumentTypeError,
    CUDAProperties,
    Device,
    Mode,
    ROCMProperties,
    device_capability,
    resolve,
)
from kernels_core.device import TORCH_DEVICE_TYPES, _capability
from kernels_core.testing import HookRecorder
from kernels_plugins.mapping import use_kernel_mapping

Make = Callable[..., Any]
CUDA = torch.device("cuda", 0)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let this machine have cuda:0 of capability 8.0 and cuda:1 of 9.0; tensors on them are fake."""
    capabilities = {0: (8, 0), 1: (9, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[torch.device(device).index])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.version, "hip", None)
    _capability.cache_clear()
    yield
    _capability.cache_clear()


@pytest.mark.parametrize("name", TORCH_DEVICE_TYPES)
def test_every_name_is_a_device(name: str) -> None:
    """Each name in the table makes a Device, equal to and hashed like any other of that name."""
    assert Device(name) == Device(name)
    assert len({Device(name), Device(name)}) == 1


@pytest.mark.parametrize("name", ["gpu", "CUDA", "", "meta", "gpu:0"])
def test_unknown_names_are_refused(name: str) -> None:
    """A name that is not in the table is an ArgumentError that lists the names."""
    with pytest.raises(ArgumentError, match="cpu, cuda") as caught:
        Device(name)
    assert isinstance(caught.value, ValueError)


def test_device_types_have_no_index() -> None:
    """A type with an index is an ArgumentError that says to leave the index out."""
    with pytest.raises(ArgumentError, match=r"'cuda:1' has an index: .*Write 'cuda'"):
        Device("cuda:1")


def test_types_are_checked() -> None:
    """Anything but a string is an ArgumentTypeError."""
    with pytest.raises(ArgumentTypeError):
        Device(torch.device("cpu"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "properties"),
    [("cpu", CUDAProperties(70, 80)), ("cuda", ROCMProperties(70, 80)), ("rocm", CUDAProperties(70, 80)), ("cuda", 80)],
)
def test_properties_belong_to_a_device(name: str, properties: Any) -> None:
    """Properties of another device, or none at all, are refused."""
    with pytest.raises(ArgumentError, match=f"Device '{name}' takes"):
        Device(name, properties)


@pytest.mark.parametrize("cls", [CUDAProperties, ROCMProperties])
def test_ranges_are_checked(cls: Any) -> None:
    """An empty range, and ends that are no integers, are refused."""
    with pytest.raises(ArgumentError, match="Swap the two"):
        cls(90, 80)
    for bad in (9.0, "90", None, True):
        with pytest.raises(ArgumentTypeError):
            cls(70, bad)
        with pytest.raises(ArgumentTypeError):
            cls(min_capability=bad, max_capability=90)
    assert cls(80, 80).holds(80)


def test_kinds_of_ranges_differ() -> None:
    """Equal ranges of CUDA and ROCm are not equal."""
    assert CUDAProperties(70, 80) == CUDAProperties(70, 80)
    assert CUDAProperties(70, 80) != ROCMProperties(70, 80)


@given(st.integers(0, 130), st.integers(0, 130), st.one_of(st.none(), st.integers(0, 130)))
def test_range_holds_both_ends(low: int, high: int, capability: int | None) -> None:
    """A range holds the capabilities between its ends, ends included, and never an unknown one."""
    low, high = sorted((low, high))
    properties = CUDAProperties(low, high)
    assert properties.holds(capability) == (capability is not None and low <= capability <= high)
    assert properties.width == high - low


def test_matching(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Device matches torch devices of its type; the build of PyTorch tells cuda from rocm."""
    assert Device("cpu").matches(torch.device("cpu"))
    assert Device("metal").matches(torch.device("mps", 0)) and Device("mps").matches(torch.device("mps"))
    assert not Device("cpu").matches(CUDA) and not Device("cuda").matches(torch.device("meta"))
    for hip, name in ((None, "cuda"), ("6.2", "rocm")):
        monkeypatch.setattr(torch.version, "hip", hip)
        assert [n for n in ("cuda", "rocm") if Device(n).matches(CUDA)] == [name]
    monkeypatch.setattr(torch.version, "hip", None)
    narrow = Device("cuda", CUDAProperties(80, 89))
    assert narrow.matches(CUDA, capability=80) and narrow.matches(CUDA, capability=89)
    assert not narrow.matches(CUDA, capability=90) and not narrow.matches(CUDA)


def test_capability_is_of_one_device(two_gpus: None) -> None:
    """Capabilities are read per index."""
    assert [device_capability(torch.device("cuda", i)) for i in (0, 1, 0)] == [80, 90, 80]
    assert device_capability(torch.device("cpu")) is None


def test_narrowest_range_serves_each_device(two_gpus: None, make_kernel: Make) -> None:
    """The narrowest range that holds a device goes first, then wider ones, then the device without a range."""
    narrow, wide, plain = make_kernel(1), make_kernel(2), make_kernel(3)
    mapping = {
        "cuda": plain,
        Device("cuda", CUDAProperties(70, 90)): wide,
        Device("cuda", CUDAProperties(89, 90)): narrow,
        Device("cuda", CUDAProperties(100, 120)): make_kernel(4),
    }
    with use_kernel_mapping({"Add": {**mapping}}):
        served = [resolve("Add", device=f"cuda:{i}", mode=Mode.INFERENCE).implementation for i in (0, 1)]
        current = resolve("Add", device="cuda", mode=Mode.INFERENCE)
    assert served == [wide.forward, narrow.forward]
    assert current.request.device == CUDA and current.request.capability == 80
    with use_kernel_mapping({"Add": {"cuda": plain}}):
        assert resolve("Add", device="cuda:1", mode=Mode.INFERENCE).implementation is plain.forward


def test_calls_on_two_gpus_resolve_apart(
    two_gpus: None, make_layer: Make, make_kernel: Make, hook_recorder: HookRecorder
) -> None:
    """Calls of one layer on two GPUs of different capability run different kernels, in any order, also warm."""
    ran = []

    def kernel(name: str) -> Any:
        return type(
            name, (torch.nn.Module,), {"forward": lambda self, x: (ran.append(name), x)[1], "can_torch_compile": True}
        )

    old, new = Device("cuda", CUDAProperties(70, 89)), Device("cuda", CUDAProperties(90, 99))
    layer = make_layer()()
    with use_kernel_mapping({"Add": {old: kernel("old"), new: kernel("new")}}), FakeTensorMode():
        try:
            xs = [torch.empty(2, device=f"cuda:{i}") for i in (0, 1)]
        except RuntimeError as error:
            pytest.skip(f"this PyTorch makes no fake CUDA tensors here: {str(error).splitlines()[0]}")
        for i in (0, 1, 1, 0):
            layer(xs[i])
    assert ran == ["old", "new", "new", "old"]
    asked = {
        (str(c.arguments["request"].device), c.arguments["request"].capability)
        for c in hook_recorder.of("kernels_find_candidates")
    }
    assert asked == {("cuda:0", 80), ("cuda:1", 90)}


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without CUDA")
def test_fake_tensors_of_a_device_that_is_not_here(make_layer: Make) -> None:
    """A fake CUDA tensor on a machine without CUDA runs the reference, as it would undecorated."""
    with FakeTensorMode():
        assert make_layer()()(torch.empty(2, device="cuda")).device == CUDA


def test_rocm_and_metal_can_be_asked_for_by_name(two_gpus: None) -> None:
    """resolve() takes the names of mappings and turns them into those of PyTorch."""
    assert resolve("Add", device="rocm:1", mode=Mode.INFERENCE).request.device == torch.device("cuda", 1)
    assert resolve("Add", device=Device("metal"), mode=Mode.INFERENCE).request.device.type == "mps"
