"""An authority that signs builds as Sigstore does: certificates, and the two logs for them and for signatures.

Nothing here is a mock: `sigstore` verifies these bundles against `trusted_root` as it verifies those of the world.
"""

from __future__ import annotations

import base64
import hashlib
import json
import struct
import subprocess
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID, ObjectIdentifier

from kernels_plugins.local_hub.testing import kernel_metadata

ISSUER = "https://token.actions.githubusercontent.com"
WORKFLOW = "https://github.com/acme/kernels/.github/workflows/build.yaml@refs/heads/main"
SOURCE = "https://github.com/acme/kernels"

_FULCIO = "1.3.6.1.4.1.57264.1."  # the extensions of Sigstore's certificates
_SCT = ObjectIdentifier("1.3.6.1.4.1.11129.2.4.2")
_SHA256 = ec.ECDSA(hashes.SHA256())


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _public(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def _key_usage(**used: bool) -> x509.KeyUsage:
    names = "digital_signature content_commitment key_encipherment data_encipherment key_agreement key_cert_sign"
    unused = dict.fromkeys([*names.split(), "crl_sign", "encipher_only", "decipher_only"], False)
    return x509.KeyUsage(**{**unused, **used})


class Authority:
    """A certificate authority with its two logs."""

    def __init__(self) -> None:
        """Make the keys, and the certificate of the authority."""
        self.key, self._ct, self._log = (ec.generate_private_key(ec.SECP256R1()) for _ in range(3))
        self._start = datetime.now(timezone.utc).replace(microsecond=0) - timedelta(days=300)
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test authority")])
        public = self.key.public_key()
        self._authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(public)
        self.certificate = (
            self._builder(public, self._name, self._start, self._start + timedelta(days=3000))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_key_usage(key_cert_sign=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .sign(self.key, hashes.SHA256())
        )
        self._clock = ec.generate_private_key(ec.SECP256R1())  # of the authority for timestamps
        stamping = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.TIME_STAMPING])
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test clock")])
        self._clock_certificate = (
            self._builder(self._clock.public_key(), subject, self._start, self._start + timedelta(days=3000))
            .add_extension(_key_usage(digital_signature=True), critical=True)
            .add_extension(stamping, critical=True)
            .add_extension(self._authority, critical=False)
            .sign(self.key, hashes.SHA256())
        )

    def _builder(self, public: Any, subject: x509.Name, start: datetime, end: datetime) -> x509.CertificateBuilder:
        named = x509.CertificateBuilder().issuer_name(self._name).subject_name(subject).public_key(public)
        return named.serial_number(x509.random_serial_number()).not_valid_before(start).not_valid_after(end)

    def write_trusted_root(self, path: Path) -> None:
        """Write the file that a verifier has to trust; `root` is its path then."""
        self.root = path
        start = {"start": f"{self._start:%Y-%m-%dT%H:%M:%SZ}"}

        def log(key: ec.EllipticCurvePrivateKey) -> dict[str, Any]:
            public = {"rawBytes": _b64(_public(key)), "keyDetails": "PKIX_ECDSA_P256_SHA_256", "validFor": start}
            identity = {"keyId": _b64(hashlib.sha256(_public(key)).digest())}
            return {
                "baseUrl": "https://log.invalid",
                "hashAlgorithm": "SHA2_256",
                "publicKey": public,
                "logId": identity,
            }

        def authority(*chain: x509.Certificate) -> dict[str, Any]:
            certificates = [{"rawBytes": _b64(certificate.public_bytes(Encoding.DER))} for certificate in chain]
            subject = {"organization": "test", "commonName": "test authority"}
            place = {"subject": subject, "uri": "https://ca.invalid"}
            return {**place, "certChain": {"certificates": certificates}, "validFor": start}

        kind = "application/vnd.dev.sigstore.trustedroot+json;version=0.1"
        lists = {"tlogs": [log(self._log)], "ctlogs": [log(self._ct)]}
        lists["certificateAuthorities"] = [authority(self.certificate)]
        lists["timestampAuthorities"] = [authority(self._clock_certificate, self.certificate)]
        path.write_text(json.dumps({"mediaType": kind, **lists}), encoding="utf-8")

    def sign(
        self,
        data: bytes,
        identity: str = WORKFLOW,
        issuer: str = ISSUER,
        source: str = SOURCE,
        late: int = 1,
        stamped: bool = False,
    ) -> bytes:
        """Return the bundle of a signature, which is logged so many minutes after the certificate was made.

        The certificate is valid for ten of them. The time is that of the log, or of a timestamp, as with newer logs.
        """
        logged = datetime.now(timezone.utc).replace(microsecond=0) - timedelta(days=0 if stamped else 30)
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self._certify(key, logged - timedelta(minutes=late), identity, issuer, source)
        signature = key.sign(data, _SHA256)
        digest = hashlib.sha256(data)
        pem = certificate.public_bytes(Encoding.PEM)
        signed = {"content": _b64(signature), "publicKey": {"content": _b64(pem)}}
        hashed = {"hash": {"algorithm": "sha256", "value": digest.hexdigest()}}
        record = {"apiVersion": "0.0.1", "kind": "hashedrekord", "spec": {"data": hashed, "signature": signed}}
        entry = self._log_entry(json.dumps(record, separators=(",", ":"), sort_keys=True).encode(), logged)
        raw = {"rawBytes": _b64(certificate.public_bytes(Encoding.DER))}
        material: dict[str, Any] = {"certificate": raw, "tlogEntries": [entry]}
        if stamped:
            verifier = {"keyDetails": "PKIX_ECDSA_P256_SHA_256", "x509Certificate": raw}
            named = {"algorithm": "SHA2_256", "digest": _b64(digest.digest())}
            newer = {"data": named, "signature": {"content": _b64(signature), "verifier": verifier}}
            record = {"apiVersion": "0.0.2", "kind": "hashedrekord", "spec": {"hashedRekordV002": newer}}
            entry = self._log_entry(json.dumps(record, separators=(",", ":"), sort_keys=True).encode(), logged)
            entry["kindVersion"]["version"] = "0.0.2"
            del entry["integratedTime"], entry["inclusionPromise"]
            stamps = {"rfc3161Timestamps": [{"signedTimestamp": _b64(self._stamp(signature))}]}
            material |= {"tlogEntries": [entry], "timestampVerificationData": stamps}
        message = {
            "messageDigest": {"algorithm": "SHA2_256", "digest": _b64(digest.digest())},
            "signature": _b64(signature),
        }
        kind = "application/vnd.dev.sigstore.bundle.v0.3+json"
        bundle = {"mediaType": kind, "verificationMaterial": material, "messageSignature": message}
        return json.dumps(bundle).encode()

    def _certify(
        self, key: ec.EllipticCurvePrivateKey, start: datetime, identity: str, issuer: str, source: str
    ) -> x509.Certificate:
        """Make a certificate with the promise of the certificate log in it, which is about all but itself."""
        builder = (
            self._builder(key.public_key(), x509.Name([]), start, start + timedelta(minutes=10))
            .add_extension(_key_usage(digital_signature=True), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING]), critical=False)
            .add_extension(self._authority, critical=False)
            .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(identity)]), critical=True)
            .add_extension(x509.UnrecognizedExtension(ObjectIdentifier(_FULCIO + "1"), issuer.encode()), critical=False)
        )
        for number, text in {"8": issuer, "12": source}.items():
            encoded = text.encode()
            length = bytes([len(encoded)] if len(encoded) < 128 else [0x81, len(encoded)])  # of DER
            value = x509.UnrecognizedExtension(ObjectIdentifier(_FULCIO + number), b"\x0c" + length + encoded)
            builder = builder.add_extension(value, critical=False)
        milliseconds = int(start.timestamp() * 1000)
        unsigned = builder.add_extension(_promise(hashlib.sha256(_public(self._ct)).digest(), milliseconds, b""), False)
        body = unsigned.sign(self.key, hashes.SHA256()).tbs_precertificate_bytes
        entry = hashlib.sha256(_public(self.key)).digest() + len(body).to_bytes(3, "big") + body
        promised = self._ct.sign(struct.pack("!BBQH", 0, 0, milliseconds, 1) + entry + b"\0\0", _SHA256)
        promise = _promise(hashlib.sha256(_public(self._ct)).digest(), milliseconds, promised)
        return builder.add_extension(promise, False).sign(self.key, hashes.SHA256())

    def _stamp(self, signature: bytes) -> bytes:
        """Return a timestamp of now; the command `openssl` makes it, for no library that we have does."""
        folder = self.root.parent
        key = self._clock.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        for name, data in {
            "clock.key": key,
            "clock.pem": self._clock_certificate.public_bytes(Encoding.PEM),
            "signature": signature,
            "serial": b"01",
            "ts.cnf": b"[tsa]\ndefault_tsa = t\n[t]\nserial = serial\nsigner_cert = clock.pem\nsigner_key = clock.key\n"
            b"signer_digest = sha256\ndefault_policy = 1.2.3\ndigests = sha256\ness_cert_id_alg = sha256\n",
        }.items():
            (folder / name).write_bytes(data)
        for command in (
            "openssl ts -query -data signature -sha256 -cert -out query",
            "openssl ts -reply -config ts.cnf -queryfile query -out reply",
        ):
            subprocess.run(command.split(), cwd=folder, check=True, capture_output=True)
        return (folder / "reply").read_bytes()

    def _log_entry(self, body: bytes, logged: datetime) -> dict[str, Any]:
        """Put a record into the transparency log, after another one, with the proof that it is there."""
        other, leaf = (hashlib.sha256(b"\0" + each).digest() for each in (b"another record", body))
        root = hashlib.sha256(b"\1" + other + leaf).digest()
        name = hashlib.sha256(_public(self._log)).digest()
        note = f"log.invalid - 1\n2\n{_b64(root)}\n"
        signature = self._log.sign(note.encode(), _SHA256)
        checkpoint = f"{note}\n\N{EM DASH} log.invalid {_b64(name[:4] + signature)}\n"
        time = int(logged.timestamp())
        promise = {"body": _b64(body), "integratedTime": time, "logID": name.hex(), "logIndex": 1}
        promised = self._log.sign(json.dumps(promise, separators=(",", ":"), sort_keys=True).encode(), _SHA256)
        proof = {"logIndex": "1", "rootHash": _b64(root), "treeSize": "2", "hashes": [_b64(other)]}
        return {
            "logIndex": "1",
            "logId": {"keyId": _b64(name)},
            "kindVersion": {"kind": "hashedrekord", "version": "0.0.1"},
            "integratedTime": str(time),
            "inclusionPromise": {"signedEntryTimestamp": _b64(promised)},
            "inclusionProof": {**proof, "checkpoint": {"envelope": checkpoint}},
            "canonicalizedBody": _b64(body),
        }


def _promise(log: bytes, milliseconds: int, signature: bytes) -> x509.UnrecognizedExtension:
    """Encode the promise of a certificate log: a list of one, in an octet string of DER."""
    promise = struct.pack("!B32sQH", 0, log, milliseconds, 0) + b"\4\3" + struct.pack("!H", len(signature)) + signature
    listed = struct.pack("!HH", len(promise) + 2, len(promise)) + promise
    length = bytes([len(listed)]) if len(listed) < 128 else b"\x81" + bytes([len(listed)])
    return x509.UnrecognizedExtension(_SCT, b"\4" + length + listed)


def signed_files(authority: Authority, layers: str, /, name: str = "kernels", **options: Any) -> dict[str, str | bytes]:
    """Return the files of a build with a signature, for `publish_kernels`; options are those of `Authority.sign`."""
    files: dict[str, str | bytes] = {"layers.py": layers, "__init__.py": "from . import layers\n"}
    metadata = json.dumps(kernel_metadata(name, files)).encode()
    return {**files, "metadata.json": metadata, "metadata.json.sigstore": authority.sign(metadata, **options)}
