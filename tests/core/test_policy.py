"""Policies: no kernel serves where one is missing, loaders ask for more code, and names of plugins cannot be taken."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from warned import ignored

from kernels_core import (
    ArgumentError,
    Candidate,
    KernelsWarning,
    LayerRequest,
    LoadedLayer,
    Mode,
    NoKernelError,
    PluginLoadError,
    PluginManager,
    Resolution,
    UntrustedError,
    authorize,
    hookimpl,
    kernelize,
    plugin_manager,
    plugins,
    resolve,
)
from kernels_core.answer import CorePlugin
from kernels_core.resolver import forget
from kernels_plugins import mapping

Make = Callable[..., Any]
Discover = Callable[..., PluginManager]
HOOKS = "from kernels_core import hookimpl\n"
VETO = HOOKS + "@hookimpl\ndef kernels_authorize(request, candidate):\n    return 'the house says no'\n"
CPU: dict[str, Any] = {"device": "cpu", "mode": Mode.INFERENCE}


@pytest.fixture
def discover(
    isolated_plugins: PluginManager, distribution: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Discover]:
    """Install a distribution, and use a plugin manager that finds it and all others that are installed."""

    def install(name: str, plugin: str, source: str) -> PluginManager:
        module = f"{name}_{abs(hash(source))}".replace("-", "_")
        monkeypatch.syspath_prepend(distribution(name, {plugin: module}, {module: source}))
        manager = PluginManager()
        manager.on_change.append(forget)
        manager.register(CorePlugin(), "core", trusted=True)
        monkeypatch.setattr(plugins, "_manager", manager)
        return manager

    with ignored(KernelsWarning):
        yield install


def fast(x: torch.Tensor) -> torch.Tensor:
    """Serve the layers of these tests."""
    return x + 10


class Fast(torch.nn.Module):
    """The same as a class."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add ten."""
        return x + 10


class Insists:
    """A plugin that has an answer without candidates."""

    @hookimpl
    def kernels_resolve_forward(self, request: LayerRequest) -> Resolution | None:
        """Serve one layer, without a question to any policy."""
        return Resolution(request, fast, Candidate(fast)) if request.layer_name == "Insisted" else None


@pytest.mark.parametrize(
    ("source", "required", "reason"),
    [
        ("import no_such_module\n", "guard", r"'guard' is not loaded.*\(KERNELS_REQUIRE_PLUGINS.*no_such_module"),
        ("import no_such_module\n", "hub, absent", r"'absent' is not loaded.*\(KERNELS_REQUIRE_PLUGINS"),
        (VETO + "import no_such_module\n", "", r"'guard' is not loaded.*\(it has kernels_authorize.*no_such_module"),
        (VETO + "raise SystemExit(3)\n", "", r"'guard' is not loaded.*\(it has kernels_authorize.*SystemExit"),
        (VETO.replace("request,", "asked,"), "", r"'guard' is not loaded.*\(it has kernels_authorize.*'asked'"),
        (VETO + "def (\n", "", r"'guard' is not loaded.*\(it has kernels_authorize.*SyntaxError"),
    ],
)
def test_no_kernel_serves_where_a_policy_is_missing(
    discover: Discover, make_layer: Make, monkeypatch: pytest.MonkeyPatch, source: str, required: str, reason: str
) -> None:
    """A plugin that is required, or has a policy, and is not loaded: no kernel serves on any way, and it is named."""
    monkeypatch.setenv("KERNELS_REQUIRE_PLUGINS", required)
    manager = discover("acme-guard", "guard", source)
    manager.register(Insists(), "insists")
    layer = make_layer()
    with mapping.use_kernel_mapping({"Add": {"cpu": Fast}}):
        ways = [
            resolve(layer, **CPU),
            resolve(layer, **CPU, candidate=Candidate(Fast)),
            resolve("Insisted", **CPU),
        ]
        assert [way.is_reference for way in ways] == [True, True, True]
        for text in (*map(str, ways), str(manager.faults)):
            assert re.search(reason, text), text
        with pytest.raises(UntrustedError, match=reason):
            authorize("the code of a kernel")
        with pytest.warns(KernelsWarning, match=reason):
            assert kernelize(layer(), mode=Mode.INFERENCE, device="cpu")(torch.ones(1)).item() == 2
        with pytest.raises(NoKernelError, match=reason):
            make_layer(use_fallback=False)()(torch.ones(1))


