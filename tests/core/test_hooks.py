"""Every hook: it has a card, it is called when the card says, with the arguments that the card lists."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from torch import nn

from kernels_core import (
    Candidate,
    KernelsWarning,
    LayerRequest,
    LoadedLayer,
    LoadError,
    Mode,
    PluginManager,
    Resolution,
    configuration,
    configured,
    hookimpl,
    hookspecs,
    kernelize,
    receipt,
)
from kernels_core import resolve as resolve_layer
from kernels_core.testing import HookRecorder
from kernels_plugins.mapping import register_kernel_mapping, use_kernel_mapping

Make = Callable[..., Any]
X = torch.zeros(2)
HOOKS = {name: spec for name, spec in vars(hookspecs).items() if name.startswith("kernels_")}
KINDS = {"first result", "collect", "veto", "tell"}

pytestmark = pytest.mark.filterwarnings("ignore::kernels_core.KernelsWarning")


def card(hook: str) -> str:
    """Return the docstring of a hook."""
    return inspect.getdoc(HOOKS[hook]) or ""


def section(text: str, name: str) -> str:
    """Return the indented lines under a heading."""
    found = re.search(rf"^{name}:\n((?:    .*\n|\n)+)", text + "\n", re.MULTILINE)
    return found.group(1) if found else ""


# --- Cards -------------------------------------------------------------------------------------------


def test_the_hooks_of_the_design_are_there() -> None:
    """The hooks of the design exist, and no others."""
    assert list(HOOKS) == [
        "kernels_resolve_forward",
        "kernels_find_candidates",
        "kernels_rank_candidates",
        "kernels_authorize",
        "kernels_load_layer",
        "kernels_check_layer",
        "kernels_resolved",
        "kernels_wrap_forward",
        "kernels_kernel_failed",
        "kernels_mapping",
        "kernels_adoption_rules",
        "kernels_packs",
        "kernels_configuration",
        "kernels_settings_in_code",
        "kernels_register_commands",
    ]


@pytest.mark.parametrize("hook", HOOKS)
def test_hook_has_a_card(hook: str) -> None:
    """Each card says the kind, when it is called, who uses it, and shows an example that is valid Python."""
    text = card(hook)
    kind = re.search(r"^Kind: ([a-z ]+?)[;.]", text, re.MULTILINE)
    assert kind and kind.group(1) in KINDS
    assert re.search(r"\bCalled: \S", text)
    assert re.search(r"^Used by: \S", text, re.MULTILINE)
    example = re.search(r"```python\n(.*?)```", section(text, "Example"), re.DOTALL)
    assert example
    code = inspect.cleandoc("    " + example.group(1).strip("\n"))
    compile(inspect.cleandoc(example.group(1)), hook, "exec")
    assert f"def {hook}(" in code and "@hookimpl" in code


@pytest.mark.parametrize("hook", HOOKS)
def test_card_lists_the_real_arguments(hook: str) -> None:
    """The Args section of a card names the arguments of the hook, all of them, in order, and no others."""
    documented = re.findall(r"^    (\w+):", section(card(hook), "Args"), re.MULTILINE)
    assert documented == list(inspect.signature(HOOKS[hook]).parameters)


@pytest.mark.parametrize("hook", HOOKS)
def test_kind_is_what_pluggy_does(hook: str) -> None:
    """A card says "first result" where pluggy stops at the first answer, and only there."""
    options = HOOKS[hook].kernels_core_spec
    assert ("Kind: first result" in card(hook)) == bool(options["firstresult"])


@pytest.mark.parametrize("hook", HOOKS)
def test_hook_has_a_test(hook: str) -> None:
    """Each hook has a test below that bears its name."""
    assert callable(getattr(sys.modules[__name__], f"test_{hook}", None))


# --- One test per hook ---------------------------------------------------------------------------------


def plugin(**hooks: Callable[..., Any]) -> Any:
    """Make a plugin of functions."""
    return type("Plugin", (), {name: staticmethod(hookimpl(function)) for name, function in hooks.items()})()


def test_kernels_resolve_forward(make_layer: Make, make_kernel: Make, isolated_plugins: PluginManager) -> None:
    """The whole question is answered by a plugin that goes first, and by the core where that one passes."""
    asked: list[LayerRequest] = []

    def own(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return x + 70

    class First:
        @hookimpl(tryfirst=True)
        def kernels_resolve_forward(self, request: LayerRequest) -> Resolution | None:
            asked.append(request)
            return Resolution(request, own, origin="ours") if request.layer_name == "Mine" else None

    isolated_plugins.register(First())
    register_kernel_mapping({name: {"cpu": make_kernel(10)} for name in ("Mine", "Add")})
    assert make_layer("Mine")()(X)[0] == 70
    assert make_layer("Add")()(X)[0] == 10
    assert {request.layer_name for request in asked} == {"Mine", "Add"}


def test_kernels_find_candidates(make_layer: Make, make_kernel: Make, isolated_plugins: PluginManager) -> None:
    """Candidates of all plugins count, and bear the name of the plugin that offered them."""
    seen: list[LayerRequest] = []
    kernel = make_kernel(10)

    def find(request: LayerRequest) -> list[Candidate]:
        seen.append(request)
        return [Candidate(kernel)]

    isolated_plugins.register(plugin(kernels_find_candidates=find), "finder")
    layer = make_layer()
    assert layer()(X)[0] == 10
    assert resolve_layer(layer, device="cpu", mode=Mode.INFERENCE).plugin == "finder"
    assert all(r.device.type == "cpu" and r.layer.name == "Add" for r in seen)


def test_kernels_rank_candidates(make_layer: Make, make_kernel: Make, isolated_plugins: PluginManager) -> None:
    """A plugin chooses the order; a limit keeps a kernel to some calls, a reason in it refuses, wrong answers too."""
    few, many = make_kernel(10), make_kernel(20)
    seen: list[Sequence[Candidate]] = []

    def to_few(loaded: LoadedLayer, forward: Callable[..., Any]) -> Callable[..., Any]:
        return lambda self, x: forward(self, x) if len(x) < 3 else NotImplemented

    def refuse(loaded: LoadedLayer, forward: Callable[..., Any]) -> Callable[..., Any]:
        raise LoadError("measured with other code")

    limits: dict[str, Any] = {"Add": to_few, "Mine": refuse, "Odd": lambda loaded, forward: 3}

    def rank(request: LayerRequest, candidates: Sequence[Candidate]) -> list[Candidate] | None:
        seen.append(candidates)
        if request.layer_name not in limits:
            return None
        return [Candidate(few, limit=limits[request.layer_name], note="few rows"), *candidates]

    isolated_plugins.register(plugin(kernels_rank_candidates=rank), "ranker")
    register_kernel_mapping({name: {"cpu": many} for name in ("Add", "Mine", "Odd", "Other")})
    module = make_layer("Add")()
    assert [module(torch.zeros(rows))[0] for rows in (1, 3, 1)] == [10, 20, 10]
    resolution = resolve_layer(module, device="cpu", mode=Mode.INFERENCE)
    assert (resolution.plugin, resolution.candidate and resolution.candidate.note) == ("ranker", "few rows")
    assert receipt(module, device="cpu").rows[0].note == "few rows"
    with pytest.warns(KernelsWarning, match="measured with other code"):
        assert make_layer("Mine")()(X)[0] == 20
    with pytest.warns(KernelsWarning, match="its limit: AttributeError"):  # its author learns which function it was
        assert make_layer("Odd")()(X)[0] == 20
    assert make_layer("Other")()(X)[0] == 20
    assert all(offer[0].source is many for offer in seen)
    limits["Other"] = None
    isolated_plugins.register(plugin(kernels_rank_candidates=lambda request: "first"), "wrong")
    with pytest.warns(KernelsWarning, match="not a sequence of Candidate"):
        assert make_layer("Other")()(X)[0] == 10


def test_kernels_authorize(make_layer: Make, make_kernel: Make, isolated_plugins: PluginManager) -> None:
    """A candidate refused by policy is never loaded, and the next one is asked."""

    class Source:
        def load(self) -> Any:
            raise AssertionError("loaded without leave")

    source = Source()

    def authorize(request: LayerRequest, candidate: Candidate) -> str | None:
        return "not this one" if candidate.source is source else None

    isolated_plugins.register(plugin(kernels_authorize=authorize))
    with use_kernel_mapping({"Add": {"cpu": [source, make_kernel(10)]}}):
        assert make_layer()()(X)[0] == 10
        (refusal,) = resolve_layer("Add", device="cpu", mode=Mode.INFERENCE).refusals
    assert (refusal.reason, refusal.candidate.source) == ("not this one", source)


def test_kernels_load_layer(make_layer: Make, make_kernel: Make, isolated_plugins: PluginManager) -> None:
    """The first plugin that knows a source loads it, once, and says where it came from."""
    loads = []

    class Ticket:
        def __call__(self) -> None: ...  # any object that a mapping takes

    def load(request: LayerRequest, source: object) -> LoadedLayer | None:
        if not isinstance(source, Ticket):
            return None
        loads.append((request.layer_name, source))
        return LoadedLayer(make_kernel(10), "the counter", {"ticket": "punched"})

    isolated_plugins.register(plugin(kernels_load_layer=load))
    ticket, layer = Ticket(), make_layer()
    with use_kernel_mapping({"Add": {"cpu": ticket}}):
        assert layer()(X)[0] == 10
        resolution = resolve_layer(layer, device="cpu", mode=Mode.TRAINING)
    assert loads == [("Add", ticket)]
    assert (resolution.origin, resolution.checked) == ("the counter", {"ticket": "punched"})


def test_kernels_check_layer(make_layer: Make, make_kernel: Make, isolated_plugins: PluginManager) -> None:
    """A loaded layer can be refused after the contract check, for one mode alone, too."""
    checked = []

    def check(request: LayerRequest, candidate: Candidate, layer: Any) -> str | None:
        checked.append((candidate.source, layer))
        return "not for training" if Mode.TRAINING in request.mode else None

    isolated_plugins.register(plugin(kernels_check_layer=check))
    kernel, layer = make_kernel(10), make_layer()()
    with use_kernel_mapping({"Add": {"cpu": kernel}}):
        assert layer(X)[0] == 10
        assert layer(torch.zeros(2, requires_grad=True))[0] == 1
    assert set(checked) == {(kernel, kernel)}


def test_kernels_resolved(make_layer: Make, make_kernel: Make, isolated_plugins: PluginManager) -> None:
    """Plugins are notified of each decision once, with its refusals, and not again for warm calls."""
    told: list[Resolution] = []
    isolated_plugins.register(plugin(kernels_resolved=lambda resolution: told.append(resolution)))
    layer = make_layer()()
    with use_kernel_mapping({"Add": {"cpu": [nn.Identity, make_kernel(10, can_torch_compile=True)]}}):
        for _ in range(3):
            assert layer(X)[0] == 10
    (resolution,) = told
    assert resolution.implementation is not None and len(resolution.refusals) == 1
    layer(X)
    assert told[1].is_reference and len(told) == 2


def test_kernels_kernel_failed(make_layer: Make, make_kernel: Make, isolated_plugins: PluginManager) -> None:
    """Plugins are notified once of a source that fails to load, with the error itself."""
    told: list[tuple[Any, ...]] = []
    raised = OSError("no network")

    class Source:
        def load(self) -> Any:
            raise raised

    def failed(request: LayerRequest, candidate: Candidate, error: BaseException) -> None:
        told.append((request.layer_name, candidate.source, error))

    isolated_plugins.register(plugin(kernels_kernel_failed=failed))
    source, layer = Source(), make_layer()()
    with use_kernel_mapping({"Add": {"cpu": source}}):
        assert [layer(x)[0].item() for x in (X, X, torch.zeros(2, requires_grad=True))] == [1, 1, 1]
    assert told == [("Add", source, raised)]


def test_kernels_mapping(make_layer: Make, make_kernel: Make, isolated_plugins: PluginManager) -> None:
    """The mapping of a plugin package is read once for any number of layers, and again after plugins changed."""
    reads = []

    def mapping() -> Any:
        reads.append(1)
        return {"First": {"cpu": kernel}, "Second": {"cpu": kernel}}

    kernel = make_kernel(10)
    isolated_plugins.register(plugin(kernels_mapping=mapping), "package")
    for name in ("First", "Second"):
        assert make_layer(name)()(X)[0] == 10
    assert len(reads) == 1
    isolated_plugins.register(plugin(kernels_resolved=lambda: None), "another")
    make_layer("Third")()(X)
    assert len(reads) == 2


def test_kernels_adoption_rules(isolated_plugins: PluginManager) -> None:
    """The rules of each plugin come with its name; an answer that is no sequence is reported."""
    isolated_plugins.register(plugin(kernels_adoption_rules=lambda: ["rule"]), "package")
    isolated_plugins.register(plugin(kernels_adoption_rules=lambda: 3), "broken")
    with pytest.warns(match="Plugin 'broken': kernels_adoption_rules returned 3, not a sequence of rules or None"):
        assert isolated_plugins.hook.kernels_adoption_rules() == [("package", ["rule"])]


def test_kernels_configuration(configure: Callable[..., Path], isolated_plugins: PluginManager) -> None:
    """A plugin checks the settings in its own table; an answer that is no mapping is reported."""
    isolated_plugins.register(plugin(kernels_configuration=lambda: {"level": lambda each: each.as_number()}), "acme")
    isolated_plugins.register(plugin(kernels_configuration=lambda: 3), "broken")
    configure("[plugin.acme]\nlevel = 3\n")
    with pytest.warns(match="Plugin 'broken': kernels_configuration returned 3, not a mapping or None"):
        assert configured("plugin.acme.level") == 3


def test_kernels_settings_in_code(isolated_plugins: PluginManager) -> None:
    """Settings of code are shown with their place, a plugin's own by their full names; no mapping is reported."""
    isolated_plugins.register(plugin(kernels_settings_in_code=lambda: {"level": "3", "mapping": "mine"}), "acme")
    isolated_plugins.register(plugin(kernels_settings_in_code=lambda: 3), "broken")
    with pytest.warns(match="Plugin 'broken': kernels_settings_in_code returned 3, not a mapping or None"):
        rows = [(row.name, row.value) for row in configuration().settings if row.source == "code"]
    assert rows == [("plugin.acme.level", "3"), ("plugin.acme.mapping", "mine")]


