"""`kernels-core doctor`: each problem of a machine is named with its remedy, and nothing secret is shown."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import run_here
from hub_scene import Publish, kernel, new_process  # noqa: F401

from kernels_core import KernelsWarning, PluginError, PluginManager
from kernels_plugins import doctor, get_kernel, mapping
from kernels_plugins.adoption import plugin as adoption
from kernels_plugins.doctor import hub, settings
from kernels_plugins.doctor import plugin as doctor_plugin
from kernels_plugins.local_hub.server import LocalHub
from kernels_plugins.packs import inductor, torch_operators

pytest_plugins = ["kernels_plugins.hub.testing"]

DOCS = Path(__file__).parents[2] / "docs"
Findings = dict[str, dict[str, Any]]
Run = Callable[..., tuple[int, Any]]


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    local_hub: LocalHub,
    new_process: object,  # noqa: F811
    isolated_plugins: PluginManager,
) -> Run:
    """Run `doctor` where no plugin but this one is loaded; returns the exit code, and findings by area and subject."""
    isolated_plugins.register(doctor_plugin, "doctor")
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, as_json: bool = True) -> tuple[int, Any]:
        ran = run_here(capsys, "doctor", *(["--json"] if as_json else []), *arguments)
        if not as_json:
            return ran.code, ran.out
        assert ran.json["ok"] is not bool(ran.code)
        return ran.code, {f"{one['area']} {one['subject']}": one for one in ran.json["findings"]}

    return run


def problems(found: Findings) -> dict[str, str]:
    return {name: one["found"] for name, one in found.items() if one["state"] == "problem"}


def test_a_sound_machine_has_no_problem(run: Run, kernel_repository: Publish, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where everything works: no problem, exit code 0, the Hub answers, and the cache is measured."""
    kernel_repository(layers=kernel(3)).branch("v1")
    get_kernel("acme/kernels", version=1)
    monkeypatch.setenv("HF_TOKEN", "hf_local_member")
    code, found = run()
    assert (code, problems(found)) == (0, {})
    assert found["machine python"]["found"].startswith(sys.version.partition(" ")[0])
    assert re.fullmatch(r"answers in \d+\.\d s", found["hub connection"]["found"])
    assert re.match("1 repositories, |huggingface_hub 1.* does not list kernels", found["cache kernels"]["found"])
    assert found["hub token"]["found"] == "is there, and is not shown"
    code, text = run(as_json=False)
    assert "hf_local_member" not in json.dumps(found) + text and "problems: 0" in text


def test_offline_sends_no_request(run: Run, local_hub: LocalHub) -> None:
    """`--offline` asks nobody."""
    local_hub.forget()
    _, found = run("--offline")
    assert found["hub connection"]["found"] == "not tried: --offline" and local_hub.count() == 0


@pytest.mark.parametrize("fault", [{"status": 503}, {"status": 401}, {"delay": 3.0}, {"drop": True}])
def test_a_hub_that_does_not_answer(
    run: Run, local_hub: LocalHub, monkeypatch: pytest.MonkeyPatch, fault: dict[str, Any]
) -> None:
    """An error, a dropped connection and silence are problems that name a remedy, after a bounded time."""
    monkeypatch.setattr(hub, "_PATIENCE", 0.5)
    local_hub.fail("/api/organizations", times=None, **fault)
    code, found = run()
    assert code == 1 and list(problems(found)) == ["hub connection"]
    assert re.search("try again|check|log in", problems(found)["hub connection"])


