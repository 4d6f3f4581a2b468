"""The command line `kernels-core`: lists plugins and hooks, and shows which kernels serve a layer or a model.

Tables on a terminal, aligned columns in a pipe, `--json` for programs. Exit codes:

| code | meaning |
|---|---|
| 0 | success |
| 1 | an answer, but a bad one: the reference would run, a requirement fails, or a plugin is at fault |
| 2 | no answer: a wrong argument, a `KernelsError`, or any other error |

Plugins add commands with the hook `kernels_register_commands`.
"""

from __future__ import annotations

import inspect
import itertools
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import importlib_metadata
import torch
import typer
from rich.console import Console

from .. import __version__, hookspecs
from ..answer import describe_tie, find_rivals
from ..environment import switch
from ..errors import ArgumentError, KernelsError, KernelsWarning, PluginError, RequirementError
from ..guards.numerics import NUMERICS, Numeric, WantedNumerics
from ..mode import STAND_INS, Mode
from ..models.receipt import receipt
from ..plugins import ENTRY_POINT_GROUP, plugin_manager
from ..raised import error_text
from ..resolution import Refusal, Resolution
from ..resolver import find_candidates, resolve
from ..scopes.scope import Scope
from ..settings.report import configuration
from ..table import as_json as to_json
from ..table import visible
from .arguments import (
    CallMode,
    Factory,
    Json,
    imported,
    made,
    mode_of,
    printing_aside,
    using_device,
    with_inputs,
    writing,
)
from .decisions import decisions, freeze
from .printing import Row, print_error, print_found, print_rows

__all__ = [
    "CallMode",
    "Factory",
    "Json",
    "Row",
    "command_line",
    "imported",
    "made",
    "main",
    "mode_of",
    "plugin_rows",
    "print_error",
    "print_found",
    "print_rows",
    "printing_aside",
    "run",
    "using_device",
    "with_inputs",
    "writing",
]


def main() -> None:
    """Run the command line."""
    run(lambda: command_line()())


def run(command: Callable[[], object]) -> None:
    """Run a command; an error of ours is a line on standard error, any other a traceback: exit code 2."""
    try:
        command()
    except Exception as error:  # not caught, Python would exit with 1, which is an answer
        if isinstance(error, KernelsError):
            print_error(error)
        else:
            traceback.print_exc()
        sys.exit(2)


def command_line() -> typer.Typer:
    """Return the application, with the commands of the plugins."""
    cli = typer.Typer(
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich" if sys.stdout.isatty() else None,
    )
    cli.callback()(_start)
    cli.command()(plugins)
    cli.command()(hooks)
    cli.command("resolve")(resolve_layer)
    cli.command()(explain)
    cli.command()(config)
    cli.command()(freeze)
    cli.add_typer(decisions, name="decisions")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KernelsWarning)  # `_start` issues them, once the command is known
        plugin_manager().hook.kernels_register_commands(cli=cli)
        _remove_duplicates(cli)
    return cli


def _remove_duplicates(cli: typer.Typer) -> None:
    """Remove and report commands whose name is taken: no plugin may replace the command of another."""
    taken: dict[str, str] = {}
    command: Any
    for command in (*cli.registered_commands, *cli.registered_groups):
        inner = getattr(command, "typer_instance", None)  # of a group, such as `cache`
        callback = command.callback if inner is None else next((c.callback for c in inner.registered_commands), None)
        name = str(command.name or getattr(callback, "__name__", "")).replace("_", "-")
        place = str(getattr(callback, "__module__", ""))
        if name in taken:
            known: list[Any] = cli.registered_commands if inner is None else cli.registered_groups
            known.remove(command)
            owners = [plugin for plugin, found in plugin_manager().plugins().items() if _module(found) == place]
            fault = f"The command {name!r} of {place} is left out: {taken[name]} has one of that name. Rename it."
            plugin_manager().report(PluginError(fault, plugin=owners[0] if owners else place))
        taken.setdefault(name, place)


def _start(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print it, and exit.")
    ] = False,
) -> None:
    """Show which kernels serve which layers on this machine, and why."""
    warnings.showwarning = _show_warning
    for variable in ("KERNELS_STRICT", "DISABLE_KERNEL_MAPPING") if context.invoked_subcommand != "doctor" else ():
        switch(variable)  # neither on nor off is an error of every command; `doctor` reports it among others
    if context.invoked_subcommand != "plugins":
        for fault in plugin_manager().faults:
            warnings.warn(str(fault), KernelsWarning, stacklevel=1)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"kernels-core {__version__}")
        raise typer.Exit


