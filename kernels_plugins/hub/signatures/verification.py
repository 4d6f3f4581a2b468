"""Verifies the signature of a build, without a request to anybody.

A builder signs `metadata.json`, whose digests name the bytes of all other files; the bundle `metadata.json.sigstore`
beside it has everything that a verifier needs: the signature, the certificate of the signer, and the proofs that both
are in public logs. Keys live for minutes, so what matters is whether the certificate was valid when the log took the
signature in, not whether it is now.

`sigstore` does the cryptography. Its errors are texts, so the stage at which it fails decides which of ours is raised.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

from kernels_core import visible

from ...locks import KeyedLocks
from ..builds.integrity import Build
from ..builds.metadata import METADATA, SIGNATURE
from ..errors import (
    AuthorityError,
    ExpiredError,
    PackageError,
    SignatureError,
    SignerError,
    TamperedError,
    UnsignedError,
)
from .signer import Signer

if TYPE_CHECKING:
    from cryptography.x509 import Certificate
    from sigstore.models import Bundle
    from sigstore.verify import Verifier

_quiet = KeyedLocks()


@dataclass(frozen=True)
class Verified:
    """A signature that is right."""

    identity: str  # the identity that the certificate names
    issuer: str  # who vouches for it
    expected: bool  # whether it is a signer that was asked for; False where none was

    def __str__(self) -> str:
        return f"{self.identity} (issuer {self.issuer})"


class _Stage:
    """A policy of `sigstore` that notes whether the certificate was in order, and whether its identity was."""

    def __init__(self, signers: Sequence[Signer]) -> None:
        self.signers = signers
        self.certified = self.accepted = False

    def verify(self, cert: Certificate) -> None:
        from sigstore.errors import VerificationError
        from sigstore.verify import policy

        self.certified = True  # sigstore asks for the policy after authority, time and certificate log
        for signer in self.signers:
            wanted: list[policy.VerificationPolicy] = [
                policy.Identity(identity=signer.identity),
                policy.AnyOf([policy.OIDCIssuerV2(signer.issuer), policy.OIDCIssuer(signer.issuer)]),
            ]
            if signer.source:
                wanted.append(policy.OIDCSourceRepositoryURI(signer.source))
            try:
                policy.AllOf(wanted).verify(cert)
            except VerificationError:
                continue
            self.accepted = True
            return
        if self.signers:
            raise VerificationError("another signer")


def verify_build(
    build: Build, signers: Sequence[Signer], root: Path | None = None, *, refresh: bool = False
) -> Verified:
    """Verify the signature of a build whose digests were checked.

    Args:
        build: The build, in memory: these bytes are imported later, and no others.
        signers: Any of these has to have signed; where there are none, the signer is only reported.
        root: The file with the authorities and logs to trust; None for those of Sigstore.
        refresh: Whether to ask Sigstore for its present authorities and logs, and keep them.

    Raises:
        PackageError: `sigstore` is not installed.
        SignatureError: It is missing, or not right: its kind says why.
    """
    if SIGNATURE not in build.files:
        raise UnsignedError(f"it has no signature ({SIGNATURE} is missing). Ask the publisher for a signed build")
    try:
        from sigstore.errors import CertValidationError
        from sigstore.models import Bundle
    except ImportError as error:
        raise PackageError(
            f"signatures cannot be verified without sigstore ({error}): pip install 'kernels-core[sigstore]'"
        ) from error
    verifier = _verifier(root, refresh)
    stage = _Stage(signers)
    bundle: Bundle | None = None
    try:
        bundle = Bundle.from_json(build.files[SIGNATURE])
        verified = Verified(*_named(bundle.signing_certificate), bool(signers))
        verifier.verify_artifact(build.files[METADATA], bundle, stage)
    except Exception as error:  # of a forged bundle: parsers of three libraries read it
        shown = visible(f"{type(error).__name__}: {error}")
        if bundle is None:
            raise SignatureError(f"{SIGNATURE} is malformed ({shown}). Do not use this kernel") from error
        if stage.certified and signers and not stage.accepted:
            raise SignerError(
                f"it is signed by {verified}{_from(_extension(bundle.signing_certificate, 12))}, not by "
                f"{' or '.join(f'{signer}{_from(signer.source)}' for signer in signers)}. Do not use this kernel; if "
                "its publisher has announced another signer, correct the setting signers"
            ) from error
        if stage.certified:
            raise TamperedError(
                f"its signature is not one of this {METADATA}: it was changed, or the signature was ({shown}). Do not "
                "use this kernel, and tell its publisher"
            ) from error
        if isinstance(error, CertValidationError) and (problem := _expiry(bundle)):
            raise ExpiredError(f"{problem}. Ask the publisher to sign it anew") from error
        raise AuthorityError(
            f"its certificate is not one of an authority that is trusted ({shown}). Do not use this kernel; if the "
            "publisher has an authority of its own, name the file with it in the setting trusted-root; if Sigstore "
            "has new ones, `kernels-core verify-signature --refresh` gets them"
        ) from error
    if build.metadata.digest is None:
        raise SignatureError(
            f"its signature covers none of its files: {METADATA} has no digest. Ask the publisher for a build that has"
        )
    return verified


def _verifier(root: Path | None, refresh: bool) -> Verifier:
    from sigstore.models import TrustedRoot
    from sigstore.verify import Verifier

    try:
        if root is not None:
            return Verifier(trusted_root=TrustedRoot.from_file(str(root)))
        with _quietly():
            return Verifier.production(offline=not refresh)
    except Exception as error:  # also of the network, and of a home that cannot be written
        what = f"the trusted root {root}" if root else "the trusted root of Sigstore"
        raise AuthorityError(
            f"{what} cannot be used ({type(error).__name__}: {error}). Name one that can be read in the setting "
            "trusted-root"
        ) from error


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep `sigstore` from logging that it sends no request: that is how we want it."""
    logger = logging.getLogger("sigstore")
    with _quiet.hold():  # or the level of one thread would be restored by another
        level = logger.level
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)


