"""Is an output the expected one? `compare` measures the errors, and `alike` only decides, in little time."""

from .full import Comparison, Difference, compare
from .quick import alike
from .structure import metadata_mismatch
from .tolerance import Tolerance, Tolerances, check_tolerances

__all__ = [
    "Comparison",
    "Difference",
    "Tolerance",
    "Tolerances",
    "alike",
    "check_tolerances",
    "compare",
    "metadata_mismatch",
]
