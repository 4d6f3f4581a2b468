"""Write the page of hooks and the table of modes from the code.

`hooks.md` comes from the docstrings in `kernels_core/hookspecs.py`; the table of stand-ins in
`mapping.md` from `kernels_core.STAND_INS`. Run without arguments to write them, or with `--check` to
exit with 1 where they are not current.
"""

from __future__ import annotations

import inspect
import re
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kernels_core import STAND_INS, Mode, hookspecs

DOCS = Path(__file__).resolve().parent

HEAD = """\
<!-- Written by docs/generate_hooks.py from kernels_core/hookspecs.py: change it there. -->

# Hooks

A plugin implements any of these hooks, with any of their arguments, by name. How to write one:
[write a plugin](write-a-plugin.md). When each is called: [the path of a call](path-of-a-call.md#cold-one-decision).

| Kind | Means |
|---|---|
| first result | The first plugin that answers decides. |
| collect | All answers are used. |
| veto | A reason refuses; None lets pass. |
| tell | The answer is ignored. |

An exception in a hook names the plugin and does not stop the others. In a veto, also in a wrapper of one, and in
`kernels_load_layer`, it refuses the candidate. For any other hook a warning reports it once;
`KERNELS_STRICT=1` raises it.

The examples need these names:

```python
from kernels_core import Candidate, hookimpl
```
"""

BEGIN = "<!-- stand-ins: written by docs/generate_hooks.py from kernels_core.STAND_INS -->"
END = "<!-- end of stand-ins -->"


def find_hooks() -> dict[str, Callable[..., Any]]:
    """Return the hook specifications, in the order of the file."""
    return {name: spec for name, spec in vars(hookspecs).items() if name.startswith("kernels_")}


def render_hooks() -> str:
    """Return the page of hooks."""
    hooks = find_hooks()
    rows = [
        f"| [`{name}({', '.join(inspect.signature(spec).parameters)})`](#{name}) | {kind(spec)} | {summary(spec)} |"
        for name, spec in hooks.items()
    ]
    table = "\n".join(["| Hook | Kind | Job |", "|---|---|---|", *rows])
    return "\n".join([HEAD, table, "", *(render_hook(name, spec) for name, spec in hooks.items())])


def render_hook(name: str, spec: Callable[..., Any]) -> str:
    """Return the card of one hook."""
    parts = [f"## {name}", "", f"`{name}{inspect.signature(spec)}`".replace("'", ""), ""]
    for block in re.split(r"\n\n+(?=\S)", inspect.cleandoc(spec.__doc__ or "")):
        parts += [*render_block(block), ""]
    return "\n".join(parts)


def render_block(block: str) -> list[str]:
    """Return one block of a docstring as Markdown: a Google section, a line of facts, or text."""
    heading, _, body = block.partition("\n")
    if heading in ("Args:", "Returns:", "Example:"):
        body = re.sub(r"(?<=[^`\n])\n\n(?=@hookimpl)", "\n\n\n", textwrap.dedent(body).strip())  # as ruff wants it
        if heading == "Args:":
            items = re.split(r"\n(?=\S)", body)
            body = "\n".join("- `{}`: {}".format(*item.split(":", 1)).replace(":  ", ": ") for item in items)
            body = re.sub(r"\n\s+", "\n  ", body)
        return [f"**{heading.removesuffix(':')}**", "", body]
    return [re.sub(r"(?:(?<=^)|(?<=\. ))(Kind|Called|Used by):", r"**\1:**", block, flags=re.MULTILINE)]


def kind(spec: Callable[..., Any]) -> str:
    """Return the kind of a hook, from its card."""
    found = re.search(r"Kind: ([a-z ]+)", spec.__doc__ or "")
    if found is None:
        raise ValueError(f"the card of {spec.__name__} does not say its kind: write 'Kind: ...'")
    return found[1]


def summary(spec: Callable[..., Any]) -> str:
    """Return the first line of a card."""
    return inspect.cleandoc(spec.__doc__ or "").partition("\n")[0]


def render_stand_ins() -> str:
    """Return the table of modes."""
    rows = [f"| {mode_text(call)} | {', '.join(map(mode_text, found))} |" for call, found in STAND_INS.items()]
    return "\n".join(["| A call that is | is served by sources for, best first |", "|---|---|", *rows])


def mode_text(mode: Mode) -> str:
    """Return a mode as users write it."""
    return "`" + " | ".join(str(flag.name) for flag in Mode if flag in mode).replace("|", "\\|") + "`"


def render_mapping() -> str:
    """Return the page of mappings with a current table."""
    before, _, rest = (DOCS / "mapping.md").read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    return f"{before}{BEGIN}\n\n{render_stand_ins()}\n\n{END}{after}"


def main(arguments: list[str]) -> int:
    """Write the pages, or check them; return the exit code."""
    stale = 0
    for name, text in {"hooks.md": render_hooks(), "mapping.md": render_mapping()}.items():
        page = DOCS / name
        if page.exists() and page.read_text(encoding="utf-8") == text:
            continue
        if "--check" in arguments:
            print(f"docs/{name} is not current: run python docs/generate_hooks.py")
            stale = 1
        else:
            page.write_text(text, encoding="utf-8")
            print(f"wrote docs/{name}")
    return stale


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
