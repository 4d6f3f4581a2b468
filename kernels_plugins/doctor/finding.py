"""`Finding`: one thing that was looked at, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass

OK, NOTE, PROBLEM = "ok", "note", "problem"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        area: The group that it belongs to, such as `hub`.
        subject: The thing.
        found: The state in which it is, in words.
        state: `ok`; `note`, for a surprise that may be wanted; `problem`, where something cannot work.
        remedy: What to do; empty where nothing is to be done.
    """

    area: str
    subject: str
    found: str
    state: str = OK
    remedy: str = ""
