"""The command `kernels-core verify`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fresh_process import run_python
from typer.testing import CliRunner

import kernels_plugins.oracle.plugin as oracle
from kernels_core import ArgumentError, Candidate, LayerRequest, PluginManager, hookimpl
from kernels_core.cli import command_line
from kernels_plugins import register_kernel_mapping
from kernels_plugins.oracle.isolated import _showing

SUPPORT = Path(__file__).parents[1] / "support"

SCENE = """
import torch
from oracle_kernels import Norm, fused, kernel, missing_gradient
from kernels_plugins import register_kernel_mapping

def right():
    register_kernel_mapping({"OracleNorm": {"cpu": kernel(fused)}})
    return torch.nn.Sequential(Norm())

def wrong():
    register_kernel_mapping({"OracleNorm": {"cpu": kernel(missing_gradient)}})
    model = torch.nn.Sequential(Norm())
    model.dummy_inputs = {"input": torch.randn(2, 64)}
    return model

class Some(torch.nn.Module):
    def __init__(self, called):
        super().__init__()
        self.norm, self.called = Norm(), called

    def forward(self, x):
        return self.norm(x) if self.called else x

def uncalled():
    right()
    return Some(False)

def unloadable():
    from kernels_plugins import LocalLayerRepository
    nowhere = LocalLayerRepository("/nowhere", layer_name="Norm")
    register_kernel_mapping({"OracleNorm": {"cpu": [nowhere, kernel(fused)]}})
    return Some(True)

def inference_only():
    register_kernel_mapping({"OracleNorm": {"cpu": kernel(fused, has_backward=False)}})
    return Some(True)

def without():
    register_kernel_mapping({}, inherit_mapping=False)
    return Some(True)

def bare(): return Some(True)

def undecorated(): return torch.nn.Identity()

def crashes():
    import ctypes, os
    def exits(self, x): os._exit(3)
    def segfaults(self, x): return x if x.requires_grad else ctypes.string_at(0)
    def exits_well(self, x): raise SystemExit
    kernels = [kernel(exits), kernel(segfaults), kernel(exits_well), kernel(fused)]
    register_kernel_mapping({"OracleNorm": {"cpu": kernels}})
    return torch.nn.Sequential(Norm(), Norm())

def one(): return torch.randn(2, 64)
def several(): return (torch.randn(2, 64),)
def named(): return {"input": torch.randn(2, 64)}
def fails(): raise OSError("no data")

class Loud(torch.nn.Sequential):
    def forward(self, input):
        print("forward")
        return super().forward(input)

def loud(): return Loud(*right())
"""


@pytest.fixture(autouse=True)
def _scene(
    mapping_plugin: object, isolated_plugins: PluginManager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run in a folder with a module that makes models, with the plugins `mapping` and `oracle`."""
    isolated_plugins.register(oracle, "oracle")
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "oracle_models.py").write_text(SCENE)
    monkeypatch.chdir(tmp_path)


