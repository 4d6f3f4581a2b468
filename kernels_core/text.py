"""Text from elsewhere, made fit to be shown: names and metadata of repositories, messages of other libraries."""

from __future__ import annotations

import re

_SECRET = re.compile(r"(?<=://)[^/\s]+(?=@)|(?<![\w/])[^\s/:@]+:[^\s/]+(?=@)|(?<=Bearer )[^\s'\"]+")
"""The part of a URL before the host, and a token as the header of a request has it."""


def cleaned(text: str, limit: int | None = None) -> str:
    """Write control characters out, leave secrets out, and cut a text that is longer than a limit; keep line ends."""
    if limit is not None and len(text) > limit:
        text = _SECRET.sub("***", text[: 2 * limit])[: limit - 1] + "…"  # secrets first: half of one has no end
    else:
        text = _SECRET.sub("***", text)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
