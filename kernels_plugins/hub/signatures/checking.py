"""Checks the signature of a build before it is imported, as far as the policy asks for it."""

from __future__ import annotations

from kernels_core import strict, warn_once

from ..builds.integrity import Build
from ..builds.metadata import SIGNATURE
from ..errors import PackageError, SignatureError, SignerError, UnsignedError
from .signer import VARIABLE, find_policy, find_root, find_signers
from .verification import verify_build


def check_signature(build: Build, repo_id: str, place: str) -> dict[str, str]:
    """Describe the signature of a build, as checks of a kernel are; refuse it where the policy says so.

    Where no policy is set, signatures are verified that are there, if `sigstore` is.

    Args:
        build: The build, whose digests were checked.
        repo_id: The repository that serves it; empty for a folder.
        place: The request and the build, for a warning.

    Raises:
        SignatureError: It is missing or not right, and the policy is `require`.
        PackageError: `sigstore` is not installed, and the policy is `require`.
    """
    policy, signed = find_policy(), SIGNATURE in build.files
    if policy == "off":
        return {"signature": "not checked: signatures are off"} if signed else {}
    if not signed and (policy is None or (policy == "warn" and not repo_id)):
        return {}  # nobody promised one: the policy is not set, or the folder is the user's own
    try:
        verified = verify_build(build, find_signers(repo_id), find_root())
        if not verified.expected and policy is not None:
            owner = repo_id.partition("/")[0]
            raise SignerError(
                f"it is signed by {verified}, and the setting signers has none for {owner!r}. If you trust that one, "
                f"add it as [signers.{owner}] to a configuration file"
            )
    except (SignatureError, PackageError) as error:
        missing = isinstance(error, PackageError)
        if policy == "require" or (strict() and not (missing and policy is None)):
            raise
        if not missing or policy is not None:
            again = f"It is loaded nevertheless; {VARIABLE}=require, or the setting signatures, refuses it"
            key = "sigstore" if missing else build.fingerprint  # the missing package once, for all kernels
            warn_once(f"{place}: {error}. {again}.", key=("signatures", key))
        return {"signature": f"not verified: {error}"}
    unexpected = "" if verified.expected else "; the setting signers has none to compare it with"
    return {"signature": f"by {verified}{unexpected}"}


def refuse_unsigned(reason: str) -> None:
    """Refuse code of a publisher that signatures cannot cover, where the policy is `require`."""
    if find_policy() == "require":
        raise UnsignedError(f"{reason}. {VARIABLE}=warn allows them")