def test_kernels_packs(make_layer: Make, make_kernel: Make, isolated_plugins: PluginManager) -> None:
    """A mapping may name the packs of plugins; an answer that is no mapping is reported, and hides no other pack."""
    asked: list[tuple[str, str]] = []

    def load(layer_name: str, device: torch.device) -> Any:
        asked.append((layer_name, device.type))
        return make_kernel(10) if layer_name == "Add" else None

    isolated_plugins.register(plugin(kernels_packs=lambda: {"acme": load}), "package")
    isolated_plugins.register(plugin(kernels_packs=lambda: 3), "broken")
    with pytest.warns(match="Plugin 'broken': kernels_packs returned 3, not a mapping or None"):
        scope = use_kernel_mapping({"Add": {"cpu": "pack:acme"}, "Other": {"cpu": "pack:acme"}})
    with scope:
        assert make_layer()()(X)[0] == 10
        (refusal,) = resolve_layer("Other", device="cpu", mode=Mode.INFERENCE).refusals
    assert refusal.reason == "pack 'acme': it has no kernel for 'Other' on cpu"
    assert asked == [("Add", "cpu"), ("Other", "cpu")]


def test_kernels_register_commands(isolated_plugins: PluginManager) -> None:
    """A plugin adds a subcommand to the application that it is given, and a broken one does not stop it."""
    from typer.testing import CliRunner

    def register(cli: typer.Typer) -> None:
        @cli.command()
        def greet() -> None:
            print("hello")

        @cli.command()
        def other() -> None: ...

    def breaks(cli: typer.Typer) -> None:
        raise ZeroDivisionError

    isolated_plugins.register(plugin(kernels_register_commands=breaks), "breaks")
    isolated_plugins.register(plugin(kernels_register_commands=register), "greets")
    cli = typer.Typer()
    isolated_plugins.hook.kernels_register_commands(cli=cli)
    assert CliRunner().invoke(cli, ["greet"]).output == "hello\n"
    assert [fault.plugin for fault in isolated_plugins.faults] == ["breaks"]


