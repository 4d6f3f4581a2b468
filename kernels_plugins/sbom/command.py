"""The command `kernels-core sbom`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kernels_core import Mode, receipt
from kernels_core.cli import CallMode, made, printing_aside, writing

from .document import bill_of_materials


def sbom(
    factory: Annotated[str, typer.Argument(help="A module, or a function that makes one, as package.module:name.")],
    device: Annotated[str | None, typer.Option(help="Device of the calls, such as cuda.")] = None,
    mode: Annotated[CallMode | None, typer.Option(help="Whether autograd records the calls.")] = None,
    traced: Annotated[bool, typer.Option("--compile", help="The calls are traced by torch.compile.")] = False,
    output: Annotated[Path | None, typer.Option(help="The file to write; by default, it is printed.")] = None,
) -> None:
    """Write a bill of materials of a model: the code that serves its layers, as CycloneDX in JSON.

    Lists commit, hashes, license, publisher and signature of each kernel, the packages of the references, and the
    operators of PyTorch that are replaced. Fetches and imports kernels, as the first calls would.
    """
    model = made(factory)
    if mode is None:  # as the model is
        mode = CallMode.training if getattr(model, "training", False) else CallMode.inference
    chosen = Mode[mode.value.upper()] | (Mode.TORCH_COMPILE if traced else Mode(0))
    with printing_aside():
        text = bill_of_materials(receipt(model, device=device, mode=chosen))
    if output is None:
        print(text)
        return
    with writing(output):
        output.write_text(text + "\n", encoding="utf-8")
