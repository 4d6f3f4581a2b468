"""The configuration file, and variables: those that are set, cannot be understood, or have a misspelt name."""

from __future__ import annotations

import difflib
import importlib
import os
import re
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import torch

from kernels_core import ArgumentError, DecisionFile, configuration, configured, plugin_manager, switch, visible

from ..canary.settings import VARIABLE as CANARY
from ..canary.settings import settings_of_environment
from ..hub.client.overrides import VARIABLE as FOLDERS
from ..hub.client.overrides import parse_overrides
from ..hub.signatures.signer import VARIABLE as SIGNATURES
from ..hub.signatures.signer import find_policy
from ..layer_names import misspelt, rule_layers
from ..observe.plugin import VARIABLE as OBSERVERS
from ..observe.plugin import observed
from ..packs.order import EVERY, lack
from ..packs.source import Pack
from .finding import NOTE, OK, PROBLEM, Finding

_NAME = re.compile(r"\b(?:KERNELS_[A-Z][A-Z_]*[A-Z]|LOCAL_KERNELS|DISABLE_KERNEL_MAPPING)\b")
_CLIENT = ("HF_ENDPOINT", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_HUB_ETAG_TIMEOUT")
_LIKE = re.compile(r"KERNELS?_|LOCAL_KERNEL|DISABLE_KERNEL")
_SWITCHES = ("KERNELS_STRICT", "DISABLE_KERNEL_MAPPING", "KERNELS_LEADER")


def check_settings() -> Iterator[Finding]:
    """Yield the file, and each variable that is set for this library or its client of the Hub, not those of others."""
    settings = configuration()
    for problem in settings.problems:
        remedy = "Until it is correct, nothing of the file applies, and no kernel serves."
        yield Finding("configuration", "problem", problem, PROBLEM, remedy)
    if settings.file is not None:
        yield Finding("configuration", "file", settings.file)
    for key, variable in (("choice", "KERNELS_CHOICE"), ("decisions", "KERNELS_DECISIONS")):
        chosen = str(configured(key) or "")
        if variable not in os.environ and chosen and (problem := _problem(variable, chosen)):
            yield Finding("configuration", key, problem, PROBLEM)
    yield from _sources()
    known = known_variables()
    for name in sorted(os.environ):
        value = visible(os.environ[name], 200)
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
        if name in known:
            problem = _problem(name, os.environ[name])
            off = "the reference serves everywhere" if name == _SWITCHES[1] and not problem and switch(name) else ""
            state = PROBLEM if problem else NOTE if off else OK
            yield Finding(
                "variables", name, problem or off or value, state, f"Unset {name} to change that." if off else ""
            )
        elif name in _CLIENT:
            yield Finding("variables", name, value)
        elif _LIKE.match(name) and close:
            yield Finding(
                "variables", name, "nothing reads it", PROBLEM, f"Do you mean {close[0]}? Write that, or unset it."
            )
        elif _LIKE.match(name):
            remedy = f"Unset it, unless another program reads it. Here are {', '.join(sorted(known))}."
            yield Finding("variables", name, "nothing here reads it", NOTE, remedy)


def _sources() -> Iterator[Finding]:
    """Yield the layer names in the file that nearly are those of adopted layers, and packs that cannot serve here."""
    mapped, ordered, layers = configured("mapping"), configured("packs"), rule_layers()
    named = {f"mapping.{name}": set(chain(*by.values())) for name, by in (mapped.sources if mapped else {}).items()}
    named |= {f"packs.{name}": set(ordered.sources(name)) for name in (ordered.order if ordered else ())}
    packs: dict[str, set[Pack]] = {}
    for place, sources in named.items():
        name = place.partition(".")[2]
        if name not in layers and (near := misspelt(name, layers)) is not None:
            remedy = f"Write {near}, unless a layer is decorated with the name {name!r}."
            yield Finding("configuration", place, "no rule adopts layers of that name", NOTE, remedy)
        for pack in (source for source in sources if isinstance(source, Pack)):
            every = layers if pack.layer_name == EVERY else [pack.layer_name]
            packs.setdefault(pack.name, set()).update(Pack(pack.name, layer) for layer in every)
    devices = {torch.device("cpu"), torch.accelerator.current_accelerator() or torch.device("cpu")}
    for name, found in sorted(packs.items()):
        lacks = [lack(pack.name, pack.layer_name, device) for pack in found for device in devices]
        if all(lacks):
            remedy = "It serves nothing on this machine: the next source does, or the reference."
            yield Finding("configuration", f"pack {name}", lacks[0], NOTE, remedy)


def known_variables() -> set[str]:
    """Return the names of all variables in the sources of this library, and of the modules that plugins are in.

    There is no list to maintain: a variable that no source names is read by none.
    """
    found: set[str] = set()
    for package in ("kernels_core", "kernels_plugins"):
        folder = Path(str(importlib.import_module(package).__file__)).parent
        for path in folder.rglob("*.py"):
            found.update(_NAME.findall(path.read_text(encoding="utf-8")))
    for plugin in plugin_manager().plugins().values():
        module = str(getattr(plugin, "__module__", None) or getattr(plugin, "__name__", ""))
        file = Path(str(getattr(sys.modules.get(module), "__file__", "")))
        if file.suffix == ".py" and file.is_file():
            found.update(_NAME.findall(file.read_text(encoding="utf-8", errors="ignore")))
    return found


def _problem(name: str, value: str) -> str:
    """Return why the value of a variable cannot be used; empty if it can."""
    try:
        if name in _SWITCHES:
            switch(name)
        elif name == CANARY:
            settings_of_environment()
        elif name == SIGNATURES:
            find_policy()
        elif name == OBSERVERS:
            observed()
        elif name == "KERNELS_CHOICE" and value:
            from ..choice.choice import Choice

            Choice.load(Path(os.path.expanduser(value)))
        elif name == "KERNELS_DECISIONS" and value:
            DecisionFile.from_file(Path(os.path.expanduser(value)))
        elif name == FOLDERS:
            gone = [str(path) for path in parse_overrides(value).values() if not path.is_dir()]
            return f"there is no folder {', '.join(gone)}: correct or unset {FOLDERS}" if gone else ""
    except ArgumentError as error:
        return str(error)
    return ""
