"""The command `kernels-core doctor`: looks at this machine, and says what keeps kernels from serving."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import importlib_metadata
import typer
from rich.console import Console

from kernels_core import KernelsError, Table, TableRow, plugin_manager
from kernels_core import as_json as to_json
from kernels_core.cli import Json, plugin_rows, print_found

from .finding import NOTE, OK, PROBLEM, Finding
from .hub import check_cache, check_hub, check_locks, check_trust
from .machine import check_machine
from .settings import check_settings

_STYLES = {OK: "", NOTE: "yellow", PROBLEM: "red"}


def doctor(
    offline: Annotated[bool, typer.Option("--offline", help="Send no request to the Hub.")] = False,
    as_json: Json = False,
) -> None:
    """Look at this machine, its plugins, the Hub and the cache, and show problems and what to do about each.

    Waits a few seconds for the Hub, and sends nothing else; no token is shown. Exits with 1 where there is a problem.
    """
    found: list[Finding] = []
    console = Console(stderr=True)
    with console.status("looking") as status:  # draws nothing where standard error is no terminal
        for finding in _all(offline):
            found.append(finding)
            status.update(f"looking at: {finding.area}")
    states = Counter(finding.state for finding in found)
    if as_json:
        print(to_json({"ok": not states[PROBLEM], "findings": found}))
    else:
        columns = ("area", "subject", "state", "found")
        rows = [
            TableRow(
                (one.area, one.subject, one.state, one.found),
                _STYLES[one.state],
                [one.remedy] if one.remedy else (),
                one.subject,
            )
            for one in found
        ]
        summary = f"problems: {states[PROBLEM]}, notes: {states[NOTE]}"
        print_found(Table(columns, rows, summary=summary))
    raise typer.Exit(1 if states[PROBLEM] else 0)


def _all(offline: bool) -> Iterator[Finding]:
    """Yield all findings; an examination that fails is one, too, and the others go on."""
    areas: dict[str, Callable[[], Iterator[Finding]]] = {
        "machine": check_machine,
        "plugins": _plugins,
        "variables": check_settings,
        "trust": check_trust,
        "locks": lambda: check_locks(Path.cwd()),
        "cache": check_cache,
        "hub": lambda: check_hub(offline),
    }
    for area, check in areas.items():
        try:
            yield from check()
        except Exception as error:
            found = str(error) if isinstance(error, KernelsError) else f"{type(error).__name__}: {error}"
            yield Finding(area, "examination", found, PROBLEM)


def _plugins() -> Iterator[Finding]:
    """Yield the plugins: loaded, failed, blocked, and tied."""
    rows = plugin_rows()
    loaded = plugin_manager().plugins()
    yield Finding("plugins", "loaded", ", ".join(loaded))
    installed = {entry.name for entry in importlib_metadata.entry_points(group="kernels_core")}
    if blocked := sorted(name for name in installed if not plugin_manager().allows(name)):
        found = f"KERNELS_PLUGINS, or the setting plugins, leaves out {', '.join(blocked)}"
        yield Finding("plugins", "blocked", found, NOTE, "Unset it, or name them there, to load them.")
    for row in rows:
        for fault in row["faults"]:
            yield Finding("plugins", row["name"], fault, PROBLEM)
    for tie in dict.fromkeys(tie for row in rows for tie in row["ties"]):
        yield Finding("plugins", "tie", tie, PROBLEM)
