"""The command line: its output for people and for programs, and its exit codes."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from command_line import Run, run_here
from torch import nn

import kernels_core
from kernels_core import (
    Candidate,
    LayerRequest,
    PluginError,
    PluginManager,
    cli,
    hookimpl,
    hookspecs,
    use_kernel_forward_from_hub,
)
from kernels_plugins import register_kernel_mapping


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    return functools.partial(run_here, capsys)


@use_kernel_forward_from_hub("Double")
class Double(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + x


class FastDouble(nn.Module):
    can_torch_compile = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


class EagerDouble(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


class Greeter:
    kernels_priority = 7

    @hookimpl
    def kernels_register_commands(self, cli: typer.Typer) -> None:
        @cli.command()
        def greet(name: str) -> None:
            print(f"hello {name}")


def test_module_runs_the_command_line() -> None:
    """`python -m kernels_core` is the command, in a process with the installed plugins."""
    done = subprocess.run([sys.executable, "-m", "kernels_core", "--version"], capture_output=True, text=True)
    assert done.stdout == f"kernels-core {kernels_core.__version__}\n"
    assert done.returncode == 0


# --- plugins -------------------------------------------------------------------------------------


def test_plugins_lists_what_is_registered(run: Run, isolated_plugins: PluginManager) -> None:
    """Each plugin is listed with its distribution, module, hooks and priority."""
    isolated_plugins.register(Greeter(), "greeter")
    ran = run("plugins", "--json")
    rows = {row["name"]: row for row in ran.json}
    assert rows["greeter"]["hooks"] == ["kernels_register_commands"]
    assert rows["greeter"]["priority"] == 7
    assert rows["mapping"]["distribution"] == f"kernels-core {kernels_core.__version__}"
    assert rows["mapping"]["module"] == "kernels_plugins.mapping"
    assert ran.code == 0


def test_plugins_tells_faults_once(run: Run, isolated_plugins: PluginManager) -> None:
    """A plugin that could not be loaded has a row and its message, and the exit code is 1."""
    with pytest.warns(kernels_core.KernelsWarning):
        isolated_plugins.report(PluginError("it is broken", plugin="lame"))
    ran = run("plugins")
    assert ran.out.count("it is broken") == 1
    assert "lame" in ran.out
    assert ran.err == ""
    assert ran.code == 1
    assert run("plugins", "--json").json[-2]["faults"] == ["it is broken"]


def test_plugins_asks_for_the_offers(run: Run, isolated_plugins: PluginManager) -> None:
    """Each plugin is listed with the layers that it offers; a tie or a fault of an offer is shown, with exit code 1."""

    class Maps:
        @kernels_core.hookimpl
        def kernels_mapping(self) -> Any:
            return {"Gate": {"cpu": torch.nn.Identity}, "Norm": {"xpu": torch.nn.Identity}}

    class Offers:
        kernels_priority = 0

        @kernels_core.hookimpl
        def kernels_find_candidates(self, request: kernels_core.LayerRequest) -> Any:
            return [kernels_core.Candidate(torch.nn.Identity, priority=self.kernels_priority)]

    class Fails:
        @kernels_core.hookimpl
        def kernels_find_candidates(self, request: kernels_core.LayerRequest) -> Any:
            raise ValueError("no table of kernels")

    offers = Offers()
    isolated_plugins.register(Maps(), "maps")
    isolated_plugins.register(offers, "offers")
    tied = run("plugins")
    assert tied.code == 1 and "Plugins maps, offers offer kernels for layer 'Gate' with equal priority" in tied.out
    assert "'Norm'" not in tied.out and tied.err == ""
    offers.kernels_priority = 1
    ran = run("plugins", "--json")
    rows = {row["name"]: row for row in ran.json}
    assert ran.code == 0 and rows["maps"]["layers"] == rows["offers"]["layers"] == ["Gate", "Norm"]
    isolated_plugins.register(Fails(), "fails")
    assert (failed := run("plugins")).code == 1 and "no table of kernels" in failed.out and failed.err == ""


def test_other_commands_warn_of_faults_on_stderr(run: Run, isolated_plugins: PluginManager) -> None:
    """Faults of plugins do not mix with the answer to another question."""
    with pytest.warns(kernels_core.KernelsWarning):
        isolated_plugins.report(PluginError("it is broken", plugin="lame"))
    ran = run("hooks", "--json")
    assert ran.err == "warning: it is broken\n"
    assert ran.code == 0
    assert ran.json


def test_pipe_gets_plain_lines(run: Run) -> None:
    """In a pipe, a row is one line, without a box, however long it is."""
    lines = run("plugins").out.splitlines()
    assert lines[0].split() == ["name", "distribution", "module", "hooks", "layers", "priority", "faults"]
    assert [line.split()[0] for line in lines[1:]] == ["core", "mapping"]


# --- hooks ---------------------------------------------------------------------------------------


def test_a_narrow_terminal_gets_a_list(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where columns would be a few characters wide, each entry is a line: names and hooks can be read."""
    monkeypatch.setenv("TTY_COMPATIBLE", "1")  # what rich takes for a terminal
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "40")
    hooks = ("kernels_find_candidates", "kernels_load_layer", "kernels_configuration", "kernels_settings_in_code")
    assert "\nhooks: {}, \n{}, \n{}, \n{}\n".format(*hooks) in run("plugins").out
    monkeypatch.setenv("COLUMNS", "160")
    assert "│ mapping " in run("plugins").out


