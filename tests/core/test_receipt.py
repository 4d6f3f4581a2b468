"""Receipts: the kernels that serve a model, required, compared, counted."""

from __future__ import annotations

import functools
import json
import pickle
import sys
import threading
from collections import OrderedDict, UserDict
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from kernels_core import (
    ArgumentError,
    ArgumentTypeError,
    Mode,
    PluginConflictError,
    PluginLoadError,
    Receipt,
    RequirementError,
    count_calls,
    decorated_layer,
    kernelize,
    plugin_manager,
    quarantine,
    receipt,
    use_kernel_forward_from_hub,
    use_kernelized_func,
)
from kernels_plugins.mapping import use_kernel_mapping

Make = Callable[..., Any]
X = torch.zeros(2)

pytestmark = pytest.mark.filterwarnings("ignore::kernels_core.KernelsWarning")


def model_of(layer: type[nn.Module]) -> nn.Module:
    """Make a model with two blocks."""
    return nn.ModuleDict({"blocks": nn.ModuleList(nn.Sequential(layer(), nn.ReLU()) for _ in range(2))})


def test_rows_tell_the_decision(make_layer: Make, make_kernel: Make) -> None:
    """A row has path, layer, device, mode, implementation, origin, plugin, and every refusal with its reason."""
    kernel = make_kernel(10)

    class Broken:
        def load(self) -> Any:
            raise OSError("gone")

        def __repr__(self) -> str:
            return "Broken()"

    with use_kernel_mapping({"Add": {"cpu": [Broken(), kernel], "xpu": make_kernel(20)}}):
        found = receipt(model_of(make_layer()), device="cpu", mode=Mode.INFERENCE)
    assert [row.path for row in found.rows] == ["blocks.0.0", "blocks.1.0"]
    row = found.rows[0]
    assert (row.layer_name, row.device, row.mode, row.plugin) == ("Add", "cpu", "inference", "mapping")
    assert row.origin.endswith("Add10") and row.implementation.endswith("make.<locals>.forward")
    assert row.refusals == (("Broken()", "OSError: gone"),) and not row.is_reference and row.calls is None
    assert row.misfits[0][1] == "it is mapped for xpu, and this call is on cpu"


def test_nothing_is_run_or_changed(make_layer: Make, make_kernel: Make, hook_recorder: Any) -> None:
    """A receipt runs no forward, warns of nothing, and is not announced as a decision that was put to use."""
    model = model_of(make_layer())
    before = [dict(module.__dict__) for module in model.modules()]
    with use_kernel_mapping({"Add": {"cpu": [make_kernel(10, has_backward=False)]}}):
        receipt(model, device="cpu")
    assert "kernels_resolved" not in hook_recorder.names()
    assert [dict(module.__dict__) for module in model.modules()] == before


def test_mode_is_that_of_the_model(make_layer: Make) -> None:
    """Without a mode, a model in training mode is asked about for training, another for inference."""
    model = model_of(make_layer())
    assert receipt(model, device="cpu").rows[0].mode == "training"
    assert receipt(model.eval(), device="cpu").rows[0].mode == "inference"


def test_device_is_that_of_each_module() -> None:
    """Modules on several devices are asked about where they are; those without tensors, where their neighbours are."""

    @use_kernel_forward_from_hub("Act")
    class Act(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    model = nn.Sequential(
        nn.Sequential(nn.Linear(1, 1), Act()), nn.Sequential(nn.Linear(1, 1, device="meta"), nn.Sequential(Act()))
    )
    assert [row.device for row in receipt(model).rows] == ["cpu", "meta"]


def test_a_model_without_a_device(make_layer: Make) -> None:
    """A model without parameters needs a device, and one without decorated layers nothing."""
    with pytest.raises(ArgumentError, match="name one with receipt"):
        receipt(model_of(make_layer()))
    assert receipt(nn.Sequential(nn.ReLU())).rows == ()
    assert str(receipt(nn.ReLU())).startswith("no decorated layer; adopt(model)")


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((3,), ArgumentTypeError),
        ((nn.ReLU(), "nowhere"), ArgumentError),
        ((nn.ReLU(), "cpu", Mode.FALLBACK), ArgumentError),
    ],
)
def test_bad_arguments(arguments: tuple[Any, ...], error: type[Exception]) -> None:
    """A value that is no module, a device that does not exist and a mode that no call has are errors of ours."""
    model, device, mode = (*arguments, None, None)[:3]
    with pytest.raises(error):
        receipt(model, device=device, mode=mode)


