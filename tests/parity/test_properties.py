"""Ranges of capabilities: both ends included, the narrowest wins, the same range replaces."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from parity_scene import OURS, REFERENCE, THEIRS, Both, Side, able, capability

pytestmark = pytest.mark.filterwarnings("ignore::kernels_core.KernelsWarning")
Ranges = list[tuple[int, int] | None]
PROPERTIES = {"cuda": "CUDAProperties", "rocm": "ROCMProperties"}


def choose(side: Side, ranges: Ranges, device: str = "cuda", mode: str = "INFERENCE") -> float:
    """Register a kernel per range, one after the other, and kernelize; the first multiplies by 3."""
    layer = side.layer()
    properties = getattr(side.lib, PROPERTIES[device])
    with side.lib.use_kernel_mapping({}):
        for number, span in enumerate(ranges):
            key = side.lib.Device(type=device, properties=None if span is None else properties(*span))
            with_it = {layer.kernel_layer_name: {key: able(3.0 + number)}}
            side.lib.register_kernel_mapping(with_it)
        model = side.lib.kernelize(layer(), mode=side.mode(mode), device=device)
    return float(model(torch.ones(1)).item())


EXAMPLES: list[tuple[Ranges, int, float]] = [
    ([(75, 90)], 75, 3),
    ([(75, 90)], 90, 3),
    ([(75, 90)], 74, REFERENCE),
    ([(75, 90)], 91, REFERENCE),
    ([(0, 100), (80, 89)], 86, 4),
    ([(80, 89), (0, 100)], 86, 3),
    ([(80, 89), None], 86, 3),
    ([None, (80, 89)], 90, 3),
    ([(80, 89), (80, 89)], 86, 4),
    ([None, None], 86, 4),
    ([(80, 86), (86, 89)], 86, 4),
    ([(100, 120), (75, 90), (90, 90)], 90, 5),
    ([], 90, REFERENCE),
]


@pytest.mark.parametrize("device", list(PROPERTIES))
@pytest.mark.parametrize(("ranges", "here", "expected"), EXAMPLES)
def test_ranges(
    both: Both, monkeypatch: pytest.MonkeyPatch, ranges: Ranges, here: int, expected: float, device: str
) -> None:
    """Both choose the kernel that was expected, on CUDA and on ROCm."""
    with capability(monkeypatch, here, hip=device == "rocm"):
        both.run(lambda side: choose(side, ranges, device)).agree(expected)


SPANS = st.tuples(st.integers(50, 130), st.integers(0, 60)).map(lambda span: (span[0], span[0] + span[1]))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    spans=st.lists(st.none() | SPANS, max_size=7, unique_by=lambda span: None if span is None else span[1] - span[0]),
    here=st.integers(50, 130),
    replaced=st.integers(0, 6),
)
def test_any_ranges(monkeypatch: pytest.MonkeyPatch, spans: Ranges, here: int, replaced: int) -> None:
    """Of any ranges of different widths, one of them registered twice, both choose the same."""
    if replaced < len(spans):
        spans = [*spans, spans[replaced]]
    with capability(monkeypatch, here):
        assert choose(OURS, spans) == choose(THEIRS, spans)


def test_properties_are_values(both: Both) -> None:
    """Both compare and hash devices and properties by value, and tell the ends by the same names."""

    def scenario(side: Side) -> list[object]:
        lib = side.lib
        one, same = (lib.CUDAProperties(min_capability=75, max_capability=90) for _ in range(2))
        other = lib.CUDAProperties(75, 89)
        devices = {lib.Device("cuda", one), lib.Device(type="cuda", properties=same), lib.Device("cuda", other)}
        return [
            one == same,
            hash(one) == hash(same),
            one == other,
            (one.min_capability, one.max_capability),
            len(devices),
            lib.Device("cuda").properties,
            lib.Device("cpu") == lib.Device("cpu"),
            one == lib.ROCMProperties(75, 90),
        ]

    both.run(scenario).agree([True, True, False, (75, 90), 2, None, True, False])


@pytest.mark.parametrize(
    ("device", "properties"), [("cpu", "CUDAProperties"), ("rocm", "CUDAProperties"), ("cuda", "ROCMProperties")]
)
def test_properties_of_another_device(both: Both, device: str, properties: str) -> None:
    """Both refuse properties that a device cannot have."""
    both.run(lambda side: side.lib.Device(device, getattr(side.lib, properties)(75, 90))).refuse(ValueError)


@pytest.mark.parametrize("value", ["75", None])
def test_ends_are_integers(both: Both, value: object) -> None:
    """Both refuse an end of a range that is no integer, with an error of their own."""
    pair = both.run(lambda side: side.lib.CUDAProperties(value, 90))
    assert pair.theirs.error is not None
    assert isinstance(pair.ours.error, TypeError)


@pytest.mark.parametrize("kind", list(PROPERTIES.values()))
def test_inverted_range(both: Both, kind: str) -> None:
    """Both refuse a range that holds nothing, at once, and name both ends."""
    pair = both.run(lambda side: getattr(side.lib, kind)(90, 75))
    for outcome in (pair.theirs, pair.ours):
        assert outcome.error is not None and "90" in str(outcome.error) and "75" in str(outcome.error)
    assert isinstance(pair.ours.error, ValueError)


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps", "neuron", "npu", "rocm", "tpu", "xpu"])
def test_devices(both: Both, device: str) -> None:
    """Both take a mapping for each of the devices, by name or as a value, and serve no other device from it."""

    def scenario(side: Side) -> list[float]:
        layer = side.layer()
        found = []
        for key in (device, side.lib.Device(type=device)):
            found.append(side.freeze(layer(), {layer.kernel_layer_name: {key: able(3)}}, device="cpu"))
        return found

    both.run(scenario).agree([3.0 if device == "cpu" else REFERENCE] * 2)
