"""Private names of PyTorch stand in one file, and each of them may go."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from renamed_torch import INSTANCES, MARKERS, USES, is_there

from kernels_core.torch_internals import release

ROOT = Path(__file__).parents[2]
INTERNALS = ROOT / "kernels_core" / "torch_internals.py"
SOURCES = sorted(
    path
    for package in ("kernels_core", "kernels_plugins")
    for path in (ROOT / package).rglob("*.py")
    if "demo/hub" not in path.as_posix() and path != INTERNALS
)

FOUND = re.findall(r'_find\("([^"]+)"\)', INTERNALS.read_text())
"""What torch_internals asks PyTorch for by path."""

READ = [
    "torch:Tensor._version",
    "torch:UntypedStorage._cdata",
    "torch.library:Library._destroy",
    "torch.distributed.tensor:DTensor._local_tensor",
    "torch.distributed.tensor:DTensor._spec",
    *(f"torch._ops:{attribute}" for attribute in INSTANCES),
]
"""What it reads off objects of PyTorch, with their classes."""

PATHS = [*FOUND, *READ, *MARKERS]
NAMES = {re.split("[.:]", path)[-1] for path in PATHS}

OF_MODULES = {"_parameters", "_buffers", "_modules", "_apply"} | {
    f"_{kind}_hooks" for kind in ("forward", "forward_pre", "backward", "backward_pre")
}
"""Not private: they stand in every pickled module, or are overridden by subclasses, so PyTorch cannot rename them."""

READS_VERSION = {
    "kernels_core/models/receipt.py": "shows it",
    "kernels_core/decisions/freezing.py": "writes it down",
    "kernels_plugins/choice/machine.py": "names the machine of a choice",
    "kernels_plugins/doctor/machine.py": "shows it",
    "kernels_plugins/hub/benchmark/command.py": "shows it",
    "kernels_plugins/demo/measure.py": "shows it",
    "kernels_plugins/hub/client/download.py": "tells the Hub",
    "kernels_plugins/hub/builds/machine.py": "looks for it in the names of builds",
    "kernels_plugins/oracle/probe.py": "a key of reports",
    "kernels_plugins/oracle/probe_cache.py": "a key of reports",
    "kernels_plugins/packs/inductor.py": "names the compiler in receipts",
}
"""Files that may read the version of PyTorch, which they must not compare."""


# --- Where private names stand ---------------------------------------------------------------------


def private_uses(source: str, own: frozenset[str] = frozenset()) -> list[str]:
    """Return the private names of PyTorch that a source uses; `own` are names that our sources define."""
    tree = ast.parse(source)
    docstrings = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)}
    return sorted({use for node in ast.walk(tree) if id(node) not in docstrings for use in _uses_in(node, own)})


def _uses_in(node: ast.AST, own: frozenset[str]) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if _is_torch(alias.name) and _is_private(alias.name))
    elif isinstance(node, ast.ImportFrom) and not node.level and _is_torch(node.module or ""):
        for alias in node.names:
            if _is_private(f"{node.module}.{alias.name}") or alias.name in NAMES:
                yield f"{node.module}.{alias.name}"
    elif isinstance(node, ast.Attribute) and (node.attr in NAMES or _is_private(node.attr)):
        owner = ast.unparse(node.value)
        if (node.attr in NAMES and owner not in ("self", "cls", "torch_internals")) or (
            _is_private(node.attr) and node.attr not in own | OF_MODULES and owner not in ("self", "cls", "sys")
        ):
            yield f"{owner}.{node.attr}"
    elif isinstance(node, ast.keyword) and node.arg in NAMES:
        yield node.arg or ""
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield from PRIVATE.findall(node.value)


def _is_torch(module: str) -> bool:
    return module.partition(".")[0] in ("torch", "functorch")


def _is_private(path: str) -> bool:
    return any(part.startswith("_") and not part.endswith("__") for part in path.split("."))


MARKS = "|".join([*sorted(filter(_is_private, NAMES)), r"_torchdynamo\w*", r"_dynamo_\w*"])
PRIVATE = re.compile(rf"\btorch(?:\.\w+)*\._\w+|(?<!\w)(?:{MARKS})\b")


def own_names() -> frozenset[str]:
    """Return all names that our sources define: functions, classes, variables, and attributes of `self`."""
    names = set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                names.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            elif isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("self", "cls"):
                names.add(node.attr)
    return frozenset(names)


OWN = own_names()

FOREIGN = {
    "kernels_core/scopes/frame.py": ["asyncio._get_running_loop"],
    "kernels_plugins/hub/client/download.py": ["client._api"],
}
"""Private names of other libraries, which the test cannot tell from those of PyTorch."""


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_private_names_stand_in_one_file(path: Path) -> None:
    """Only torch_internals uses private names of PyTorch, and compares its version."""
    place, source = path.relative_to(ROOT).as_posix(), path.read_text()
    assert [use for use in private_uses(source, OWN) if use not in FOREIGN.get(place, [])] == []
    assert version_reads(source) == [] or (place in READS_VERSION and "compared" not in version_reads(source))


def version_reads(source: str) -> list[str]:
    """Return how a source uses the version of PyTorch."""
    reads = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare) and any(ast.unparse(child) == "torch.__version__" for child in ast.walk(node)):
            reads.append("compared")
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.__version__":
            reads.append("read")
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "torch.__version__":
            reads.append("compared")  # such as startswith
    return reads


@pytest.mark.parametrize(
    ("source", "uses"),
    {
        "from torch._C._functorch import peek_interpreter_stack": ["torch._C._functorch.peek_interpreter_stack"],
        "from torch.utils import _pytree as pytree": ["torch.utils._pytree"],
        "from torch.fx.proxy import TraceError": ["torch.fx.proxy.TraceError"],
        "def f():\n    import torch._dynamo.config as config": ["torch._dynamo.config"],
        "import torch\ntorch._C._get_tracing_state()": ["torch._C", "torch._C._get_tracing_state"],
        "compiler._is_compiling_flag": ["compiler._is_compiling_flag"],
        "tensor._version": ["tensor._version"],
        "f'{x} or module._current_level >= 0'": ["_current_level"],
        "getattr(autograd, '_top_saved_tensors_default_hooks', None)": ["_top_saved_tensors_default_hooks"],
        "'torch._dynamo' in sys.modules": ["torch._dynamo"],
        "f._torchdynamo_inline = g": ["f._torchdynamo_inline"],
        "vars(f).update(_torchdynamo_disable=True)": ["_torchdynamo_disable"],
        "f._dynamo_never_heard_of = True": ["f._dynamo_never_heard_of"],
        "module._parameters, self._anything, sys._getframe(), object.__new__": [],
        '"""Docstrings may name torch._C."""': [],
        "import torch.fx\nfrom torch.utils.checkpoint import checkpoint\ntorch.__version__": [],
    }.items(),
    ids=str,
)
def test_private_names_are_noticed(source: str, uses: list[str]) -> None:
    """The test above can fail: imports, attributes, keywords and strings are noticed, and nothing public is."""
    assert private_uses(source) == uses


@pytest.mark.parametrize(
    "source", ["torch.__version__ >= '2.13'", "torch.__version__.startswith('2.13.')", "(2, 13) < v(torch.__version__)"]
)
def test_comparisons_of_versions_are_noticed(source: str) -> None:
    """The test above can fail for versions, too."""
    assert "compared" in version_reads(source)


def test_each_private_name_is_listed() -> None:
    """Whatever private name torch_internals uses is deleted by the tests below."""
    used = {re.split(r"[.:]", use)[-1] for use in private_uses(INTERNALS.read_text(), frozenset(_own(INTERNALS)))}
    paths = {part for path in PATHS for part in re.split(r"[.:]", path)}
    assert used <= paths | {"_subclasses", "_fields", "_dynamo"}
    assert len(set(PATHS)) == len(PATHS) > 25


def _own(path: Path) -> Iterator[str]:
    """Names that a file defines."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