def test_other_plugins_that_are_not_loaded_refuse_nothing(
    discover: Discover, make_layer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A broken plugin without a policy, one that KERNELS_PLUGINS blocks, and one that is registered: kernels serve."""
    monkeypatch.setenv("KERNELS_REQUIRE_PLUGINS", "mapping,mine")
    monkeypatch.setenv("KERNELS_PLUGINS", "-policy")
    discover("acme-policy", "policy", VETO)
    discover("acme-broken", "broken", "import no_such_module\n").register(Insists(), "mine")
    with mapping.use_kernel_mapping({"Add": {"cpu": Fast}}):
        assert not resolve(make_layer(), **CPU).is_reference
    assert "broken" in {fault.plugin for fault in plugin_manager().faults}


def test_names_of_our_plugins_cannot_be_taken(discover: Discover) -> None:
    """A distribution before ours by name, and a plugin that registers another one, displace none of our plugins."""
    steal = "from kernels_core import plugin_manager\nimport types\n"
    steal += "plugin_manager().register(types.SimpleNamespace(kernels_mapping=kernels_mapping), 'observe')\n"
    offer = HOOKS + "@hookimpl\ndef kernels_mapping():\n    return {}\n"
    discover("acme-core", "core", offer)
    discover("acme-hub", "hub", offer)
    manager = discover("acme-thief", "a-thief", offer + steal)
    found = manager.plugins()
    assert isinstance(found["core"], CorePlugin) and "a-thief" not in found
    assert [getattr(found[name], "__name__", "") for name in ("hub", "observe")] == [
        "kernels_plugins.hub.plugin",
        "kernels_plugins.observe.plugin",
    ]
    told = {fault.plugin: str(fault) for fault in manager.faults}
    assert {"core", "hub", "a-thief"} <= told.keys()
    assert "'kernels-core' is used, and those of acme-hub are not" in told["hub"]


def test_a_name_of_ours_that_a_program_took_is_reported(discover: Discover) -> None:
    """A program registers a plugin as `hub` before plugins are searched: a fault says that ours is not used."""
    manager = discover("acme-any", "any", HOOKS + "@hookimpl\ndef kernels_mapping():\n    return {}\n")
    manager.register(Insists(), "hub")
    assert isinstance(manager.plugins()["hub"], Insists)
    assert "'hub' is that of a plugin of kernels-core" in str(manager.faults)


def test_plugins_declare_the_oldest_core(isolated_plugins: PluginManager) -> None:
    """A plugin for a later kernels-core is refused with both versions; one for this or an earlier one is loaded."""
    for version, fits in (("0.0.1", True), ("0.1", True), ("99.1", False), (3, False), ("soon", False)):
        plugin = type("Plugin", (Insists,), {"kernels_core_version": version})
        if fits:
            isolated_plugins.unregister(isolated_plugins.register(plugin))
        else:
            with pytest.raises(PluginLoadError, match=f"'Plugin'.*kernels_core_version.*{version}"):
                isolated_plugins.register(plugin)


def test_unregister_as_in_pluggy(isolated_plugins: PluginManager) -> None:
    """A plugin is unregistered by itself, its class, its name, or the keyword `name`; any other object is an error."""
    plugin = Insists()
    for key, keywords in (((plugin,), {}), ((Insists,), {}), (("one",), {}), ((), {"name": "one"})):
        isolated_plugins.register(plugin, "one")
        assert isolated_plugins.unregister(*key, **keywords) is plugin
        assert "one" not in isolated_plugins.plugins()
    for wrong in (plugin, "one", None, 5):
        with pytest.raises(ArgumentError, match="No plugin"):
            isolated_plugins.unregister(wrong)


class Parts:
    """A loader of a third party: a source has parts, each of which policies are asked about."""

    def __init__(self, *parts: str) -> None:
        """Load these parts."""
        self.parts, self.loads = parts, 0

    def load(self) -> LoadedLayer:
        """Load the layer."""
        for part in self.parts:
            authorize(part, "acme")
        self.loads += 1
        return LoadedLayer(fast, "parts")


class Policy:
    """Refuses a part for one layer, and notes each question."""

    def __init__(self, refused: str = "", layer: str = "") -> None:
        """Refuse a part for a layer."""
        self.refused, self.layer, self.asked = refused, layer, list[tuple[str, object]]()

    @hookimpl
    def kernels_authorize(self, request: LayerRequest, candidate: Candidate) -> str | None:
        """Refuse the part."""
        self.asked.append((request.layer_name, candidate.source))
        return "no" if (candidate.source, request.layer_name) == (self.refused, self.layer) else None


def test_policies_are_asked_about_what_a_loader_finds(isolated_plugins: PluginManager) -> None:
    """A part is refused for one layer only; a later policy is asked about parts that are already loaded."""
    policy, source = Policy("b", "First"), Parts("a", "b", "c")
    isolated_plugins.register(policy)
    with mapping.use_kernel_mapping({"First": {"cpu": source}, "Second": {"cpu": source}}):
        first, second = resolve("First", **CPU), resolve("Second", **CPU)
        assert first.is_reference and "'b': no" in first.refusals[0].reason
        assert isinstance(first.refusals[0].error, UntrustedError)
        assert not second.is_reference and source.loads == 1
        assert policy.asked == [("First", source), ("First", "a"), ("First", "b")] + [
            ("Second", part) for part in (source, "a", "b", "c")
        ]
        assert resolve("First", **CPU).is_reference
        isolated_plugins.register(Policy("c", "Second"), "later")
        later = resolve("Second", **CPU)
        assert later.is_reference and "'c': no" in str(later) and source.loads == 1
    with pytest.raises(UntrustedError, match="'d': no"):
        isolated_plugins.register(Policy("d"), "last")
        authorize("d")
