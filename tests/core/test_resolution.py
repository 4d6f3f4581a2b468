"""How candidates are ranked, tried and reported; the members of a Resolution."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from warned import ignored, never

from kernels_core import (
    ArgumentError,
    Candidate,
    KernelsWarning,
    LayerRequest,
    Mode,
    PluginManager,
    Refusal,
    Resolution,
    forget,
    hookimpl,
    resolve,
)
from kernels_plugins.mapping import register_kernel_mapping, use_kernel_mapping

Make = Callable[..., Any]
X = torch.zeros(2)


def offering(mapping: Any, priority: int | None = None) -> Any:
    """Make a plugin package that brings a mapping."""
    members: dict[str, Any] = {"kernels_mapping": staticmethod(hookimpl(lambda: mapping))}
    if priority is not None:
        members["kernels_priority"] = priority
    return type("Package", (), members)()


def served_by(name: str = "Add") -> str:
    """Return which plugin's offer serves a name, or which tier."""
    resolution = resolve(name, device="cpu", mode=Mode.INFERENCE)
    assert resolution.candidate is not None
    return resolution.plugin if resolution.candidate.tier == "plugin" else resolution.candidate.tier


def test_ranking_of_tiers(make_kernel: Make, isolated_plugins: PluginManager) -> None:
    """The innermost scope goes before the outer one, that before the user, and that before any plugin."""
    kernels = {name: make_kernel(index) for index, name in enumerate(["inner", "outer", "user", "package"])}
    isolated_plugins.register(offering({"Add": {"cpu": kernels["package"]}}, priority=1_000_000), "package")
    assert served_by() == "package"
    register_kernel_mapping({"Add": {"cpu": kernels["user"]}})
    assert served_by() == "user"
    with use_kernel_mapping({"Add": {"cpu": kernels["outer"]}}):
        assert served_by() == "scope"
        with use_kernel_mapping({"Add": {"cpu": kernels["inner"]}}):
            resolution = resolve("Add", device="cpu", mode=Mode.INFERENCE)
    assert resolution.implementation is kernels["inner"].forward


def test_every_tier_is_tried_in_turn(make_kernel: Make, isolated_plugins: PluginManager) -> None:
    """Where inner offers are refused, outer ones are tried in order, and each refusal is kept with its reason."""
    unfit = [type(f"Unfit{i}", (nn.Module,), {"forward": lambda self, x: x, "extra": i}) for i in range(6)]
    isolated_plugins.register(offering({"Add": {"cpu": [unfit[4]]}}, priority=2), "b")
    isolated_plugins.register(offering({"Add": {"cpu": [unfit[5], make_kernel(10)]}}, priority=1), "a")
    register_kernel_mapping({"Add": {"cpu": [unfit[3]]}})
    with use_kernel_mapping({"Add": {"cpu": unfit[2]}}), use_kernel_mapping({"Add": {"cpu": unfit[:2]}}):
        resolution = resolve("Add", device="cpu", mode=Mode.INFERENCE)
    assert [refusal.candidate.source for refusal in resolution.refusals] == unfit
    assert all("extra" in refusal.reason for refusal in resolution.refusals)
    assert resolution.plugin == "a"
    text = resolution.explain()
    assert [text.index(f"Unfit{i}:") for i in range(6)] == sorted(text.index(f"Unfit{i}:") for i in range(6))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(st.sampled_from("abcdef"), st.one_of(st.none(), st.integers(-2, 2)), min_size=1),
    st.randoms(use_true_random=False),
)
def test_plugins_rank_by_priority_then_name(
    make_kernel: Make, isolated_plugins: PluginManager, priorities: dict[str, int | None], chance: Any
) -> None:
    """In whatever order plugins are registered, the largest priority goes first, then the name; 0 is the default."""
    names = list(priorities)
    chance.shuffle(names)
    try:
        for name in names:
            isolated_plugins.register(offering({"Add": {"cpu": make_kernel(1)}}, priorities[name]), name)
        with ignored():
            assert served_by() == min(names, key=lambda name: (-(priorities[name] or 0), name))
    finally:
        for name in names:
            isolated_plugins.unregister(name)


