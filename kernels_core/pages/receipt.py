"""The page of a receipt: a summary, then equal layers together, with the reasons."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from ..models.receipt_row import ReceiptRow, together
from ..table import TableRow
from .bars import Bars
from .page import Page, Section

_UNEXPLAINED = "no kernel is offered for it"

_FEW = 6
"""Groups of layers on the reference that are open at first."""


def receipt_page(rows: Sequence[ReceiptRow], about: Mapping[str, str], faults: Sequence[str]) -> Page:
    """Return the page of a receipt.

    Args:
        rows: The layers.
        about: Facts for the end of the page: versions, date.
        faults: The faults of plugins.
    """
    groups: dict[object, list[ReceiptRow]] = {}
    for row in rows:
        groups.setdefault((row.layer_name, row.cells[2:6], tuple(row.remarks)), []).append(row)
    alike = sorted(groups.values(), key=len, reverse=True)
    vary = len({(row.device, row.mode) for row in rows}) > 1
    references = [group for group in alike if group[0].is_reference]
    bypassed = [group for group in alike if group[0].is_bypassed]
    kernels = [group for group in alike if not (group[0].is_reference or group[0].is_bypassed)]
    parts: list[object] = []
    if faults:
        parts.append(Section("Plugins that failed, and may have had kernels", faults, style="red"))
    parts.append(
        Section("Who serves", [Bars(list(_shares(alike)))])
        if rows
        else "No layer of this model is decorated: decorate one, or adopt the model."
    )
    if references:
        shown = [_group(group, vary, folded=len(references) > _FEW) for group in references]
        parts.append(Section("On the reference, and why", shown))
    if kernels:
        parts.append(Section("Served by kernels", [_group(group, vary, folded=True) for group in kernels]))
    if bypassed:
        parts.append(Section("Not called", [_group(group, vary, folded=True) for group in bypassed]))
    facts = {name: value for name, value in about.items() if name != "model"}
    title = f"Receipt: {about['model']}" if "model" in about else "Receipt"
    lead = "The kernel that serves each layer, and why each other layer runs its own forward, the reference."
    return Page(title, [*parts, *([facts] if facts else [])], lead, list(_cards(rows)))


def _cards(rows: Sequence[ReceiptRow]) -> Iterator[TableRow]:
    not_called, rows = len(rows), [row for row in rows if not row.is_bypassed]
    not_called -= len(rows)
    on_kernels = sum(not row.is_reference for row in rows)
    yield TableRow(
        (f"{on_kernels} of {len(rows)}", "layers are served by kernels"), "green" if on_kernels else "yellow"
    )
    if left := len(rows) - on_kernels:
        yield TableRow((left, "on the reference"), "yellow")
    if not_called:
        yield TableRow((not_called, "not called: kernels of others compute them"), "dim")
    for name in ("device", "mode"):
        if values := list(dict.fromkeys(getattr(row, name) for row in rows)):
            yield TableRow(
                (values[0] if len(values) == 1 else f"{len(values)} {name}s", name), notes=values[1:] and values
            )
    calls = _calls(rows)
    if calls is not None:
        yield TableRow((f"{calls.total():,}", "calls counted"), notes=[f"{calls['reference']:,} on the reference"])


def _calls(rows: Sequence[ReceiptRow]) -> Counter[str] | None:
    """Return the calls per origin; None where none was counted."""
    counts = [Counter(row.calls) for row in rows if row.calls is not None]
    return sum(counts, Counter()) if counts else None


def _shares(groups: Sequence[Sequence[ReceiptRow]]) -> Iterator[TableRow]:
    """Yield a bar for each kernel, and for each reason for the reference."""
    shares: Counter[tuple[str, str, str]] = Counter()
    for group in groups:
        row = group[0]
        if row.is_reference:
            cause = next(iter(row.remarks), _UNEXPLAINED).partition("\n")[0]
            shares["reference", cause, "yellow"] += len(group)
        else:
            shares[row.origin, f"plugin {row.plugin}" if row.plugin else "", row.style] += len(group)
    for (label, note, style), count in shares.most_common():
        yield TableRow((label, count, _counted(count)), style, [note] if note else [])


def _counted(count: int) -> str:
    return f"{count} layer{'s' * (count != 1)}"


def _group(rows: Sequence[ReceiptRow], vary: bool, *, folded: bool) -> Section:
    """Return layers that are served alike, with the reasons, to be opened for their paths."""
    row = rows[0]
    patterns = [each.cells[0] for each in together(replace(each, calls=None) for each in rows)]
    notes = [_counted(len(rows)), *([f"{row.device}, {row.mode}"] if vary else [])]
    if row.is_reference:
        notes.append(patterns[0] + (f" and {len(patterns) - 1} more" if patterns[1:] else ""))
    else:
        notes += [row.cells[4], *([f"plugin {row.plugin}"] if row.plugin else [])]
    facts = {"layer": row.layer, **({} if row.is_reference else {"runs": row.implementation})}
    facts |= {"checks": ", ".join(f"{name}: {result}" for name, result in row.checked.items())} if row.checked else {}
    if (calls := _calls(rows)) is not None:
        facts["calls"] = ", ".join(f"{count:,} {origin}" for origin, count in calls.items()) or "0"
    paths = [each.cells[0] + (f" (calls: {each.cells[6]})" if each.calls is not None else "") for each in rows]
    parts = [*_reasons(row), *([patterns] if patterns[1:] or not row.is_reference else []), facts]
    if len(patterns) < len(paths):
        parts.append(Section(f"All {len(paths)} paths", [paths], folded=True))
    return Section(row.layer_name, parts, " · ".join(notes), row.style, folded)


def _reasons(row: ReceiptRow) -> Iterator[object]:
    if row.note:
        yield row.note
    if row.bypasses:
        yield f"bypasses {', '.join(row.bypasses)}"
    for candidate, reason in row.refusals:
        yield Section(candidate, [reason], "refused", "red")
    for candidate, reason in row.misfits if row.is_reference else ():
        yield Section(candidate, [reason], "not for this call", "dim")
    if row.is_reference and not list(row.remarks):
        yield f"Nothing was refused: {_UNEXPLAINED}."
