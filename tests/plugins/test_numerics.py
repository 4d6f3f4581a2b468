"""Properties of numbers: found out bit by bit, of kernels that lack one on purpose, and of references."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from norms import ByRows, Norm, by_rows, norm
from torch import nn

from kernels_core import (
    NUMERICS,
    ArgumentError,
    ArgumentTypeError,
    Mode,
    PluginManager,
    find_layer,
    resolve,
    use_kernel_forward_from_hub,
)
from kernels_core.replay import Call
from kernels_plugins import check_kernel, use_kernel_mapping, verify
from kernels_plugins.numerics import invariance, store
from kernels_plugins.numerics import rows as sampled
from kernels_plugins.numerics.bits import difference, differing
from kernels_plugins.numerics.invariance import BACKWARD, Judgement
from kernels_plugins.numerics.properties import find
from kernels_plugins.oracle import prober

pytestmark = pytest.mark.usefixtures("numerics_plugin")


def judge(forward: Callable[..., Any], *names: str, rows: int = 8, width: int = 64) -> dict[str, Judgement]:
    """Find out properties of a forward of a norm on a few rows."""
    call = Call(None, (torch.randn(rows, width), torch.rand(width)))
    return find(call, forward, norm, names or ["batch_invariant"])


# --- Bits ------------------------------------------------------------------------------------------


def test_bits_are_compared_and_not_numbers() -> None:
    """0 and -0 differ, two NaN do not, in each dtype; a difference is described in steps of its dtype."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64):
        one, other = (torch.tensor(values, dtype=dtype) for values in ([0.0, torch.nan, 1.0], [-0.0, torch.nan, 1.0]))
        assert differing(one, other).tolist() == [True, False, False]
    near = torch.nextafter(torch.ones(2), torch.tensor(2.0))
    assert difference(near, torch.ones(2)) == "2 of 2 elements differ, at most 1.2e-07 and 1 ulps"
    assert (
        difference([torch.ones(1)], [torch.full((1,), torch.inf)])
        == "[0]: 1 of 1 elements differ, some in being finite"
    )
    assert "another shape" in difference(torch.ones(1), torch.ones(2)) and difference(near, near) == ""
    assert difference({"a": near}, near) == "other tensors are returned"


# --- Batch-invariant -------------------------------------------------------------------------------


def test_the_kernel_of_the_issue_is_not_batch_invariant_and_the_smallest_input_shows_it() -> None:
    """The number of rows at which the kernel changes its way is named, with the rows that change bits."""
    found = judge(by_rows)["batch_invariant"]
    assert found.has is False and found.case == (torch.float32, "")
    assert "rows have other bits in parts of 64" in found.why
    assert "smallest input: argument 1 65x64 float32" in found.why and "than alone" in found.why


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(2, 3000), st.sampled_from([(8, 64), (2, 3, 64), (1, 64)]))
def test_any_number_of_rows_is_found(most: int, shape: tuple[int, ...]) -> None:
    """A kernel that changes its way at any number of rows is caught, and that number is found."""
    call = Call(None, (torch.randn(*shape), torch.rand(64)))
    found = find(call, lambda x, weight: by_rows(x, weight, most), norm, ["batch_invariant"])["batch_invariant"]
    assert found.has is False and f" {most + 1}x" in found.why


