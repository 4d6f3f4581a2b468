"""Operators and calls keep one name for the same code, in every process, and have another one for any other code."""

from __future__ import annotations

import enum
import json
import os
import types
import uuid
from pathlib import Path
from typing import Any

import pytest
import torch
from fresh_process import run_python
from torch import nn

from kernels_core import decorated_layer, use_kernel_forward_from_hub
from kernels_plugins.adapters.ambient import autocast_now
from kernels_plugins.adapters.names import call_text, free_name, read_call, take_name
from kernels_plugins.adapters.structure import Parts, take_call

SHOP = """
from torch import nn
import torch
from kernels_core import use_kernel_forward_from_hub
from kernels_plugins import opaque, register_kernel_mapping

STEP = 1

def helper(x, many=4):
    return x + STEP

@use_kernel_forward_from_hub("Scale")
class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(3.0))

    def forward(self, x, plus=0.5):
        return x * self.factor + plus

def made(last):
    class Kernel(nn.Module):
        def forward(self, x, plus=0.5):
            data = helper(x.detach() * 2).numpy()
            return torch.from_numpy(data * 16) * self.factor + plus - last

    return Kernel

Kernel = made(7)
"""

EDITS = [
    *(("data * 16", f"data * {number}") for number in range(17, 37)),  # the kernel
    *(("many=4", f"many={number}") for number in range(5, 25)),  # a default of a function that it calls
    *(("x + STEP", f"x + STEP + {number}") for number in range(20)),  # a function that it calls
    *(("made(7)", f"made({number})") for number in range(8, 18)),  # what it has from the function that made it
    *(("STEP = 1", f"STEP = {number}") for number in range(2, 12)),  # a constant of its module
    *(("return x * self.factor + plus", f"return x * self.factor + plus + {number}") for number in range(10)),
    *((f"plus=0.5):\n{line}", f"plus={number}):\n{line}")
      for line in ("            data", "        return x") for number in (1.5, 2.5)),
    ("self.factor + plus - last", "self.factor - last + plus"),
    ("helper(x.detach() * 2)", "helper(x.detach().clone() * 2)"),
    (".numpy()", ".numpy().copy()"),
    ("(x.detach() * 2)", "(x.detach() + x)"),
    ('"Scale"', '"Scaled"'),
    ("- last", "+ last"),
]  # fmt: skip


def named(source: str = SHOP, **changed: Any) -> str:
    """Return the name of an operator of the kernel in a module with a source, and free it."""
    module = types.ModuleType("shop")
    exec(source, vars(module))
    options = {"content": "", "own_backward": True, **changed}
    name = take_name(decorated_layer(module.Scale), module.Kernel, **options)
    free_name(name)
    return name


def test_a_hundred_edits_have_names_of_their_own() -> None:
    """An edit of the kernel, its layer or a function that they call gives a new name."""
    sources = [SHOP.replace(before, after) for before, after in EDITS]
    names = {named(source) for source in [SHOP, *sources]}
    assert len(EDITS) == 100 and SHOP not in sources and len(names) == 101
    assert named() == named() in names
    assert len({named(), named(content="1"), named(content="2"), named(own_backward=False)} | names) == 104


def test_two_operators_of_one_code_have_two_names() -> None:
    """They may differ in state; the first name is free again when its operator is gone."""
    first = named()
    layer = decorated_layer(use_kernel_forward_from_hub("same")(lambda x: x))
    one, two = (take_name(layer, len, "", own_backward=True) for _ in range(2))
    assert one != two  # without code in Python, none that lasts
    names = [take_name(layer, nn.Identity, "files", own_backward=True) for _ in range(3)]
    assert names[1:] == [f"{names[0]}_2", f"{names[0]}_3"]
    free_name(names[1])
    assert take_name(layer, nn.Identity, "files", own_backward=True) == names[1]
    for name in (one, two, *names):
        free_name(name)
    assert named() == first


class Color(enum.Enum):
    """An argument."""

    RED = 1


