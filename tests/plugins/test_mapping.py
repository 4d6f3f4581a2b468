"""The plugin `mapping`: forms of a mapping, and the source that it finds."""

from __future__ import annotations

import contextlib
import copy
import functools
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from warned import ignored, never

from kernels_core import (
    STAND_INS,
    ArgumentError,
    ArgumentTypeError,
    Candidate,
    CUDAProperties,
    Device,
    KernelsWarning,
    LayerRequest,
    Mode,
    NoKernelError,
    PluginManager,
    Reference,
    Scope,
    hookimpl,
    kernelize,
    receipt,
    resolve,
    use_kernel_forward_from_hub,
)
from kernels_plugins import LayerRepository, LocalLayerRepository, opaque, reference_backward, verify
from kernels_plugins import mapping as mapping_module
from kernels_plugins.mapping import parse_mapping, register_kernel_mapping, use_kernel_mapping

pytestmark = pytest.mark.usefixtures("mapping_plugin")


def kernel(name: str = "Kernel") -> Any:
    """Make a kernel class that can be traced."""
    return type(name, (nn.Module,), {"forward": lambda self, x: name, "can_torch_compile": True})


def serving(name: str = "Layer", mode: Mode = Mode.INFERENCE, device: str = "cpu") -> str:
    """Return the name of the kernel that serves, or "reference"."""
    resolution = resolve(name, device=device, mode=mode)
    return "reference" if resolution.is_reference else resolution.origin.rpartition(".")[2]


A, B, C = kernel("A"), kernel("B"), kernel("C")

BAD_MAPPINGS: dict[str, tuple[Any, type[Exception]]] = {
    "no mapping": ([("Layer", {"cpu": A})], ArgumentTypeError),
    "None": (None, ArgumentTypeError),
    "layer name": ({3: {"cpu": A}}, ArgumentTypeError),
    "no devices": ({"Layer": A}, ArgumentTypeError),
    "unknown device": ({"Layer": {"gpu": A}}, ArgumentError),
    "device type": ({"Layer": {3: A}}, ArgumentTypeError),
    "several devices": ({"Layer": {("cpu", "cuda"): A}}, ArgumentTypeError),
    "device with an index": ({"Layer": {"cuda:1": A}}, ArgumentError),
    "mode before device": ({"Layer": {Mode.INFERENCE: {"cpu": A}}}, ArgumentTypeError),
    "torch device": ({"Layer": {torch.device("cpu"): A}}, ArgumentTypeError),
    "mode type": ({"Layer": {"cpu": {"training": A}}}, ArgumentTypeError),
    "compile alone": ({"Layer": {"cpu": {Mode.TORCH_COMPILE: A}}}, ArgumentError),
    "string without a layer": ({"Layer": {"cpu": "owner/repository"}}, ArgumentError),
    "string without a repository": ({"Layer": "name:Layer"}, ArgumentError),
    "unknown option": ({"Layer": ("owner/name:Layer", {"versions": 2})}, ArgumentError),
    "version and revision": ({"Layer": ("owner/name:Layer", {"version": 2, "revision": "main"})}, ArgumentError),
    "version of the wrong type": ({"Layer": ("owner/name:Layer", {"version": "two"})}, ArgumentError),
    "options that are none": ({"Layer": {"cpu": ("owner/name:Layer", 2)}}, ArgumentTypeError),
    "bytes": ({"Layer": {"cpu": b"owner/name:Layer"}}, ArgumentTypeError),
    "instance": ({"Layer": {"cpu": A()}}, ArgumentTypeError),
    "other class": ({"Layer": {"cpu": dict}}, ArgumentTypeError),
    "number": ({"Layer": {"cpu": 3}}, ArgumentTypeError),
    "None as source": ({"Layer": {"cpu": None}}, ArgumentTypeError),
    "bad one in a list": ({"Layer": {"cpu": [A, 3]}}, ArgumentTypeError),
    "list in a list": ({"Layer": {"cpu": [[A]]}}, ArgumentTypeError),
    "mapping in a mode": ({"Layer": {"cpu": {Mode.TRAINING: {Mode.TRAINING: A}}}}, ArgumentTypeError),
}


@pytest.mark.parametrize("name", BAD_MAPPINGS)
@pytest.mark.parametrize("use", [register_kernel_mapping, use_kernel_mapping])
def test_bad_mappings_are_refused_at_once(name: str, use: Callable[..., Any]) -> None:
    """A mistake in a mapping is an error of the call that gets it, and nothing of it is registered."""
    bad, error = BAD_MAPPINGS[name]
    if isinstance(bad, dict):
        bad = {"Good": {"cpu": B}, **bad}
    with pytest.raises(error):
        use(bad)
    assert serving("Good") == "reference"


