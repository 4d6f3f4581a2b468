"""The command `kernels-core new-plugin`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from kernels_core import as_json as to_json
from kernels_core.cli import Json

from .package import Names, render, write


def new_plugin(
    name: Annotated[str, typer.Argument(help="Name of the package, such as acme-kernels.")],
    layer: Annotated[str, typer.Option(help="Name of the layer that its kernels serve.")] = "RMSNorm",
    directory: Annotated[
        Path | None, typer.Option(help="A new folder for it; by default NAME in the current one.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write the package of a new plugin: kernels in PyTorch and Triton, tests, and a workflow for GitHub.

    It can be installed and passes its tests as it is. Writes everything or nothing.
    """
    names = Names(name, layer)
    folder = Path(name) if directory is None else directory
    files = render(names)
    write(files, folder)
    steps = [f"cd {shlex.quote(str(folder))}", "pip install -e '.[test]'", "python -m pytest", "kernels-core plugins"]
    if as_json:
        print(to_json({"folder": str(folder), "plugin": names.plugin, "files": list(files), "next": steps}))
        return
    print(f"{folder} has the plugin {names.plugin!r}, with kernels for the layer {layer!r}:")
    print(*(f"  {place}" for place in files), "", "Next:", *(f"  {step}" for step in steps), sep="\n")
    if layer != "RMSNorm":
        print(f"\nThey compute an RMSNorm: write the forward of {layer} as the reference, and kernels for it.")
