"""Find the kernels that change a metric."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import nn

from kernels_core import ArgumentTypeError, set_module

from .evaluations import Evaluations, progress_bar
from .measure import Plain, Reading, Tolerance
from .result import BisectError, BisectResult, Culprit, CulpritSet
from .search import find_minimal_sets
from .switch import Switch


def bisect(
    model: nn.Module, metric: Callable[[nn.Module], object], *, tolerance: float, relative: float = 0.0
) -> BisectResult:
    """Find the smallest sets of kernels that change a metric of a model beyond a tolerance.

    Compares the model as it is with the model on its references, and looks for the kernels that make the
    difference, by running some layers on their kernels and all others on their reference. For `k` culprits among
    `n` kernels, that takes O(k log n) evaluations: at most `k * (ceil(log2(n)) + 4) + 5`, and one more for each
    culprit that is in several sets. `docs/bisect.md` has the algorithm and its guarantees.

    Each evaluation starts with the same random numbers and without gradients. The model is left as it was:
    buffers, gradients, training modes and random numbers are put back.

    Args:
        model: The model; its kernels are those that calls find where `bisect` is called.
        metric: Called with the model. Returns a number, as a float or a tensor of no dimensions, or a dict or tuple
            of numbers, of which the largest change matters. It must not change parameters.
        tolerance: How far the metric may be from that on references.
        relative: A share of that number, allowed besides.

    Returns:
        The culprits, none if the metric stays within the tolerance.

    Raises:
        ArgumentError: If the tolerance is negative or no finite number.
        ArgumentTypeError: If the model is no module, or the metric cannot be called or returns no number.
        BisectError: If nothing can be found out: the metric raises, or is NaN or infinite on references; two
            evaluations of the same thing differ by more than the tolerance; the model has no decorated layer, or
            no kernel is in use. NaN on kernels is a change beyond every tolerance.

    Example:
        >>> @use_kernel_forward_from_hub("Twice")
        ... class Twice(torch.nn.Module):
        ...     def forward(self, x):
        ...         return x * 2
        >>> class Wrong(torch.nn.Module):
        ...     def forward(self, x):
        ...         return x * 2.5
        >>> model = torch.nn.Sequential(Twice(), torch.nn.ReLU())
        >>> with use_kernel_mapping({"Twice": {"cpu": Wrong}}):
        ...     result = bisect(model, lambda model: model(torch.ones(3)).mean(), tolerance=1e-3)
        >>> [(culprit.path, culprit.metric, culprit.change) for culprit in result.culprits]
        [('0', 2.5, 0.5)]
    """
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(f"bisect takes an nn.Module, not {model!r}.")
    if not callable(metric):
        raise ArgumentTypeError(f"The metric of bisect is a function of the model, not {metric!r}.")
    allowed = Tolerance(tolerance, relative)
    switch = Switch(model)
    with switch.installed(), progress_bar() as show:
        return _bisect(switch, Evaluations(model, metric, switch, show), allowed)


def _bisect(switch: Switch, evaluations: Evaluations, allowed: Tolerance) -> BisectResult:
    suspect = evaluations.suspect()
    kernels = evaluations.kernels
    if not kernels:
        raise BisectError(_nothing(switch), evaluation=evaluations.count)
    baseline = evaluations.anew(())
    again = evaluations.anew(())  # not from memory: it shows how much equal runs differ
    for reading in (baseline, again):
        if not reading.is_finite:
            raise BisectError(
                f"With every decorated layer on its reference, the metric is {reading}: nothing can be compared with "
                "that. Fix the metric, or its inputs.",
                evaluation=evaluations.count,
            )
    noise = _noise("every decorated layer on its reference", evaluations, allowed, baseline, again, ())
    paths = [kernel.path for kernel in kernels]
    noise = max(noise, _noise("all kernels on", evaluations, allowed, suspect, evaluations.anew(kernels), paths))

    def of(items: Iterable[int]) -> Reading:
        return evaluations.with_only([kernels[item] for item in sorted(items)])

    sets: list[tuple[int, ...]] = []
    if allowed.is_exceeded(suspect, baseline):
        sets = find_minimal_sets(len(kernels), lambda items: bool(items) and allowed.is_exceeded(of(items), baseline))
    # A member of several sets is one culprit.
    guilty = sorted({item for members in sets for item in members}, key=lambda item: (kernels[item].place, item))
    mended = of(set(range(len(kernels))).difference(guilty))

    def measured(items: Iterable[int]) -> tuple[Plain, float]:
        reading = of(items)
        return reading.plain, reading.change_from(baseline)

    culprits = [(item, kernels[item]) for item in guilty]
    return BisectResult(
        culprits=tuple(Culprit(it.path, it.layer, it.origin, *measured([item]), it.also) for item, it in culprits),
        sets=tuple(CulpritSet(tuple(kernels[item].path for item in members), *measured(members)) for members in sets),
        baseline=baseline.plain,
        suspect=suspect.plain,
        change=suspect.change_from(baseline),
        mended=mended.plain,
        is_mended=not allowed.is_exceeded(mended, baseline),
        tolerance=str(allowed),
        noise=noise,
        kernels=len(kernels),
        evaluations=evaluations.count,
    )


def _noise(
    setup: str, evaluations: Evaluations, allowed: Tolerance, first: Reading, again: Reading, paths: Sequence[str]
) -> float:
    """Return how far two evaluations of the same thing are apart; raise if that is too far."""
    noise = again.change_from(first)
    if allowed.is_exceeded(again, first):
        raise BisectError(
            f"The model is not deterministic: evaluated twice with {setup}, with the same random numbers, the metric "
            f"is {first}, and then {again}. That is a difference of {noise:.3g}, and {allowed} is allowed. Look for "
            "state in layers or in the metric (caches, counters), call torch.use_deterministic_algorithms(True), or "
            "allow more.",
            evaluation=evaluations.count,
            paths=paths,
        )
    return noise


def _nothing(switch: Switch) -> str:
    """Return why there is nothing to look for."""
    if switch.found_elsewhere:
        return (
            "No kernel of this model is in use, but one ran in something else: the metric must call the model that it "
            "is given, no copy of it."
        )
    if not switch.has_layers:
        return (
            "This model has no decorated layer, so it runs no kernels: decorate its layers with "
            "use_kernel_forward_from_hub, or bisect the part of it that has some."
        )
    return (
        "No kernel is in use: the metric ran every decorated layer on its reference. print(receipt(model)) shows why; "
        "call bisect in the scope of the mapping, and let the metric call the model."
    )


set_module("kernels_plugins", globals())
