"""What each request tells the Hub about who asks, unless telemetry is switched off."""

from __future__ import annotations

from functools import cache

from ..builds.variants import Machine


def describe(caller: str | None) -> str:
    """Return what is added to the client's own words, which are library, client and Python.

    Args:
        caller: What the caller wants to be told, if anything.

    Example:
        >>> describe("my-app/7").split("; ")[::4]
        ['my-app/7', 'file_type/kernel']
    """
    return "; ".join([*([caller] if caller else []), *_surroundings()])


@cache
def _surroundings() -> tuple[str, ...]:
    import torch

    machine = Machine.here()
    parts = [f"backend/{machine.backend_tag}", f"platform/{machine.platform}", f"torch/{torch.__version__}"]
    if machine.tvm_ffi:
        parts.append("tvm-ffi/{}.{}".format(*machine.tvm_ffi))
    return (*parts, "file_type/kernel")