def test_errors_say_where() -> None:
    """An error in a mapping names layer, device and value."""
    with pytest.raises(ArgumentError, match=r"layer 'Layer': Unknown device type 'gpu'"):
        use_kernel_mapping({"Layer": {"gpu": A}})
    with pytest.raises(ArgumentTypeError, match=r"layer 'Layer': Mode.INFERENCE stands where a device should"):
        use_kernel_mapping({"Layer": {Mode.INFERENCE: A}})
    with pytest.raises(ArgumentError, match=r"layer 'Layer', device 'cpu': 'owner/repository' names no layer"):
        use_kernel_mapping({"Layer": {"cpu": "owner/repository"}})


REPOSITORY = LayerRepository("owner/name", layer_name="Fast", version=1)
TRANSFORMERS = {
    "text": ("owner/name:Fast", REPOSITORY),
    "text per device": ({"cpu": "owner/name:Fast", "cuda": "owner/other:Fast"}, REPOSITORY),
    "text per mode": ({"cpu": {Mode.INFERENCE: "owner/name:Fast"}}, REPOSITORY),
    "version": (("owner/name:Fast", {"version": 3}), LayerRepository("owner/name", layer_name="Fast", version=3)),
    "revision": (
        {"cpu": ("owner/name:Fast", {"revision": "main", "version": None})},
        LayerRepository("owner/name", layer_name="Fast", revision="main"),
    ),
    "trust": (
        {"cpu": {Mode.INFERENCE: ("owner/name:Fast", {"version": 1, "trust_remote_code": True})}},
        LayerRepository("owner/name", layer_name="Fast", version=1, trust_remote_code=True),
    ),
    "folder": ({"cpu": "/home/user/fast_norm:Fast"}, LocalLayerRepository("/home/user/fast_norm", layer_name="Fast")),
    "in a list": ({"cpu": ["owner/name:Fast", ("owner/name:Fast", {"version": 2})]}, REPOSITORY),
}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_tables_of_transformers(name: str) -> None:
    """Sources written as in transformers mean the repositories that transformers would make of them."""
    form, expected = TRANSFORMERS[name]
    level = parse_mapping({"Layer": form})
    request = LayerRequest("Layer", torch.device("cpu"), Mode.INFERENCE)
    assert level.offers(request, Candidate(None))[0] == Candidate(expected)


@pytest.mark.parametrize(
    "form",
    [
        {"cpu": A},
        {Device("cpu"): A},
        {"cpu": [A]},
        {"cpu": (A, B)},
        {"cpu": {Mode.FALLBACK: A}},
        {"cpu": {Mode.INFERENCE: [A, B]}},
        {"cuda": B, "cpu": A, "mps": C},
    ],
    ids=range(7),
)
def test_forms_of_a_mapping(form: Any) -> None:
    """Devices as strings or Device; a source, sources in order, or sources per mode."""
    with use_kernel_mapping({"Layer": form}):
        assert serving() == "A"


def test_sources_of_every_kind() -> None:
    """A class, a function, a partial, a bound method, a builtin, and an object with load() can serve."""

    class Loads:
        def load(self) -> Any:
            return A

    class Method:
        def run(self, x: Any) -> Any:
            return "method"

    @use_kernel_forward_from_hub("fn")
    def fn(x: torch.Tensor) -> Any:
        return "reference"

    def three(n: int, x: Any) -> Any:
        return "partial"

    x = torch.zeros(1)
    for source, expected in (
        (A, "A"),
        (Loads(), "A"),
        (lambda x: "lambda", "lambda"),
        (functools.partial(three, 1), "partial"),
        (Method().run, "method"),
    ):
        with use_kernel_mapping({"fn": {"cpu": source}}):
            assert fn(x) == expected


def test_empty_list_of_sources_offers_nothing() -> None:
    """An empty list leaves a layer to the mappings further out."""
    register_kernel_mapping({"Layer": {"cpu": A}})
    with use_kernel_mapping({"Layer": {"cpu": []}}):
        assert serving() == "A"


