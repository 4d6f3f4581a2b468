"""Is an output the expected one? `compare` measures the errors, and `alike` only decides, in little time."""

from .full import Comparison, Difference, compare
from .quick import alike
from .structure import metadata_mismatch
from .tolerance import Tolerance, Tolerances

__all__ = ["Comparison", "Difference", "Tolerance", "Tolerances", "alike", "compare", "metadata_mismatch"]