@pytest.mark.parametrize("few", [1, 2, 3, 4, 8])
def test_a_way_of_its_own_for_few_rows_is_found(few: int) -> None:
    """As for one step of a decoder: the bits of one row in five differ there, so that some rows show nothing."""

    def kernel(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return by_rows(x, weight, 0 if len(x) == few else 10**9)

    for seed in range(4):
        torch.manual_seed(seed)
        assert judge(kernel)["batch_invariant"].has is False


@pytest.mark.parametrize(
    ("is_odd", "smallest", "every"),
    [
        (lambda n: n == 613, 613, True),
        (lambda n: n % 7 == 3, 3, False),
        (lambda n: n > 3000, 3001, False),
        (lambda n: n % 17 == 3 and n > 200, 207, False),
        (lambda n: n % 256 == 255 and 700 < n < 4000, 767, False),
    ],
)
@pytest.mark.parametrize("backward", [False, True])
def test_any_pattern_of_sizes_is_found(
    is_odd: Callable[[int], bool], smallest: int, every: bool, backward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One number of rows, a remainder, and all from one on; a single one among thousands by trying every number."""
    monkeypatch.setattr(invariance, "_BUDGET", 600.0)  # as on a machine that is quick enough
    kernel = Backward.apply if backward else lambda is_odd, x: x * (1 + 2e-7 * is_odd(len(x)))

    def forward(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return kernel(is_odd, norm(x, weight))  # type: ignore[no-untyped-call, no-any-return]

    call = Call(None, (torch.randn(8, 16), torch.rand(16)))
    name = BACKWARD if backward else "batch_invariant"
    found = find(call, forward, norm, [name], every=every)[name]
    assert found.has is False and f"argument 1 {smallest}x16 float32" in found.why
    if every:
        assert find(call, forward, norm, [name])[name].has  # too rare for the usual search, which says what it tried


class Backward(torch.autograd.Function):
    """The identity, with other gradients for some numbers of rows."""

    @staticmethod
    def forward(ctx: Any, is_odd: Callable[[int], bool], x: torch.Tensor) -> torch.Tensor:
        ctx.is_odd = is_odd
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return None, gradient * (1 + 2e-7 * ctx.is_odd(len(gradient)))


def test_outputs_of_one_number_for_each_row_have_rows() -> None:
    """A row may be a single number, such as a loss for each token."""

    def sums(x: torch.Tensor, most: int = 10**9) -> torch.Tensor:
        return x.mul(2).sum(-1) * (1 + 2e-7 * (len(x) > most))

    call = Call(None, (torch.randn(8, 16),))
    assert find(call, lambda x: sums(x, 64), sums, ["batch_invariant"])["batch_invariant"].has is False
    q, k = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 3, 8)  # grouped queries: keys have fewer heads
    pair = find(
        Call(None, (q, k)),
        lambda q, k: (q * 2, k * 2 * (1 + 2e-7 * (len(k) > 64))),
        lambda q, k: (q * 2, k * 2),
        ["batch_invariant"],
    )["batch_invariant"]
    assert pair.has is False and "argument 1 65x4x3x8 float32, argument 2 65x2x3x8 float32" in pair.why
    assert not find(call, torch.numel, sums, ["batch_invariant"])["batch_invariant"].has


def by_place(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    y = norm(x, weight)
    y[-1:] = torch.nextafter(y[-1:], torch.full_like(y[-1:], torch.inf))
    return y


def by_neighbours(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return norm(x, weight) + 0 * x.flatten(0, -2)[0]  # NaN and infinities spread


def in_bfloat16(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return norm(x, weight) * (1.01 if x.dtype is torch.bfloat16 and len(x) > 64 else 1)


def where_strided(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return norm(x, weight) if x.is_contiguous() or len(x) < 3 else by_rows(x, weight, 2)


@pytest.mark.parametrize(
    ("forward", "shown"),
    [
        (by_place, "other bits"),
        (by_neighbours, "beside rows that hold inf; smallest input: argument 1 2x64 float32"),
        (in_bfloat16, "65x64 bfloat16"),
        (where_strided, "3x64 float32 (rows with gaps)"),
    ],
)
def test_each_way_in_which_a_row_depends_on_others_is_found(forward: Callable[..., Any], shown: str) -> None:
    """The place of a row, its neighbours, one dtype and one layout are each enough."""
    found = judge(forward)["batch_invariant"]
    assert found.has is False and shown in found.why


def test_a_finding_names_the_inputs_tried() -> None:
    """A right norm has it up to 4,096 rows; a dtype that a kernel does not take is named."""
    found = judge(norm)["batch_invariant"]
    assert found.has and found.why.endswith(" of argument 1 4096x64, float32, bfloat16, float16")
    numbers = re.match(r"1 to 4,096 rows \((\d+) numbers\)", found.why)
    assert numbers is not None and int(numbers[1]) >= 30  # and more where there is time
    partly = judge(lambda x, w: norm(x, w) if x.dtype is torch.float32 else NotImplemented)["batch_invariant"]
    assert partly.has is True and partly.why.endswith("float32; not bfloat16, float16")


def test_a_kernel_that_raises_beside_other_rows_is_not_known_to_be_invariant() -> None:
    """One that refuses infinities and NaN in other rows makes a row depend on these: no "yes", and the error."""

    def careful(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if not x.isfinite().all():
            raise ValueError("only finite numbers")
        return norm(x, weight)

    (found,) = judge(careful).values()
    assert found.has is None and "raises" in found.why and "only finite numbers" in found.why


def test_what_cannot_be_known_is_not_known() -> None:
    """Inputs without rows, outputs without rows, random numbers and rows that depend on one another give reasons."""

    def unknown(reference: Callable[..., Any], *args: Any) -> str:
        found = find(Call(None, args), reference, reference, ["batch_invariant"])["batch_invariant"]
        assert found.has is None
        return found.why

    assert "none of its inputs has rows" in unknown(torch.sin, torch.ones(3))
    assert "none of its inputs has rows" in unknown(len, "text")
    assert "none of its outputs has as many rows" in unknown(torch.sum, torch.randn(4, 8))
    assert "random numbers" in unknown(lambda x: nn.functional.dropout(x, 0.5), torch.randn(4, 8))
    assert "they depend on one another" in unknown(lambda x: x - x.mean(0), torch.randn(4, 8))
    assert "meta" in unknown(torch.sin, torch.ones(4, 8, device="meta"))

    def fails(x: torch.Tensor) -> torch.Tensor:
        raise ValueError("no")

    assert "the reference fails: ValueError: no" in unknown(fails, torch.randn(4, 8))
    raising = find(Call(None, (torch.randn(4, 8),)), fails, torch.sin, NUMERICS)
    assert all(one.has is None and "ValueError: no" in one.why for one in raising.values())


@pytest.mark.parametrize(
    ("reference", "shapes", "rows"),
    [
        (lambda q, k: (q * 2, k * 3), [(2, 4, 3, 8), (2, 2, 3, 8)], "argument 1 4096x4x3x8, argument 2 4096x2x3x8"),
        (lambda q, cos: q * cos, [(2, 4, 3, 8), (1, 1, 8)], "argument 1 4096x1x1x8"),
        (lambda x, weight: x @ weight.mT, [(8, 8), (8, 8)], None),
        (lambda x: x.unflatten(1, (2, -1)).sum(1), [(6, 8)], "argument 1 4096x8"),
        (lambda x: x - x.mean(1, keepdim=True), [(3, 5, 8)], "argument 1 4096x5x8"),
    ],
)
def test_rows_are_found_in_arguments_of_several_shapes(
    reference: Callable[..., Any], shapes: list[tuple[int, ...]], rows: str | None
) -> None:
    """Batches of several dimensions, arguments that broadcast, weights as long as the batch: rows are those of both."""
    call = Call(None, tuple(torch.randn(shape) for shape in shapes))
    found = find(call, reference, reference, ["batch_invariant"])["batch_invariant"]
    if rows is None:  # a product of matrices: rows are found, and a row alone has other bits
        assert found.has is False and "argument 1" in found.why and "argument 2" not in found.why
    else:
        assert found.has is True and found.why.split(") of ")[1].startswith(rows)


# --- Deterministic, and equal when recomputed --------------------------------------------------------


def test_a_kernel_that_differs_from_run_to_run_is_not_deterministic() -> None:
    """Forward and backward are compared over several runs; random numbers start equal in each."""
    count = itertools.count()

    def drifting(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return norm(x, weight) + (next(count) % 3) * 1e-7

    class Unstable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            return gradient * 2 + (next(count) % 3) * 1e-6

    found = judge(drifting, "deterministic")["deterministic"]
    assert found.has is False and "forward: " in found.why and "smallest input: argument 1 1x64" in found.why
    found = judge(lambda x, w: Unstable.apply(x), "deterministic")["deterministic"]
    assert found.has is False and "backward: argument" not in found.why and "backward: " in found.why
    assert judge(lambda x, w: nn.functional.dropout(norm(x, w), 0.5), "deterministic")["deterministic"].has
    generator = torch.Generator()

    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.generator = [generator]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.rand(x.shape, generator=self.generator[0])

    call = Call(Noisy(), (torch.randn(8, 64),))
    found_of = find(call, Noisy.forward, Noisy.forward, ["deterministic", "batch_invariant"])
    assert found_of["deterministic"].has and "random numbers" in found_of["batch_invariant"].why
    alone = judge(lambda x, w: norm(x.detach(), w.detach()), "deterministic")["deterministic"]
    assert alone.has is True


def test_what_differs_when_it_is_recorded_or_recomputed_is_named() -> None:
    """A forward that takes another way where autograd records, and one that does so at its second run."""

    def recorded(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return norm(x, weight) * (1 + 2e-7 if torch.is_grad_enabled() else 1)

    calls = Call(None, (torch.randn(8, 64), torch.rand(64)))
    found = find(calls, recorded, norm, ["recompute_equal"], compiles=False)["recompute_equal"]
    assert found.has is False and found.why.startswith("recorded: ") and "; recomputed: " in found.why
    assert "smallest input: argument 1 1x64 float32" in found.why
    state = {"runs": 0}

    def second(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        state["runs"] += 1
        return norm(x, weight) + (1e-6 if state["runs"] == 5 else 0)  # tried, plain, recorded, checkpoint, recomputed

    found = find(calls, second, norm, ["recompute_equal"], compiles=False)["recompute_equal"]
    assert found.has is False and found.why.startswith("recomputed: ")
    right = find(calls, norm, norm, ["recompute_equal"], compiles=False)["recompute_equal"]
    assert right.has is True and "not compiled" in right.why


def test_what_differs_when_it_is_compiled_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward that asks whether it is compiled differs there; one that cannot be compiled is not known."""
    compile_as_eager = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **more: compile_as_eager(f, backend="aot_eager", **more))

    def compiled(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return norm(x, weight) * (1 + 2e-7) if torch.compiler.is_compiling() else norm(x, weight)

    call = Call(None, (torch.randn(8, 64), torch.rand(64)))
    found = find(call, compiled, norm, ["recompute_equal"])["recompute_equal"]
    assert found.has is False and found.why.startswith("compiled: ")

    def fails(f: Any, **more: Any) -> Any:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", fails)
    found = find(call, norm, norm, ["recompute_equal"])["recompute_equal"]
    assert found.has is None and "RuntimeError: no compiler" in found.why


# --- Of kernels: check_kernel, verify, probing -------------------------------------------------------


def test_the_kit_refuses_the_kernel_of_the_issue() -> None:
    """Where the reference is batch-invariant, the kernel has to be; `ignore` is the way out, with a reason."""
    inputs = torch.randn(8, 64), torch.rand(64)
    with pytest.raises(AssertionError, match=r"batch_invariant: [\d,]+ of 4,096 rows have other bits.*65x64 float32"):
        check_kernel(by_rows, norm, *inputs)
    report = check_kernel(by_rows, norm, *inputs, ignore={"batch_invariant"})
    assert report.can("batch_invariant") is False and report.can("deterministic")
    assert report.can("recompute_equal") is None  # neither asked for nor declared
    assert check_kernel(norm, norm, *inputs, numerics=["batch_invariant"]).can("batch_invariant")
    assert check_kernel(by_rows, by_rows, *inputs).can("batch_invariant") is False  # it takes nothing away
    with pytest.raises(AssertionError, match="batch_invariant"):
        check_kernel(by_rows, by_rows, *inputs, numerics=["batch_invariant"])
    with pytest.raises(AssertionError, match="batch_invariant: its reference computes other numbers"):
        check_kernel(*[lambda x: x - x.mean(0)] * 2, torch.randn(4, 8), numerics=["batch_invariant"])


def test_the_kit_reports_a_wrong_declaration() -> None:
    """A declaration is found out, also where the reference lacks the property."""

    def declared(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return by_rows(x, weight)

    declared.batch_invariant = True  # type: ignore[attr-defined]
    with pytest.raises(AssertionError, match=r"it declares batch_invariant = True, and that is not so: [\d,]+ of"):
        check_kernel(declared, by_rows, torch.randn(8, 64), torch.rand(64))


class Claims(ByRows):
    batch_invariant = True


def test_verify_has_rows_for_what_is_declared_and_what_is_asked_for() -> None:
    """A wrong declaration is a failure; kernel and reference have a row for each property, also in JSON."""
    with use_kernel_mapping({"NumericsNorm": {"cpu": Claims}}):
        plain = verify(Norm(), torch.randn(8, 64), gradients=False)
        asked = verify(Norm(), torch.randn(8, 64), gradients=False, numerics=["deterministic", "batch_invariant"])
    (row,) = [row for row in plain.rows if row.case == "numerics"]
    assert (row.subject, row.verdict, row.mode) == ("batch_invariant", "wrong", "inference")
    assert row.reason.startswith("it declares batch_invariant = True, and that is not so: ") and not plain.ok
    rows = [row for row in json.loads(asked.to_json())["rows"] if row["case"] == "numerics"]
    assert [(row["origin"].rpartition(".")[2], row["subject"], row["verdict"]) for row in rows] == [
        ("Claims", "deterministic", "ok"),
        ("Claims", "batch_invariant", "wrong"),
        ("reference", "deterministic", "ok"),
        ("reference", "batch_invariant", "ok"),
    ]
    assert "1 kernel compared" in asked.summary and "numerics, batch_invariant" in str(asked)


def test_every_number_of_rows_is_tried_where_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample known from before is no answer then; its finding is, and serves later questions."""
    monkeypatch.setattr(sampled, "MOST", 640)  # 4,096 would take many times as long

    class Odd(nn.Module):
        def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
            return norm(x, self.weight) * (1 + 2e-7 * (len(x) == 613))

    def verdict(**options: Any) -> str:
        (row,) = [
            row
            for row in verify(
                Norm(16), torch.randn(8, 16), gradients=False, numerics=["batch_invariant"], **options
            ).rows
            if row.case == "numerics" and row.kernel
        ]
        return row.verdict

    with use_kernel_mapping({"NumericsNorm": {"cpu": Odd}}):
        assert [verdict(), verdict(every_size=True), verdict()] == ["ok", "wrong", "wrong"]
    with pytest.raises(AssertionError, match="batch_invariant: smallest input: x 613x64 float32"):
        check_kernel(Odd, Norm(), torch.randn(8, 64), every_size=True, ignore={"compile"})
    with pytest.raises(ArgumentTypeError, match="every_size"):
        check_kernel(Odd, Norm(), torch.randn(8, 64), every_size="yes")  # type: ignore[arg-type]


def test_the_reference_is_not_innocent() -> None:
    """A reference whose rows depend on others has the verdict that a kernel would have."""

    class Own(nn.Module):
        weight = torch.rand(64)
        forward = ByRows.forward

    layer = use_kernel_forward_from_hub("NumericsOwn")(Own)()
    report = verify(layer, torch.randn(8, 64), numerics=["batch_invariant"])
    (row,) = [row for row in report.rows if row.case == "numerics"]
    assert (row.origin, row.verdict) == ("reference", "wrong") and not report.ok


def test_probing_reports_a_wrong_declaration(isolated_plugins: PluginManager, recwarn: pytest.WarningsRecorder) -> None:
    """A kernel that declares a property is judged at its first call, and serves on, with a warning."""
    isolated_plugins.register(prober, "probe")
    with use_kernel_mapping({"NumericsNorm": {"cpu": Claims}}), prober.probing():
        Norm()(torch.randn(8, 64))
        resolution = resolve(Norm, device="cpu", mode=Mode.INFERENCE)
    assert "Claims" in resolution.origin and "not batch_invariant" in resolution.checked["probes"]
    assert any("batch_invariant: " in str(one.message) and "was probed" in str(one.message) for one in recwarn)


# --- Arguments, and what is kept ---------------------------------------------------------------------


def test_wrong_names_are_errors() -> None:
    """An unknown property, a text in place of a list, and anything else are errors of ours."""
    for wrong, kind in (("batch_invariant", ArgumentTypeError), (["exact"], ArgumentError), ([1], ArgumentTypeError)):
        with pytest.raises(kind):
            verify(Norm(), torch.randn(2, 64), numerics=wrong)
        with pytest.raises(kind):
            check_kernel(norm, norm, torch.randn(2, 64), torch.rand(64), numerics=wrong)


def test_findings_are_kept_for_other_processes(tmp_path: Path) -> None:
    """A file has them by kind of call; one that cannot be read, or is of another format, counts as none."""
    layer = find_layer(Norm)
    assert layer is not None
    key = store.key_of(layer, by_rows, torch.device("cpu"))
    store.keep(key, "float32, x 64", {"batch_invariant": Judgement(True, "tried")})
    store.keep(key, "float32, x 128", {BACKWARD: Judgement(False, "shown")})
    store._found.clear()
    assert store.verdicts(key, training=False) == {"batch_invariant": Judgement(True, "tried")}
    assert store.verdicts(key, training=True) == {"batch_invariant": Judgement(False, "shown")}
    (file,) = tmp_path.rglob("*.json")
    broken = {"format": store._FORMAT, "findings": {"a": {"b": 1}}}
    for text in ("", "[]", "{", '{"format": "0", "findings": {}}', json.dumps(broken)):
        file.write_text(text)
        store._found.clear()
        assert store.verdicts(key, training=False) == {}


def test_the_default_device_of_the_process_changes_no_finding() -> None:
    """Numbers that are drawn come from a generator of the CPU, wherever new tensors go by default."""
    call, names = Call(None, (torch.randn(8, 16),)), ["batch_invariant", BACKWARD]
    expected = find(call, torch.square, torch.square, names)
    with torch.device("meta"):
        found = find(call, torch.square, torch.square, names)
    assert {name: one.has for name, one in found.items()} == {name: one.has for name, one in expected.items()}
    assert all(one.has for one in found.values()), found
