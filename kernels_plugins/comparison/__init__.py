"""Is an output the expected one? `compare` says how far it is off, and `alike` only whether, in little time."""

from .full import Comparison, Difference, compare
from .quick import alike
from .structure import metadata_mismatch
from .tolerance import Tolerance, Tolerances

__all__ = ["Comparison", "Difference", "Tolerance", "Tolerances", "alike", "compare", "metadata_mismatch"]
