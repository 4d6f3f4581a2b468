"""Plugins: found, refused by name, isolated from each other, chosen by the environment."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import importlib_metadata
import pytest
import torch
from torch import nn
from warned import ignored, never, noted

from kernels_core import (
    ArgumentError,
    Candidate,
    KernelsWarning,
    Mode,
    NoKernelError,
    PluginConflictError,
    PluginError,
    PluginLoadError,
    PluginManager,
    hookimpl,
    plugin_manager,
    quarantined,
    resolve,
)
from kernels_plugins.mapping import register_kernel_mapping, use_kernel_mapping

Make = Callable[..., Any]
X = torch.zeros(2)
ACME = Path(__file__).parents[1] / "third_party" / "acme_kernels"

GOOD_PLUGIN = """
    import torch
    from kernels_core import hookimpl
    class Kernel(torch.nn.Module):
        def forward(self, x):
            return x + {added}
    @hookimpl
    def kernels_mapping():
        return {{"Add": {{"cpu": Kernel}}}}
"""

RUN = """
    import json, warnings, torch
    caught = warnings.catch_warnings(record=True).__enter__()
    warnings.simplefilter("always")
    from kernels_core import *
    @use_kernel_forward_from_hub("Add")
    class Add(torch.nn.Module):
        def forward(self, x):
            return x + 1
    def run():
        return Add()(torch.zeros(1)).item()
    def tell(**more):
        ours = [str(w.message) for w in caught if issubclass(w.category, KernelsWarning)]
        print(json.dumps({"warnings": ours, "plugins": list(plugin_manager().plugins()), **more}))