def run(*arguments: str) -> tuple[int, str]:
    """Run the command in this process, and return its exit code and output."""
    result = CliRunner().invoke(command_line(), ["verify", "--in-process", *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


@pytest.mark.parametrize("inputs", ["one", "several", "named"])
def test_a_right_kernel_exits_with_0(inputs: str) -> None:
    """Inputs are a tensor, a tuple or a dict."""
    code, output = run("oracle_models:right", "--inputs", f"oracle_models:{inputs}")
    assert code == 0, output
    assert "1 kernel compared" in output


def test_a_wrong_kernel_exits_with_1() -> None:
    """The reason is printed; the inputs are the dummies of the model."""
    code, output = run("oracle_models:wrong")
    assert code == 1
    assert "no gradient, where the reference has one" in output


def test_without_gradients_and_as_json() -> None:
    """`--no-gradients` leaves training out; `--json` prints rows for programs."""
    code, output = run("oracle_models:wrong", "--no-gradients", "--json")
    assert code == 0
    assert {row["mode"] for row in json.loads(output)["rows"]} == {"inference"}


@pytest.mark.parametrize(
    ("model", "gap"),
    [
        ("right", ""),
        ("inference_only", ""),
        ("unloadable", "there is no such folder"),
        ("without", "no kernel: none is offered"),
        ("uncalled", "not called: the model does not call it with these inputs"),
        ("undecorated", "no decorated layer was called"),
    ],
)
def test_what_was_not_compared_is_a_failure_if_all_is_wanted(
    model: str, gap: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Kernels that nothing is known about, and layers without one, do no harm but for `--complete`."""
    asked = (f"oracle_models:{model}", "--inputs", "oracle_models:one")
    assert run(*asked)[0] == 0
    code, output = run(*asked, "--complete")
    assert code == (1 if gap else 0)
    assert ("error: not everything was compared" in output) is bool(gap)
    assert gap in output


def test_what_a_model_prints_is_no_part_of_the_answer(capfd: pytest.CaptureFixture[str]) -> None:
    """Standard output is JSON alone."""
    arguments = ["verify", "oracle_models:loud", "--inputs", "oracle_models:one", "--json"]
    command_line()(arguments, standalone_mode=False)
    printed = capfd.readouterr()
    assert json.loads(printed.out)["ok"]
    assert "forward" in printed.err


def test_a_kernel_that_ends_its_process_is_a_row(tmp_path: Path) -> None:
    """Each is reported once, with its case, which was shown before; others are compared; errors keep exit code 2."""
    paths = os.pathsep.join([str(SUPPORT), str(tmp_path), *sys.path])

    def verify(*arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": paths}
        return run_python(
            "-m", "kernels_core", "verify", *arguments, "--json", environment=environment, folder=tmp_path
        )

    done = verify("oracle_models:crashes", "--inputs", "oracle_models:one", "--dtype", "float32")
    rows = json.loads(done.stdout)["rows"]
    assert done.returncode == 1, done.stderr
    failed = {row["reason"]: row for row in rows if row["verdict"] == "failed"}
    codes = {f"it ends the process with exit code {code}" for code in (0, 3)}
    assert failed.keys() == {"it ends the process by signal SIGSEGV", *codes}
    assert len(failed) == sum(not row["ok"] for row in rows)
    case = failed["it ends the process by signal SIGSEGV"]
    assert (case["path"], case["mode"], case["case"]) == ("0", "inference", "as given")
    assert done.stderr.count("Segfaults, inference, float32, as given") == 1
    right = [row for row in rows if row["verdict"] == "ok"]
    assert {row["path"] for row in right} == {"0", "1"} and {row["mode"] for row in right} == {"inference", "training"}
    refused = verify("oracle_models:right", "--inputs", "oracle_models:fails")
    assert refused.returncode == 2 and "no data" in refused.stderr and not refused.stdout


def test_dtypes_are_limited() -> None:
    """`--dtype` converts inputs and parameters, and runs all cases in that dtype only; another word is an error."""
    code, output = run("oracle_models:right", "--inputs", "oracle_models:one", "--dtype", "bfloat16", "--json")
    rows = [row for row in json.loads(output)["rows"] if row["dtype"]]
    assert code == 0 and {row["dtype"] for row in rows} == {"bfloat16"}
    assert {"as given", "strided", "odd size"} <= {row["case"] for row in rows}
    with pytest.raises(ArgumentError, match="--dtype is 'bf17': name a dtype of PyTorch"):
        run("oracle_models:right", "--inputs", "oracle_models:one", "--dtype", "bf17")


def test_a_plugin_that_failed_is_no_missing_kernel(isolated_plugins: PluginManager) -> None:
    """Where nothing is offered because a plugin raised, the exit code is 1, and its error is in the report."""

    class Broken:
        @hookimpl
        def kernels_find_candidates(self, request: LayerRequest) -> list[Candidate]:
            raise OSError("no table of kernels")

    isolated_plugins.register(Broken(), "broken")
    code, output = run("oracle_models:bare", "--inputs", "oracle_models:one")
    assert code == 1 and "no table of kernels" in output


def test_what_cannot_be_answered_says_why() -> None:
    """Unknown modules, inputs and devices are errors of ours, which the command line turns into exit code 2."""
    with pytest.raises(ArgumentError, match="The inputs of the model are not known"):
        run("oracle_models:right")
    with pytest.raises(ArgumentError, match="'oracle_models:fails' makes no model: OSError: no data"):
        run("oracle_models:fails")
    with pytest.raises(ArgumentError, match="'oracle_models:fails' makes no inputs: OSError: no data"):
        run("oracle_models:right", "--inputs", "oracle_models:fails")
    with pytest.raises(ArgumentError, match="Cannot import 'oracle_models:nothing'"):
        run("oracle_models:nothing")
    with pytest.raises(ArgumentError, match="The device 'abacus' cannot be used here"):
        run("oracle_models:wrong", "--device", "abacus")


def test_a_decorated_function_is_not_called_for_a_model() -> None:
    """`verify` takes a decorated function, too."""
    Path("oracle_functions.py").write_text(
        "from kernels_core import use_kernel_forward_from_hub\n"
        "@use_kernel_forward_from_hub('oracle_f')\n"
        "def f(x):\n    return x * 2\n"
        "import torch\nx = torch.ones(2, 3)\n"
    )
    register_kernel_mapping({"oracle_f": {"cpu": lambda x: x + x}})
    code, output = run("oracle_functions:f", "--inputs", "oracle_functions:x")
    assert code == 0 and "1 kernel compared" in output, output
    assert torch.is_grad_enabled()


def test_the_first_seconds_show_what_is_done(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first case, a terminal has a text beside the spinner: importing a model takes seconds."""
    monkeypatch.setenv("FORCE_COLOR", "1")  # for rich, a terminal
    with _showing("verify"):
        pass
    assert "the model is made" in capsys.readouterr().err
