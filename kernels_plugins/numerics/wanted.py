"""The properties of numbers that are wanted: required by a block, the process or the file, or only to be found out."""

from __future__ import annotations

from contextvars import ContextVar

from kernels_core import NUMERICS, LayerRequest, Numeric, WantedNumerics, configured

registered: list[Numeric] = []
"""The properties that `register_numerics` requires."""

found_out: list[bool] = []
"""Not empty once a property of some implementation was found out in this process."""


trying: ContextVar[bool] = ContextVar("kernels_plugins_numerics_trying", default=False)
"""Whether this thread calls an implementation to find out about it: no program has made such a call."""


def required(request: LayerRequest) -> tuple[Numeric, ...]:
    """Return the properties that the implementation for a request must have."""
    return wanted(request)


def wanted(request: LayerRequest, *, also_found: bool = False) -> tuple[Numeric, ...]:
    """Return the properties that are required for a request, or also those that are only to be found out."""
    names = {*registered, *(configured("numerics") or ())}
    for payload in request.scopes:
        if isinstance(payload, WantedNumerics) and (payload.required or also_found):
            names.update(payload.names)
    return tuple(name for name in NUMERICS if name in names)
