"""Trust in publishers: checked before anything is fetched, kept in the cache with the download."""

from __future__ import annotations

from kernels_core import configured

from ..errors import PublisherError
from ..request import KernelRequest
from .answers import share
from .board import ask_once
from .download import Client, metadata_cache
from .metadata_cache import Pin


def require_trust(request: KernelRequest, pin: Pin, client: Client) -> str:
    """Return the grounds on which the code of a repository may run.

    The repository that finally serves it decides: a trusted name that was moved into an untrusted organisation
    is not trusted.
    """
    if request.trusts(pin.repo_id):
        return "allowed by trust_remote_code"
    owner = pin.repo_id.partition("/")[0]
    trusted = configured("trusted") or {}
    if place := trusted.get(owner) or trusted.get(pin.repo_id):
        return f"trusted by {place.place}"
    known = metadata_cache(pin.repo_id)
    record = known.record(pin.commit)
    if record is not None and record.publisher_trusted:  # of this commit: a later one is asked about
        return f"{owner} was a trusted publisher when it was downloaded"
    allow = f"allow it with trust_remote_code=[{pin.repo_id!r}], or by the setting trusted of a configuration file"
    question = f"whether {owner} is a trusted publisher"

    def send() -> bool:
        if client.silence:
            raise PublisherError(
                f"whether {owner!r} is a trusted publisher cannot be asked while {client.silence} is set. Load it once "
                f"online, or {allow}"
            )
        return bool(share(question, known, lambda: client.is_trusted_publisher(owner), patience=2 * client.patience))

    if ask_once(question, send) is True:
        known.update_record(pin.commit, publisher_trusted=True)  # a refusal is not kept, and asked about again
        return f"{owner} is a trusted publisher"
    moved = "" if pin.repo_id == request.repo_id else f" ({request.repo_id!r} was moved to {pin.repo_id!r})"
    raise PublisherError(
        f"{owner!r} is not a trusted publisher{moved}, and its code would run in this process. If you trust it, {allow}"
    )