def test_sources_are_tried_in_order() -> None:
    """The first source that loads and fits serves, and the others are not loaded."""
    loads = []

    class Source:
        def __init__(self, name: str, loaded: Any) -> None:
            self.name, self.loaded = name, loaded

        def load(self) -> Any:
            loads.append(self.name)
            if isinstance(self.loaded, Exception):
                raise self.loaded
            return self.loaded

    sources = [Source("fails", OSError("gone")), Source("unfit", nn.Linear), Source("good", A), Source("late", B)]
    with use_kernel_mapping({"Layer": {"cpu": sources}}):
        resolution = resolve("Layer", device="cpu", mode=Mode.INFERENCE)
    assert loads == ["fails", "unfit", "good"]
    assert [refusal.candidate.source for refusal in resolution.refusals] == sources[:2]
    assert "OSError: gone" in resolution.refusals[0].reason
    assert resolution.implementation is A.forward


def test_registering_adds_and_replaces() -> None:
    """A second mapping adds layers and devices; the entry for an equal device is replaced, with all its modes."""
    register_kernel_mapping({"Layer": {"cpu": {Mode.INFERENCE: A, Mode.TRAINING: B}}, "Other": {"cpu": A}})
    register_kernel_mapping({"Layer": {"cuda": C}})
    assert (serving(), serving(mode=Mode.TRAINING), serving("Other")) == ("A", "B", "A")
    register_kernel_mapping({"Layer": {"cpu": {Mode.INFERENCE: C}}})
    assert (serving(), serving(mode=Mode.TRAINING)) == ("C", "reference")
    register_kernel_mapping({"Other": {Device("cpu"): B}})
    assert serving("Other") == "B"


class Package:
    """A plugin package with a mapping."""

    @hookimpl
    def kernels_mapping(self) -> Any:
        return {"Packaged": {"cpu": C}}


def test_registering_without_inheriting(isolated_plugins: PluginManager) -> None:
    """inherit_mapping=False drops registered mappings, and those of plugin packages; True brings both back."""
    isolated_plugins.register(Package(), "package")
    register_kernel_mapping({"Layer": {"cpu": A}})
    assert (serving(), serving("Packaged")) == ("A", "C")
    register_kernel_mapping({"Other": {"cpu": B}}, inherit_mapping=False)
    assert (serving(), serving("Other"), serving("Packaged")) == ("reference", "B", "reference")
    register_kernel_mapping({"Layer": {"cpu": A}}, False)
    assert (serving(), serving("Other")) == ("A", "reference")


def test_not_inheriting_leaves_out_what_plugins_offer_by_themselves(isolated_plugins: PluginManager) -> None:
    """Candidates of kernels_find_candidates do not count, either, where a mapping does not inherit."""

    class Package:
        @hookimpl
        def kernels_find_candidates(self, request: LayerRequest) -> Any:
            return [Candidate(C)]

    isolated_plugins.register(Package(), "package")
    assert serving() == "C"
    with use_kernel_mapping({}, inherit_mapping=False):
        assert serving() == "reference"
    register_kernel_mapping({}, inherit_mapping=False)
    assert serving() == "reference"
    register_kernel_mapping({})
    assert serving() == "C"


def test_a_scope_that_a_plugin_opens_inside_counts(isolated_plugins: PluginManager) -> None:
    """Offers of a plugin for a scope of its own apply inside of a mapping that does not inherit."""

    class Package:
        @hookimpl
        def kernels_find_candidates(self, request: LayerRequest) -> Any:
            return [Candidate(C, tier="scope")] if "package" in request.scopes else None

    isolated_plugins.register(Package(), "package")
    with use_kernel_mapping({}, inherit_mapping=False), Scope("package"):
        assert serving() == "C"


def test_scope_without_inheriting(isolated_plugins: PluginManager) -> None:
    """A scope with inherit_mapping=False hides mappings of program and packages, and inner scopes apply."""
    isolated_plugins.register(Package(), "package")
    register_kernel_mapping({"Layer": {"cpu": A}})
    with use_kernel_mapping({"Other": {"cpu": B}}, inherit_mapping=False):
        assert (serving(), serving("Other"), serving("Packaged")) == ("reference", "B", "reference")
        with use_kernel_mapping({"Layer": {"cpu": C}}):
            assert (serving(), serving("Other")) == ("C", "B")
    assert (serving(), serving("Packaged")) == ("A", "C")


def test_mapping_is_read_when_it_is_said() -> None:
    """Changing the dictionary afterwards changes nothing."""
    said: dict[str, Any] = {"Layer": {"cpu": [A]}}
    scope = use_kernel_mapping(said)
    register_kernel_mapping(said)
    said["Layer"]["cpu"][0] = B
    said["Layer"] = {"cpu": C}
    assert serving() == "A"
    with scope:
        assert serving() == "A"


