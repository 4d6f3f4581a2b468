"""The documentation is true: its examples run, its links lead somewhere, generated pages are current.

A fence with `title="some/file.py"` is a file of an example package: the package of a page is installed
and its tests are run. Any other python block of a page runs, in order, in one process. A fence
`text title="Output"` after a python block is what that block prints, with `...` for what varies.
A python fence with the word `notest` is left out, and one below `<!-- needs package -->` where that is not installed.
"""

from __future__ import annotations

import doctest
import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import os
import pkgutil
import re
import subprocess
import sys
import textwrap
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from fresh_process import run_python

import kernels_core
import kernels_core.replay
import kernels_plugins
from kernels_core import PluginManager, device, errors, hookimpl, hookspecs, use_kernel_forward_from_hub
from kernels_plugins.hub.dependency import Dependency
from kernels_plugins.hub.locking.lockfile import Lock, LockedKernel, write_lock
from kernels_plugins.local_hub.server import LocalHub

pytest_plugins = ["kernels_plugins.hub.testing"]

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
PACKAGES = (kernels_core, kernels_plugins)
PUBLIC = (*PACKAGES, kernels_core.replay)
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
FENCE = re.compile(
    r"(?:^<!-- needs (?P<needs>\w+) -->\n\n)?^```(?P<info>[^\n`]*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)


# --- Pages ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, the rest of its first line, its text, its line, and the package that it needs."""

    language: str
    options: str
    text: str
    line: int
    needs: str | None

    @property
    def title(self) -> str | None:
        found = re.search(r'title="([^"]*)"', self.options)
        return found[1] if found else None

    @property
    def is_run(self) -> bool:
        installed = self.needs is None or importlib.util.find_spec(self.needs) is not None
        return self.language == "python" and self.title is None and "notest" not in self.options and installed


def read_blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(*(f["info"].strip() + " ").split(" ", 1), f["text"], text.count("\n", 0, f.start("text")) + 1, f["needs"])
        for f in FENCE.finditer(text)
    ]


def find_steps(page: Path) -> list[tuple[Block, Block | None]]:
    """Return the python blocks to run, each with the output that the page shows for it."""
    blocks = read_blocks(page)
    return [
        (block, following if following is not None and following.title == "Output" else None)
        for block, following in zip(blocks, [*blocks[1:], None], strict=False)
        if block.is_run
    ]


def find_files(page: Path) -> dict[str, str]:
    """Return the files that a page shows, by path."""
    return {
        block.title: block.text
        for block in read_blocks(page)
        if block.title and re.fullmatch(r"[\w/.-]+\.(py|toml)", block.title)
    }


def clean_environment(home: Path) -> dict[str, str]:
    """Return an environment without settings of this machine, with an empty place for the Hub's client."""
    home.mkdir()
    kept = {name: value for name, value in os.environ.items() if not re.match("HF_|KERNELS_|DISABLE_KERNEL", name)}
    return {**kept, "HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONWARNINGS": "ignore"}