def _show_warning(message: Warning | str, *where: object, **more: object) -> None:
    """Print a warning on a line, without the source line that raised it."""
    print(f"warning: {visible(str(message))}", file=sys.stderr)


# --- Commands ------------------------------------------------------------------------------------


def plugins(as_json: Json = False) -> None:
    """List the plugins, their hooks, the layers that they offer kernels for, and their faults.

    Calls the hooks that offer kernels. Exits with 1 where a plugin is at fault, or where of several plugins with equal
    priority only the name decides which one serves.
    """
    rows = plugin_rows()
    texts = [text for column in ("faults", "ties") for row in rows for text in row[column]]
    if not as_json:  # numbers only: the texts come below
        for row in rows:
            row["faults"] = len(row["faults"]) + len(row.pop("ties"))
    print_rows(rows, as_json)
    if texts:
        if not as_json:
            print("", *dict.fromkeys(texts), sep="\n")
        raise typer.Exit(1)


def hooks(as_json: Json = False) -> None:
    """List the hooks that plugins may implement."""
    rows = [
        {
            "hook": name,
            "arguments": list(inspect.signature(spec).parameters),
            "does": (spec.__doc__ or "").partition("\n")[0],
        }
        for name, spec in _hooks().items()
    ]
    print_rows(rows, as_json)


def resolve_layer(
    layer: Annotated[str, typer.Argument(help="A layer name, or a decorated object as package.module:name.")],
    device: Annotated[str, typer.Option(help="Device of the call, such as cuda:1.")] = "cpu",
    mode: Annotated[CallMode, typer.Option(help="Whether autograd records the call.")] = CallMode.inference,
    traced: Annotated[bool, typer.Option("--compile", help="The call is traced by torch.compile.")] = False,
    as_json: Json = False,
) -> None:
    """Show which kernel would serve a layer, and why each other one would not.

    Fetches and imports kernels, as the first call of the layer would. Exits with 1 where the
    layer's own forward, the reference, would run.
    """
    resolution = resolve(imported(layer) if ":" in layer else layer, device=device, mode=mode_of(mode, traced))
    if as_json:
        print(to_json(_resolution(resolution)))
    else:
        Console(markup=False, highlight=False, soft_wrap=True).print(
            visible(resolution.explain()), style="yellow" if resolution.is_reference else "green"
        )
    if resolution.is_reference:
        raise typer.Exit(1)


def explain(
    factory: Factory,
    device: Annotated[str | None, typer.Option(help="Device of the calls, such as cuda.")] = None,
    mode: Annotated[CallMode | None, typer.Option(help="Whether autograd records the calls.")] = None,
    traced: Annotated[bool, typer.Option("--compile", help="The calls are traced by torch.compile.")] = False,
    require: Annotated[list[str] | None, typer.Option(help="A glob of paths that kernels must serve.")] = None,
    origin: Annotated[str | None, typer.Option(help="With --require: a glob of where they must come from.")] = None,
    numerics: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="Find this out, and require it with --require: batch_invariant, for example."
        ),
    ] = None,
    inputs: Annotated[str, typer.Option(help="With --numerics: a function that returns inputs of the model.")] = "",
    html: Annotated[Path | None, typer.Option(help="Write a page for a browser, too.")] = None,
    as_json: Json = False,
) -> None:
    """Show which kernel serves each layer of a model, where it comes from, and why each other one does not.

    Exits with 1 if a requirement fails.
    """
    if origin is not None and not require:
        raise ArgumentError("--origin restricts the layers that --require GLOB names: add that option.")
    if unknown := sorted({*(numerics or ())} - {*NUMERICS}):
        raise ArgumentError(f"--numerics names {', '.join(unknown)}: there are {', '.join(NUMERICS)}.")
    if inputs and not numerics:
        raise ArgumentError("--inputs are those that --numerics NAME is found out on: add that option.")
    model = made(factory)
    chosen = mode_of(mode, traced, model)
    if numerics:
        _run_once(model, inputs, device, chosen, tuple(name for name in NUMERICS if name in numerics))
    found = receipt(model, device=device, mode=chosen)
    if html is not None:
        with writing(html):
            html.write_text(found.to_html(), encoding="utf-8")
    print_found(found, as_json)
    try:
        for pattern in require or ():
            found.require(pattern, origin, **dict.fromkeys(numerics or (), True))
    except RequirementError as error:
        print_error(error)
        raise typer.Exit(1) from error