def test_hooks_lists_every_card(run: Run) -> None:
    """Every hook is listed with its arguments and the first line of its card."""
    ran = run("hooks", "--json")
    assert {row["hook"] for row in ran.json} == {name for name in vars(hookspecs) if name.startswith("kernels_")}
    assert all(row["does"].endswith(".") for row in ran.json)
    (row,) = [row for row in ran.json if row["hook"] == "kernels_authorize"]
    assert row["arguments"] == ["request", "candidate"]


# --- resolve -------------------------------------------------------------------------------------


def test_resolve_tells_what_serves(run: Run) -> None:
    """A layer that a kernel serves: its origin, and exit code 0."""
    register_kernel_mapping({"Double": {"cpu": FastDouble}})
    ran = run("resolve", "Double")
    assert "FastDouble" in ran.out
    assert ran.code == 0


def test_resolve_exits_with_1_for_the_reference(run: Run) -> None:
    """A layer that nothing serves runs its reference, and the exit code says so."""
    ran = run("resolve", "Nothing")
    assert ran.out == "layer 'Nothing' on cpu for inference: reference\n"
    assert ran.code == 1


def test_resolve_passes_mode_device_and_compile_on(run: Run) -> None:
    """The options make the request, and the output has the refusal of a kernel that they rule out."""
    register_kernel_mapping({"Double": {"cpu": EagerDouble}})
    ran = run("resolve", "Double", "--mode", "training", "--compile", "--device", "cpu", "--json")
    assert ran.json["mode"] == ["training", "torch_compile"]
    assert "can_torch_compile" in ran.json["refusals"][0]["reason"]
    assert ran.json["is_reference"]
    assert ran.code == 1