"""


def told(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """Read the last line that a subprocess printed."""
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


@pytest.fixture
def caught() -> Iterator[Callable[[], list[str]]]:
    """Collect our warnings."""
    with noted() as record:
        yield lambda: [str(w.message) for w in record if w.category is KernelsWarning]


# --- Registration ----------------------------------------------------------------------------------


def test_register_and_unregister(isolated_plugins: PluginManager) -> None:
    """Modules, objects and classes can be registered, are listed by name, and removed once."""

    class Some:
        @hookimpl
        def kernels_resolved(self, resolution: Any) -> None: ...

    instance = Some()
    assert isolated_plugins.register(Some) == "Some"
    assert isolated_plugins.register(instance, "named") == "named"
    assert plugin_manager() is isolated_plugins
    assert list(isolated_plugins.plugins()) == ["Some", "core", "mapping", "named"]
    assert isolated_plugins.plugins()["named"] is instance
    assert isinstance(isolated_plugins.unregister("Some"), Some)
    with pytest.raises(ArgumentError, match=r"No plugin 'Some'.*core, mapping, named"):
        isolated_plugins.unregister("Some")


def test_name_twice_is_a_conflict(isolated_plugins: PluginManager) -> None:
    """Two plugins cannot have one name; the first stays."""

    class First:
        @hookimpl
        def kernels_resolved(self, resolution: Any) -> None: ...

    first = First()
    isolated_plugins.register(first, "same")
    with pytest.raises(PluginConflictError, match="'same'") as caught:
        isolated_plugins.register(First(), "same")
    assert caught.value.plugin == "same"
    assert isolated_plugins.plugins()["same"] is first


def unknown_hook() -> Any:
    class Bad:
        @hookimpl
        def kernels_maping(self) -> Any: ...

    return Bad()


def unmarked_hook() -> Any:
    class Bad:
        def kernels_mapping(self) -> Any: ...

    return Bad()


def unknown_argument() -> Any:
    class Bad:
        @hookimpl
        def kernels_find_candidates(self, requests: Any) -> Any: ...

    return Bad()


def argument_with_default() -> Any:
    class Bad:
        @hookimpl
        def kernels_find_candidates(self, request: Any = None) -> Any: ...

    return Bad()


def varargs() -> Any:
    class Bad:
        @hookimpl
        def kernels_find_candidates(self, *args: Any) -> Any: ...

    return Bad()


def no_hooks() -> Any:
    return object()


def bad_priority() -> Any:
    class Bad:
        kernels_priority = "high"

        @hookimpl
        def kernels_mapping(self) -> Any: ...

    return Bad()


def wrapper_without_yield() -> Any:
    class Bad:
        @hookimpl(wrapper=True)
        def kernels_resolve_forward(self, request: Any) -> Any:
            return None

    return Bad()


def old_wrapper() -> Any:
    class Bad:
        @hookimpl(hookwrapper=True)
        def kernels_resolve_forward(self, request: Any) -> Any:
            yield

    return Bad()


def wants_arguments() -> Any:
    class Bad:
        def __init__(self, settings: Any) -> None:
            pass

        @hookimpl
        def kernels_mapping(self) -> Any:
            return {}

    return Bad


BAD_PLUGINS = {
    wants_arguments: "is a class, and cannot be made: TypeError: .*'settings'.* Register an object of it",
    unknown_hook: "did you mean kernels_mapping",
    unmarked_hook: "put @hookimpl on it",
    unknown_argument: r"takes 'requests', which the hook does not have. It may take any of \(request\)",
    argument_with_default: "with a default, which pluggy would never fill",
    varargs: "takes 'args'",
    no_hooks: "implements no hook",
    bad_priority: "kernels_priority is 'high', not an integer",
    wrapper_without_yield: "yield",
    old_wrapper: "wrapper",
}


@pytest.mark.parametrize("make", BAD_PLUGINS, ids=lambda make: make.__name__)
def test_bad_plugins_are_refused(isolated_plugins: PluginManager, make: Callable[[], Any]) -> None:
    """A plugin that pluggy would take and never call right is refused by name, with its fault."""
    with pytest.raises(PluginLoadError, match=BAD_PLUGINS[make]) as caught:  # type: ignore[index]
        isolated_plugins.register(make(), "bad one")
    assert caught.value.plugin == "bad one"
    assert "'bad one'" in str(caught.value)
    assert "bad one" not in isolated_plugins.plugins()


# --- Isolation -------------------------------------------------------------------------------------


RAISING_HOOKS = ["kernels_find_candidates", "kernels_resolved", "kernels_resolve_forward", "kernels_mapping"]


def raising(hook: str) -> Any:
    """Make a plugin whose hook raises."""

    def implementation() -> Any:
        raise ZeroDivisionError("oh no")

    return type("Raises", (), {hook: staticmethod(hookimpl(implementation))})()


@pytest.mark.parametrize("hook", RAISING_HOOKS)
def test_hook_that_raises_is_isolated(
    make_layer: Make, make_kernel: Make, isolated_plugins: PluginManager, caught: Any, hook: str
) -> None:
    """A raising hook causes one warning with plugin, hook and error; kernels of other plugins serve all the same."""
    isolated_plugins.register(raising(hook), "clumsy")

    class Offers:
        @hookimpl
        def kernels_mapping(self) -> Any:
            return {name: {"cpu": make_kernel(10, can_torch_compile=True)} for name in ("Add", "Other")}

    isolated_plugins.register(Offers(), "offers")
    for layer in (make_layer()(), make_layer("Other")()):
        for _ in range(2):
            assert layer(X)[0] == 10
        told = str(resolve(layer, device="cpu", mode=Mode.INFERENCE))
        assert told.count("clumsy") == (hook == "kernels_find_candidates")
    about = [message for message in caught() if "clumsy" in message]
    assert len(about) == 1, about
    assert hook in about[0] and "ZeroDivisionError: oh no" in about[0]


@pytest.mark.parametrize("hook", RAISING_HOOKS)
def test_hook_that_raises_raises_in_strict_mode(
    make_layer: Make, isolated_plugins: PluginManager, monkeypatch: pytest.MonkeyPatch, hook: str
) -> None:
    """In strict mode a raising hook raises an error of ours that names plugin, hook and cause."""
    isolated_plugins.register(raising(hook), "clumsy")
    monkeypatch.setenv("KERNELS_STRICT", "1")
    with pytest.raises((PluginError, NoKernelError), match="'clumsy'.*" + hook) as error:
        make_layer()()(X)
    assert "oh no" in str(error.value)


@pytest.mark.parametrize("hook", ["kernels_authorize", "kernels_check_layer"])
def test_veto_that_raises_refuses(
    make_layer: Make, make_kernel: Make, isolated_plugins: PluginManager, caught: Any, hook: str
) -> None:
    """An exception in a veto hook refuses the candidate, names the plugin, and is warned about once."""
    isolated_plugins.register(raising(hook), "guard")
    layer = make_layer()()
    with use_kernel_mapping({"Add": {"cpu": make_kernel(10)}}):
        assert layer(X)[0] == layer(X)[0] == 1
        refusals = resolve(layer, device="cpu", mode=Mode.INFERENCE).refusals
    assert [("guard" in r.reason, hook in r.reason, "oh no" in r.reason) for r in refusals] == [(True, True, True)]
    assert len(caught()) == 1


ANSWERS = {
    "kernels_find_candidates": [42, "text", [42], iter(())],
    "kernels_mapping": [42, [1, 2]],
    "kernels_authorize": [False, 42, ""],
    "kernels_check_layer": [True, " "],
    "kernels_resolve_forward": ["yes", nn.Linear],
    "kernels_load_layer": [42],
}


@pytest.mark.parametrize(
    ("hook", "answer"),
    [(hook, answer) for hook, answers in ANSWERS.items() for answer in answers],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_answers_of_the_wrong_type_are_isolated(
    make_layer: Make, make_kernel: Make, isolated_plugins: PluginManager, caught: Any, hook: str, answer: Any
) -> None:
    """A hook that answers something else causes a warning with plugin and answer, and crashes no call."""

    def implementation() -> Any:
        return answer

    plugin = type("Odd", (), {hook: staticmethod(hookimpl(tryfirst=True)(implementation))})()
    isolated_plugins.register(plugin, "odd")
    with use_kernel_mapping({"Add": {"cpu": make_kernel(10)}}):
        assert make_layer()()(X)[0] in (1, 10)
    assert len(caught()) == 1, caught()
    assert hook == "kernels_load_layer" or ("'odd'" in caught()[0] and hook in caught()[0])


def test_what_a_plugin_does_wrong_again_is_told_once(
    make_layer: Make, isolated_plugins: PluginManager, caught: Any
) -> None:
    """A fault whose message has the address of an object is one fault, however often it happens."""

    class Yields:
        @hookimpl
        def kernels_find_candidates(self, request: Any) -> Any:
            yield Candidate(nn.Linear)  # makes a generator, which is no sequence

    isolated_plugins.register(Yields(), "yields")
    kept = [make_layer(name)() for name in ("Add", "Other")]
    for layer in kept:
        layer(X)
        resolve(layer, device="cpu", mode=Mode.INFERENCE)
    assert len(caught()) == len(isolated_plugins.faults) == 1, caught()


@pytest.mark.parametrize(
    "hook", ["kernels_find_candidates", "kernels_authorize", "kernels_load_layer", "kernels_wrap_forward"]
)
@pytest.mark.parametrize("wrapper", [False, True])
def test_plugins_that_exit_do_not_end_the_process(
    make_layer: Make, make_kernel: Make, isolated_plugins: PluginManager, caught: Any, hook: str, wrapper: bool
) -> None:
    """`sys.exit` in a hook, or in a wrapper of one, is a fault like any other, reported with the plugin's name."""

    def leaves(self: Any) -> Any:
        sys.exit("no GPU here")
        yield

    def leaves_at_once(self: Any) -> Any:
        sys.exit("no GPU here")

    function = hookimpl(wrapper=True)(leaves) if wrapper else hookimpl(tryfirst=True)(leaves_at_once)
    isolated_plugins.register(type("Leaves", (), {hook: function})(), "leaves")
    with use_kernel_mapping({"Add": {"cpu": make_kernel(10)}}):
        assert make_layer()()(X)[0] in (1, 10)
    assert "no GPU here" in caught()[0]
    assert "'leaves'" in caught()[0] or hook == "kernels_load_layer"