# --- Without a name ------------------------------------------------------------------------------------

Outcomes = dict[str, str]


@pytest.fixture(scope="module")
def renamed() -> Iterator[Callable[[str], Outcomes]]:
    """Use kernels_core in a process of its own, in which PyTorch calls something otherwise; see `renamed_torch`."""
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("KERNELS_")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    environment["CUDA_VISIBLE_DEVICES"] = ""  # CUDA does not survive a fork
    script = ROOT / "tests" / "support" / "renamed_torch.py"
    with subprocess.Popen(
        [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as server:
        assert server.stdin is not None and server.stdout is not None
        stdin, stdout = server.stdin, server.stdout

        def run(path: str) -> Outcomes:
            print(path, file=stdin, flush=True)
            outcomes: Outcomes = json.loads(stdout.readline())
            return outcomes

        yield run
        stdin.close()


EXPECTED = dict.fromkeys(["import", *USES], "ok$")
EXPECTED |= dict.fromkeys(["breaking", "losing"], "ok; 1 warnings: .*quarantine")
"""Each use goes well; the reference steps in for a kernel that raises or loses gradients, with one warning."""

NO_TRANSFORM = "torch._C._functorch:peek_interpreter_stack torch._C:_are_functorch_transforms_active"

CAUTIOUS = {
    "torch:Tensor._version": {
        "breaking": r"ValueError: broken kernel; 1 warnings: .*in quarantine from now on",
        "losing": r"RuntimeError: element 0 .*; 1 warnings: .*the gradients of this one call are lost",
    },
    "torch.utils._python_dispatch:TorchDispatchMode": {
        "operator": r"ok; 1 warnings: .*the reference is compiled instead",
    },
    NO_TRANSFORM: {
        **dict.fromkeys(["breaking", "losing"], r"ok; 1 warnings: .*under torch\.func.*reference serves such calls"),
        "internals": r"AssertionError",
    },
}
"""Where a fallback does less: the call at fault is not made again; no kernel becomes an operator; or, with two names
gone, a transform is assumed: the reference steps in, and no kernel goes into quarantine."""


TOGETHER = [
    NO_TRANSFORM,
    "torch._C:_len_torch_dispatch_stack torch.utils._python_dispatch:_get_current_dispatch_mode_stack",
    "torch.utils._python_dispatch:_disable_current_modes torch._C:_DisableTorchDispatch",
]
"""Names that are the fallback of each other."""

DEPENDS = {
    "torch.utils._pytree:SUPPORTED_NODES": {"exported"},
    "torch._dynamo.config:patch": {"compiled", "marked", "operator", "exported"},
}
"""What PyTorch itself cannot do where something is called otherwise, for it is also found by other ways."""


def check(outcomes: Outcomes, path: str) -> None:
    """Compare outcomes with those expected, and skip where this PyTorch has no such name."""
    if "absent" in outcomes:
        pytest.skip(f"this PyTorch has no {outcomes['absent']}")
    expected = EXPECTED | CAUTIOUS.get(path, {})
    lost = {name for name, outcome in outcomes.items() if outcome.startswith("PyTorch: ")}
    wrong = {
        name: outcomes.get(name, "not tried")
        for name, pattern in expected.items()
        if name not in lost and not re.match(pattern, outcomes.get(name, ""), re.DOTALL)
    }
    assert wrong == {}
    assert lost <= {use for use, (_, needed) in USES.items() if needed is not None}
    assert lost <= DEPENDS.get(path, set()) or release != (2, 13)  # others may do less


def skip_where_newer_is_false() -> None:
    """Skip a test that says to be a newer PyTorch, where Dynamo cannot do yet all that a newer one can."""
    if release < (2, 13):
        pytest.skip(f"the Dynamo of PyTorch {release} cannot do all that the version stated here can")


@pytest.mark.parametrize("path", [*PATHS, *TOGETHER])
def test_without_a_name(renamed: Callable[[str], Outcomes], path: str) -> None:
    """Imports, eager calls, modes, gradients, compilation, export and transforms work without any one name."""
    if path in MARKERS:  # a marker changes with a release, so the version is another one, too
        skip_where_newer_is_false()
    check(renamed(path), path)


def test_without_any_name(renamed: Callable[[str], Outcomes]) -> None:
    """The same where all names are gone at once, except those that PyTorch itself needs."""
    outcomes = renamed(" ".join(path for path in PATHS if path not in DEPENDS and is_there(path)))
    assert {outcomes[name] for name in ("import", "eager", "modes", "checkpointed")} == {"ok"}


@pytest.mark.parametrize("version", ["2.13.0", "2.99.0", "3.0.0a0+git123", "unknown"])
def test_other_versions(renamed: Callable[[str], Outcomes], version: str) -> None:
    """The same with other versions of PyTorch, by their number, or without one."""
    if version != "unknown":
        skip_where_newer_is_false()
    if version == "2.13.0" and release > (2, 13):
        pytest.skip("Dynamo is not that of 2.13")
    check(renamed(f"version {version}"), version)


def test_nothing_is_lost_without_changes(renamed: Callable[[str], Outcomes]) -> None:
    """Without a change, each use succeeds: a use that is lost above is lost by the change."""
    outcomes = renamed("")
    check(outcomes, "")
    assert not [outcome for outcome in outcomes.values() if outcome.startswith("PyTorch")]


@pytest.mark.parametrize("path", ["torch.compiler:is_dynamo_compiling", "torch:get_rng_state"])
def test_a_missing_name_is_noticed(renamed: Callable[[str], Outcomes], path: str) -> None:
    """The tests above can fail: without a public name, for which there is no fallback, uses go wrong."""
    with pytest.raises(AssertionError):
        check(renamed(path), path)


def test_the_backend_of_an_extension_has_its_name() -> None:
    """A backend that an extension registers is found under its public name."""
    code = (
        "import torch; from kernels_plugins.hub.builds.machine import _extension_backend as named; print(named());"
        "torch.utils.rename_privateuse1_backend('npu'); print(named())"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["privateuseone", "npu"]
