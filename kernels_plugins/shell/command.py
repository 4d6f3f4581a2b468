"""The script `kernels-core`: the command line of the core, and a fast way to complete words in a shell."""

from __future__ import annotations

import contextlib
import os
from typing import Any

from .outline import describe, find_outline, keep_outline

_NAME = "kernels-core"
_ASKED = "_KERNELS_CORE_COMPLETE"
"""The variable that the shell sets when it wants words, and nothing else."""


def main() -> None:
    """Run the command line; or, for a shell that completes a word, only answer that."""
    outline = find_outline()
    if outline is not None and os.environ.get(_ASKED):
        from .completion import application

        application(outline)(prog_name=_NAME)
        return
    from kernels_core.cli import command_line, run

    def start() -> None:
        cli = command_line()
        try:
            cli(prog_name=_NAME)
        finally:
            # Afterwards: it asks plugins for their offers, and a command that does not would report their faults.
            if outline is None:
                with contextlib.suppress(Exception):  # the words for a shell are worth no error
                    keep_outline(_outline(cli))

    run(start)


def _outline(cli: Any) -> dict[str, Any]:
    from kernels_core.cli import plugin_rows

    from ..adoption.rule import find_rules

    layers = {rule.layer_name for rule in find_rules(None)} | {name for row in plugin_rows() for name in row["layers"]}
    return {**describe(cli), "layers": sorted(layers)}