def test_a_fault_that_is_raised_as_a_warning_names_its_plugin(
    make_layer: Make, isolated_plugins: PluginManager
) -> None:
    """Where warnings are errors, the warning of a fault is raised as it is, and the core is not blamed for it."""

    class Fails:
        @hookimpl
        def kernels_find_candidates(self, request: Any) -> Any:
            raise KeyError("x")

    isolated_plugins.register(Fails(), "fails")
    layer = make_layer()()
    with never(KernelsWarning):
        for _ in range(2):
            with pytest.raises(KernelsWarning, match=r"^Plugin 'fails' raised in kernels_find_candidates: KeyError"):
                layer(X)


def test_an_error_without_a_message_is_told_by_its_type(
    make_layer: Make, make_kernel: Make, isolated_plugins: PluginManager, caught: Any
) -> None:
    """An exception that says nothing leaves no dangling colon."""

    class Source:
        def load(self) -> Any:
            raise NotImplementedError

    class Guard:
        @hookimpl
        def kernels_authorize(self, candidate: Any) -> Any:
            if not isinstance(candidate.source, Source):
                raise NotImplementedError

    isolated_plugins.register(Guard(), "guard")
    with use_kernel_mapping({"Add": {"cpu": [Source(), make_kernel(10)]}}):
        first, second = resolve("Add", device="cpu", mode=Mode.INFERENCE).refusals
    assert first.reason == "NotImplementedError"
    assert second.reason == "Plugin 'guard' raised in kernels_authorize: NotImplementedError."