class Config:
    """An object that is no dataclass: a constant of a call."""

    def __init__(self, size: int) -> None:
        self.size = size


def text_of(*args: Any, exporting: bool = False) -> tuple[str, Any]:
    parts = Parts()
    structure = take_call(True, args, {}, parts)
    text = call_text(structure, parts.objects, autocast_now(), exporting=exporting)
    return text, (structure, tuple(parts.objects), autocast_now())


def test_texts_of_calls() -> None:
    """Those of an export are read again; the others are short, and differ where a call does, also in an object."""
    values: list[Any] = [
        1, 0.5, "text", None, True, False, (1,), [1], {"a": 1}, {1: 1}, {"a": None}, torch.float16, torch.float32,
        torch.device("cpu"), torch.device("meta"), torch.strided, torch.channels_last, uuid.SafeUUID.safe, nn.Linear,
        torch.nn.functional.gelu, torch.nn.functional.relu, nn.Identity(),
    ]  # fmt: skip
    layer = decorated_layer(use_kernel_forward_from_hub("texts")(lambda x: x))
    short = [text_of(torch.ones(2), value)[0] for value in values]
    assert len(set(short)) == len(values) and max(map(len, short)) < 32
    for value in values:
        for autocast in (False, True):
            with torch.autocast("cpu", dtype=torch.float16, enabled=autocast):
                text, (structure, objects, state) = text_of(torch.ones(2), value, exporting=True)
                spec = read_call(text, layer)
            assert (spec.structure, spec.objects, spec.autocast) == (structure, objects, state)
    assert text_of(Config(1))[0] == text_of(Config(1))[0] != text_of(Config(2))[0]
    with torch.autocast("cpu"):
        assert text_of(1)[0] != short[0]
    for value in (Config(1), lambda x: x, {Color.RED: 1}):
        with pytest.raises(RuntimeError, match="values that only the process knows"):
            read_call(text_of(value, exporting=True)[0], layer)


# --- Other processes -----------------------------------------------------------------------------------

CONFIGURED = """
import torch._inductor.config
torch._inductor.config.cpp.vec_isa_ok = False  # else each new cache has ten programs compiled, to try the CPU's vectors
"""

MODEL = """
import json, os, sys, warnings
import torch
import shop
from kernels_core import Mode, resolve
from torch._dynamo.utils import counters
shop.register_kernel_mapping({"Scale": {"cpu": shop.opaque(shop.Kernel)}})
x, found = torch.ones(2), {}
layer = shop.Scale().requires_grad_(False)
"""

COMPILES = """
found["compiled"] = torch.compile(layer, fullgraph=True)(x).tolist()
for kind in ("aot_autograd", "inductor"):
    found.update({key: count for key, count in counters[kind].items() if key.endswith(("cache_hit", "cache_miss"))})
"""

EXPORTS = """
program = torch.export.export(layer, (x,))
torch.export.save(program, "program.pt2")
if "aot" in sys.argv:
    quick = {"aot_inductor.precompile_headers": False, "aot_inductor.compile_wrapper_opt_level": "O0"}
    torch._inductor.aoti_compile_and_package(program, package_path=os.path.abspath("aot.pt2"), inductor_configs=quick)
"""

LOADS = """
resolve(shop.Scale, device="cpu", mode=Mode.INFERENCE | Mode.TORCH_COMPILE)
try:
    found["loaded"] = torch.export.load("program.pt2").module()(x).tolist()
    if "aot" in sys.argv:
        found["aot"] = torch._inductor.aoti_load_package("aot.pt2")(x).tolist()
except Exception as error:
    found["loaded"] = type(error).__name__
"""


def run(folder: Path, source: str, code: str, *arguments: str) -> Any:
    """Return what a program has found in a process of its own, with caches in the folder."""
    (folder / "shop.py").write_text(source)
    return in_process(folder, f"{MODEL}{code}\nprint(json.dumps(found))", *arguments)


