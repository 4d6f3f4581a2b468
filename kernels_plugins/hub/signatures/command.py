"""The command `verify-signature`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer

from kernels_core import ArgumentError, IntegrityError
from kernels_core.cli import Json, Row, print_rows

from .. import fetching
from ..builds.integrity import Build, as_build, check_digest, read_files
from ..builds.metadata import METADATA
from ..builds.selection import local_builds, local_variant
from ..builds.variants import parse_variant
from ..command import keep_client_quiet, request_to_read, selected_builds
from ..errors import SignatureError, UnsignedError
from .signer import GITHUB, Signer, find_root, find_signers
from .verification import verify_build


def verify_signature(
    kernel: Annotated[str, typer.Argument(metavar="KERNEL", help="A repository, as owner/name, or a folder.")],
    version: Annotated[int | None, typer.Argument(help="The number of a version; by default the newest.")] = None,
    revision: Annotated[str | None, typer.Option(help="A branch, tag or commit.")] = None,
    all_variants: Annotated[
        bool, typer.Option("--all-variants", help="All builds, not only the one for this machine.")
    ] = False,
    filter_unsigned: Annotated[bool, typer.Option("--filter-unsigned", help="Leave out builds without one.")] = False,
    identity: Annotated[
        list[str] | None, typer.Option(help="Who has to have signed, whatever the setting signers; may be repeated.")
    ] = None,
    issuer: Annotated[str, typer.Option(help="With --identity: who vouches for it.")] = GITHUB,
    trusted_root: Annotated[Path | None, typer.Option(help="A file with authorities and logs to trust.")] = None,
    refresh: Annotated[bool, typer.Option("--refresh", help="Ask Sigstore for its present authorities first.")] = False,
    as_json: Json = False,
) -> None:
    """Verify who signed the builds of a kernel, and that no byte was changed since.

    Runs none of its code, and sends no request to Sigstore without --refresh. Exits with 1 where a signature is missing
    or not right.
    """
    keep_client_quiet()
    local = Path(kernel).is_dir()
    if local and (version, revision) != (None, None):
        raise ArgumentError(f"{kernel} is a folder: it has neither revisions nor versions; leave both out.")
    signers = tuple(Signer(one, issuer) for one in identity or ()) or find_signers("" if local else kernel)
    root = trusted_root or find_root()
    builds = (
        _in_folder(Path(kernel), all_variants) if local else _in_repository(kernel, revision, version, all_variants)
    )
    rows: list[Row] = []
    for name, read in builds:
        row: Row = {"variant": name, "signature": "valid", "signer": "", "reason": ""}
        try:
            build = read()
            found = verify_build(build, signers, root, refresh=refresh)
            row["signer"] = str(found)
            if not found.expected:
                row |= {"signature": "refused", "reason": "no signer is set for it: name one with --identity"}
        except (SignatureError, IntegrityError) as error:
            if filter_unsigned and isinstance(error, UnsignedError):
                continue
            row |= {"signature": "none" if isinstance(error, UnsignedError) else "refused", "reason": str(error)}
        rows.append(row)
    print_rows(rows, as_json, style=lambda row: "green" if row["signature"] == "valid" else "red")
    if any(row["signature"] != "valid" for row in rows):
        raise typer.Exit(1)


def _in_folder(folder: Path, every: bool) -> Iterator[tuple[str, Callable[[], Build]]]:
    """Yield the builds in a folder, by name, with the functions that read and check them."""
    with fetching.naming(str(folder)):
        places = [local_variant(folder)]
        if every and not (folder / METADATA).is_file():
            places = [place for place in local_builds(folder) if parse_variant(place.name) is not None]
    for place in places:

        def read(place: Path = place) -> Build:
            build = as_build(place, read_files(place))
            check_digest(build)
            return build

        yield place.resolve().name, read


def _in_repository(
    repo_id: str, revision: str | None, version: int | None, every: bool
) -> Iterator[tuple[str, Callable[[], Build]]]:
    """Yield the builds of a repository, as those of a folder."""
    for selected in selected_builds(request_to_read(repo_id, revision, version), every):

        def read(selected: fetching.SelectedBuild = selected) -> Build:
            return fetching.fetch_build(selected, verify=False).build

        yield selected.variant, read
