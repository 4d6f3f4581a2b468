"""Are these outputs those that were expected, within what the dtype allows?

Tolerances are those of `torch.testing`. They say how far a single number may be off. That alone would let a
kernel pass that is off by one percent in bfloat16, always to the same side; so the mean of the errors is
looked at, too: rounding goes either way, and a mean over many numbers must be near zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch

from kernels_core import ArgumentTypeError
from kernels_core.replay import leaves, nodes

Tolerance = tuple[float, float]
Tolerances = Tolerance | Mapping[torch.dtype, Tolerance]

TOLERANCES: Mapping[torch.dtype, Tolerance] = {
    torch.float16: (4e-3, 1e-5),
    torch.bfloat16: (1.6e-2, 1e-5),
    torch.float32: (1.3e-6, 1e-5),
    torch.float64: (1e-7, 1e-7),
    torch.complex32: (4e-3, 1e-5),
    torch.complex64: (1.3e-6, 1e-5),
    torch.complex128: (1e-7, 1e-7),
}
"""Relative and absolute, as in `torch.testing.assert_close`; other floating dtypes: their eps; integers: none.

But for float16, the relative one there is a single unit in the last place. Two right kernels differ by more,
where one keeps an intermediate result in float32 and the other does not: it is four here.
"""

OWN_RMS, OWN_MAX = 8.0, 3.0
"""How many times the root mean square, or the largest, of the reference's own errors a number may be off, besides."""

LOW_EPS = 1e-4
"""Dtypes with a larger eps round so much that both sides are allowed their error, where only both are known."""

SIGNIFICANT = 6.0
"""How many times its own uncertainty the mean of the errors must be, to be told from chance."""


@dataclass(frozen=True)
class Difference:
    """How far one tensor is from the expected one.

    Attributes:
        path: Where it is in the output, such as `"[0]['hidden']"`; empty if it is the output.
        dtype: Of the actual tensor.
        shape: Of both.
        max_abs: The largest error.
        max_rel: The largest error, relative to the expected number.
        mean_abs: The mean of the errors, without sign.
        bias: The mean of the errors, with sign.
        max_ulps: The largest error, in units in the last place of the expected number, or of the root mean
            square of its tensor where that is larger: next to zero, units mean little.
        index: Where the error is largest in units of what is allowed there; None if there is no number.
        actual: The number there.
        expected: The number that should be there.
        excess: The largest error in units of what is allowed there, or their mean in units of what is allowed for
            it, whichever is larger: more than 1 is wrong.
        own_error: The largest error of the reference in this dtype; None without a float64 reference.
        reasons: What is wrong with it; empty if nothing is.
    """

    path: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    max_abs: float = 0.0
    max_rel: float = 0.0
    mean_abs: float = 0.0
    bias: float = 0.0
    max_ulps: float = 0.0
    index: tuple[int, ...] | None = None
    actual: float = 0.0
    expected: float = 0.0
    excess: float = 0.0
    own_error: float | None = None
    reasons: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether it is as expected."""
        return not self.reasons

    def __str__(self) -> str:
        """One line: what is wrong, if anything is, and how far it is off."""
        place = self.path or "output"
        dtype = str(self.dtype).removeprefix("torch.")
        numbers = f"max {self.max_abs:.3g}, mean {self.mean_abs:.3g}, {self.max_ulps:.3g} ulps"
        if self.own_error is not None:
            numbers += f", the reference's own {self.own_error:.3g}"
        said = "; ".join(self.reasons) or "as expected"
        return f"{place} ({dtype}, {_shape(self.shape)}): {said} ({numbers})"


@dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    Attributes:
        mismatches: What cannot be compared number by number: structure, shape, dtype, device.
        differences: A difference for each tensor that can.
    """

    mismatches: tuple[str, ...] = ()
    differences: tuple[Difference, ...] = field(default=())

    @property
    def ok(self) -> bool:
        """Whether everything is as expected."""
        return not self.mismatches and all(difference.ok for difference in self.differences)

    @property
    def worst(self) -> Difference | None:
        """The tensor that is furthest off, in units of what is allowed; None if there is none."""
        return max(self.differences, key=lambda d: (not d.ok, d.excess), default=None)

    @property
    def max_abs(self) -> float:
        """The largest error."""
        return max((difference.max_abs for difference in self.differences), default=0.0)

    @property
    def max_rel(self) -> float:
        """The largest relative error."""
        return max((difference.max_rel for difference in self.differences), default=0.0)

    @property
    def mean_abs(self) -> float:
        """The largest mean error of a tensor."""
        return max((difference.mean_abs for difference in self.differences), default=0.0)

    @property
    def max_ulps(self) -> float:
        """The largest error in units in the last place."""
        return max((difference.max_ulps for difference in self.differences), default=0.0)

    @property
    def index(self) -> tuple[int, ...] | None:
        """Where the worst tensor is furthest off."""
        return self.worst.index if self.worst is not None else None

    def __str__(self) -> str:
        """One line: everything that is wrong, or how near the worst tensor is."""
        said = [*self.mismatches, *(str(difference) for difference in self.differences if not difference.ok)]
        if not said:
            said = [str(self.worst) if self.worst is not None else "nothing to compare"]
        return "; ".join(said)