def test_kernels_wrap_forward(make_layer: Make, make_kernel: Make, isolated_plugins: PluginManager) -> None:
    """Decorators are put around the serving function, in eager calls of layers, references and kernelized modules."""
    calls: list[str] = []

    def wrap(resolution: Resolution) -> Any:
        def decorate(forward: Any) -> Any:
            def counted(*args: Any, **kwargs: Any) -> Any:
                calls.append(resolution.origin.rpartition(".")[2])
                return forward(*args, **kwargs)

            return counted

        return decorate

    layer, other = make_layer()(), make_layer("Other")()
    isolated_plugins.register(plugin(kernels_wrap_forward=wrap), "counts")
    with use_kernel_mapping({"Add": {"cpu": make_kernel(10)}}):
        assert [layer(X)[0], other(X)[0], layer(X)[0]] == [10, 1, 10]
        assert calls == ["Add10", "reference", "Add10"]
        frozen = kernelize(make_layer()(), mode=Mode.INFERENCE, device="cpu")
        frozen(X)
        assert calls[3:] == ["Add10"]
        isolated_plugins.unregister("counts")
        assert [layer(X)[0], frozen(X)[0]] == [10, 10] and len(calls) == 4


def test_decorator_that_fails_is_left_out(make_layer: Make, isolated_plugins: PluginManager) -> None:
    """An exception of a decorator of kernels_wrap_forward is reported in the plugin's name; the call goes on."""

    def wrap(resolution: Resolution) -> Any:
        return lambda forward: 1 / 0

    with pytest.warns(KernelsWarning, match=r"Plugin 'breaks' raised.*ZeroDivisionError"):
        isolated_plugins.register(plugin(kernels_wrap_forward=wrap), "breaks")
        assert make_layer()()(X)[0] == 1