def no_function(forward: Any) -> Any:
    return None


def takes_nothing(forward: Any) -> Any:
    return lambda: None


def raises_in_calls(forward: Any) -> Any:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        raise ZeroDivisionError("oh no")

    return wrapped


def test_what_wraps_no_forward_is_left_out(
    make_layer: Make, make_kernel: Make, isolated_plugins: PluginManager, caught: Any
) -> None:
    """A decorator of kernels_wrap_forward that returns no function is reported with its plugin; the kernel serves."""
    isolated_plugins.register(Wraps(no_function), "wraps")
    with use_kernel_mapping({"Add": {"cpu": make_kernel(10)}}):
        assert make_layer()()(X)[0] == 10
    assert len(caught()) == 1 and "'wraps'" in caught()[0] and "kernels_wrap_forward" in caught()[0]


@pytest.mark.parametrize("wrap", [takes_nothing, raises_in_calls], ids=lambda wrap: wrap.__name__)
def test_kernels_are_not_blamed_for_wrappers(
    make_layer: Make, make_kernel: Make, isolated_plugins: PluginManager, caught: Any, wrap: Any
) -> None:
    """A wrapper of calls raises by itself: the call goes on, and no kernel is in quarantine for it."""
    isolated_plugins.register(Wraps(wrap), "wraps")
    with use_kernel_mapping({"Add": {"cpu": make_kernel(10)}}):
        with pytest.raises((TypeError, ZeroDivisionError)):
            make_layer()()(X)
        assert quarantined() == [] and caught() == []
        isolated_plugins.unregister("wraps")
        assert make_layer()()(X)[0] == 10


class Wraps:
    """A plugin that puts something around calls."""

    def __init__(self, wrap: Any) -> None:
        self._wrap = wrap

    @hookimpl
    def kernels_wrap_forward(self) -> Any:
        """Return it."""
        return self._wrap


@pytest.mark.parametrize("fields", [{"tier": "bogus"}, {"priority": None}, {"priority": "9"}, {"tier": None}], ids=repr)
def test_bad_candidates_are_isolated(
    make_layer: Make, make_kernel: Make, isolated_plugins: PluginManager, fields: dict[str, Any]
) -> None:
    """A candidate with an impossible tier or priority costs its plugin, and no one else: calls go on being served."""
    kernel = make_kernel(20)

    class Odd:
        @hookimpl
        def kernels_find_candidates(self, request: Any) -> Any:
            return [Candidate(kernel, **fields)]

    layer = make_layer()()
    register_kernel_mapping({"Add": {"cpu": make_kernel(10)}})
    assert layer(X)[0] == 10
    with ignored():
        isolated_plugins.register(Odd(), "odd")
        assert layer(X)[0] == 10


def forgets_to_return(self: Any) -> Any:
    yield


def returns_nonsense(self: Any) -> Any:
    yield
    return 42


def raises_before(self: Any) -> Any:
    raise ZeroDivisionError("oh no")
    yield


def raises_after(self: Any) -> Any:
    yield
    raise ZeroDivisionError("oh no")


def never_yields(self: Any) -> Any:
    if self is None:
        yield
    return 42


def yields_twice(self: Any) -> Any:
    result = yield
    yield
    return result


