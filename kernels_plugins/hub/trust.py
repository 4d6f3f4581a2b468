"""May this publisher's code run here? Asked before anything is fetched, remembered with the download."""

from __future__ import annotations

from kernels_core import UntrustedError

from . import download
from .cache import Pin
from .source import LayerRepository


def require_trust(source: LayerRepository, pin: Pin) -> str:
    """Return on what grounds the code of a repository may run.

    What counts is the repository that finally serves it: a trusted name that was moved into an
    untrusted organisation is not trusted.

    Raises:
        UntrustedError: If there are none; says how to allow it.
        UnreachableError: If the Hub cannot be asked.
    """
    if source.trusts(pin.repo_id):
        return "allowed by trust_remote_code"
    notes = download.notes(pin.repo_id)
    record = notes.record(pin.commit)
    owner = pin.repo_id.partition("/")[0]
    if record is not None and record.publisher_trusted:
        return f"{owner} was a trusted publisher when it was downloaded"
    if download.is_offline():
        raise UntrustedError(
            f"whether {owner!r} is a trusted publisher cannot be asked while HF_HUB_OFFLINE is set. Load it once "
            f"online, or allow it with LayerRepository(..., trust_remote_code=[{pin.repo_id!r}])"
        )
    if download.is_trusted_publisher(owner):
        notes.trust(pin.commit)
        return f"{owner} is a trusted publisher"
    moved = "" if pin.repo_id == source.repo_id else f" ({source.repo_id!r} was moved to {pin.repo_id!r})"
    raise UntrustedError(
        f"{owner!r} is not a trusted publisher{moved}, and its code would run in this process. If you trust it, "
        f"allow it with LayerRepository(..., trust_remote_code=[{pin.repo_id!r}])"
    )