def test_resolve_imports_a_class(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`module:Class` is imported from the current directory, and checked against the contract."""
    source = "import torch\nfrom kernels_core import use_kernel_forward_from_hub\n"
    source += "@use_kernel_forward_from_hub('Double')\nclass Mine(torch.nn.Module):\n    def forward(self, a, b): ...\n"
    (tmp_path / "cli_user_layers.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    register_kernel_mapping({"Double": {"cpu": FastDouble}})
    ran = run("resolve", "cli_user_layers:Mine")
    assert "takes other parameters" in ran.out
    assert ran.code == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resolve", "nowhere:Layer"], "error: Cannot import 'nowhere:Layer': ModuleNotFoundError"),
        (["resolve", "torch.nn:Nope"], "error: Cannot import 'torch.nn:Nope': AttributeError"),
        (["resolve", "torch.nn:Linear"], "is not decorated"),
        (["resolve", "Double", "--device", "toaster"], "error: Unknown device 'toaster'"),
        (["resolve", "Double", "--mode", "dreaming"], "dreaming"),
        (["resolve"], "Missing argument"),
        (["unheard-of"], "No such command"),
    ],
)
def test_wrong_questions(run: Run, arguments: list[str], message: str) -> None:
    """A question without an answer is a message on standard error and exit code 2, never a traceback."""
    ran = run(*arguments)
    assert message in ran.err
    assert "Traceback" not in ran.err
    assert ran.out == ""
    assert ran.code == 2


def test_warnings_are_lines(run: Run, isolated_plugins: PluginManager) -> None:
    """A warning raised on the way is one line on standard error."""

    def offer(priority: int) -> object:
        class Plugin:
            @hookimpl
            def kernels_find_candidates(self, request: LayerRequest) -> list[Candidate]:
                return [Candidate(FastDouble, priority=priority)]

        return Plugin()

    isolated_plugins.register(offer(0), "cli-one")
    isolated_plugins.register(offer(0), "cli-two")
    ran = run("resolve", "Double")
    assert ran.err.startswith("warning: Plugins cli-one, cli-two offer kernels")
    assert ran.code == 0


# --- explain -------------------------------------------------------------------------------------

MODELS = """
import torch
from kernels_core import use_kernel_forward_from_hub

@use_kernel_forward_from_hub("Double")
class Mine(torch.nn.Module):
    def forward(self, x): return x + x

@use_kernel_forward_from_hub("Double")
def mine(x): return x + x

def make():
    import cli_more_models
    print("loading weights")
    return torch.nn.Sequential(Mine())

def fails(): raise OSError("no weights")
def parses(): import argparse; argparse.ArgumentParser(prog="parses").parse_args(["--nonsense"])
def wants(size): ...
number = 3
"""


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run where there are models."""
    (tmp_path / "cli_models.py").write_text(MODELS)
    (tmp_path / "cli_more_models.py").write_text("")
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("models")
def test_explain_prints_json_alone(run: Run) -> None:
    """Text that a factory prints is no part of the answer; a factory may import from the current directory."""
    ran = run("explain", "cli_models:make", "--json", "--device", "cpu")
    assert [row["path"] for row in ran.json] == ["0"]
    assert ran.err == "loading weights\n"
    assert ran.code == 0


@pytest.mark.usefixtures("models")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cli_models:fails"], "error: 'cli_models:fails' makes no model: OSError: no weights"),
        (["cli_models:parses"], "'cli_models:parses' makes no model: SystemExit: 2"),
        (["cli_models:wants"], "'cli_models:wants' makes no model: TypeError"),
        (["cli_models:number"], "receipt takes an nn.Module, not 3"),
        (["cli_models:mine"], "receipt takes an nn.Module, not <function mine"),
        (["cli_models"], "error: Cannot import 'cli_models': add the name of an object in it, as package.module:name."),
        (["cli_models:make", "--device", "cpu", "--html", "nowhere/x.html"], "Cannot write 'nowhere/x.html'"),
        (["cli_models:make", "--origin", "acme/*"], "--require GLOB"),
    ],
)
def test_a_model_that_is_not_to_be_had_is_no_answer(run: Run, arguments: list[str], message: str) -> None:
    """Exit code 1 says that a requirement fails, so everything else is 2."""
    ran = run("explain", *arguments)
    assert message in ran.err
    assert (ran.code, ran.out) == (2, "")