@pytest.mark.parametrize(
    "wrapper",
    [forgets_to_return, returns_nonsense, raises_before, raises_after, never_yields, yields_twice],
    ids=lambda wrapper: wrapper.__name__,
)
@pytest.mark.parametrize("hook", ["kernels_resolve_forward", "kernels_find_candidates", "kernels_mapping"])
def test_broken_wrappers_are_isolated(
    make_layer: Make, make_kernel: Make, isolated_plugins: PluginManager, caught: Any, hook: str, wrapper: Any
) -> None:
    """A faulty wrapper is reported with plugin and hook, and the answer that it wrapped is used."""

    class Offers:
        @hookimpl
        def kernels_mapping(self) -> Any:
            return {"Add": {"cpu": make_kernel(10, can_torch_compile=True)}}

    isolated_plugins.register(Offers(), "offers")
    isolated_plugins.register(type("Wraps", (), {hook: hookimpl(wrapper=True)(wrapper)})(), "wraps")
    assert make_layer()()(X)[0] == 10
    about = [message for message in caught() if "'wraps'" in message]
    assert len(about) == 1 and hook in about[0], caught()


@pytest.mark.parametrize("hook", ["kernels_authorize", "kernels_check_layer"])
@pytest.mark.parametrize(
    "wrapper", [raises_before, raises_after, forgets_to_return, returns_nonsense], ids=lambda wrapper: wrapper.__name__
)
def test_broken_veto_wrappers_refuse(
    make_layer: Make, make_kernel: Make, isolated_plugins: PluginManager, caught: Any, hook: str, wrapper: Any
) -> None:
    """A broken wrapper of a veto hook cannot let a candidate pass that the policy stops: it is refused."""
    isolated_plugins.register(type("Wraps", (), {hook: hookimpl(wrapper=True)(wrapper)})(), "wraps")
    with use_kernel_mapping({"Add": {"cpu": make_kernel(10)}}):
        assert make_layer()()(X)[0] == 1
    assert len(caught()) == 1 and "'wraps'" in caught()[0] and hook in caught()[0], caught()


def test_load_fault_of_a_plugin_names_it(make_layer: Make, make_kernel: Make, isolated_plugins: PluginManager) -> None:
    """An exception of a kernels_load_layer hook becomes the refusal, with the error kept."""
    raised = OSError("the disk is full")

    class Loader:
        @hookimpl(tryfirst=True)
        def kernels_load_layer(self, source: Any) -> Any:
            raise raised

    isolated_plugins.register(Loader(), "loader")
    with use_kernel_mapping({"Add": {"cpu": make_kernel(10)}}):
        (refusal,) = resolve("Add", device="cpu", mode=Mode.INFERENCE).refusals
    assert refusal.error is raised
    assert refusal.reason == "OSError: the disk is full (raised by plugin 'loader')"


# --- Discovery, in real processes --------------------------------------------------------------------


def test_importing_scans_nothing(python: Make, distribution: Make) -> None:
    """Importing kernels_core imports neither plugins, nor huggingface_hub, nor the reader of entry points."""
    distribution("acme", {"acme": "acme_module"}, {"acme_module": "raise SystemExit('imported')"})
    done = python("""
        import sys, kernels_core
        print([n for n in ("acme_module", "huggingface_hub", "importlib_metadata", "kernels_plugins", "typer",
               "rich", "pytest", "triton", "torch._dynamo") if n in sys.modules])
    """)
    assert done.stdout.strip() == "[]"


def test_discovery_is_lazy_and_happens_once(python: Make, distribution: Make) -> None:
    """Entry points are scanned at the first resolution, and only then, whatever is called before and after."""
    distribution("acme", {"acme": "acme_module"}, {"acme_module": GOOD_PLUGIN.format(added=50)})
    done = python(
        RUN
        + """
    import sys, importlib_metadata
    real, scans = importlib_metadata.entry_points, []
    importlib_metadata.entry_points = lambda **k: (scans.append(k), real(**k))[1]
    layer = Add()
    layer.state_dict(), repr(layer), Device("cpu"), plugin_manager()
    before = (len(scans), "acme_module" in sys.modules)
    values = [run(), run()]
    resolve("Other", device="cpu", mode=Mode.INFERENCE)
    plugin_manager().plugins()
    tell(before=before, values=values, scans=len(scans))
    """,
        {"KERNELS_PLUGINS": "acme,mapping"},
    )
    answer = told(done)
    assert answer["before"] == [0, False]
    assert answer["values"] == [50, 50]
    assert answer["scans"] == 1
    assert answer["plugins"] == ["acme", "core", "mapping"]
    assert answer["warnings"] == []