def compare(
    actual: object,
    expected: object,
    *,
    exact: object = None,
    tolerances: Tolerances | None = None,
    quick: bool = False,
) -> Comparison:
    """Compare a nested output with the expected one.

    Args:
        actual: Tensors, alone or in lists, tuples, dicts and dataclasses.
        expected: The same from the reference, in the same dtypes.
        exact: The same from the reference in float64, where that can be had. Errors are then measured from
            it, and what the reference itself errs in its dtype is allowed besides, several times.
        tolerances: Relative and absolute tolerance, or these per dtype; by default those of `torch.testing`.
            A number that is small beside the others of its tensor is held to their root mean square: sums
            that cancel leave such numbers. Without `exact`, the relative one counts twice for 16 bits and
            fewer, for the reference errs, too.
        quick: Compute in float32 where that holds the numbers, and leave out `max_rel` and `max_ulps`: a fraction
            of the memory and time.

    Returns:
        What was found. It does not raise for any difference.

    Raises:
        ArgumentTypeError: If `exact` has another structure than `expected`.

    Example:
        >>> print(compare(torch.tensor([1.0, 2.5]), torch.tensor([1.0, 2.0])))
        output (float32, 2): 2.5 instead of 2 at [1]... (max 0.5, mean 0.25, 2.1e+06 ulps)
        >>> compare(torch.ones(2), torch.ones(3)).mismatches
        ('output: shape (2,) instead of (3,)',)
    """
    mismatches = list(structure_mismatches(actual, expected))
    if mismatches:
        return Comparison(tuple(mismatches))
    exacts = [leaf for _, leaf in leaves(exact)] if exact is not None else None
    pairs = list(zip(leaves(actual), leaves(expected), strict=True))
    if exacts is not None and len(exacts) != len(pairs):
        raise ArgumentTypeError(
            f"exact has {len(exacts)} leaves and expected has {len(pairs)}: both come from the same reference."
        )
    found: list[_Measured] = []
    for number, ((path, ours), (_, theirs)) in enumerate(pairs):
        if not isinstance(theirs, torch.Tensor):
            mismatches += value_mismatches(path or "output", ours, theirs)
            continue
        mismatch = metadata_mismatch(path or "output", ours, theirs)
        if mismatch is None:
            ideal = exacts[number] if exacts is not None else None
            found.append(_Measured(path, ours, theirs, ideal, tolerance_of(theirs.dtype, tolerances), quick))
        else:
            mismatches.append(mismatch)
    return Comparison(tuple(mismatches), tuple(measured.difference() for measured in found))


# --- What is not a number -------------------------------------------------------------------------


def structure_mismatches(actual: object, expected: object) -> list[str]:
    """Say where two nested values hold other things."""
    ours, theirs = list(_containers(actual)), list(_containers(expected))
    if ours == theirs:
        return []
    for (path, kind, keys), (other, expected_kind, expected_keys) in zip(ours, theirs, strict=False):
        if path == other and kind is not expected_kind:
            return [f"{path or 'output'}: {kind.__name__} instead of {expected_kind.__name__}"]
        if path == other and keys != expected_keys:
            return [f"{path or 'output'}: holds {_listed(keys)} instead of {_listed(expected_keys)}"]
    return [f"output: {_listed(p for p, _ in leaves(actual))} instead of {_listed(p for p, _ in leaves(expected))}"]


def _containers(value: object) -> Iterator[tuple[str, type, tuple[str, ...]]]:
    return ((path, type(node), keys) for path, node, keys in nodes(value) if keys is not None)


def _listed(keys: Any) -> str:
    return ", ".join(key or "one value" for key in keys) or "nothing"


def value_mismatches(path: str, ours: object, theirs: object) -> list[str]:
    """Compare what is no tensor: by value where it has one, else by type."""
    if type(ours) is not type(theirs):
        return [f"{path}: {type(ours).__name__} instead of {type(theirs).__name__}"]
    if isinstance(ours, float) and isinstance(theirs, float):
        rtol, atol = TOLERANCES[torch.float64]
        both_nan = math.isnan(ours) and math.isnan(theirs)
        same = both_nan or math.isclose(ours, theirs, rel_tol=rtol, abs_tol=atol)
    elif isinstance(ours, str | bytes | int | complex | torch.Size | torch.dtype | torch.device):
        same = bool(ours == theirs)
    else:
        return []  # objects that nobody can look into
    return [] if same else [f"{path}: {ours!r} instead of {theirs!r}"]