# --- Order, arguments, and the kit for plugin authors --------------------------------------------------


def test_order_of_the_hooks(make_layer: Make, make_kernel: Make, hook_recorder: HookRecorder) -> None:
    """A decision is asked for, candidates are found, authorized, loaded, checked; then plugins are notified."""
    layer = make_layer()
    kernel = make_kernel(10, can_torch_compile=True)
    source = type("Source", (), {"load": lambda self: kernel})()
    with use_kernel_mapping({"Add": {"cpu": source}}):
        resolve_layer(layer, device="cpu", mode=Mode.INFERENCE)
        assert hook_recorder.names() == [
            "kernels_resolve_forward",
            "kernels_find_candidates",
            "kernels_mapping",
            "kernels_rank_candidates",
            "kernels_authorize",
            "kernels_load_layer",
            "kernels_check_layer",
        ]
        hook_recorder.clear()
        layer()(X)
    assert hook_recorder.names()[-2:] == ["kernels_resolved", "kernels_wrap_forward"]
    assert "kernels_load_layer" not in hook_recorder.names()  # loaded already
    assert hook_recorder.names().count("kernels_resolved") == 1


def test_hooks_may_take_fewer_arguments(make_layer: Make, make_kernel: Make, isolated_plugins: PluginManager) -> None:
    """An implementation takes the arguments that it needs, in any order, by name."""
    seen = []
    isolated_plugins.register(
        plugin(
            kernels_check_layer=lambda layer, request: seen.append((layer, request.layer_name)),
            kernels_authorize=lambda: seen.append("authorize"),
        )
    )
    kernel = make_kernel(10)
    with use_kernel_mapping({"Add": {"cpu": kernel}}):
        assert resolve_layer("Add", device="cpu", mode=Mode.INFERENCE).implementation is kernel.forward
    assert seen == ["authorize", (kernel, "Add")]


