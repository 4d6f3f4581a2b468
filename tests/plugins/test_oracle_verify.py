"""`verify`: kernels that are wrong on purpose are caught, right ones are not, and nothing is left behind."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from typing import Any

import oracle_kernels as made
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console
from torch import nn

import kernels_plugins.oracle.plugin as oracle
from kernels_core import (
    ArgumentError,
    ArgumentTypeError,
    KernelsError,
    Mode,
    PluginManager,
    VerificationError,
    kernelize,
    use_kernel_forward_from_hub,
)
from kernels_core.replay import Call
from kernels_plugins import VerifyReport, VerifyRow, register_kernel_mapping, use_kernel_mapping, verify


@pytest.fixture(autouse=True)
def _plugins(mapping_plugin: object, isolated_plugins: PluginManager, same_numbers: None) -> None:
    """Run with the plugins `core`, `mapping` and `oracle`."""
    isolated_plugins.register(oracle, "oracle")


def verified(forward: Callable[..., Any], *, layer: nn.Module | None = None, **options: Any) -> VerifyReport:
    """Verify one kernel on its layer."""
    with use_kernel_mapping({"OracleNorm": {"cpu": made.kernel(forward)}}):
        return verify(layer or made.Norm(), torch.randn(4, 8, 64), **options)


def test_a_call_that_a_kernel_passes_on_is_refused_and_no_failure() -> None:
    """Only the cases that it takes are compared; the report gives the others, as the probes do."""

    def forward(self: Any, x: torch.Tensor) -> Any:
        return made.fused(self, x) if x.dtype == torch.float32 and x.shape[-2] == 8 else NotImplemented

    report = verified(forward)
    refused = {row.case for row in report.rows if row.verdict == "refused"}
    assert report.ok and refused == {"bfloat16", "float16", "odd size"}
    assert {"as given", "strided"} <= {row.case for row in report.rows if row.verdict == "ok"}


# --- Wrong ones are caught ------------------------------------------------------------------------

CAUGHT = [
    (made.biased_in_bfloat16, {"bfloat16"}, "biased"),
    (made.wrong_for_strides, {"strided", "transposed"}, "instead of"),
    (made.wrong_gradient, {"as given"}, "instead of"),
    (made.missing_gradient, {"as given"}, "no gradient, where the reference has one"),
    (made.make_stateful(), {"as given"}, "a second call on equal inputs differs from the first"),
    (made.keeps_its_first_answer, {"as given"}, "it sets or deletes _kept, which the reference does not"),
    (made.mutating, {"as given"}, "it changes input x"),
    (made.raising, {"as given"}, "it raises RuntimeError: no kernel image is available"),
    (made.other_dtype, {"bfloat16", "float16"}, "torch.float32 instead of torch.bfloat16"),
    (made.other_shape, {"as given"}, "shape (1, 4, 8, 64) instead of (4, 8, 64)"),
    (made.spoiled_at_the_end, {"as given"}, "not finite as expected"),
    (made.wrong_for_odd_sizes, {"odd size"}, "instead of"),
    (made.fails_when_empty, {"empty"}, "invalid configuration argument"),
    (made.deaf_to_autocast, {"autocast bfloat16"}, "torch.bfloat16 instead of torch.float32"),
]


@pytest.mark.parametrize(("forward", "cases", "reason"), CAUGHT, ids=lambda value: getattr(value, "__name__", ""))
def test_a_wrong_kernel_is_caught(forward: Callable[..., Any], cases: set[str], reason: str) -> None:
    """Each fault is found and reported, in the cases in which it shows."""
    report = verified(forward)
    assert not report.ok
    assert cases <= {row.case for row in report.failures}
    assert any(reason in row.reason for row in report.failures), report


@pytest.mark.parametrize("forward", [made.biased_in_bfloat16, made.wrong_for_strides, made.wrong_for_odd_sizes])
def test_a_wrong_kernel_is_right_elsewhere(forward: Callable[..., Any]) -> None:
    """A fault of some cases is not reported for the others."""
    report = verified(forward)
    assert "as given" not in {row.case for row in report.failures}
    assert "ok" in {row.verdict for row in report.rows if row.case == "as given"}


def test_an_output_in_the_memory_of_an_input() -> None:
    """It is right until a caller changes it in place; where the reference shares memory, too, it is right as well."""

    @use_kernel_forward_from_hub("OracleCopy")
    class Copy(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

    @use_kernel_forward_from_hub("OracleView")
    class View(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.view_as(x)

    views, copies = made.kernel(lambda self, x: x.view_as(x)), made.kernel(lambda self, x: x.clone())
    with use_kernel_mapping({"OracleCopy": {"cpu": [views]}, "OracleView": {"cpu": [views, copies]}}):
        report = verify(Copy(), torch.randn(4, 8))
        assert {row.verdict for row in report.rows if row.subject != "changes"} == {"ok"}
        assert all("its output shares the memory of input x" in row.reason for row in report.failures)
        assert not report.ok and verify(View(), torch.randn(4, 8)).ok


def test_a_sparse_output_beside_one_in_the_memory_of_an_input() -> None:
    """An output without memory of its own hides no other output that shares that of an input."""
    x = torch.ones(4, 8)

    def outputs(given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return given.view(8, 4), given.detach().to_sparse()

    assert Call(None, (x,), {}, inspect.signature(outputs)).run(outputs, gradients=False).shared == {"input given"}


def test_a_wrong_gradient_names_the_parameter() -> None:
    """One wrong gradient does not make the others wrong."""
    report = verified(made.wrong_gradient)
    assert {row.subject for row in report.failures} == {"gradient of parameter weight"}
    assert {row.mode for row in report.failures} == {"training"}


# --- Right ones are not ---------------------------------------------------------------------------


@pytest.mark.parametrize("forward", made.RIGHT, ids=lambda forward: forward.__name__)
def test_a_right_kernel_is_not_reported(forward: Callable[..., Any]) -> None:
    """Another order of summation, fusion, a backward of its own: all right, in every case and dtype."""
    report = verified(forward)
    assert report.ok, report
    assert {row.dtype for row in report.rows} == {"float32", "bfloat16", "float16"}
    assert all(row.own_error is not None for row in report.rows if row.subject == "forward" and row.case != "empty")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    order=st.permutations(range(8)),
    scale=st.sampled_from([1e-3, 1.0, 10.0]),  # with larger ones, the gradient of the softmax is ill-conditioned
    shift=st.sampled_from([0.0, 3.0]),
    upcast=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_random_right_kernels_are_not_reported(
    order: list[int], scale: float, shift: float, upcast: bool, seed: int
) -> None:
    """A sum in any order, in the dtype or in float32, over numbers of any size, is right."""

    @use_kernel_forward_from_hub("OracleMix")
    def mix(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.softmax(x * y, -1) * x.sum(-1, keepdim=True) + y

    def kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        a, b = (x.float(), y.float()) if upcast else (x, y)
        total = sum(a[..., i::8].sum(-1, keepdim=True) for i in order)
        exps = torch.exp(a * b - (a * b).amax(-1, keepdim=True))
        return (exps / exps.sum(-1, keepdim=True) * total + b).to(x.dtype)

    torch.manual_seed(seed)
    x, y = torch.randn(2, 6, 32) * scale + shift, torch.randn(6, 32)
    with use_kernel_mapping({"OracleMix": {"cpu": kernel}}):
        report = verify(mix, x, y)
    failures = [row for row in report.failures if upcast or row.dtype == "float32"]
    assert not failures, "\n".join(map(str, failures))


# --- What is tried --------------------------------------------------------------------------------


def test_every_candidate_is_tried() -> None:
    """Not only the one that serves: also those behind it, and those of other modes; the refused have a row."""
    right, wrong = made.kernel(made.fused), made.kernel(made.missing_gradient, has_backward=False)
    unfit = made.kernel(lambda self, x, y: x)
    with use_kernel_mapping({"OracleNorm": {"cpu": [right, wrong, unfit]}}):
        report = verify(made.Norm(), torch.randn(2, 4, 64))
    verdicts = {(row.kernel.rpartition(".")[2], row.mode, row.verdict) for row in report.rows}
    assert ("Fused", "inference", "ok") in verdicts and ("Fused", "training", "ok") in verdicts
    assert ("MissingGradient", "inference", "ok") in verdicts
    assert ("MissingGradient", "training", "refused") in verdicts
    refused = [row for row in report.rows if row.kernel.endswith("<Lambda>")]
    assert {row.verdict for row in refused} == {"refused"}
    assert "takes other parameters" in refused[0].reason
    assert report.ok


def test_layers_of_a_model_are_verified_on_what_they_are_called_with() -> None:
    """Each layer has its rows; other inputs are derived for the first of those that are alike."""
    model = nn.Sequential(nn.Linear(8, 64), made.Norm(), nn.Sequential(nn.Linear(64, 64), made.Norm()))
    with use_kernel_mapping({"OracleNorm": {"cpu": made.kernel(made.fused)}}):
        report = verify(model, torch.randn(3, 5, 8))
    assert report.ok
    assert {row.path for row in report.rows} == {"1", "2.1"}
    assert {row.case for row in report.rows if row.path == "2.1"} == {"as given"}
    assert len({row.case for row in report.rows if row.path == "1"}) > 8


def test_a_wrong_kernel_in_front_does_not_spoil_the_inputs_of_others() -> None:
    """The model runs on its references while calls are recorded."""
    seen: list[bool] = []

    def looks(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        seen.append(bool(x.isfinite().all()))
        return made.norm(x, self.weight)

    @use_kernel_forward_from_hub("OracleSecond")
    class Second(made.Norm):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return made.norm(x, self.weight)

    model = nn.Sequential(made.Norm(), Second())
    mapping = {"OracleNorm": {"cpu": made.kernel(made.spoiled_at_the_end)}, "OracleSecond": {"cpu": made.kernel(looks)}}
    with use_kernel_mapping(mapping):
        verify(model, torch.randn(4, 64))
    assert seen and all(seen)


def test_without_gradients_only_inference_is_compared() -> None:
    """`gradients=False` finds no fault with gradients."""
    report = verified(made.missing_gradient, gradients=False)
    assert report.ok and {row.mode for row in report.rows} == {"inference"}


def test_a_function_is_verified_with_nested_inputs() -> None:
    """A decorated function takes inputs in lists and dicts; each gets a name."""

    @use_kernel_forward_from_hub("OracleSum")
    def total(xs: list[torch.Tensor], more: dict[str, Any]) -> tuple[torch.Tensor, int]:
        return xs[0] * 2 + xs[1] * more["deep"][0], 3

    def right(xs: list[torch.Tensor], more: dict[str, Any]) -> tuple[torch.Tensor, int]:
        return more["deep"][0] * xs[1] + xs[0] + xs[0], 3

    def wrong(xs: list[torch.Tensor], more: dict[str, Any]) -> tuple[torch.Tensor, int]:
        return more["deep"][0].detach() * xs[1] + xs[0] + xs[0], 3

    x, y, z = torch.randn(3, 4, 8).unbind()
    with use_kernel_mapping({"OracleSum": {"cpu": [right, wrong]}}):
        report = verify(total, [x, y], more={"deep": (z,)})
    assert {row.kernel.rpartition(".")[2] for row in report.failures} == {"wrong"}
    assert {row.subject for row in report.failures} == {"gradient of input more['deep'][0]"}


def test_functions_that_a_model_calls_are_verified() -> None:
    """A decorated function inside of a model is recorded as layers are."""

    @use_kernel_forward_from_hub("oracle_twice")
    def twice(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    class Model(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return twice(x.relu())

    def wrong(x: torch.Tensor) -> torch.Tensor:
        return x * 2.1

    with use_kernel_mapping({"oracle_twice": {"cpu": wrong}}):
        report = verify(Model(), torch.randn(3, 4))
    assert {row.path for row in report.failures} == {"twice"}


def test_a_kernelized_model_is_verified() -> None:
    """Its kernels are tried, too, though their mapping is closed; none spoils the inputs of the next layer."""
    model = nn.Sequential(made.Norm(), made.Norm())
    with use_kernel_mapping({"OracleNorm": {"cpu": made.kernel(made.spoiled_at_the_end)}}):
        frozen = kernelize(model, mode=Mode.INFERENCE, device="cpu")
    report = verify(frozen, torch.randn(4, 64), gradients=False)
    given = [row for row in report.rows if row.case == "as given"]
    assert [(row.path, row.verdict) for row in given] == [("0", "wrong"), ("1", "wrong")]


def test_no_kernel_is_said_with_the_reason() -> None:
    """A layer without a kernel has a row, and is not at fault; nor is a model without a decorated layer."""
    with use_kernel_mapping({"OracleNorm": {"cuda": made.kernel(made.fused)}}):
        (row,) = verify(made.Norm(), torch.randn(2, 64)).rows
    assert row.verdict == "no kernel" and row.ok
    assert "mapped for cuda" in row.reason
    empty = verify(nn.Linear(2, 2), torch.randn(1, 2))
    assert empty.ok and str(empty).startswith("no decorated layer was called; adopt(model)")


def test_disabled_mappings_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """With everything switched off, the row names the switch."""
    monkeypatch.setenv("DISABLE_KERNEL_MAPPING", "1")
    (row,) = verified(made.spoiled_at_the_end).rows
    assert row.verdict == "no kernel" and row.reason == "DISABLE_KERNEL_MAPPING is on"


def test_compiled_models_are_verified_as_they_were_written() -> None:
    """Calls in compiled code cannot be recorded: the model runs without it once."""
    model = torch.compile(nn.Sequential(made.Norm()), backend="eager")
    with use_kernel_mapping({"OracleNorm": {"cpu": made.kernel(made.missing_gradient)}}):
        report = verify(model, torch.randn(3, 64))
    assert {row.subject for row in report.failures} == {"gradient of parameter weight"}


def test_a_condition_that_is_not_met_is_said() -> None:
    """A layer whose condition keeps kernels away has nothing to compare."""

    @use_kernel_forward_from_hub("OracleNorm", condition=lambda module: False)
    class Conditional(made.Norm):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    register_kernel_mapping({"OracleNorm": {"cpu": made.kernel(made.fused)}})
    (row,) = verify(Conditional(), torch.randn(2, 64)).rows
    assert row.verdict == "no kernel" and "condition" in row.reason


def test_only_unusable_kernels_decide_nothing() -> None:
    """Where no kernel that is offered can be used, nothing was verified, and that is not ok."""

    class Broken:
        def load(self) -> None:
            raise OSError("no such build")

    with use_kernel_mapping({"OracleNorm": {"cpu": Broken()}}):
        report = verify(made.Norm(), torch.randn(2, 64))
    assert not report.ok
    assert [row.verdict for row in report.rows] == ["refused", "refused", "undecided"]
    assert "no such build" in report.rows[0].reason
    assert report.summary.startswith("no kernel was compared")


def test_integers_and_outputs_in_dataclasses() -> None:
    """Integer inputs are left as they are, and compared exactly."""

    @use_kernel_forward_from_hub("oracle_embed")
    def embed(ids: torch.Tensor, table: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"hidden": table[ids], "ids": ids + 1}

    def wrong(ids: torch.Tensor, table: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"hidden": nn.functional.embedding(ids, table), "ids": ids + 2}

    with use_kernel_mapping({"oracle_embed": {"cpu": wrong}}):
        report = verify(embed, torch.randint(0, 9, (2, 4)), torch.randn(9, 8))
    given_case = [row for row in report.failures if row.case == "as given"]
    assert {row.subject for row in given_case} == {"forward"}
    assert all(row.reason.startswith("['ids']") for row in given_case)


# --- Bad input ------------------------------------------------------------------------------------


def test_a_layer_that_is_not_deterministic_is_told_how() -> None:
    """The reference runs twice; where it differs, nothing is decided, and the row says how it was noticed."""
    count = iter(range(1000))

    @use_kernel_forward_from_hub("OracleNorm")
    class Moody(made.Norm):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + next(count)

    with use_kernel_mapping({"OracleNorm": {"cpu": made.kernel(made.fused)}}):
        (row,) = verify(Moody(), torch.randn(2, 64)).rows
    assert row.verdict == "undecided" and not row.ok
    assert "its reference ran twice on equal inputs" in row.reason


def test_a_reference_that_fails_decides_nothing() -> None:
    """A layer by itself has a row that says so; a model cannot be run."""

    @use_kernel_forward_from_hub("oracle_fails")
    def fails(x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("only on Tuesdays")

    with use_kernel_mapping({"oracle_fails": {"cpu": lambda x: x}}):
        (row,) = verify(fails, torch.randn(2, 64)).rows
    assert row.verdict == "undecided"
    assert row.reason == "the reference fails: NotImplementedError: only on Tuesdays"
    with pytest.raises(ArgumentError, match=r"cannot be run with these inputs.*RuntimeError"):
        verify(nn.Sequential(made.Norm()), torch.randn(2, 63))


def test_inputs_on_another_device_are_refused() -> None:
    """The message names the device of each input."""
    with pytest.raises(ArgumentError, match="The model is on cpu, but its inputs are not: argument 1 on meta"):
        verify(nn.Sequential(made.Norm()), torch.randn(2, 64, device="meta"))


def test_what_cannot_be_verified_is_refused() -> None:
    """A class, a function that is not decorated: the message names the remedy."""
    for wrong in (made.Norm, made.norm, 3):
        with pytest.raises(ArgumentTypeError, match="verify takes a module or a decorated function"):
            verify(wrong, torch.ones(1))


def test_without_its_plugin_it_verifies(isolated_plugins: PluginManager) -> None:
    """The plugin brings the command only: where it is blocked, a wrong kernel is caught in Python as ever."""
    isolated_plugins.unregister("oracle")
    assert not verified(made.missing_gradient).ok


# --- Nothing is left behind -----------------------------------------------------------------------


class Busy(nn.Module):
    """A model with everything that a run can change."""

    def __init__(self) -> None:
        super().__init__()
        self.batch = nn.BatchNorm1d(64)
        self.norm = made.Norm()
        self.drop = nn.Dropout(0.5)
        self.calls = 0
        self.log: list[int] = []
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.log.append(self.calls)
        self.seen = self.seen + 1
        x.mul_(2)
        y = self.drop(self.norm(self.batch(x)))
        if x.shape[0] == 5:
            raise RuntimeError("five")
        return y


@pytest.mark.parametrize("rows", [4, 5])
@pytest.mark.parametrize("forward", [made.fused, made.mutating, made.raising])
def test_the_model_is_exactly_as_before(forward: Callable[..., Any], rows: int) -> None:
    """Parameters, buffers, attributes, gradients, hooks, random numbers and inputs, whatever fails."""
    model = Busy()
    model.norm.weight.grad = torch.ones(64)
    x = torch.randn(rows, 64)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random, given = torch.get_rng_state(), x.clone()
    attributes = {m: {k: (id(v), str(v)) for k, v in vars(m).items()} for m in model.modules()}
    with use_kernel_mapping({"OracleNorm": {"cpu": made.kernel(forward)}}):
        if rows == 5:
            with pytest.raises(ArgumentError, match="five"):
                verify(model, x)
        else:
            verify(model, x)
    assert {m: {k: (id(v), str(v)) for k, v in vars(m).items()} for m in model.modules()} == attributes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random) and torch.equal(x, given)
    assert torch.equal(model.norm.weight.grad, torch.ones(64))
    assert model.batch.weight.grad is None


# --- The report -----------------------------------------------------------------------------------


def test_the_report_is_told_in_every_form(capsys: pytest.CaptureFixture[str]) -> None:
    """As text, as JSON, as a table with colours, and as an error with its rows."""
    report = verified(made.biased_in_bfloat16)
    assert "biased" in str(report) and str(report).splitlines()[0].split()[:3] == ["path", "layer", "kernel"]
    plain = json.loads(report.to_json())
    assert plain["ok"] is False and len(plain["rows"]) == len(report.rows)
    assert set(plain["rows"][0]) == {*VerifyRow.__dataclass_fields__, "ok"}
    console = Console(width=200, record=True)
    console.print(report)
    assert "wrong" in console.export_text()
    with pytest.raises(VerificationError, match=r"(?s)checks failed:.*biased") as caught:
        report.raise_for_failures()
    assert caught.value.rows == report.failures
    assert verified(made.fused).raise_for_failures().ok


def test_numbers_that_are_not_finite_are_valid_json() -> None:
    """JSON has no infinity."""
    plain = json.loads(verified(made.spoiled_at_the_end).to_json(), parse_constant=pytest.fail)
    assert "inf" in {row["max_abs"] for row in plain["rows"]}


def test_a_plot_is_drawn_or_the_error_says_what_is_missing(tmp_path: Any) -> None:
    """With matplotlib, a picture; without it, or with nothing compared, an error that names the remedy."""
    report = verified(made.fused)
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        with pytest.raises(KernelsError, match="pip install matplotlib"):
            report.plot(tmp_path / "errors.png")
        return
    assert report.plot(tmp_path / "errors.png").stat().st_size > 1000
    with pytest.raises(KernelsError, match="nothing to plot"):
        VerifyReport().plot(tmp_path / "empty.png")


@pytest.mark.parametrize("tolerances", ["tight", 1e-3, (1,), {"float32": (0, 0)}, {torch.float32: 1e-3}], ids=repr)
def test_what_is_no_tolerance_is_told(tolerances: Any) -> None:
    """It is an error before anything runs, and so is a tolerance of less than nothing."""
    with pytest.raises(ArgumentTypeError, match="tolerances are"):
        verify(made.Norm(), torch.ones(2, 64), tolerances=tolerances)
    with pytest.raises(ArgumentError, match="0 or more"):
        verify(made.Norm(), torch.ones(2, 64), tolerances={torch.float32: (0, -1)})