def metadata_mismatch(path: str, ours: object, theirs: torch.Tensor) -> str | None:
    """Say why two tensors cannot be compared number by number, None if they can."""
    if not isinstance(ours, torch.Tensor):
        return f"{path}: {type(ours).__name__} instead of a tensor"
    if ours.shape != theirs.shape:
        return f"{path}: shape {tuple(ours.shape)} instead of {tuple(theirs.shape)}"
    if ours.dtype != theirs.dtype:
        return f"{path}: {ours.dtype} instead of {theirs.dtype}"
    if ours.device != theirs.device:
        return f"{path}: on {ours.device} instead of {theirs.device}"
    return None


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def tolerance_of(dtype: torch.dtype, tolerances: Tolerances | None = None) -> Tolerance:
    """Return the relative and absolute tolerance of a dtype."""
    if isinstance(tolerances, tuple):
        return tolerances
    if tolerances is not None and dtype in tolerances:
        return tolerances[dtype]
    if dtype in TOLERANCES:
        return TOLERANCES[dtype]
    return (torch.finfo(dtype).eps, 1e-5) if dtype.is_floating_point else (0.0, 0.0)


# --- Numbers --------------------------------------------------------------------------------------


class Yardstick:
    """What is allowed between two tensors of a dtype and shape.

    Attributes:
        dtype: Of both.
        shape: Of both.
        rtol: What a number may be off, relative to its size.
        atol: And besides.
        eps: Of the dtype; 0 for integers.
        rows: How many rows there are: errors of a row may go one way.
    """

    def __init__(self, tensor: torch.Tensor, tolerance: Tolerance) -> None:
        """Measure for tensors like this one."""
        self.dtype, self.shape = tensor.dtype, tuple(tensor.shape)
        self.rtol, self.atol = tolerance
        self.eps = torch.finfo(tensor.dtype).eps if tensor.dtype.is_floating_point or tensor.is_complex() else 0.0
        self.rows = max(1, tensor.numel() // max(1, tensor.shape[-1] if tensor.dim() else 1))

    def relative(self, *, exact: bool) -> float:
        """Return the relative tolerance, from numbers that are exact, or err themselves."""
        return self.rtol * (2 if not exact and self.eps > LOW_EPS else 1)

    def bias(
        self,
        count: float,
        bias: float,
        along: float,
        size: float,
        rms: float,
        own: tuple[float, float, float] | None = None,
    ) -> tuple[float, str]:
        """Return how far the errors go to one side, in units of what is allowed, and to which.

        Up, down, away from zero or towards it. What is shared by a row, such as a norm that was rounded, moves all
        of the row to one side; with many rows, that goes either way, too. What the reference's own errors do is
        known with a float64 reference.
        """
        if not self.eps:
            return 0.0, ""
        step = max(0.75 * self.eps, self.rtol / 4) * (1 + (1.5 if own is None else 0.5) / math.sqrt(self.rows))
        own_bias, own_along, own_rms = own or (0.0, 0.0, 0.0)
        found = []
        for mean, reference, sides in (
            (bias, own_bias, ("high", "low")),
            (along, own_along, ("large in magnitude", "small in magnitude")),
        ):
            spread = max(math.sqrt(max(rms * rms - mean * mean, 0.0)), own_rms)
            chance = SIGNIFICANT * spread / math.sqrt(count)
            allowed = step * size + self.atol + 2 * abs(reference) + chance
            told = f"biased: too {sides[mean < 0]} by {abs(mean):.3g} on average, where rounding goes either way"
            found.append((abs(mean) / allowed if mean and allowed else math.inf if mean else 0.0, told))
        return max(found, key=lambda one: one[0])


class _Measured(Yardstick):
    """A tensor that is being compared: the work is given to the device at once, and waited for later."""

    def __init__(
        self,
        path: str,
        actual: torch.Tensor,
        expected: torch.Tensor,
        exact: torch.Tensor | None,
        tolerance: Tolerance,
        quick: bool,
    ) -> None:
        super().__init__(actual, tolerance)
        self.path = path
        self.complex = actual.is_complex()
        self.exact = exact is not None
        self.count = actual.numel()
        self.statistics: torch.Tensor | None = None
        if self.count:
            with torch.inference_mode(False), torch.no_grad(), torch.autocast(actual.device.type, enabled=False):
                self._measure(actual, expected, exact, quick)

    def _measure(self, actual: torch.Tensor, expected: torch.Tensor, exact: torch.Tensor | None, quick: bool) -> None:
        wide = actual.dtype in (torch.float64, torch.complex128) or not self.eps  # float32 would round these
        work = torch.float32 if (quick and not wide) or actual.device.type == "mps" else torch.float64
        ours, theirs = _numbers(actual, work), _numbers(expected, work)
        target = theirs if exact is None else _numbers(exact.to(actual.device), work)
        finite = torch.isfinite(ours) & torch.isfinite(target)
        astray = ~finite & ~((ours == theirs) | (torch.isnan(ours) & torch.isnan(theirs)))
        count = finite.sum().clamp(min=1)
        target = torch.where(finite, target, 0)
        error = torch.where(finite, ours, 0) - target
        size = target.abs()
        nothing = torch.zeros((), dtype=work, device=ours.device)
        own = torch.where(finite & torch.isfinite(theirs), theirs - target, 0) if exact is not None else nothing
        # In double, without a copy: squares of large numbers overflow, and sums of many lose digits.
        root = count.sqrt() if work is torch.float32 else count.double().sqrt()
        scale = norm(target) / root
        own_scale = norm(own) / root
        allowed = torch.maximum(OWN_RMS * own_scale.to(work), OWN_MAX * own.abs().max())
        limit = self.atol + self.relative(exact=self.exact) * torch.maximum(size, scale.to(work)) + allowed
        magnitude = error.abs()
        excess = torch.where(magnitude == 0, 0, magnitude / limit)
        excess = torch.where(astray, torch.inf, excess)
        where = excess.argmax()
        along = error * target.sign()
        relative = ulps = nothing
        if not quick:
            relative = torch.where(magnitude == 0, 0, magnitude / size).max()
            ulps = (magnitude / _ulp(torch.maximum(size, scale.to(work)), self.dtype)).max()
        values = [
            where,
            excess.max(),
            astray.sum(),
            count,
            magnitude.max(),
            magnitude.sum() / count,
            error.sum() / count,
            along.sum() / count,
            size.sum() / count,
            norm(error) / root,
            own.abs().max(),
            own.sum() / count,
            (own * target.sign()).sum() / count,
            own_scale,
            relative,
            ulps,
            ours.take(where),  # an index would wait for the device
            torch.where(finite, target, theirs).take(where),
        ]
        kind = torch.float32 if ours.device.type == "mps" else torch.float64
        self.statistics = torch.stack([value.to(kind) for value in values])

    def difference(self) -> Difference:
        """Wait for the numbers, and judge."""
        if self.statistics is None:
            return Difference(self.path, self.dtype, self.shape)
        (
            where,
            excess,
            astray,
            count,
            max_abs,
            mean_abs,
            bias,
            along,
            mean_size,
            rms,
            own_max,
            own_bias,
            own_along,
            own_rms,
            max_rel,
            max_ulps,
            actual,
            expected,
        ) = self.statistics.tolist()
        index = _index(int(where), (*self.shape, 2) if self.complex else self.shape)
        reasons = []
        if astray:
            of = f"{int(astray)} of {self.count} not finite as expected"
            reasons.append(f"{of}, such as {_at(actual, expected, index)}")
        elif not excess <= 1:
            reasons.append(f"{_at(actual, expected, index)}, {excess:.3g} times the tolerance")
        own = (own_bias, own_along, own_rms) if self.exact else None
        ratio, told = self.bias(count, bias, along, mean_size, rms, own)
        excess = max(excess, ratio)
        reasons += [told] if ratio > 1 else []
        return Difference(
            self.path,
            self.dtype,
            self.shape,
            max_abs=math.inf if astray else max_abs,
            max_rel=max_rel,
            mean_abs=mean_abs,
            bias=bias,
            max_ulps=max_ulps,
            index=index[:-1] if self.complex else index,
            actual=actual,
            expected=expected,
            excess=excess,
            own_error=own_max if self.exact else None,
            reasons=tuple(reasons),
        )


def _numbers(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor as real numbers of a dtype."""
    tensor = tensor.detach()
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    if tensor.is_quantized:
        tensor = tensor.dequantize()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor.to(dtype)


def norm(tensor: torch.Tensor) -> torch.Tensor:
    """Return the root of the sum of squares, in double where there is one, without a copy."""
    dtype = tensor.dtype if tensor.device.type == "mps" else torch.float64
    return cast(torch.Tensor, torch.linalg.vector_norm(tensor, dtype=dtype))


def _ulp(size: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the distance between a number and the next one of a dtype."""
    if not (dtype.is_floating_point or dtype.is_complex):
        return torch.ones_like(size)
    info = torch.finfo(dtype)
    exponent = torch.frexp(size.clamp(min=info.tiny)).exponent
    return torch.ldexp(torch.full_like(size, info.eps), exponent - 1)


def _index(flat: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    index = []
    for size in reversed(shape):
        flat, rest = divmod(flat, size)
        index.append(rest)
    return tuple(reversed(index))


def _at(actual: float, expected: float, index: tuple[int, ...]) -> str:
    return f"{actual:.6g} instead of {expected:.6g} at {list(index)}"