def test_recorder_keeps_arguments_answers_and_errors(
    make_kernel: Make, isolated_plugins: PluginManager, hook_recorder: HookRecorder
) -> None:
    """The recorder of the kit keeps the arguments, the answer and the error of each call of a hook."""
    kernel = make_kernel(10)

    class Source:
        def load(self) -> Any:
            raise OSError("no network")

    with use_kernel_mapping({"Add": {"cpu": [Source(), kernel]}}):
        resolution = resolve_layer("Add", device="cpu", mode=Mode.INFERENCE)
    (whole,) = hook_recorder.of("kernels_resolve_forward")
    assert whole.answer == resolution and whole.done and whole.error is None
    assert whole.arguments == {"request": resolution.request}
    failed, loaded = hook_recorder.of("kernels_load_layer")
    assert isinstance(failed.error, OSError) and failed.answer is None
    assert loaded.answer is kernel and set(loaded.arguments) == {"request", "source"}
    (told,) = hook_recorder.of("kernels_kernel_failed")
    assert told.arguments["error"] is failed.error
    hook_recorder.clear()
    assert hook_recorder.names() == []


def test_isolated_plugins_knows_nobody() -> None:
    """Inside the kit's fixture the manager is another one than that of the process, and it discovers nothing."""
    from kernels_core import plugin_manager

    assert list(plugin_manager().plugins()) == ["core", "mapping"]