def test_ties_are_reported_once(make_layer: Make, make_kernel: Make, isolated_plugins: PluginManager) -> None:
    """Two plugins with equal priority for one layer: the first by name serves, and a warning names both and a way."""
    isolated_plugins.register(offering({"Add": {"cpu": make_kernel(20)}}), "zeta")
    isolated_plugins.register(offering({"Add": {"cpu": make_kernel(10)}}), "alpha")
    isolated_plugins.register(offering({"Add": {"cpu": make_kernel(30)}}, priority=-1), "late")
    layer = make_layer()()
    with pytest.warns(KernelsWarning) as caught:
        assert layer(X)[0] == layer(torch.zeros(2, requires_grad=True))[0] == 10
    ties = [str(w.message) for w in caught if "equal priority" in str(w.message)]
    assert len(ties) == 1
    assert "alpha, zeta" in ties[0] and "'alpha' goes first" in ties[0] and "late" not in ties[0]
    with never():
        register_kernel_mapping({"Add": {"cpu": make_kernel(40, can_torch_compile=True)}})
        assert layer(X)[0] == 40  # said by the user: no tie to speak of


def test_no_tie_without_rivals(make_kernel: Make, isolated_plugins: PluginManager) -> None:
    """Different priorities, different layers, or two sources of one plugin are no tie."""
    isolated_plugins.register(offering({"Add": {"cpu": [make_kernel(1), make_kernel(2)]}}, 1), "a")
    isolated_plugins.register(offering({"Add": {"cpu": make_kernel(3)}, "Mul": {"cpu": make_kernel(3)}}, 2), "b")
    with never():
        assert (served_by("Add"), served_by("Mul")) == ("b", "b")


def test_candidates_rank_across_hooks(make_kernel: Make, isolated_plugins: PluginManager) -> None:
    """Candidates of kernels_find_candidates and mappings of packages are ranked together by priority."""

    class Finds:
        @hookimpl
        def kernels_find_candidates(self, request: LayerRequest) -> Any:
            return [Candidate(low, priority=1), Candidate(high, priority=9)]

    low, high = make_kernel(1), make_kernel(9)
    isolated_plugins.register(Finds(), "finds")
    isolated_plugins.register(offering({"Add": {"cpu": make_kernel(5)}}, 5), "package")
    resolution = resolve("Add", device="cpu", mode=Mode.INFERENCE)
    assert resolution.implementation is high.forward
    isolated_plugins.register(
        type(
            "V",
            (),
            {"kernels_authorize": staticmethod(hookimpl(lambda candidate: None if candidate.priority < 9 else "no"))},
        )(),
        "veto",
    )
    assert served_by() == "package"


def test_equal_sources_load_once(make_kernel: Make) -> None:
    """Two equal values share one load, as two LayerRepository objects with the same fields do."""
    from dataclasses import dataclass

    loads = []

    @dataclass(frozen=True)
    class Source:
        name: str

        def load(self) -> Any:
            loads.append(self.name)
            return kernel

    kernel = make_kernel(10)
    for _ in range(3):
        with use_kernel_mapping({"Add": {"cpu": Source("same")}, "Other": {"cpu": Source("same")}}):
            for name in ("Add", "Other"):
                assert resolve(name, device="cpu", mode=Mode.INFERENCE).implementation is kernel.forward
    assert loads == ["same"]


def test_failures_are_remembered_until_a_change(make_kernel: Make) -> None:
    """A source that failed is not tried at each resolution; after forget() it is tried again."""

    class Source:
        loads = 0

        def load(self) -> Any:
            self.loads += 1
            if self.loads == 1:
                raise OSError("no network")
            return make_kernel(10)

    source = Source()
    register_kernel_mapping({"Add": {"cpu": source}})
    for _ in range(3):
        assert resolve("Add", device="cpu", mode=Mode.INFERENCE).is_reference
    assert source.loads == 1
    forget()
    assert not resolve("Add", device="cpu", mode=Mode.INFERENCE).is_reference
    assert source.loads == 2


def test_training_does_not_fetch_what_is_for_inference(make_layer: Make, make_kernel: Make) -> None:
    """With a source per mode, a call loads the source of its own mode alone."""
    loads = []

    def source(added: float) -> Any:
        kernel = make_kernel(added)
        return type("Source", (), {"load": lambda self: loads.append(added) or kernel})()

    layer = make_layer()()
    with use_kernel_mapping({"Add": {"cpu": {Mode.TRAINING: source(10), Mode.INFERENCE: source(20)}}}):
        assert layer(torch.zeros(2, requires_grad=True))[0] == 10
        assert loads == [10]
        assert layer(X)[0] == 20
    assert loads == [10, 20]


