"""`compare`: the differences of an output from the expected one, in numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from kernels_core import ArgumentTypeError
from kernels_core.replay import leaves

from .structure import metadata_mismatch, own_part, structure_mismatches, value_mismatches
from .tolerance import OWN_MAX, OWN_RMS, Tolerance, Tolerances, Yardstick, norm, tolerance_of, widest


@dataclass(frozen=True)
class Difference:
    """How far one tensor is from the expected one.

    Attributes:
        path: Where it is in the output, such as `"[0]['hidden']"`; empty if it is the output.
        max_abs: The largest error.
        max_rel: The largest error, relative to the expected number.
        mean_abs: The mean of the errors, without sign.
        max_ulps: The largest error, in units in the last place of the expected number, or of the root mean
            square of its tensor where that is larger: next to zero, units mean little.
        index: Where the error is largest in units of the error that is allowed there; None if there is no number.
            `actual` and `expected` are the numbers there.
        excess: The largest error in units of the allowed one, or the mean of the errors in units of the allowed mean,
            whichever is larger: more than 1 is wrong.
        own_error: The largest error of the reference in this dtype; None without a float64 reference.
        reasons: The faults; empty if there are none.
    """

    path: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    max_abs: float = 0.0
    max_rel: float = 0.0
    mean_abs: float = 0.0
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
        """One line: the faults, if there are any, and the errors."""
        place = self.path or "output"
        dtype = str(self.dtype).removeprefix("torch.")
        numbers = f"max {self.max_abs:.3g}, mean {self.mean_abs:.3g}, {self.max_ulps:.3g} ulps"
        if self.own_error is not None:
            numbers += f", the reference's own {self.own_error:.3g}"
        verdict = "; ".join(self.reasons) or "as expected"
        shape = "x".join(map(str, self.shape)) or "scalar"
        return f"{place} ({dtype}, {shape}): {verdict} ({numbers})"


@dataclass(frozen=True)
class Comparison:
    """The result of `compare`."""

    mismatches: tuple[str, ...] = ()  # of structure, shape, dtype and device, where no numbers are compared
    differences: tuple[Difference, ...] = ()  # one for each tensor whose numbers are compared

    @property
    def ok(self) -> bool:
        """Whether everything is as expected."""
        return not self.mismatches and all(difference.ok for difference in self.differences)

    @property
    def worst(self) -> Difference | None:
        """The tensor with the largest error, in units of the allowed error; None if there is none."""
        return max(self.differences, key=lambda d: (not d.ok, d.excess), default=None)

    def largest(self, error: str) -> float:
        """Return the largest error of one kind, such as `"max_abs"`, of all tensors."""
        return max((getattr(difference, error) for difference in self.differences), default=0.0)

    def __str__(self) -> str:
        """One line: everything that is wrong, or how near the worst tensor is."""
        lines = [*self.mismatches, *(str(difference) for difference in self.differences if not difference.ok)]
        if not lines:
            lines = [str(self.worst) if self.worst is not None else "nothing to compare"]
        return "; ".join(lines)


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
        actual: A tensor, or tensors in lists, tuples, dicts and dataclasses.
        expected: The same from the reference, in the same dtypes.
        exact: The same from the reference in float64, where that can be had. Errors are then measured from
            it, and several times the error of the reference in its own dtype is allowed besides. A tensor of it
            that is infinite, or too large, where `expected` is finite is no judge, and left out.
        tolerances: Relative and absolute tolerance, or these per dtype; by default those of `torch.testing`.
            A number that is small beside the others of its tensor is held to their root mean square: sums
            that cancel leave such numbers. Without `exact`, the relative one is doubled for 16 bits and
            fewer, for the reference errs, too.
        quick: Compute in float32 where that holds the numbers, and leave out `max_rel` and `max_ulps`: a fraction
            of the memory and time.

    Returns:
        The differences. It does not raise for any.

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
    pairs = list(zip(leaves(actual), leaves(expected), strict=True))
    exacts = [leaf for _, leaf in leaves(exact)] if exact is not None else [None] * len(pairs)
    if len(exacts) != len(pairs):
        raise ArgumentTypeError(
            f"exact has {len(exacts)} leaves and expected has {len(pairs)}: both come from the same reference."
        )
    found: list[_Measured] = []
    for ((path, ours), (_, theirs)), ideal in zip(pairs, exacts, strict=True):
        if not isinstance(theirs, torch.Tensor):
            mismatches += value_mismatches(path or "output", ours, theirs)
            continue
        mismatch = metadata_mismatch(path or "output", ours, theirs)
        if mismatch is None:
            ideal = own_part(ideal, theirs) if ideal is not None else None
            if ideal is not None and not _judges(ideal, own_part(theirs, theirs)):
                ideal = None
            tolerance = tolerance_of(theirs.dtype, tolerances)
            found.append(_Measured(path, own_part(ours, theirs), own_part(theirs, theirs), ideal, tolerance, quick))
        else:
            mismatches.append(mismatch)
    return Comparison(tuple(mismatches), tuple(measured.difference() for measured in found))


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
        if self.count:  # an empty tensor has no largest error
            with torch.inference_mode(False), torch.no_grad(), torch.autocast(actual.device.type, enabled=False):
                self._measure(actual, expected, exact, quick)

    def _measure(self, actual: torch.Tensor, expected: torch.Tensor, exact: torch.Tensor | None, quick: bool) -> None:
        wide = actual.dtype in (torch.float64, torch.complex128) or not self.eps  # float32 would round these
        work = torch.float32 if quick and not wide else widest(actual)
        ours, theirs = _numbers(actual, work), _numbers(expected, work)
        target = theirs if exact is None else _numbers(exact.to(actual.device), work)
        finite = torch.isfinite(ours) & torch.isfinite(target)
        astray = ~finite & ~((ours == theirs) | (torch.isnan(ours) & torch.isnan(theirs)))
        count = finite.sum().clamp(min=1)  # with 0, every mean would be NaN
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
        excess = torch.where(astray, torch.inf, excess)  # so that `where` finds them first
        where = excess.argmax()
        along = error * target.sign()  # positive where the number is too large in magnitude
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
        # One tensor, so that one copy to the host waits for all.
        self.statistics = torch.stack([value.to(widest(ours)) for value in values])

    def difference(self) -> Difference:
        """Wait for the numbers, and judge."""
        if self.statistics is None:
            return Difference(self.path, self.dtype, self.shape)
        where, excess, astray, count, max_abs, mean_abs, bias, along, mean_size, rms, *rest = self.statistics.tolist()
        own_max, own_bias, own_along, own_rms, max_rel, max_ulps, actual, expected = rest
        flat = torch.tensor(int(where), device="cpu")  # whatever the default device is
        index = tuple(map(int, torch.unravel_index(flat, (*self.shape, 2) if self.complex else self.shape)))
        reasons = []
        if astray:
            of = f"{int(astray)} of {self.count} not finite as expected"
            reasons.append(f"{of}, such as {_at(actual, expected, index)}")
        elif not excess <= 1:  # not `>`: NaN is wrong, too
            reasons.append(f"{_at(actual, expected, index)}, {excess:.3g} times the tolerance")
        own = (own_bias, own_along, own_rms) if self.exact else None
        ratio, reason = self.bias(count, bias, along, mean_size, rms, own)
        excess = max(excess, ratio)
        reasons += [reason] if ratio > 1 else []
        return Difference(
            self.path,
            self.dtype,
            self.shape,
            max_abs=math.inf if astray else max_abs,
            max_rel=max_rel,
            mean_abs=mean_abs,
            max_ulps=max_ulps,
            index=index[:-1] if self.complex else index,
            actual=actual,
            expected=expected,
            excess=excess,
            own_error=own_max if self.exact else None,
            reasons=tuple(reasons),
        )


def _judges(exact: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether float64 holds numbers where the dtype does: native code, as of quantized layers, may misread float64."""
    lost = torch.isfinite(expected) & ~torch.isfinite(exact.to(expected.device, expected.dtype))
    return not bool(lost.any())


def _numbers(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor as real numbers of a dtype."""
    tensor = tensor.detach()
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    if tensor.is_quantized:
        tensor = tensor.dequantize()
    if tensor.is_complex():  # real and imaginary part, each by its own error
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor.to(dtype)


def _ulp(size: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the distance between a number and the next one of a dtype."""
    if not (dtype.is_floating_point or dtype.is_complex):
        return torch.ones_like(size)
    info = torch.finfo(dtype)
    exponent = torch.frexp(size.clamp(min=info.tiny)).exponent
    return torch.ldexp(torch.full_like(size, info.eps), exponent - 1)


def _at(actual: float, expected: float, index: tuple[int, ...]) -> str:
    return f"{actual:.6g} instead of {expected:.6g} at {list(index)}"
