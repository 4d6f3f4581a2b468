"""The user agent of each request, unless telemetry is switched off."""

from __future__ import annotations

from functools import cache

from ..builds.machine import this_machine


def describe(caller: str | None) -> str:
    """Return the parts that are added to those of the client, which are library, client and Python.

    Example:
        >>> describe("my-app/7").split("; ")[::4]
        ['my-app/7', 'file_type/kernel']
    """
    return "; ".join([*([caller] if caller else []), *_parts()])


@cache
def _parts() -> tuple[str, ...]:
    import torch

    machine = this_machine()
    parts = [f"backend/{machine.backend_tag}", f"platform/{machine.platform}", f"torch/{torch.__version__}"]
    if machine.tvm_ffi:
        parts.append("tvm-ffi/{}.{}".format(*machine.tvm_ffi))
    return (*parts, "file_type/kernel")