def in_process(folder: Path, program: str, *arguments: str) -> Any:
    """Return the JSON that a program prints in a process of its own, with caches in the folder."""
    (folder / "program.py").write_text(CONFIGURED + program)
    environment = {
        **os.environ,
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache"),
        "PYTHONWARNINGS": "ignore",
        "PYTHONDONTWRITEBYTECODE": "1",  # an edit within a second has the same time, and perhaps size
    }
    command = (str(folder / "program.py"), *arguments)
    done = run_python(*command, environment=environment, folder=folder, compiler=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_caches_and_programs_of_another_process(tmp_path: Path) -> None:
    """The graph is found on disk and the exported program loads, as for undecorated code; not for a changed kernel."""
    expected = [3 * 16 * 3 + 0.5 - 7.0] * 2
    first = run(tmp_path, SHOP, COMPILES + EXPORTS)
    again = run(tmp_path, SHOP, COMPILES + LOADS)
    hits = {"autograd_cache_hit", "fxgraph_cache_hit"}
    assert first.pop("compiled") == expected and "fxgraph_cache_miss" in first and not hits & first.keys()
    assert (again.pop("compiled"), again.pop("loaded")) == (expected, expected)
    assert hits & again.keys() and not any(key.endswith("miss") for key in again)
    changed = run(tmp_path, SHOP.replace("made(7)", "made(8)"), COMPILES + LOADS)
    assert changed.pop("compiled") == [expected[0] - 1] * 2
    assert changed.pop("loaded") == "RuntimeError"  # PyTorch's: there is no operator of that name
    assert "fxgraph_cache_miss" in changed and not hits & changed.keys()


MANY = """
import importlib, json, pathlib, sys
import torch
from torch._dynamo.utils import counters

found = []
for source in json.loads(pathlib.Path("sources.json").read_text()):
    sys.modules.pop("shop", None)
    pathlib.Path("shop.py").write_text(source)
    importlib.invalidate_caches()
    import shop
    opaque = shop.opaque(shop.Kernel)
    shop.register_kernel_mapping({name: {"cpu": opaque} for name in ("Scale", "Scaled")})
    layer = shop.Scale().requires_grad_(False)
    torch._dynamo.reset()
    counters.clear()
    x = torch.full((2,), 3.0)
    same = torch.equal(torch.compile(layer, fullgraph=True)(x), layer(x))
    names = [f"{kind}_cache_{what}" for kind in ("autograd", "fxgraph") for what in ("hit", "miss")]
    counts = {name: counters["aot_autograd"][name] + counters["inductor"][name] for name in names}
    found.append([same, layer(x).tolist(), counts])
print(json.dumps(found))
"""


@pytest.mark.slow
def test_no_edit_of_a_hundred_hits_the_cache_of_another_process(tmp_path: Path) -> None:
    """One process fills the caches on disk; in another, the unedited kernel hits them, and none of 100 edits does."""

    def run_many(sources: list[str]) -> Any:
        (tmp_path / "sources.json").write_text(json.dumps(sources))
        return in_process(tmp_path, MANY)

    def seen(counts: dict[str, int]) -> set[str]:
        """Hits and misses; the cache of autograd is off in some versions of PyTorch."""
        return {name.removeprefix("autograd_").removeprefix("fxgraph_") for name, count in counts.items() if count}

    ((same, first, counts),) = run_many([SHOP])
    assert same and seen(counts) == {"cache_miss"}
    edited = [SHOP.replace(before, after) for before, after in EDITS]
    *of_edits, (same, again, unedited) = run_many([*edited, SHOP])
    assert same and again == first and seen(unedited) == {"cache_hit"}
    assert len(of_edits) == 100 and all(same and seen(counts) == {"cache_miss"} for same, _, counts in of_edits)


@pytest.mark.slow
def test_an_aot_compiled_program_of_another_process(tmp_path: Path) -> None:
    """AOTInductor's package runs where the layer is resolved."""
    run(tmp_path, SHOP, EXPORTS, "aot")
    assert run(tmp_path, SHOP, LOADS, "aot") == {"loaded": [137.5] * 2, "aot": [137.5] * 2}