def test_faulty_distributions_are_isolated(python: Make, distribution: Make) -> None:
    """Each broken distribution is named in one warning of its own, and the good ones serve."""
    hooks = "from kernels_core import hookimpl\n"
    distribution("a-missing", {"missing": "no_such_module"}, {})
    distribution("a-raises", {"raises": "raises_module"}, {"raises_module": "raise RuntimeError('while importing')"})
    distribution("a-syntax", {"syntax": "syntax_module"}, {"syntax_module": "def ("})
    distribution("a-exits", {"exits": "exits_module"}, {"exits_module": "raise SystemExit(3)"})
    distribution(
        "a-typo", {"typo": "typo_module"}, {"typo_module": hooks + "@hookimpl\ndef kernels_maping(): return {}"}
    )
    distribution(
        "a-argument", {"argument": "arg_module"}, {"arg_module": hooks + "@hookimpl\ndef kernels_mapping(x): return {}"}
    )
    distribution("twin-one", {"twin": "twin_one"}, {"twin_one": GOOD_PLUGIN.format(added=50)})
    distribution("twin-two", {"twin": "twin_two"}, {"twin_two": GOOD_PLUGIN.format(added=60)})
    ours = importlib_metadata.distribution("kernels-core").entry_points.select(group="kernels_core").names
    blocked = {"KERNELS_PLUGINS": ",".join(f"-{name}" for name in sorted(ours - {"mapping"}))}
    answer = told(python(RUN + "\n    tell(values=[run(), run()])", blocked))
    assert answer["values"] == [50, 50]
    assert answer["plugins"] == ["core", "mapping", "twin"]
    for name, part in {
        "missing": "no_such_module",
        "raises": "RuntimeError: while importing",
        "syntax": "SyntaxError",
        "exits": "SystemExit",
        "typo": "did you mean kernels_mapping",
        "argument": "'x', which the hook does not have",
        "twin": "'twin-one' is used, and those of twin-two are not",
    }.items():
        about = [message for message in answer["warnings"] if f"'{name}'" in message]
        assert len(about) == 1 and part in about[0], (name, answer["warnings"])
    assert len(answer["warnings"]) == 7


def test_faulty_distribution_raises_in_strict_mode(python: Make, distribution: Make) -> None:
    """With KERNELS_STRICT=1 a broken plugin raises, at each call, not at the first one only."""
    distribution("a-missing", {"a_missing": "no_such_module"}, {})
    distribution("acme", {"z_acme": "acme_module"}, {"acme_module": GOOD_PLUGIN.format(added=50)})
    done = python(
        RUN
        + """
    seen = []
    for _ in range(2):
        try:
            seen.append(run())
        except Exception as error:
            seen.append(f"{type(error).__name__}: {error}")
    print(json.dumps(seen))
    """,
        {"KERNELS_STRICT": "1", "KERNELS_PLUGINS": "a_missing,mapping,z_acme"},
    )
    first, second = json.loads(done.stdout.splitlines()[-1])
    assert first.startswith("PluginLoadError") and "'a_missing'" in first
    assert second == first, "the second call went on with half of the plugins"


def test_plugins_are_chosen_by_the_environment(python: Make, distribution: Make) -> None:
    """KERNELS_PLUGINS=a,b allows only those, -c blocks one, and an unknown name causes a warning."""
    distribution("acme", {"acme": "acme_module"}, {"acme_module": GOOD_PLUGIN.format(added=50)})
    distribution("beta", {"beta": "beta_module"}, {"beta_module": GOOD_PLUGIN.format(added=60)})
    code = RUN + "\n    tell(value=run())"
    allowed = told(python(code, {"KERNELS_PLUGINS": "beta, mapping"}))
    assert (allowed["plugins"], allowed["value"], allowed["warnings"]) == (["beta", "core", "mapping"], 60, [])
    blocked = told(python(code, {"KERNELS_PLUGINS": "-acme"}))
    assert "acme" not in blocked["plugins"] and "beta" in blocked["plugins"] and blocked["value"] == 60
    unknown = told(python(code, {"KERNELS_PLUGINS": "acme,mapping,gamma"}))
    assert unknown["value"] == 50
    assert len(unknown["warnings"]) == 1 and "'gamma'" in unknown["warnings"][0]