def test_use_kernel_mapping_takes_inherit_by_name_only() -> None:
    """inherit_mapping of a scope is keyword-only."""
    with pytest.raises(TypeError):
        use_kernel_mapping({}, False)  # type: ignore[misc]


def test_narrowest_device_goes_before_best_mode() -> None:
    """A narrower device counts more than a better mode; wider entries are tried after."""
    narrow, wide = Device("cuda", CUDAProperties(80, 89)), Device("cuda", CUDAProperties(70, 99))
    level = parse_mapping(
        {"Layer": {wide: {Mode.INFERENCE: A}, narrow: B, "cuda": {Mode.INFERENCE: C, Mode.FALLBACK: A}}}
    )
    from kernels_core import LayerRequest

    request = LayerRequest("Layer", torch.device("cuda", 0), Mode.INFERENCE, capability=86)
    offers = level.offers(request, Candidate(None))
    assert offers == [Candidate(source) for source in (B, A, C, A)]


@pytest.mark.parametrize(
    "bad", [{"Layer": {"gpu": A}}, {"Layer": {"cpu": "text"}}, {3: {}}], ids=["device", "source", "name"]
)
def test_bad_mapping_of_a_package_is_isolated(isolated_plugins: PluginManager, bad: Any) -> None:
    """A package with a bad mapping is named in one warning, and the others' mappings count."""
    for name, offer in (("broken", bad), ("good", {"Layer": {"cpu": A}})):
        isolated_plugins.register(_package(offer), name)
    with pytest.warns(KernelsWarning) as caught:
        assert serving() == serving() == "A"
    (message,) = [str(w.message) for w in caught]
    assert "'broken' offers a bad mapping" in message


def _package(offer: Any) -> Any:
    def kernels_mapping() -> Any:
        return offer

    return type("Package", (), {"kernels_mapping": staticmethod(hookimpl(kernels_mapping))})()


def test_registering_in_threads_loses_nothing() -> None:
    """Eight threads that register at once all get their entries in."""
    barrier = threading.Barrier(8)

    def work(number: int) -> None:
        barrier.wait()
        for turn in range(5):
            register_kernel_mapping({f"Layer{number}x{turn}": {"cpu": A}})

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(mapping_module._registered.sources) == 40
    assert serving("Layer3x4") == "A"


