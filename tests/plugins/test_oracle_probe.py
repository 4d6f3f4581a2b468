"""Probes: abilities of a kernel are tried, remembered, and obeyed; and the kit for the authors of kernels."""

from __future__ import annotations

import functools
import inspect
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import oracle_kernels as made
import pytest
import torch
from torch import nn
from warned import ignored

import kernels_plugins.oracle.plugin as oracle
from kernels_core import (
    ArgumentError,
    ArgumentTypeError,
    KernelsWarning,
    Mode,
    NoKernelError,
    PluginManager,
    ScopeError,
    forget,
    kernelize,
    quarantined,
    release,
    resolve,
    use_kernel_forward_from_hub,
)
from kernels_plugins import check_kernel, probing, register_kernel_mapping, use_kernel_mapping
from kernels_plugins.oracle import probe_cache, prober
from kernels_plugins.oracle.probe import implementation_of
from kernels_plugins.packs import inductor as inductor_pack

COMPILED = Mode.INFERENCE | Mode.TORCH_COMPILE


@pytest.fixture(autouse=True)
def _scene(
    mapping_plugin: object,
    isolated_plugins: PluginManager,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    same_numbers: None,
) -> Iterator[None]:
    """Run with the plugins of the oracle, with nothing known and a cache of its own."""
    isolated_plugins.register(oracle, "oracle")
    isolated_plugins.register(prober, "probe")
    monkeypatch.setenv("KERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("KERNELS_PROBE", raising=False)
    probe_cache._known.clear()
    yield
    probe_cache._known.clear()


def breaks_the_graph(self: Any, x: torch.Tensor) -> torch.Tensor:
    torch._dynamo.graph_break()
    return made.norm(x, self.weight)


def wrong_when_compiled(self: Any, x: torch.Tensor) -> torch.Tensor:
    y = made.norm(x, self.weight)
    return y + 1 if torch.compiler.is_compiling() else y


def always_wrong(self: Any, x: torch.Tensor) -> torch.Tensor:
    return x


def probed(
    forward: Callable[..., Any], *, grad: bool = True, **declarations: bool
) -> tuple[list[str], dict[Mode, str]]:
    """Call a layer once while probing is on; return the warnings, and the kernels that serve afterwards."""
    layer, x = made.Norm(), torch.randn(4, 8, 64)
    kernel = made.kernel(forward, **declarations)
    with use_kernel_mapping({"OracleNorm": {"cpu": kernel}}), probing():
        with warnings.catch_warnings(record=True) as told, torch.set_grad_enabled(grad):
            warnings.simplefilter("always", KernelsWarning)
            torch.testing.assert_close(layer(x), made.Norm.forward.kernels_layer.reference(layer, x))
        served = {
            mode: resolve(layer, device="cpu", mode=mode).origin.rpartition(".")[2]
            for mode in (Mode.INFERENCE, Mode.TRAINING, COMPILED)
        }
    return [str(warning.message) for warning in told if "was probed:" in str(warning.message)], served


# --- What was found is obeyed ---------------------------------------------------------------------


def test_a_kernel_that_can_do_all_serves_all() -> None:
    """Nothing is refused, and there is no warning."""
    told, served = probed(made.fused, can_torch_compile=True)
    assert not told
    assert set(served.values()) == {"Fused"}


def test_a_kernel_that_loses_gradients_serves_no_training() -> None:
    """The call for which it is tried already gets the reference's gradients."""
    told, served = probed(made.missing_gradient, can_torch_compile=True)
    assert "fails in training: as given, gradient of parameter weight" in told[0]
    assert served == {Mode.INFERENCE: "MissingGradient", Mode.TRAINING: "reference", COMPILED: "MissingGradient"}
    assert [entry.mode for entry in quarantined()] == [Mode.TRAINING]


@pytest.mark.parametrize("forward", [breaks_the_graph, wrong_when_compiled])
def test_a_kernel_that_does_not_trace_serves_no_compiled_calls(forward: Callable[..., Any]) -> None:
    """Whether tracing fails, or gives other numbers."""
    told, served = probed(forward, can_torch_compile=True)
    assert "it declares can_torch_compile = True, and cannot be traced" in told[0]
    assert served[COMPILED] == "reference" and served[Mode.TRAINING] != "reference"


def test_a_kernel_that_is_wrong_serves_nothing() -> None:
    """Neither the call for which it is tried, nor any other."""
    told, served = probed(always_wrong)
    assert "forward: as given" in told[0]
    assert set(served.values()) == {"reference"}


@pytest.mark.parametrize(
    ("forward", "probe"),
    [(made.biased_in_bfloat16, "bfloat16"), (made.wrong_for_strides, "layouts"), (made.fails_when_empty, "sizes")],
)
def test_what_is_wrong_elsewhere_is_told(forward: Callable[..., Any], probe: str) -> None:
    """Another dtype, layout or size: a warning, for the calls that are made may be others."""
    told, served = probed(forward, can_torch_compile=True)
    assert f"was probed: {probe}: " in told[0]
    assert "reference" not in (served[Mode.INFERENCE], served[Mode.TRAINING])


def test_declarations_that_are_too_modest_are_told() -> None:
    """A kernel that traces, or has a backward, and does not say so."""
    told, served = probed(made.fused, grad=False, has_backward=False)
    assert "it declares has_backward = False, and has all gradients" in told[0]
    assert "it does not declare can_torch_compile = True, and can be traced" in told[0]
    assert served == {Mode.INFERENCE: "Fused", Mode.TRAINING: "reference", COMPILED: "reference"}


# --- When it is tried -----------------------------------------------------------------------------


def count(forward: Callable[..., Any], calls: list[int]) -> type[nn.Module]:
    """Make a kernel that counts its calls."""

    def counted(self: Any, x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return forward(self, x)

    return made.kernel(counted)


def test_off_by_default() -> None:
    """Nothing is tried, and the kernel itself serves."""
    calls: list[int] = []
    with use_kernel_mapping({"OracleNorm": {"cpu": count(made.fused, calls)}}):
        made.Norm()(torch.randn(2, 64))
    assert len(calls) == 1 and not probe_cache._known


def test_a_kernel_is_tried_once() -> None:
    """The second call runs the kernel and nothing else; another layer or scope tries nothing again."""
    calls: list[int] = []
    kernel = count(made.fused, calls)
    with use_kernel_mapping({"OracleNorm": {"cpu": kernel}}), probing(), ignored(KernelsWarning):
        layer = made.Norm()
        layer(torch.randn(2, 64))
        tried = len(calls)
        layer(torch.randn(2, 64))
        made.Norm()(torch.randn(5, 64))
    assert tried > 10 and len(calls) == tried + 2


def test_calls_under_transforms_are_left_alone() -> None:
    """Inside of vmap nothing else can run: the next call is tried."""
    calls: list[int] = []
    with use_kernel_mapping({"OracleNorm": {"cpu": count(made.fused, calls)}}), probing(), ignored(KernelsWarning):
        layer = made.Norm()
        with torch.no_grad():
            torch.func.vmap(layer)(torch.randn(3, 2, 64))
        assert len(calls) == 1
        layer(torch.randn(2, 64))
        assert len(calls) > 10


def test_the_model_is_as_before() -> None:
    """Random numbers, buffers and gradients are those of a call without probing."""

    @use_kernel_forward_from_hub("OracleDrop")
    class Drop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.count += 1
            return torch.dropout(x, 0.5, True)

    def kernel(self: Any, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        return torch.dropout(x, 0.5, True)

    layer, x = Drop(), torch.randn(4, 8)
    torch.manual_seed(1)
    expected = [layer(x), torch.rand(1)]
    torch.manual_seed(1)
    with use_kernel_mapping({"OracleDrop": {"cpu": made.kernel(kernel, can_torch_compile=True)}}), probing():
        actual = [layer(x), torch.rand(1)]
    assert all(map(torch.equal, actual, expected)) and layer.count == 2


def test_a_reference_that_fails_decides_nothing() -> None:
    """The kernel serves where its reference cannot; that nothing is known about it is reported."""

    @use_kernel_forward_from_hub("oracle_kernel_only")
    def only(x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    mapping = use_kernel_mapping({"oracle_kernel_only": {"cpu": lambda x: x + 1}})
    with mapping, probing(), pytest.warns(KernelsWarning, match="whether it is right is not known: .*NotImplemented"):
        assert only(torch.ones(2)).tolist() == [2.0, 2.0]
    assert not quarantined()


def test_the_next_candidate_takes_over_in_the_same_call() -> None:
    """Behind a kernel that is wrong, the next one serves, and is tried in turn; strict mode has no reference."""
    both = [made.kernel(always_wrong), made.kernel(made.fused, can_torch_compile=True)]
    with use_kernel_mapping({"OracleNorm": {"cpu": both}}), probing(), ignored(KernelsWarning):
        layer, x = made.Norm(), torch.randn(4, 64)
        torch.testing.assert_close(layer(x), made.norm(x, layer.weight))
        decision = resolve(layer, device="cpu", mode=Mode.INFERENCE)
    assert decision.origin.endswith("Fused")
    assert decision.checked["probes"].startswith("forward, gradients, ")


def test_strict_mode_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the only kernel is out, the call for which it was tried raises."""
    monkeypatch.setenv("KERNELS_STRICT", "1")
    with use_kernel_mapping({"OracleNorm": {"cpu": made.kernel(always_wrong)}}), probing(), ignored(KernelsWarning):
        with pytest.raises(NoKernelError, match="it was probed, and is wrong"):
            made.Norm()(torch.randn(4, 64))


def test_functions_are_probed() -> None:
    """A decorated function falls back in the same call, too."""

    @use_kernel_forward_from_hub("oracle_probed")
    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    with use_kernel_mapping({"oracle_probed": {"cpu": lambda x: x * 3}}), probing(), ignored(KernelsWarning):
        assert double(torch.ones(2)).tolist() == [2.0, 2.0]
        assert double(torch.ones(2)).tolist() == [2.0, 2.0]


def test_kernelized_models_are_probed() -> None:
    """The choice of `kernelize` is taken out, too."""
    with use_kernel_mapping({"OracleNorm": {"cpu": made.kernel(always_wrong)}}), probing():
        model = kernelize(nn.Sequential(made.Norm()), mode=Mode.INFERENCE, device="cpu")
        x = torch.randn(3, 64)
        with torch.no_grad(), pytest.warns(KernelsWarning, match="was probed: forward"):
            first, second = model(x), model(x)
    expected = made.Norm.forward.kernels_layer.reference(model[0], x)
    torch.testing.assert_close(first, expected)
    torch.testing.assert_close(second, expected)


def test_probing_is_left_as_often_as_entered() -> None:
    """One more is an error."""
    with pytest.raises(ScopeError, match="No probing is open"):
        probing().__exit__(None, None, None)


def test_a_setting_that_is_not_understood_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The warning names the values that are; kernels serve as ever."""
    monkeypatch.setenv("KERNELS_PROBE", "perhaps")
    with pytest.warns(KernelsWarning, match="so nothing is probed: write 1, 0 or cached"):
        register_kernel_mapping({"OracleNorm": {"cpu": made.kernel(made.fused)}})
        assert not resolve(made.Norm, device="cpu", mode=Mode.INFERENCE).is_reference


# --- What was found is remembered -----------------------------------------------------------------


def test_reports_are_kept_in_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process uses the results and tries nothing, also with `cached`; a broken file is none."""
    probed(made.missing_gradient)
    release()
    (file,) = (tmp_path / "cache" / "kernels-core" / "probes").glob("*.json")
    assert json.loads(file.read_text())["probes"]["gradients"]["ok"] is False
    register_kernel_mapping({"OracleNorm": {"cpu": made.kernel(made.missing_gradient)}})

    def served(setting: str) -> tuple[str, bool]:
        monkeypatch.setenv("KERNELS_PROBE", setting)
        probe_cache._known.clear()
        forget()
        layer = made.Norm()
        with ignored(KernelsWarning):
            layer(torch.randn(2, 64))
        return resolve(layer, device="cpu", mode=Mode.TRAINING).origin, bool(quarantined())

    assert served("1") == served("cached") == ("reference", False)
    assert served("0")[0].endswith("MissingGradient") or quarantined()
    release()
    file.write_text("{")
    monkeypatch.setenv("KERNELS_PROBE", "cached")
    probe_cache._known.clear()
    forget()
    assert resolve(made.Norm(), device="cpu", mode=Mode.TRAINING).origin.endswith("MissingGradient")


def test_keys_tell_kernels_apart() -> None:
    """Other code, other values that it was made with, another layer: another key; the same again: the same."""

    def make(added: float) -> Callable[..., Any]:
        def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
            return x + added

        return forward

    layer = made.Norm.forward.kernels_layer
    cpu = torch.device("cpu")
    keys = [probe_cache.key_of(layer, f, cpu) for f in (make(1.0), make(2.0), made.fused, made.other_order)]
    assert len(set(keys)) == 4
    assert keys[0] == probe_cache.key_of(layer, make(1.0), cpu)
    scope: dict[str, Any] = {}
    exec("def forward(self, x):\n    return x", scope)
    assert probe_cache.key_of(layer, scope["forward"], cpu).startswith("here-")


SPLITS = 4


class Settings:
    splits = 4
    calls = 0


def split(x: torch.Tensor) -> int:
    return SPLITS


def by_global(self: Any, x: torch.Tensor) -> torch.Tensor:
    return x * SPLITS


def by_helper(self: Any, x: torch.Tensor) -> torch.Tensor:
    return x * split(x)


def by_class(self: Any, x: torch.Tensor) -> torch.Tensor:
    Settings.calls += 1
    return x * Settings.splits


def test_keys_tell_values_apart_that_code_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Globals, also of functions that it calls, and attributes of classes: another value is another key.

    A name that the code itself sets is left out, or each call would have a key of its own.
    """
    layer, cpu = made.Norm.forward.kernels_layer, torch.device("cpu")

    def keys() -> list[str]:
        return [probe_cache.key_of(layer, f, cpu) for f in (by_global, by_helper, by_class)]

    before = keys()
    by_class(None, torch.ones(1))
    assert keys() == before and len(set(before)) == 3
    monkeypatch.setitem(globals(), "SPLITS", 2)
    assert [one == other for one, other in zip(before, keys(), strict=True)] == [False, False, True]
    monkeypatch.setattr(Settings, "splits", 2)
    assert all(one != other for one, other in zip(before, keys(), strict=True))


LOADED: object = None


def load() -> None:
    global LOADED
    LOADED = object()


def by_loaded(self: Any, x: torch.Tensor) -> torch.Tensor:
    if LOADED is None:
        load()
    return x


def test_keys_stay_when_code_sets_what_it_reads() -> None:
    """Also where another function sets it: a library loaded at the first call, a counter in a closure."""
    count = 0

    def by_count(self: Any, x: torch.Tensor) -> torch.Tensor:
        nonlocal count
        count += 1
        return x

    layer, cpu = made.Norm.forward.kernels_layer, torch.device("cpu")
    for forward in (by_loaded, by_count):
        before = probe_cache.key_of(layer, forward, cpu)
        forward(None, torch.ones(1))
        assert probe_cache.key_of(layer, forward, cpu) == before, forward.__name__
    assert LOADED is not None and count


class Tuned:
    """As a tuner of Triton around a kernel: it has the function in `fn`, of an object that has it in `fn`."""

    def __init__(self, fn: Any) -> None:
        self.fn = fn


TUNED: Any = None
CACHED: Any = None


def by_wrapped(self: Any, x: torch.Tensor) -> torch.Tensor:
    return x * TUNED.fn.fn(x) * CACHED(2)


def doubled(x: Any) -> Any:
    return x * 2


def tripled(x: Any) -> Any:
    return x * 3


def test_keys_tell_functions_apart_that_objects_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Code of tuned kernels and of cached functions that a kernel calls."""
    layer, cpu, keys = made.Norm.forward.kernels_layer, torch.device("cpu"), set()
    for tuned, kept in ((doubled, doubled), (tripled, doubled), (doubled, tripled)):
        monkeypatch.setitem(globals(), "TUNED", Tuned(Tuned(tuned)))
        monkeypatch.setitem(globals(), "CACHED", functools.lru_cache(kept))
        keys.add(probe_cache.key_of(layer, by_wrapped, cpu))
    assert len(keys) == 3


@pytest.mark.parametrize("decorator", ["", "@torch.no_grad()\n"])
def test_keys_have_the_commit_of_a_decorated_kernel(tmp_path: Path, decorator: str) -> None:
    """The commit of a snapshot of the Hub, and its file: a decorator of PyTorch is in another file."""
    layer, cpu, keys = made.Norm.forward.kernels_layer, torch.device("cpu"), []
    for commit, table in (("a" * 40, "[1]"), ("b" * 40, "[1]"), ("b" * 40, "[2]")):
        file = tmp_path / "snapshots" / commit / "kernel.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        code = f"import torch\nTABLE = {table}\n{decorator}def forward(self, x):\n    return x * TABLE[0]\n"
        file.write_text(code)
        scope: dict[str, Any] = {"__name__": "kernel"}
        exec(compile(code, str(file), "exec"), scope)
        keys.append(probe_cache.key_of(layer, scope["forward"], cpu))
    assert len(set(keys)) == 3 and not any(key.startswith("here-") for key in keys)


def test_keys_of_classes_for_functions_have_their_attributes() -> None:
    """Two classes that share a forward differ in what it reads of them."""

    class Two(nn.Module):
        factor = 2.0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.factor

    class Three(Two):
        factor = 3.0

    layer, cpu = made.Norm.forward.kernels_layer, torch.device("cpu")
    keys = [probe_cache.key_of(layer, implementation_of(each, function=True), cpu) for each in (Two, Three, Two)]
    assert keys[0] != keys[1] and keys[0] == keys[2]


def test_keys_tell_a_wrapped_reference_from_the_reference() -> None:
    """As compiled code, or a kernel that wraps it in any other way, computes other numbers."""
    reference = made.Norm.forward
    layer, cpu = reference.kernels_layer, torch.device("cpu")

    @functools.wraps(layer.reference)
    def wrapping(*args: Any, **kwargs: Any) -> Any:
        return layer.reference(*args, **kwargs) * 2

    compiled = torch.compile(layer.reference, backend="eager")
    inductor = inductor_pack._compiled(layer).forward
    keys = [probe_cache.key_of(layer, f, cpu) for f in (layer.reference, wrapping, compiled, inductor)]
    assert len(set(keys)) == 4
    assert inspect.signature(inductor) == inspect.signature(layer.reference)


def test_keys_are_the_same_in_another_process(tmp_path: Path) -> None:
    """Whatever the seed of hashes, which orders sets, and wherever modules that the code reads are installed."""
    code = (
        "import torch, by_form, oracle_kernels as made; from kernels_plugins.oracle import probe_cache; "
        "layer, cpu = made.Norm.forward.kernels_layer, torch.device('cpu'); "
        "print([probe_cache.key_of(layer, f, cpu) for f in (made.own_backward, by_form.forward)])"
    )
    text = "import forms\ndef forward(self, x):\n    return x * forms.WIDE if x.ndim in {'a', 'b', 'c', 'd'} else x\n"
    (tmp_path / "by_form.py").write_text(text)
    for seed in ("1", "2"):
        (tmp_path / seed).mkdir()
        (tmp_path / seed / "forms.py").write_text("WIDE = 3\n")
    keys = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={
                "PYTHONPATH": os.pathsep.join(map(str, (Path(made.__file__).parent, tmp_path, tmp_path / seed))),
                "PYTHONHASHSEED": seed,
                "PATH": "",
            },
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(keys) == 1 and "here" not in keys.pop()


# --- The kit --------------------------------------------------------------------------------------


@pytest.mark.parametrize("forward", made.RIGHT, ids=lambda forward: forward.__name__)
def test_a_right_kernel_passes_the_kit(forward: Callable[..., Any]) -> None:
    """Every probe says yes."""
    report = check_kernel(made.kernel(forward), made.Norm(), torch.randn(4, 8, 64))
    assert all(probe.ok for probe in report.probes.values()), report
    assert {"forward", "gradients", "bfloat16", "float16", "layouts", "sizes", "autocast", "compile"} <= {
        *report.probes
    }


def test_the_kit_lists_every_failed_probe() -> None:
    """One assertion with all of them, each with its reason; ignored ones are left out."""

    def poor(self: Any, x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        if not x.numel():
            raise ValueError("empty")
        return made.biased_in_bfloat16(self, x)

    with pytest.raises(AssertionError) as caught:
        check_kernel(made.kernel(poor), made.Norm(), torch.randn(4, 8, 64))
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0].strip() for line in lines[1:]] == ["bfloat16", "sizes", "compile"]
    report = check_kernel(
        made.kernel(poor), made.Norm(), torch.randn(4, 8, 64), ignore={"bfloat16", "sizes", "compile"}
    )
    assert set(report.failed) == {"bfloat16", "sizes", "compile"}
    with pytest.raises(ArgumentError, match="ignore names speed"):
        check_kernel(made.kernel(made.fused), made.Norm(), torch.randn(4, 8, 64), ignore={"speed"})


def test_the_kit_takes_modules_that_are_not_decorated_and_functions() -> None:
    """A reference is anything that computes the same as the kernel."""

    class Plain(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tanh(x)

    def kernel(self: Any, x: torch.Tensor) -> torch.Tensor:
        return 2 * torch.sigmoid(2 * x) - 1

    assert check_kernel(made.kernel(kernel), Plain(), torch.randn(3, 4)).can("gradients")
    assert check_kernel(torch.square, lambda x: x * x, torch.randn(3, 4)).can("compile")
    assert check_kernel(torch.square, functools.partial(lambda x, n: x**n, n=2), torch.randn(3, 4)).can("forward")
    with pytest.raises(ArgumentTypeError, match="A kernel for a module is a class"):
        check_kernel(torch.tanh, Plain(), torch.randn(3, 4))
    with pytest.raises(ArgumentTypeError, match="The reference is a module or a function"):
        check_kernel(torch.tanh, Plain, torch.randn(3, 4))


def test_the_kit_says_where_the_reference_cannot_tell() -> None:
    """A reference that fails proves nothing."""

    def fails(x: torch.Tensor) -> torch.Tensor:
        raise ValueError("no")

    with pytest.raises(AssertionError, match="the reference fails: ValueError: no"):
        check_kernel(torch.tanh, fails, torch.randn(3, 4))