def test_variables_that_are_misspelt_or_malformed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name near to one of ours is a problem that names it, as is a malformed value; other names are notes."""
    values = {
        "KERNELS_STRCT": "1",
        "LOCAL_KERNEL": "x",
        "KERNELS_FLAVOUR_OF_THE_DAY": "vanilla",
        "DISABLE_KERNEL_MAPPING": "perhaps",
        "KERNELS_CANARY": "first=many",
        "KERNELS_SIGNATURES": "sometimes",
        "KERNELS_OBSERVE": "logs",
        "KERNELS_CHOICE": "no-such-file.json",
        "LOCAL_KERNELS": "acme/gate=/no/such/folder",
        "KERNELS_DENY": "acme/*\x1b[2J",
    }
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    code, found = run("--offline")
    assert code == 1
    wrong = {name.removeprefix("variables "): text for name, text in problems(found).items() if "variables" in name}
    assert "neither on nor off" in problems(found)["plugins examination"], "the other areas are examined all the same"
    assert wrong.keys() == values.keys() - {"KERNELS_FLAVOUR_OF_THE_DAY", "KERNELS_DENY"}
    assert "KERNELS_STRICT" in found["variables KERNELS_STRCT"]["remedy"]
    assert "LOCAL_KERNELS" in found["variables LOCAL_KERNEL"]["remedy"]
    assert "/no/such/folder" in wrong["LOCAL_KERNELS"] and "neither on nor off" in wrong["DISABLE_KERNEL_MAPPING"]
    assert found["variables KERNELS_DENY"]["found"] == r"acme/*\x1b[2J"
    assert found["variables KERNELS_FLAVOUR_OF_THE_DAY"]["state"] == "note"


def test_a_configuration_file_that_is_wrong(run: Run, configure: Callable[..., Path]) -> None:
    """The file is shown, and each of its problems with its line."""
    path = configure('deny = ["x"]\n')
    code, found = run()
    assert found["configuration file"]["found"] == str(path) and "configuration problem" not in found
    configure('choice = "gone.json"')
    code, found = run("--offline")
    assert code == 1 and str(path.with_name("gone.json")) in found["configuration choice"]["found"]
    configure("deny = 3\n")
    code, found = run()
    assert code == 1 and found["configuration problem"]["found"] == f"{path}:1: deny: write a list, not 3."


def test_names_in_a_configuration_file(
    run: Run, configure: Callable[..., Path], isolated_plugins: PluginManager
) -> None:
    """A layer name near to that of a rule, and a pack without a kernel on this machine, are notes; others are not."""
    plugins = {"adopt": adoption, "mapping": mapping, "torch": torch_operators, "inductor": inductor}
    for name, plugin in plugins.items():
        isolated_plugins.register(plugin, name)
    configure('[mapping]\nRMSNrom = "pack:torch"\nAttention = "reference"\n[packs]\n"*" = ["torch"]\nx = ["inductor"]')
    _, found = run("--offline")
    notes = {name: one["found"] for name, one in found.items() if name.startswith("configuration")}
    assert notes.keys() == {"configuration file", "configuration mapping.RMSNrom"}
    assert found["configuration mapping.RMSNrom"]["state"] == "note"
    assert found["configuration mapping.RMSNrom"]["remedy"].startswith("Write RMSNorm, unless")
    configure('[mapping]\nRMSNrom = "pack:torch"')
    _, found = run("--offline")
    assert "it has no kernel for 'RMSNrom' on cpu" in found["configuration pack torch"]["found"]


def test_the_variables_are_those_of_the_page() -> None:
    """The names that are found in the sources are those that docs/environment.md lists."""
    page = (DOCS / "environment.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| `(\w*KERNEL\w*)`", page, re.MULTILINE))
    assert settings.known_variables() == listed


def test_a_gpu_that_pytorch_cannot_use(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver lists a GPU, and this PyTorch has no CUDA: a problem; hidden on purpose, it is a note."""
    if doctor.machine.torch.version.cuda is not None or sys.platform == "win32":
        pytest.skip("this PyTorch is built for CUDA")
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 550.54'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    _, found = run("--offline")
    assert "compiled without CUDA" in problems(found)["gpu torch"] and "H100" in found["gpu driver"]["found"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    _, found = run("--offline")
    assert found["gpu torch"]["state"] == "note" and "hides every GPU" in found["gpu torch"]["found"]
    program.write_text("#!/bin/sh\nexit 9\n")
    assert "no GPU" in run("--offline")[1]["gpu torch"]["found"]


def test_compilers_that_are_missing_or_switched_off(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a C++ compiler, or with Dynamo switched off, models are not compiled: notes."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    monkeypatch.delenv("CXX", raising=False)
    _, found = run("--offline")
    assert found["machine compiler"]["state"] == found["machine torch.compile"]["state"] == "note"


def test_faults_of_plugins_are_problems(run: Run, isolated_plugins: PluginManager) -> None:
    """A plugin at fault is named with the reason."""
    with pytest.warns(KernelsWarning):
        isolated_plugins.report(PluginError("it is broken", plugin="lame"))
    code, found = run("--offline")
    assert code == 1 and problems(found) == {"plugins lame": "it is broken"}


def test_a_cache_that_cannot_be_used(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file where a folder belongs, and a user that does not exist, are problems."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("KERNELS_CACHE", str(tmp_path / "file" / "cache"))
    assert "is a file" in problems(run("--offline")[1])["cache folder"]
    monkeypatch.setenv("KERNELS_CACHE", "~nobody-of-that-name/cache")
    assert "no such user" in problems(run("--offline")[1])["cache folder"]


def test_locks_are_found_and_read(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock of the project above is read: malformed, or without a kernel that the project names, it is a problem."""
    (tmp_path / "kernels.lock").write_text("[")
    inner = tmp_path / "inner"
    inner.mkdir()
    monkeypatch.chdir(inner)
    assert "kernels.lock" in problems(run("--offline")[1])["locks kernels.lock"]
    (tmp_path / "kernels.lock").write_text("[]")
    (tmp_path / "pyproject.toml").write_text('[tool.kernels.dependencies]\n"acme/kernels" = 1\n')
    _, found = run("--offline")
    assert "does not have acme/kernels version 1" in problems(found)["locks kernels.lock"]
    assert f"kernels-core lock {tmp_path}" in found["locks kernels.lock"]["remedy"]
