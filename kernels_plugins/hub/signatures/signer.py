"""Who is to sign the builds of a publisher: the settings `signatures`, `signers` and `trusted-root`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernels_core import ArgumentError, ConfigSection, configured

from ..names import is_repo_id

VARIABLE = "KERNELS_SIGNATURES"
POLICIES = ("off", "warn", "require")

GITHUB = "https://token.actions.githubusercontent.com"
"""The issuer that vouches for the workflows of GitHub."""
_SITE = "https://github.com/"
_COMMUNITY = f"{_SITE}huggingface/kernels-community"


@dataclass(frozen=True)
class Signer:
    """An identity that a certificate has to name.

    Example:
        >>> Signer("https://github.com/acme/kernels/.github/workflows/build.yaml@refs/heads/main").source
        'https://github.com/acme/kernels'
    """

    identity: str  # a workflow, or the address of a person
    issuer: str = GITHUB  # who vouches for the identity
    repository: str = ""  # the repository whose sources were built, where it is not that of the workflow

    @property
    def source(self) -> str:
        """The repository that the certificate has to name; empty for a person.

        Without it, a workflow that others may call would sign whatever they build with it.
        """
        if self.repository or self.issuer != GITHUB or not self.identity.startswith(_SITE):
            return self.repository
        return _SITE + "/".join(self.identity.removeprefix(_SITE).split("/")[:2])

    def __str__(self) -> str:
        return f"{self.identity} (issuer {self.issuer})"


_workflows = ("build", "build-mac", "build-windows", "sign-old-builds")
KNOWN = {
    "kernels-community": tuple(
        Signer(f"{_COMMUNITY}/.github/workflows/{name}.yaml@refs/heads/main") for name in _workflows
    )
}
"""The signers that Hugging Face's `kernels` trusts: the workflows that build the kernels of its organisation."""


def find_policy() -> str | None:
    """Return the policy of the variable, else that of the configuration file; None where neither says one.

    Raises:
        ArgumentError: The variable has another word.
    """
    text = os.environ.get(VARIABLE)
    if text is None:
        policy: str | None = configured("signatures")
        return policy
    text = text.strip().lower()
    if text and text not in POLICIES:
        raise ArgumentError(f"{VARIABLE}={text!r} is no policy: set it to {', '.join(POLICIES)}, or unset it.")
    return text or None


def find_signers(repo_id: str) -> tuple[Signer, ...]:
    """Return the signers of a repository: its own, else those of its owner; for a folder (empty), all."""
    known: Mapping[str, tuple[Signer, ...]] = {**KNOWN, **(configured("signers") or {})}
    if not repo_id:
        return tuple(dict.fromkeys(signer for signers in known.values() for signer in signers))
    return known.get(repo_id) or known.get(repo_id.partition("/")[0]) or ()


def find_root() -> Path | None:
    """Return the file with the authorities and logs to trust; None for those of Sigstore."""
    path: Path | None = configured("trusted-root")
    return path


def _parse_policy(section: ConfigSection) -> str:
    text = section.as_text()
    if text not in POLICIES:
        raise section.error(f"{text!r} is no policy: write any of {', '.join(POLICIES)}.")
    return text


def _parse_signers(section: ConfigSection) -> dict[str, tuple[Signer, ...]]:
    """Parse `signers`: for an organisation, or a repository as `owner/name`, a table or a list of tables."""
    signers = {}
    for name, entry in section.as_table().items():
        if not (is_repo_id(name) or is_repo_id(f"{name}/name")):
            raise entry.error(f"{name!r} is neither an organisation nor a repository: write 'owner' or 'owner/name'.")
        tables = entry.as_list() if isinstance(entry.value, list) else [entry]
        signers[name] = tuple(_parse_signer(table) for table in tables)
        if not tables:
            raise entry.error("it names no signer: write a table with identity and issuer, or delete it.")
    return signers


def _parse_signer(section: ConfigSection) -> Signer:
    table = section.as_table(("identity", "issuer", "repository"))
    if "identity" not in table:
        raise section.error("identity is missing: write the workflow, or the address of the person, that signs.")
    return Signer(**{key: value.as_text() for key, value in table.items()})


def _parse_root(section: ConfigSection) -> Path:
    return section.path.parent / os.path.expanduser(section.as_text())


SETTINGS: Mapping[str, Any] = {
    "signatures": _parse_policy,
    "signers": _parse_signers,
    "trusted-root": _parse_root,
}
"""The settings of this folder, and the functions that read them."""