# --- One kernel for all modes ------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["scope", "registered"])
def test_one_kernel_for_all_modes(how: str) -> None:
    """The kernel that serves training serves inference: dispatched, kernelized, compiled, and losing gradients."""

    @use_kernel_forward_from_hub("SameForAll")
    class Double(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2

    def times(factor: int, **members: Any) -> Any:
        forward = members.pop("forward", lambda self, x: x * factor)
        return type(f"Times{factor}", (nn.Module,), {"forward": forward, "can_torch_compile": True, **members})

    def numbers(mapping: Any, **options: bool) -> list[float]:
        """Return the factor of an inference call, a recorded one, a kernelized and a compiled inference call."""
        torch.compiler.reset()
        layer, x = Double(), torch.ones(1, requires_grad=True)
        with contextlib.ExitStack() as stack:
            if how == "scope":
                stack.enter_context(use_kernel_mapping({"SameForAll": {"cpu": mapping}}, **options))
            else:
                register_kernel_mapping({"SameForAll": {"cpu": mapping}}, **options)
            recorded = layer(x).item()
            with torch.no_grad():
                frozen = kernelize(nn.Sequential(Double()), mode=Mode.INFERENCE, device="cpu")
                compiled = torch.compile(layer, backend="eager")
                return [layer(x).item(), recorded, frozen(x).item(), compiled(x).item()]

    traced = {mode | Mode.TORCH_COMPILE: times(n) for n, mode in ((5, Mode.INFERENCE), (6, Mode.TRAINING))}
    by_mode = {Mode.INFERENCE: times(3), Mode.TRAINING: times(4), **traced}
    assert numbers(by_mode) == [3, 4, 3, 5]
    assert numbers(by_mode, same_for_all_modes=True) == [4, 4, 4, 6]
    with ignored(KernelsWarning):
        assert numbers(times(6, has_backward=False)) == [6, 2, 6, 6]
        assert numbers(times(6, has_backward=False), same_for_all_modes=True) == [2, 2, 2, 2]
        lossy = times(7, forward=lambda self, x: x.detach() * 7)
        assert numbers(lossy, same_for_all_modes=True) == [2, 2, 2, 2]


# --- The reference, by name ------------------------------------------------------------------------


@use_kernel_forward_from_hub("Named", use_fallback=False)
class Named(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


class Tripled(nn.Module):
    can_torch_compile = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 3


class Even(nn.Module):
    can_torch_compile = True

    def forward(self, x: torch.Tensor) -> Any:
        return x * 3 if len(x) % 2 == 0 else NotImplemented


class Broken:
    def load(self) -> Any:
        raise ImportError("not built")


ONE, TWO = torch.ones(1), torch.ones(2)


@pytest.mark.parametrize(
    "named", [Reference, "reference", copy.deepcopy(Reference), pickle.loads(pickle.dumps(Reference))]
)
def test_reference_can_be_named(named: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A named reference serves in every mode, and no candidate after it does: no warning, no error in strict mode."""
    monkeypatch.setenv("KERNELS_STRICT", "1")
    model = nn.Sequential(Named())
    with never():
        with (
            use_kernel_mapping({"Named": {"cpu": Tripled}}),
            use_kernel_mapping({"Named": {"cpu": [named, Tripled], "cuda": Tripled}}),
        ):
            assert model(ONE).item() == 2
            with torch.no_grad():
                assert model(ONE).item() == 2
                assert torch.compile(model, backend="eager", fullgraph=True)(ONE).item() == 2
            for mode in STAND_INS:
                resolution = resolve(Named, device="cpu", mode=mode)
                assert resolution.is_reference and resolution.note == "the mapping names it"
                row = receipt(model, device="cpu", mode=mode).rows[0]
                assert (row.origin, row.note) == ("reference", "the mapping names it")
            kernelize(model, mode=Mode.INFERENCE, device="cpu")
        assert model(ONE).item() == 2
        with use_kernel_mapping({"Named": "reference"}):
            assert resolve(Named, device="cuda", mode=Mode.TRAINING).note == "the mapping names it"


def test_reference_by_mode() -> None:
    """Each mode has its own choice, and where no source is mapped, a layer without a fallback still raises."""
    model = Named()
    with use_kernel_mapping({"Named": {"cpu": {Mode.INFERENCE: Reference, Mode.TRAINING: Tripled}}}):
        assert model(ONE).item() == 2 and model(ONE.clone().requires_grad_()).item() == 3
    with use_kernel_mapping({"Named": {"cpu": {Mode.INFERENCE: Reference}}}):
        assert model(ONE).item() == 2
        with pytest.raises(NoKernelError):
            model(ONE.clone().requires_grad_())
    with use_kernel_mapping({"Named": {"cpu": {Mode.TRAINING: Reference}}}, same_for_all_modes=True):
        assert model(ONE).item() == 2


@pytest.mark.parametrize("strict", ["0", "1"])
def test_reference_after_kernels(strict: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels before it serve the calls that they take, silently; one that cannot be loaded is warned of."""
    monkeypatch.setenv("KERNELS_STRICT", strict)
    model = Named()
    with never(), use_kernel_mapping({"Named": {"cpu": [Even, Reference, Tripled]}}):
        assert model(TWO)[0].item() == 3 and model(ONE).item() == 2
        traced = torch.compile(model, backend="eager")
        assert traced(TWO)[0].item() == 3 and traced(ONE).item() == 2
    with pytest.warns(KernelsWarning, match="reference runs instead: .*not built"):
        with use_kernel_mapping({"Named": {"cpu": [Broken(), Reference]}}):
            assert model(ONE).item() == 2


def test_reference_is_nothing_to_adapt_or_verify() -> None:
    """Adapters refuse it, and `verify` compares the kernels around it."""
    for adapter in (opaque, reference_backward):
        with pytest.raises(ArgumentError, match="needs no adapter"):
            adapter("reference")
    with use_kernel_mapping({"Named": {"cpu": [Reference, Tripled]}}):
        assert {row.kernel.rpartition(".")[2] for row in verify(Named(), ONE).rows} == {"Tripled"}
    with use_kernel_mapping({"Named": {"cpu": Reference}}):
        assert [row.reason for row in verify(Named(), ONE).rows] == ["the mapping names it"]


def test_reference_that_a_plugin_offers(isolated_plugins: PluginManager) -> None:
    """A plugin may offer it, too, with a priority; the note names the plugin."""

    class Plugin:
        @hookimpl
        def kernels_find_candidates(self, request: LayerRequest) -> list[Candidate]:
            return [Candidate(Tripled), Candidate(Reference, priority=1)]

    isolated_plugins.register(Plugin(), "acme")
    assert resolve(Named, device="cpu", mode=Mode.INFERENCE).note == "plugin 'acme' offers it"