def config(as_json: Json = False) -> None:
    """Print every setting, its value, and where it is set: file and line, the environment, or nowhere.

    Exits with 1 if the configuration file is wrong, or a setting names a file that is not there.
    """
    found = configuration()
    print_found(found, as_json)
    if found.problems or found.missing:
        raise typer.Exit(1)


# --- Their answers -------------------------------------------------------------------------------


def _run_once(model: Any, inputs: str, device: str | None, mode: Mode, names: tuple[Numeric, ...]) -> None:
    """Run a model once, so that properties of what serves its layers are found out."""
    model, given = with_inputs(model, inputs, device, "its inputs", "--numerics is found out on a call, and the model")
    args = given if isinstance(given, tuple | list) else () if isinstance(given, dict) else (given,)
    named = given if isinstance(given, dict) else {}
    wanted = Scope(WantedNumerics(names, required=False))
    try:
        with printing_aside(), wanted, torch.set_grad_enabled(Mode.TRAINING in mode):
            model(*args, **named)
    except KernelsError:
        raise
    except Exception as error:
        raise ArgumentError(f"The model cannot be run with its inputs: {error_text(error)}") from error


def _resolution(resolution: Resolution) -> Row:
    request = resolution.request
    return {
        "layer": request.layer_name,
        "device": str(request.device),
        "mode": [str(flag.name).lower() for flag in Mode if flag in request.mode],
        **{name: getattr(resolution, name) for name in ("origin", "is_reference", "plugin", "checked", "note")},
        "refusals": [_refusal(refusal) for refusal in resolution.refusals],
        "misfits": [_refusal(misfit) for misfit in resolution.misfits],
    }


def _refusal(refusal: Refusal) -> Row:
    candidate = refusal.candidate.label if refusal.candidate else None
    return {"candidate": candidate, "plugin": refusal.plugin, "reason": refusal.reason}


def plugin_rows() -> list[Row]:
    """Return a row for each plugin, with its faults and its ties in words; calls the hooks that offer kernels.

    Example:
        >>> [row["distribution"] for row in plugin_rows() if row["name"] == "mapping"]
        ['kernels-core 0.1.0']
    """
    manager = plugin_manager()
    found, origins = manager.plugins(), _distributions()
    layers, ties = _offers()
    names = sorted({*found, *(fault.plugin for fault in manager.faults)})
    return [
        {
            "name": name,
            "distribution": origins.get(name, ""),
            "module": _module(found[name]) if name in found else "",
            "hooks": [hook for hook in _hooks() if hasattr(found.get(name), hook)],
            "layers": sorted(layers.get(name, ())),
            "priority": getattr(found.get(name), "kernels_priority", 0),
            "faults": [str(fault) for fault in manager.faults if fault.plugin == name],
            "ties": [describe_tie(layer, rivals) for layer, rivals in ties.items() if name in rivals],
        }
        for name in names
    ]


def _hooks() -> dict[str, Any]:
    return {name: spec for name, spec in vars(hookspecs).items() if name.startswith("kernels_")}


def _offers() -> tuple[dict[str, set[str]], dict[str, list[str]]]:
    """Return the layers that each plugin offers kernels for on this machine, and the plugins that tie for a layer."""
    layers: dict[str, set[str]] = {}
    ties: dict[str, list[str]] = {}
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KernelsWarning)  # they are listed as faults and ties
        for offer in plugin_manager().hook.kernels_mapping():
            layers.setdefault(offer.plugin, set()).update(map(str, offer.mapping))
        names = set().union(*layers.values()) or {"RMSNorm"}  # any name, to find plugins that fail
        devices = {"cpu", str(accelerator or "cpu")}
        for name, device, mode in itertools.product(sorted(names), devices, STAND_INS):
            candidates, refusals = find_candidates(name, device=device, mode=mode)
            for candidate in (*candidates, *(refusal.candidate for refusal in refusals)):
                if candidate is not None and candidate.tier == "plugin":
                    layers.setdefault(candidate.plugin, set()).add(name)
            if rivals := find_rivals(candidates):
                ties[name] = rivals
    return layers, ties


def _distributions() -> dict[str, str]:
    """Return the distribution of each entry point; of several with one name, the first by name, which is used."""
    found = importlib_metadata.entry_points(group=ENTRY_POINT_GROUP)
    known = sorted(((e.dist.name, e.dist.version, e.name) for e in found if e.dist is not None), reverse=True)
    return {name: f"{distribution} {version}" for distribution, version, name in known}


def _module(plugin: object) -> str:
    return plugin.__name__ if inspect.ismodule(plugin) else type(plugin).__module__