def test_resolve_runs_nothing(make_layer: Make) -> None:
    """resolve() decides without calling the kernel or the reference, and notifies no plugin of a use."""

    class Runs(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise AssertionError("run")

    with use_kernel_mapping({"Add": {"cpu": Runs}}):
        resolution = resolve(make_layer(), device="cpu", mode=Mode.INFERENCE)
    assert resolution.implementation is Runs.forward
    assert not resolution.is_reference
    assert resolution.origin.endswith("Runs")


def test_resolve_agrees_with_the_call(make_layer: Make, make_kernel: Make) -> None:
    """The answer of resolve() for each mode is the kernel that a call in that mode runs."""
    layer = make_layer()()
    kernel = make_kernel(10, has_backward=False)
    with use_kernel_mapping({"Add": {"cpu": kernel}}), ignored():
        for mode, x in ((Mode.INFERENCE, X), (Mode.TRAINING, torch.zeros(2, requires_grad=True))):
            said = resolve(layer, device="cpu", mode=mode)
            assert (layer(x)[0] == 1) == said.is_reference == (mode is Mode.TRAINING)


@pytest.mark.parametrize("device", ["nowhere", "", "cpu:x", 3.5, None, "cuda:300", "cuda:99999"])
def test_impossible_devices_are_errors_of_ours(device: Any) -> None:
    """A device that PyTorch does not know, or takes for another one, is an ArgumentError."""
    with pytest.raises(ArgumentError):
        resolve("Add", device=device, mode=Mode.INFERENCE)


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks about a device that is not there")
def test_resolving_for_a_device_that_is_not_here(make_kernel: Make) -> None:
    """A question about CUDA on a machine without it gets an answer, or an error of ours."""
    register_kernel_mapping({"Add": {"cuda": make_kernel(10)}})
    try:
        resolution = resolve("Add", device="cuda", mode=Mode.INFERENCE)
    except ArgumentError:
        return
    assert resolution.request.capability is None
    assert not resolution.is_reference


def test_disabled_mapping_gives_the_reference_with_a_note(
    make_layer: Make, make_kernel: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DISABLE_KERNEL_MAPPING=1 gives the reference, says so, asks no plugin, and does not trip use_fallback=False."""
    monkeypatch.setenv("DISABLE_KERNEL_MAPPING", "1")
    register_kernel_mapping({"Add": {"cpu": make_kernel(10)}})
    layer = make_layer(use_fallback=False)
    assert layer()(X)[0] == 1
    resolution = resolve(layer, device="cpu", mode=Mode.INFERENCE)
    assert resolution.is_reference and resolution.refusals == ()
    assert "DISABLE_KERNEL_MAPPING" in resolution.explain()


def test_values_print_as_sentences(make_kernel: Make) -> None:
    """Request, refusal and resolution read as lines that name layer, device, mode, source and reason."""
    request = LayerRequest("Add", torch.device("cuda", 1), Mode.TRAINING | Mode.TORCH_COMPILE)
    assert str(request) == "layer 'Add' on cuda:1 for training + compile"
    refusal = Refusal("it is too slow", Candidate(nn.Identity), "acme")
    assert str(refusal) == "torch.nn.modules.linear.Identity: it is too slow"
    assert str(Refusal("it raised", plugin="acme")) == "plugin 'acme': it raised"
    resolution = Resolution(request, refusals=(refusal,), checked={"digest": "12 files"}, note="why not")
    assert str(resolution).splitlines() == [
        "layer 'Add' on cuda:1 for training + compile: reference (why not)",
        "  refused torch.nn.modules.linear.Identity: it is too slow",
        "  digest: 12 files",
    ]


def test_values_are_frozen() -> None:
    """Values that travel between plugins cannot be changed on the way."""
    request = LayerRequest("Add", torch.device("cpu"), Mode.INFERENCE)
    for value, name in (
        (request, "layer_name"),
        (Candidate(3), "source"),
        (Refusal(""), "reason"),
        (Resolution(request), "origin"),
    ):
        with pytest.raises(AttributeError):
            setattr(value, name, "changed")


def test_requests_inside_a_scope_can_be_keys() -> None:
    """A plugin may remember answers by request, inside a use_kernel_mapping scope, too."""
    with use_kernel_mapping({}):
        request = resolve("Add", device="cpu", mode=Mode.INFERENCE).request
    assert {request: 1}[request] == 1