def _named(certificate: Certificate) -> tuple[str, str]:
    """Return the identity in a certificate, and who vouches for it."""
    from cryptography import x509

    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    found: list[str] = [*names.get_values_for_type(x509.UniformResourceIdentifier)]
    found += names.get_values_for_type(x509.RFC822Name)
    return ", ".join(found) or "a signer of another kind", _extension(certificate, 8) or _extension(certificate, 1)


def _from(source: str) -> str:
    """Name the repository whose sources were built, if there is one."""
    return f" from {visible(source)}" if source else ""


def _extension(certificate: Certificate, number: int) -> str:
    """Return a text that Sigstore's authority writes into certificates; empty if there is none."""
    from cryptography import x509

    try:
        found = certificate.extensions.get_extension_for_oid(x509.ObjectIdentifier(f"1.3.6.1.4.1.57264.1.{number}"))
    except x509.ExtensionNotFound:
        return ""
    value: bytes = found.value.public_bytes()
    if number != 1:  # newer ones are texts of DER: a tag, a length of one byte, or after 0x81 and 0x82 of more
        value = value[2 + max(0, value[1] - 0x80) :]
    return value.decode(errors="replace")


def _expiry(bundle: Bundle) -> str:
    """Describe a certificate that was not valid when a log or a timestamp took the signature in; else nothing."""
    times = [
        datetime.fromtimestamp(int(entry["integratedTime"]), timezone.utc)
        for entry in json.loads(bundle.to_json())["verificationMaterial"]["tlogEntries"]
        if int(entry.get("integratedTime") or 0)
    ]
    if stamps := bundle.verification_material.timestamp_verification_data:
        times += [stamp.tst_info.gen_time for stamp in stamps.rfc3161_timestamps]
    certificate = bundle.signing_certificate
    start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    late = next((time for time in times if not start <= time <= end), None)
    if late is None:
        return ""
    return (
        f"its certificate was valid from {start:%Y-%m-%d %H:%M} to {end:%Y-%m-%d %H:%M} UTC, and the signature is of "
        f"{late:%Y-%m-%d %H:%M} UTC: it had expired, or was not valid yet"
    )