def test_an_error_of_nobody_is_no_answer(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 1 is an answer, so Python must not give it for a traceback."""
    monkeypatch.setattr(cli, "print_rows", lambda *_: 1 / 0)
    ran = run("hooks")
    assert "Traceback" in ran.err and "ZeroDivisionError" in ran.err
    assert ran.code == 2


# --- Commands of plugins -------------------------------------------------------------------------


def test_plugins_add_commands(run: Run, isolated_plugins: PluginManager) -> None:
    """A command that a plugin adds runs like any other."""
    isolated_plugins.register(Greeter(), "greeter")
    assert run("greet", "world").out == "hello world\n"
    assert "greet" in run("--help").out


def test_a_plugin_cannot_replace_a_command(run: Run, isolated_plugins: PluginManager) -> None:
    """A command with the name of another is left out, and a warning names both places."""

    class Clumsy:
        @hookimpl
        def kernels_register_commands(self, cli: typer.Typer) -> None:
            @cli.command("resolve")
            def mine() -> None:
                print("not what was asked for")

            group = typer.Typer()
            group.command("more")(mine)
            cli.add_typer(group, name="explain")

    isolated_plugins.register(Clumsy(), "clumsy")
    ran = run("resolve", "Double")
    assert ran.out.startswith("layer 'Double' on cpu") and ran.code == 1
    assert "--require" in run("explain", "--help").out
    assert f"The command 'explain' of {__name__} is left out" in ran.err
    assert f"The command 'resolve' of {__name__} is left out: kernels_core.cli has one of that name" in ran.err
    assert [fault.plugin for fault in isolated_plugins.faults] == ["clumsy", "clumsy"]


def test_a_broken_plugin_does_not_break_the_command_line(run: Run, isolated_plugins: PluginManager) -> None:
    """A plugin that raises while adding commands is reported by name, and the rest works."""

    class Broken:
        @hookimpl
        def kernels_register_commands(self, cli: typer.Typer) -> None:
            raise RuntimeError("no commands today")

    isolated_plugins.register(Broken(), "broken")
    ran = run("resolve", "Nothing")
    assert ran.err.startswith("warning: Plugin 'broken' raised in kernels_register_commands")
    assert ran.code == 1


@pytest.mark.parametrize("variable", ["KERNELS_STRICT", "DISABLE_KERNEL_MAPPING"])
def test_a_switch_that_is_neither_on_nor_off(run: Run, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    """Every command refuses such a variable, not only one that comes to ask for it."""
    monkeypatch.setenv(variable, "maybe")
    for command in (("resolve", "Nothing"), ("hooks",), ("plugins",)):
        ran = run(*command)
        assert ran.code == 2 and f"{variable}='maybe' is neither on nor off" in ran.err


def test_strict_mode_ends_the_command(
    run: Run, isolated_plugins: PluginManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With KERNELS_STRICT a fault is an error, still without a traceback."""

    class Broken:
        @hookimpl
        def kernels_register_commands(self, cli: typer.Typer) -> None:
            raise RuntimeError("no commands today")

    isolated_plugins.register(Broken(), "broken")
    monkeypatch.setenv("KERNELS_STRICT", "1")
    ran = run("hooks")
    assert ran.err.startswith("error: Plugin 'broken' raised")
    assert ran.code == 2


# --- freeze and decisions ------------------------------------------------------------------------


def test_freeze_show_and_diff(run: Run, models: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file is written for both modes, added to, shown and compared; exit codes are 0, 1 and 2."""
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    ran = run("freeze", "cli_models:make", "--device", "cpu", "--output", first)
    assert (ran.code, "Replay it: KERNELS_DECISIONS=" in ran.err) == (0, True)
    assert [row["mode"] for row in json.loads(Path(first).read_text())["models"]] == ["inference", "training"]
    before = Path(first).read_bytes()
    monkeypatch.setenv("KERNELS_DECISIONS", "no such file")  # it decides anew
    arguments = ["freeze", "cli_models:make", "--device", "cpu", "--mode", "inference", "--json"]
    assert run(*arguments, "--output", first).json["decisions"] == 1
    assert Path(first).read_bytes() == before
    run(*arguments, "--output", second)
    monkeypatch.delenv("KERNELS_DECISIONS")
    shown = run("decisions", "show", second)
    assert shown.code == 0 and shown.out.splitlines()[0].split() == ["path", "layer", "device", "mode"]
    assert run("decisions", "show", second, "--json").json == json.loads(Path(second).read_text())
    assert (run("decisions", "diff", first, first).code, run("decisions", "diff", first, first).out) == (
        0,
        "no difference\n",
    )
    ran = run("decisions", "diff", first, second, "--json")
    assert ran.code == 1
    assert {(row["mode"], row["after"]) for row in ran.json} == {("training", "not there")}
    assert max(map(len, run("decisions", "diff", first, second).out.splitlines())) <= 80
    Path(second).write_text("{}")
    for command in (
        ["decisions", "diff", first, second],
        ["decisions", "show", second],
        [*arguments, "--output", second],
    ):
        ran = run(*command)
        assert (ran.code, ran.out) == (2, "") and "is no decision file" in ran.err
    ran = run("freeze", "cli_models:mine", "--output", first)
    assert (ran.code, "not a module" in ran.err) == (2, True)
