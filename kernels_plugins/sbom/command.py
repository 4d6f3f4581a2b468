"""The command `kernels-core sbom`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from kernels_core import receipt
from kernels_core.cli import CallMode, Factory, Json, Row, made, mode_of, print_rows, printing_aside, writing

from .document import bill_of_materials


def sbom(
    factory: Factory,
    device: Annotated[str | None, typer.Option(help="Device of the calls, such as cuda.")] = None,
    mode: Annotated[CallMode | None, typer.Option(help="Whether autograd records the calls.")] = None,
    traced: Annotated[bool, typer.Option("--compile", help="The calls are traced by torch.compile.")] = False,
    output: Annotated[Path | None, typer.Option(help="Write the CycloneDX document to this file, too.")] = None,
    as_json: Json = False,
) -> None:
    """Show the code that serves the layers of a model; with --json, as a bill of materials in the format CycloneDX.

    Lists commit, hashes, license, publisher and signature of each kernel, the packages of the references, and the
    operators of PyTorch that are replaced. Fetches and imports kernels, as the first calls would.
    """
    model = made(factory)
    with printing_aside():
        text = bill_of_materials(receipt(model, device=device, mode=mode_of(mode, traced, model)))
    if output is not None:
        with writing(output):
            output.write_text(text + "\n", encoding="utf-8")
    if as_json:
        print(text)
    else:
        print_rows([_row(component) for component in json.loads(text)["components"]])


def _row(component: Mapping[str, Any]) -> Row:
    known = {entry["name"]: entry["value"] for entry in component.get("properties", ())}
    licenses = [
        entry.get("expression") or next(iter(entry["license"].values())) for entry in component.get("licenses", ())
    ]
    return {
        "component": "/".join(filter(None, (component.get("group"), component["name"]))),
        "version": component.get("version", "")[:12],
        "publisher": component.get("publisher", ""),
        "license": licenses,
        "signature": known.get("kernels-core:signature", ""),
    }