def test_condition_frozen_quarantine_and_functions(make_layer: Make, make_kernel: Make) -> None:
    """Conditions, kernelized modules, quarantine and functions that a class calls have their rows and remarks."""

    @use_kernel_forward_from_hub("twice")
    def twice(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @use_kernelized_func(twice)
    class Uses(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return twice(x)

    layer, kernel = make_layer("A"), make_kernel(10)
    model = nn.ModuleDict({"a": layer(), "b": make_layer("B", condition=lambda module: False)(), "c": Uses()})
    with use_kernel_mapping({"A": {"cpu": kernel}, "B": {"cpu": kernel}, "twice": {"cpu": lambda x: x}}):
        kernelize(model["a"], mode=Mode.INFERENCE, device="cpu")
        rows = {row.path: row for row in receipt(model, device="cpu", mode=Mode.INFERENCE).rows}
        assert list(rows) == ["a", "b", "c:twice"]
        assert rows["a"].frozen and not rows["a"].is_reference
        assert rows["b"].is_reference and rows["b"].note == "its condition is not met"
        assert not rows["c:twice"].is_reference and not rows["c:twice"].frozen
        quarantine(decorated_layer(layer), kernel.forward, kernel="k", reason="it is wrong")
        row = receipt(model["a"], device="cpu", mode=Mode.INFERENCE).rows[0]
        assert not row.frozen and row.is_reference and "it is wrong" in row.refusals[0][1]


@use_kernel_forward_from_hub("called")
def called(x: torch.Tensor) -> torch.Tensor:
    """Run as a function that code names."""
    return x * 2


def helper(x: torch.Tensor) -> torch.Tensor:
    """Call it, for others of this file."""
    return called(x)


@use_kernel_forward_from_hub("made")
class Made(nn.Module):
    """A class of which code makes a module for each call."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute."""
        return x * 2


class Calls(nn.Module):
    """An undecorated one."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Call the function that is decorated."""
        return helper(x)


class Instances(OrderedDict[str, Any]):
    """As `ACT2FN` of transformers: its values are classes, alone or with arguments."""

    def __getitem__(self, key: str) -> Any:
        """Make a module."""
        kind, more = content if isinstance(content := super().__getitem__(key), tuple) else (content, {})
        return kind(**more)


class Lazy(UserDict[str, Any]):
    """A mapping whose methods must not run."""

    def __iter__(self) -> Any:
        """Fail."""
        raise AssertionError

    values = __iter__


class Operators:
    """A class that is no module."""

    twice = staticmethod(called)


TABLE = {"twice": called}
PAIRS = [("twice", functools.partial(helper))]
NESTED = OrderedDict({"scale": {"kinds": (called,)}})
MADE = Instances(made=Made)
MADE_WITH = Instances(calls=(Calls, {}))
LAZY = Lazy(twice=called)
KINDS = (Made, Calls)
VOCABULARY = {str(number): number for number in range(20_000)}


class Caller(nn.Module):
    """Calls it in several ways, by name."""

    def table(self, x: torch.Tensor) -> torch.Tensor:
        """Find it in a dict."""
        return TABLE["twice"](x)

    def pairs(self, x: torch.Tensor) -> torch.Tensor:
        """Find a function that calls it in a list of tuples."""
        return dict(PAIRS)["twice"](x)

    def nested(self, x: torch.Tensor) -> torch.Tensor:
        """Find it in containers in containers, by the module that has them."""
        return this.NESTED["scale"]["kinds"][0](x)

    def made(self, x: torch.Tensor) -> torch.Tensor:
        """Make a module of a decorated class."""
        return MADE["made"](x)

    def made_with(self, x: torch.Tensor) -> torch.Tensor:
        """Make a module that calls it."""
        return MADE_WITH["calls"](x)

    def lazy(self, x: torch.Tensor) -> torch.Tensor:
        """Find it in a mapping that is no dict."""
        return LAZY["twice"](x)

    def static(self, x: torch.Tensor) -> torch.Tensor:
        """Find it in a class."""
        return Operators.twice(x)

    def kinds(self, x: torch.Tensor) -> torch.Tensor:
        """Compare with classes, and look a word up."""
        return x if isinstance(x, KINDS) or VOCABULARY["7"] else x * 2

    def direct(self, x: torch.Tensor) -> torch.Tensor:
        """Call it from a function inside."""
        return (lambda: called(x))()

    def by_helper(self, x: torch.Tensor) -> torch.Tensor:
        """Call a function of this file that calls it, and itself."""
        return helper(x) if x.numel() else self.by_helper(x)

    def by_method(self, x: torch.Tensor) -> torch.Tensor:
        """Call another method."""
        return self.direct(x)

    def by_module(self, x: torch.Tensor) -> torch.Tensor:
        """Find it in a module."""
        return this.called(x)

    def not_at_all(self, x: torch.Tensor) -> torch.Tensor:
        """Call functions of others only."""
        return torch.relu(x)


this = sys.modules[__name__]


WAYS = ["direct", "by_helper", "by_method", "by_module", "closure", "wrapped"]
TABLES = ["table", "pairs", "nested", "made", "made_with", "lazy", "static"]


@pytest.mark.parametrize("name", [*WAYS, *TABLES, "not_at_all", "kinds"])
def test_functions_that_code_calls(name: str) -> None:
    """A receipt lists the decorated functions that the serving code names; `require` fails while one has no kernel."""
    inner = called
    ways: dict[str, Any] = {
        "closure": lambda self, x: inner(x),
        "wrapped": functools.wraps(Caller.direct)(lambda *_: _),
    }
    forward = ways.get(name) or getattr(Caller, name)
    plain = type("Plain", (Caller,), {"forward": forward})()
    expected = [] if name in ("not_at_all", "kinds") else ["made" if name == "made" else "called"]
    assert [row.layer_name for row in receipt(plain, device="cpu").rows] == expected
    with use_kernel_mapping({"called": {"cpu": lambda x, y: x}, "made": {"cpu": nn.GLU}}):
        found = receipt(nn.Sequential(plain), device="cpu")
        assert [row.path for row in found.rows] == [f"0:{each.replace('made', 'Made')}" for each in expected]
        if expected:
            reason = r"0:(called|Made) \(layer '\w+'\): reference\n.*(parameters|constructor)"
            with pytest.raises(RequirementError, match=reason):
                found.require("*")


@pytest.mark.parametrize(("way", "calls"), [("table", {"reference": 2}), ("made", None)])
def test_calls_of_what_a_table_has(way: str, calls: dict[str, int] | None) -> None:
    """Calls of a function in a table are counted; those of modules that a forward makes are not known."""
    model = type("Plain", (Caller,), {"forward": getattr(Caller, way)})()
    with count_calls():
        assert model(torch.ones(1)).item() == helper(torch.ones(1)).item() == 2
        (row, _) = receipt(
            nn.Sequential(model, type("Direct", (Caller,), {"forward": Caller.direct})()), device="cpu"
        ).rows
        assert row.calls == calls


def test_functions_that_only_the_kernel_calls() -> None:
    """Where a kernel serves, its code applies, and not that of the reference."""

    @use_kernel_forward_from_hub("Calls")
    class Calls(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2

    class Fast(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return called(x)

    model = nn.Sequential(Calls())
    assert [row.path for row in receipt(model, device="cpu").rows] == ["0"]
    with use_kernel_mapping({"Calls": {"cpu": Fast}}):
        assert [row.path for row in receipt(model, device="cpu").rows] == ["0", "0:called"]
        kernelize(model, mode=Mode.INFERENCE, device="cpu")
    assert [(row.path, row.frozen) for row in receipt(model, device="cpu").rows] == [("0", True), ("0:called", False)]


def test_require(make_layer: Make, make_kernel: Make) -> None:
    """A requirement that is met gives the receipt back; one that is not names the rows and the reasons."""
    model = model_of(make_layer())
    with use_kernel_mapping({"Add": {"cpu": make_kernel(10)}}):
        found = receipt(model, device="cpu", mode=Mode.INFERENCE)
    assert found.require("blocks.*").require("blocks.0.0", origin="*.Add10") is found
    with pytest.raises(
        RequirementError, match=r"2 of 2 layers .* not served by origin 'kernels-community/\*'"
    ) as failed:
        found.require("*", origin="kernels-community/*")
    assert failed.value.rows == found.rows
    assert pickle.loads(pickle.dumps(failed.value)).rows == found.rows
    with use_kernel_mapping({"Add": {"cpu": make_kernel(20, has_backward=False)}}):
        training = receipt(model, device="cpu", mode=Mode.TRAINING)
    with pytest.raises(
        RequirementError,
        match=r"blocks\.0\.0 \(layer 'Add'\): reference\n    refused .*Add20: it declares has_backward",
    ):
        training.require("blocks.0.0")


def test_a_requirement_names_layers_plugins_and_the_next_step(make_layer: Make, monkeypatch: Any) -> None:
    """The error names the layer name, a plugin that failed, that nothing was offered, and where to look next."""
    fault = PluginLoadError("Plugin 'acme' cannot be imported", plugin="acme")
    monkeypatch.setattr(plugin_manager(), "faults", [fault])
    with pytest.raises(RequirementError) as failed:
        receipt(model_of(make_layer("Add")), device="cpu").require("*")
    text = str(failed.value)
    assert "blocks.0-1.0 (layer 'Add'): reference\n    no kernel is offered for it\n" in text
    assert "Plugin 'acme' cannot be imported" in text and "kernels-core plugins" in text and "Offer a kernel" in text
    assert len(failed.value.rows) == 2


def test_layers_that_are_served_alike_are_one_line(make_layer: Make, make_kernel: Make) -> None:
    """Text, HTML and errors fold numbers of paths where all else is equal; rows and JSON have each layer."""
    layer, other = make_layer("A"), make_layer("B")
    blocks = [nn.ModuleDict({"a": layer(), "more": nn.ModuleList(other() for _ in range(3))}) for _ in range(12)]
    blocks[4]["a"] = nn.Identity()
    model = nn.ModuleDict({"layers": nn.ModuleList(blocks), "head": other(), "v2": layer()})
    with use_kernel_mapping({"A": {"cuda": make_kernel(10)}}):
        found = receipt(model, device="cpu")
    lines = str(found).splitlines()
    assert [line.split()[0] for line in lines if line[0] != " "] == [
        "path", "layers.0-3,5-11.a", "layers.0-11.more.0-2", "head", "v2"
    ]  # fmt: skip
    assert len(lines) == 7
    assert len(found.rows) == len(json.loads(found.to_json())) == 11 + 36 + 2


def test_wrappers_are_no_part_of_a_path(make_layer: Make) -> None:
    """A wrapper of a whole model adds nothing to the paths; a child of the user's own that is named so does."""
    layer = make_layer()
    model = nn.ModuleDict({"layers": nn.ModuleList([layer(), layer()])})
    plain = receipt(model, device="cpu")

    class Wrapper(nn.Module):
        def __init__(self, **children: nn.Module) -> None:
            super().__init__()
            for name, child in children.items():
                self.add_module(name, child)

    parallel = Wrapper(module=model)
    lightning = Wrapper(_forward_module=parallel, _original_module=model)
    for wrapped in (torch.compile(model), parallel, Wrapper(_fsdp_wrapped_module=torch.compile(parallel)), lightning):
        found = receipt(wrapped, device="cpu")
        assert not plain.diff(found) and found.rows == plain.rows, str(plain.diff(found))
    assert receipt(nn.ModuleDict({"net": parallel}), device="cpu").rows[0].path == "net.layers.0"
    own = Wrapper(module=layer(), head=layer())
    assert [row.path for row in receipt(own, device="cpu").rows] == ["module", "head"]
    inner = layer()
    inner.add_module("module", layer())
    assert [row.path for row in receipt(nn.Sequential(inner), device="cpu").rows] == ["0", "0.module"]


def test_offloaded_models_are_where_they_run() -> None:
    """Weights that accelerate keeps elsewhere between calls: the device is that to which its hook moves them."""
    accelerate = pytest.importorskip("accelerate")

    @use_kernel_forward_from_hub("Offloaded")
    class Act(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    def make() -> nn.Module:
        return nn.Sequential(nn.Sequential(nn.Linear(2, 2), Act()), Act())

    offloaded = accelerate.cpu_offload(make(), execution_device=torch.device("cpu"))
    assert next(offloaded.parameters()).device.type == "meta"
    assert [row.device for row in receipt(offloaded).rows] == ["cpu", "cpu"]
    for hook in (
        SimpleNamespace(execution_device=0),
        SimpleNamespace(hooks=[SimpleNamespace(execution_device="cuda:0")]),
    ):
        model = make()
        model._hf_hook = hook
        assert {row.device for row in receipt(model).rows} == {
            row.device for row in receipt(make(), device="cuda:0").rows
        }


def test_calls_that_were_not_counted_are_not_zero(make_layer: Make) -> None:
    """A model that ran while nothing was counted, or in compiled code only, has no counts, rather than zeros."""
    first, second, compiled = (make_layer(name)() for name in ("A", "B", "C"))
    with count_calls():
        first(X), torch.compile(compiled, backend="eager")(X)
    second(X)
    for model in (second, compiled):
        (row,) = receipt(model, device="cpu").rows
        assert row.calls is None and "calls" not in str(receipt(model, device="cpu"))
    both = nn.ModuleDict({"first": first, "second": second})
    assert [row.calls for row in receipt(both, device="cpu").rows] == [{"reference": 1}, {}]
    traced = receipt(both, device="cpu", mode=Mode.INFERENCE | Mode.TORCH_COMPILE)
    assert [row.calls for row in traced.rows] == [{"reference": 1}, None]


def test_require_that_matches_nothing(make_layer: Make) -> None:
    """A pattern without a match is an error that shows paths which exist."""
    with pytest.raises(RequirementError, match=r"No decorated layer matches 'block\.\*'.*blocks\.0\.0"):
        receipt(model_of(make_layer()), device="cpu").require("block.*")
    with pytest.raises(RequirementError, match="there is none at all"):
        Receipt(()).require("*")


def test_diff(make_layer: Make, make_kernel: Make) -> None:
    """A comparison lists the layers that are served otherwise, that are new, and that are gone."""
    model = model_of(make_layer())
    before = receipt(model, device="cpu", mode=Mode.INFERENCE)
    assert not before.diff(before) and str(before.diff(before)) == "no difference"
    with use_kernel_mapping({"Add": {"cpu": make_kernel(10)}}):
        model["more"] = make_layer("Other")()
        del model["blocks"][1]
        after = receipt(model, device="cpu", mode=Mode.INFERENCE)
    difference = before.diff(after)
    assert [(a.path, b.origin.rpartition(".")[2]) for a, b in difference.changed] == [("blocks.0.0", "Add10")]
    assert [row.path for row in difference.added] == ["more"]
    assert [row.path for row in difference.removed] == ["blocks.1.0"]
    assert [line[:1] for line in str(difference).splitlines()] == ["~", "+", "-"]


def test_json_and_html(make_layer: Make, make_kernel: Make) -> None:
    """JSON has every field, and HTML shows text that would be markup as text."""
    with use_kernel_mapping({"<i>": {"cuda": make_kernel(10)}}):
        found = receipt(make_layer("<i>")(), device="cpu")
    (row,) = json.loads(found.to_json())
    assert row["layer_name"] == "<i>" and row["origin"] == "reference" and row["calls"] is None
    assert row["misfits"][0]["reason"] == "it is mapped for cuda, and this call is on cpu"
    assert "&lt;i&gt;" in found.to_html() and "<i>" not in found.to_html()


def test_page(make_layer: Make, make_kernel: Make) -> None:
    """The page sums up, shows equal layers and their reasons once, with all paths, versions and failed plugins."""
    layer, other = make_layer("A"), make_layer("B")
    blocks = [nn.ModuleDict({"a": layer(), "more": nn.ModuleList(other() for _ in range(3))}) for _ in range(12)]
    model = nn.ModuleDict({"layers": nn.ModuleList(blocks), "head": layer()})
    wrong = type("Wrong", (nn.Module,), {"forward": lambda self, y, z: y})
    with (
        use_kernel_mapping({"A": {"cuda": make_kernel(1), "cpu": wrong}, "B": {"cpu": make_kernel(10)}}),
        count_calls(),
    ):
        other()(torch.ones(1))
        model["head"](torch.ones(1))
        found = receipt(model, device="cpu", mode=Mode.INFERENCE)
    page = Receipt(found.rows, found.about, ("the plugin <acme> failed",)).to_html()
    assert "<h1>Receipt: ModuleDict</h1>" in page and "the plugin &lt;acme&gt; failed" in page
    assert "<b>36 of 49</b>layers are served by kernels" in page and "<b>13</b>on the reference" in page
    assert "<b>1</b>calls counted<br><small>1 on the reference" in page
    assert page.count("<dt>layer</dt><dd><code>(x)") == page.count("<dt>kernel</dt><dd><code>(y, z)") == 1
    assert page.count("it is mapped for cuda, and this call is on cpu") == 1
    plain = page.replace("<wbr>", "")
    assert all(f"<li>layers.{n}.more.2 (calls: 0)</li>" in plain for n in range(12))
    assert "13 layers · layers.0-11.a and 1 more" in plain and "36 layers · " in plain and "All 36 paths" in plain
    assert f"<dt>torch</dt><dd>{torch.__version__}" in plain and " UTC</dd>" in page
    assert found._repr_html_().startswith("<div class='kc'>") and found == replace(found, about={})
    assert "No layer of this model is decorated" in receipt(nn.Linear(1, 1), device="cpu").to_html()


def test_rich_table(make_layer: Make) -> None:
    """In a terminal, a receipt is a table; markup in names is not interpreted."""
    console = Console(width=120, record=True, force_terminal=True)
    with console.capture() as captured:
        console.print(receipt(make_layer("[red]x")(), device="cpu"))
    assert "[red]x" in captured.get() and "reference" in captured.get()


def test_counted_calls(make_layer: Make, make_kernel: Make) -> None:
    """While calls are counted, each module has its own, per origin; outside nothing is counted; anew from zero."""
    first, second = make_layer("A")(), make_layer("B")()
    model = nn.ModuleDict({"a": first, "b": second})
    first(X)
    with use_kernel_mapping({"A": {"cpu": make_kernel(10)}}):
        with count_calls():
            first(X), first(X), second(X)
            with use_kernel_mapping({}, inherit_mapping=False):
                first(X)
        first(X)
        calls = [row.calls for row in receipt(model, device="cpu").rows]
        assert [sorted(c.values()) for c in calls if c is not None] == [[1, 2], [1]]
        with count_calls():
            second(X)
        assert [row.calls for row in receipt(model, device="cpu").rows] == [{}, {"reference": 1}]


def test_counts_of_threads_add_up(make_layer: Make) -> None:
    """Calls of several threads are all counted, those of functions and kernelized modules too."""

    @use_kernel_forward_from_hub("f")
    def f(x: torch.Tensor) -> torch.Tensor:
        return x

    layer = make_layer()()
    frozen = kernelize(make_layer("Frozen")(), mode=Mode.INFERENCE, device="cpu")

    def work() -> None:
        for _ in range(200):
            layer(X), f(X), frozen(X)

    with count_calls():
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [receipt(m, device="cpu").rows[0].calls for m in (layer, frozen)] == [{"reference": 800}] * 2


def test_counting_opens_and_closes_in_threads() -> None:
    """A block that opens while the last one closes is counted: the plugin is not registered twice, nor left behind."""
    errors: list[Exception] = []

    def work() -> None:
        try:
            for _ in range(100):
                with count_calls():
                    pass
        except PluginConflictError as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert errors == [] and "counter" not in plugin_manager().plugins()


def test_explain(python: Callable[..., Any], distribution: Callable[..., Any]) -> None:
    """The command prints a receipt as text and JSON, and exits with 1 if a requirement fails."""
    site = distribution("nothing", {}, {})
    (site / "models.py").write_text(
        "import torch\nfrom kernels_core import use_kernel_forward_from_hub\n"
        "@use_kernel_forward_from_hub('Add')\nclass Add(torch.nn.Module):\n"
        "    def forward(self, x):\n        return x\n"
        "def make():\n    return torch.nn.Sequential(Add())\n"
    )
    run = "import sys\nfrom kernels_core.cli import main\nsys.argv = {!r}\nmain()"
    base = ["kernels-core", "explain", "models:make", "--device", "cpu"]
    done = python(run.format(base))
    assert done.stdout.splitlines()[1].split() == ["0", "Add", "cpu", "training", "reference"]
    done = python(run.format([*base, "--json", "--mode", "inference"]))
    assert json.loads(done.stdout)[0]["mode"] == "inference"
    done = python(run.format([*base, "--html", "out.html", "--require", "*"]), check=False)
    assert done.returncode == 1 and "not served by a kernel" in done.stderr
    assert (site.parent / "out.html").read_text().startswith("<!doctype html>")
    done = python(run.format([*base[:2], "models:missing"]), check=False)
    assert done.returncode == 2 and "Cannot import" in done.stderr


def test_a_shared_layer_is_found_at_each_of_its_paths(make_layer: Make, make_kernel: Make) -> None:
    """A layer is one row, wherever it is, and can be required by any of its paths; circles of modules do no harm."""
    shared = make_layer()()
    encoder = nn.Sequential(shared)
    model = nn.ModuleDict({"encoder": encoder, "decoder": nn.Sequential(shared, make_layer()())})
    shared.add_module("around", encoder)
    with use_kernel_mapping({"Add": {"cpu": make_kernel(10)}}):
        found = receipt(model, device="cpu")
    assert [(row.path, row.aliases) for row in found.rows] == [("encoder.0", ("decoder.0",)), ("decoder.1", ())]
    assert "encoder.0 = decoder.0" in str(found)
    assert json.loads(found.to_json())[0]["aliases"] == ["decoder.0"]
    found.require("decoder.0").require("decoder.*")


@pytest.mark.parametrize("ask", [lambda r: r.require(3), lambda r: r.require("*", 3), lambda r: r.diff(None)])
def test_questions_of_the_wrong_type(ask: Make) -> None:
    """An argument that is no glob and no receipt is refused by name."""
    with pytest.raises(ArgumentTypeError, match=r"not (3|None)\."):
        ask(Receipt(()))