def test_leaving_out_what_asks_for_mappings_is_told(python: Make, distribution: Make) -> None:
    """KERNELS_PLUGINS=a without `mapping` warns, for no mapping applies then; -mapping does not: it is meant so."""
    distribution("acme", {"acme": "acme_module"}, {"acme_module": GOOD_PLUGIN.format(added=50)})
    code = RUN + "\n    tell(value=run())"
    alone = told(python(code, {"KERNELS_PLUGINS": "acme"}))
    assert alone["value"] == 1 and len(alone["warnings"]) == 1
    assert "leaves out the plugin 'mapping', without which no mapping is used" in alone["warnings"][0]
    for meant in ("acme,-mapping", "-mapping", "-acme"):
        assert told(python(code, {"KERNELS_PLUGINS": meant}))["warnings"] == []


def test_slow_discovery_is_waited_for(python: Make, distribution: Make) -> None:
    """A thread that calls while another is still importing plugins waits for them, and is served."""
    slow = "import time; time.sleep(1.0)\n" + "\n".join(line[4:] for line in GOOD_PLUGIN.format(added=50).splitlines())
    distribution("acme", {"acme": "acme_module"}, {"acme_module": slow})
    done = python(
        RUN
        + """
    import threading, time
    layers = [use_kernel_forward_from_hub("Add", use_fallback=False)(type(f"L{i}", (torch.nn.Module,),
              {"forward": lambda self, x: x + 1})) for i in range(4)]
    results = [None] * 4
    def work(i):
        try:
            results[i] = layers[i]()(torch.zeros(1)).item()
        except Exception as error:
            results[i] = type(error).__name__
    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
        time.sleep(0.1)
    for thread in threads:
        thread.join()
    tell(results=results)
    """,
        {"KERNELS_PLUGINS": "acme,mapping"},
    )
    assert told(done)["results"] == [50] * 4


def test_plugin_that_dispatches_while_it_is_imported(python: Make, distribution: Make) -> None:
    """A plugin module that decorates and calls a layer at import is loaded, and nothing recurses."""
    calls = (
        GOOD_PLUGIN.format(added=50)
        + """
    from kernels_core import use_kernel_forward_from_hub
    @use_kernel_forward_from_hub("Add")
    def own(x):
        return x + 3
    value = own(torch.zeros(1)).item()
    """
    )
    distribution("acme", {"acme": "acme_module"}, {"acme_module": calls})
    done = python(
        RUN + "\n    first = run()\n    import acme_module\n"
        "    tell(first=first, then=run(), importing=acme_module.value)",
        {"KERNELS_PLUGINS": "acme,mapping"},
    )
    answer = told(done)
    assert (answer["first"], answer["then"], answer["importing"]) == (50, 50, 3)


@pytest.mark.slow
def test_installed_third_party_package(tmp_path: Path, python: Make) -> None:
    """A plugin package on public names, installed by pip, is found, ranked, vetoes, wraps, and serves."""
    import shutil

    source = tmp_path / "source"
    shutil.copytree(ACME, source, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info", "build"))
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"),
            *("--disable-pip-version-check", "--target", str(tmp_path / "site"), str(source)),
        ],
        check=True,
        capture_output=True,
    )
    done = python(
        RUN
        + """
    @use_kernel_forward_from_hub("Triple")
    class Double(torch.nn.Module):
        def forward(self, x):
            return x * 2
    layer = Double()
    value = layer(torch.ones(1)).item()
    resolution = resolve(layer, device="cpu", mode=Mode.INFERENCE)
    import acme_kernels
    compiled = torch.compile(layer, backend="eager", fullgraph=True)(torch.ones(1)).item()
    tell(value=value, plugin=resolution.plugin, origin=resolution.origin, compiled=compiled,
         refusals=[r.reason for r in resolution.refusals], decisions=acme_kernels.decisions[:1],
         priority=resolution.candidate.priority)
    """
    )
    answer = told(done)
    assert answer["value"] == answer["compiled"] == 3
    assert (answer["plugin"], answer["priority"]) == ("acme", 10)
    assert answer["origin"] == "acme_kernels.AcmeTriple"
    assert answer["refusals"] == ["acme does not trust this one"]
    assert answer["decisions"] == ["Triple: acme_kernels.AcmeTriple"]
    assert any("acme does not trust this one" in message for message in answer["warnings"])