def run(command: list[str], environment: dict[str, str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)


def install_package(files: dict[str, str], folder: Path, environment: dict[str, str]) -> None:
    """Install the example package of a page from its files, as pip does, and let Python find it."""
    source, site = folder / "package", folder / "site"
    for path, text in files.items():
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        (source / path).write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    done = run([*command, "--target", str(site), str(source)], environment, folder)
    assert done.returncode == 0, done.stdout + done.stderr
    environment["PYTHONPATH"] = str(site)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_examples_of_a_page_run_and_print_what_it_shows(page: Path, tmp_path: Path) -> None:
    """Every python block runs, after those before it, and prints the output that the page shows below it."""
    steps, files = find_steps(page), find_files(page)
    if not steps:
        pytest.skip("no examples")
    environment = clean_environment(tmp_path / "home")
    if files:
        install_package(files, tmp_path, environment)
    mark = "--- end of block ---"
    lines: list[str] = []
    for block, _ in steps:
        # Blank lines, so that lines of the script are lines of the page, and inspect finds the source.
        lines += [""] * (block.line - 1 - len(lines)) + block.text.splitlines()
        lines += [f"print({mark!r})"]  # in place of the line that closes the fence
    script = tmp_path / f"page_{page.stem.replace('-', '_')}.py"  # a page may be called as a module is
    script.write_text("\n".join(lines) + "\n", encoding="utf-8")
    done = run_python(str(script), environment=environment, folder=tmp_path, compiler=True)
    assert done.returncode == 0, f"{page.name}, line numbers as in the page:\n{done.stderr[-3000:]}"
    printed = done.stdout.split(mark + "\n")
    for (block, shown), text in zip(steps, printed, strict=False):
        if shown is not None:
            matches = doctest.OutputChecker().check_output(shown.text, text, FLAGS)
            assert matches, f"{page.name}, line {block.line} prints:\n{text}\nthe page shows:\n{shown.text}"


@pytest.mark.skipif(device.ACCELERATOR is not None, reason="the page shows what a build for the CPU only generates")
def test_the_generated_forward_is_the_one_on_the_page() -> None:
    """path-of-a-call.md shows the source that the dispatcher generates."""

    @use_kernel_forward_from_hub("Scale")
    class Scale(torch.nn.Module):
        def forward(self, x: torch.Tensor, factor: float = 2.0) -> torch.Tensor:
            return x * factor

    source = inspect.getsource(Scale.forward.__code__)
    assert re.sub(r"layer\d+", "layer0", source) in [block.text for block in read_blocks(DOCS / "path-of-a-call.md")]


@pytest.mark.slow
def test_the_example_package_passes_its_own_tests(tmp_path: Path) -> None:
    """The plugin package that write-a-plugin.md shows can be installed, and its tests pass."""
    files = find_files(DOCS / "write-a-plugin.md")
    environment = clean_environment(tmp_path / "home")
    install_package(files, tmp_path, environment)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path)]
    done = run([*command, str(tmp_path / "package" / "tests")], environment, tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_leaves_out_no_example_and_misspells_no_fence(page: Path) -> None:
    """No example is excluded from running, and every fence opens and closes."""
    text = page.read_text(encoding="utf-8")
    assert len(re.findall(r"^\s*```", text, re.MULTILINE)) == 2 * len(read_blocks(page))
    assert not [block.line for block in read_blocks(page) if "notest" in block.options]
    assert {block.language for block in read_blocks(page)} <= {"python", "text", "toml", "console"}


# --- Docstrings ----------------------------------------------------------------------------------


@functools.cache
def public_namespace() -> dict[str, object]:
    """Return the names that examples in docstrings may use without importing them."""
    names = {name: getattr(package, name) for package in PUBLIC for name in package.__all__}
    return {**names, "torch": torch, "Path": Path}


def find_modules() -> Iterator[str]:
    for package in PACKAGES:
        yield package.__name__
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not module.name.endswith("__main__"):
                yield module.name


class Finder(doctest.DocTestFinder):
    """Finds the examples of public names in the files that define them, although their `__module__` is the package."""

    def _from_module(self, module: types.ModuleType, object: object) -> bool:
        if not hasattr(sys.modules.get(getattr(object, "__module__", "")), "__path__"):  # not of a package
            return super()._from_module(module, object)  # type: ignore[misc, no-any-return]
        if isinstance(object, type):
            return re.search(rf"^class {object.__name__}\b", inspect.getsource(module), re.MULTILINE) is not None
        return inspect.unwrap(object).__globals__ is vars(module)  # type: ignore[arg-type]


@pytest.fixture
def kernels_on_a_hub(local_hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Publish the kernels that examples load, and lock one in the current folder."""
    from kernels_plugins.local_hub.testing import publish_kernels

    silu = "import torch\n\nclass Silu(torch.nn.Module):\n    def forward(self, x):\n        return x * x.sigmoid()\n"
    repository = publish_kernels(local_hub, "acme/silu", silu)
    repository.branch("v1")
    publish_kernels(local_hub, "acme/base", {"__init__.py": "FACTOR = 3\n"}).branch("v1")
    top = 'from kernels_plugins import get_kernel_dep\n\nFACTOR = 2 * get_kernel_dep("acme/base").FACTOR\n'
    needs = {"kernel-depends": [{"repo-id": "acme/base", "version": 1}]}
    publish_kernels(local_hub, "acme/top", {"__init__.py": top}, metadata=needs).branch("v1")
    monkeypatch.chdir(tmp_path)
    locked = LockedKernel(Dependency("acme/silu", version=1), repository.head())
    write_lock(tmp_path / "kernels.lock", Lock((locked,)))


@pytest.mark.filterwarnings("ignore:.* is deprecated, as in:DeprecationWarning")
@pytest.mark.parametrize("name", list(find_modules()))
def test_examples_in_docstrings_run(name: str, request: pytest.FixtureRequest) -> None:
    """Every example in the docstrings of a module runs and prints the output that it shows."""
    if name.startswith("kernels_plugins.hub"):
        request.getfixturevalue("kernels_on_a_hub")
    if name.startswith("kernels_plugins.packs.triton.") and importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    module = importlib.import_module(name)
    runner = doctest.DocTestRunner(optionflags=FLAGS)
    report: list[str] = []
    names = {**public_namespace(), **vars(module)}  # a module may have a name of its own that is public elsewhere
    for test in Finder(exclude_empty=True).find(module, globs=names):
        runner.run(test, out=report.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(report)


@pytest.mark.parametrize("name", [name for name in vars(hookspecs) if name.startswith("kernels_")])
def test_the_example_of_a_hook_is_a_plugin(name: str) -> None:
    """The example on the card of each hook is an implementation that the plugin manager accepts."""
    card = inspect.cleandoc(getattr(hookspecs, name).__doc__)
    fence = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert fence, f"the card of {name} has no example"
    example: dict[str, object] = {}
    exec(textwrap.dedent(fence[1]), {"hookimpl": hookimpl}, example)
    manager = PluginManager(discover=False)
    assert manager.register(types.SimpleNamespace(**example), "example") == "example"
    assert name in example


@pytest.mark.parametrize("name", [name for name in vars(hookspecs) if name.startswith("kernels_")])
def test_a_hook_lists_the_plugins_that_implement_it(name: str) -> None:
    """Where the card of a hook lists plugins, these are the ones of this distribution that implement it."""
    card = inspect.cleandoc(getattr(hookspecs, name).__doc__)
    if listed := re.search(r"implemented by the plugins? ([^.]*)\.", card):
        entries = importlib.metadata.distribution("kernels-core").entry_points.select(group="kernels_core")
        offered = {entry.name for entry in entries if hasattr(entry.load(), name)}
        assert set(re.findall(r"`(\w+)`", listed[1])) == offered


# --- Links ---------------------------------------------------------------------------------------


def find_anchors(page: Path) -> set[str]:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ +(.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    """Every internal link names a file that exists, and a heading that is in it."""
    text = re.sub(r"`[^`\n]*`", "", FENCE.sub("", page.read_text(encoding="utf-8")))
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (anchor and anchor not in find_anchors(target)):
            broken.append(link)
    assert not broken


def test_every_page_is_in_the_navigation() -> None:
    """No page is left out of mkdocs.yml, and none is named that does not exist."""
    _, _, navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("nav:")
    assert sorted(re.findall(r"[\w-]+\.md", navigation)) == [page.name for page in PAGES]


@pytest.mark.slow
def test_the_site_builds(tmp_path: Path) -> None:
    """`mkdocs build --strict` passes; needs docs/requirements.txt."""
    for module in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(module)
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path / "site")]
    done = run(command, {**os.environ}, ROOT)
    assert done.returncode == 0, done.stderr
    reference = (tmp_path / "site" / "reference" / "index.html").read_text(encoding="utf-8")
    assert all(f'id="{name}"' in reference for name in load_generator("reference").public_names())
    pages = {page.parent.name: page.read_text(encoding="utf-8") for page in (tmp_path / "site").rglob("index.html")}
    assert not [name for name, text in pages.items() if "```" in text], (
        "a fence that is none, such as x=y without quotes"
    )


# --- What is written from the code ---------------------------------------------------------------


def load_generator(name: str) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(f"generate_{name}", DOCS / f"generate_{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_hooks_and_stand_ins_are_current(capsys: pytest.CaptureFixture[str]) -> None:
    """hooks.md has the text of the cards in hookspecs.py, and mapping.md has the table of the code."""
    assert load_generator("hooks").main(["--check"]) == 0, capsys.readouterr().out


def test_plots_are_current(capsys: pytest.CaptureFixture[str]) -> None:
    """The plots show the numbers that stand in the tables of benchmarks.md."""
    assert load_generator("plots").main(["--check"]) == 0, capsys.readouterr().out


def test_the_reference_is_current(capsys: pytest.CaptureFixture[str]) -> None:
    """Every public name is on the page, in one group; names that the plugins have from the core are there once."""
    generator = load_generator("reference")
    assert generator.main(["--check"]) == 0, capsys.readouterr().out
    text = (DOCS / "reference.md").read_text(encoding="utf-8")
    again = {f"kernels_plugins.{name}" for name in kernels_core.__all__}
    assert {line.removeprefix("::: ") for line in text.splitlines() if line.startswith(":::")} == {
        f"{package.__name__}.{name}" for package in PUBLIC for name in package.__all__
    } - again


def test_every_hook_is_documented_with_its_arguments() -> None:
    """Each hook has a heading, its argument list, its kind and the first line of its card."""
    text = (DOCS / "hooks.md").read_text(encoding="utf-8")
    for name, spec in vars(hookspecs).items():
        if name.startswith("kernels_"):
            arguments = ", ".join(inspect.signature(spec).parameters)
            assert f"\n## {name}\n" in text
            assert f"`{name}({arguments})`" in text
            assert inspect.cleandoc(spec.__doc__).partition("\n")[0] in text
            assert re.search(r"Kind: (first result|collect|veto|tell)\b", spec.__doc__), name


def test_the_tree_of_errors_is_that_of_the_code() -> None:
    """errors.md draws the tree of the module's docstring, and that tree has every class."""
    tree = re.search(r"```\n(.*?)```", errors.__doc__ or "", re.DOTALL)
    assert tree and tree[1] in (DOCS / "errors.md").read_text(encoding="utf-8")
    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.KernelsError)]
    assert all(re.search(rf"\b{c.__name__}\b", tree[1]) for c in classes)
