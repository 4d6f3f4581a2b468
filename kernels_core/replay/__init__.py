"""A call made again, on copies, with any forward, and without a trace.

For plugins that compare a kernel with the reference, or look at a kernel before it serves. Arguments, parameters,
buffers, attributes, random generators, gradients and hooks are afterwards as they were before.
"""

from ..exports import set_module
from ..nested import each_tensor, leaves, mapped, nodes
from .ambient import (
    RandomSource,
    RandomStates,
    host_random_states,
    is_capturing,
    is_observed,
    kept_random_states,
    numpy_random,
    random_states,
    same_random_states,
    set_host_random_states,
    set_random_states,
)
from .call import CONSTANTS, Call, Outcome, Replay
from .copies import generators_of, same_numbers
from .model_state import ModelState

__all__ = [
    "CONSTANTS",
    "Call",
    "ModelState",
    "Outcome",
    "RandomSource",
    "RandomStates",
    "Replay",
    "each_tensor",
    "generators_of",
    "host_random_states",
    "is_capturing",
    "is_observed",
    "kept_random_states",
    "leaves",
    "mapped",
    "nodes",
    "numpy_random",
    "random_states",
    "same_numbers",
    "same_random_states",
    "set_host_random_states",
    "set_random_states",
]

set_module(__name__, globals(), __all__)
for _public in (each_tensor, leaves, mapped, nodes):  # `kernels_core.nested` is outside of this package
    _public.__module__ = __name__
