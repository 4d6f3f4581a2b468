"""Provenance in receipts, and bills of materials that are valid by the schema of CycloneDX."""

from __future__ import annotations

import hashlib
import json
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_scene import kernel, new_process, scale
from torch import nn
from typer.testing import CliRunner
from warned import ignored

from kernels_core import LoadError, receipt, use_kernel_forward_from_hub
from kernels_core.cli import command_line
from kernels_plugins import get_loaded_kernels, opaque, use_kernel_mapping
from kernels_plugins.local_hub.server import Repository

pytest_plugins = ["kernels_plugins.hub.testing"]

Publish = Callable[..., Repository]


@use_kernel_forward_from_hub("SbomScale")
class Scale(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


@use_kernel_forward_from_hub("SbomOther")
class Other(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def scene(kernel_repository: Publish, monkeypatch: pytest.MonkeyPatch) -> tuple[Repository, dict[str, Any]]:
    """Publish a kernel with a dependency; return it, and a mapping. The module `sbom_model` makes a model."""
    kernel_repository("acme/base", {"__init__.py": "FACTOR = 3"}, metadata={"license": "MIT"})
    needs = [{"repo-id": "acme/base", "revision": "main"}]
    repository = kernel_repository(
        "acme/kernels", kernel(), metadata={"license": "apache-2.0", "kernel-depends": needs}
    )
    module: Any = types.ModuleType("sbom_model")
    module.make = lambda: nn.Sequential(Scale(), Other(), Scale()).eval()
    monkeypatch.setitem(sys.modules, "sbom_model", module)
    return repository, {"SbomScale": {"cpu": scale()}}


def test_json_of_a_receipt_lists_the_provenance(
    kernel_repository: Publish, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Commit, license, publisher, signature, digests, dependencies; packages of references; replaced operators."""
    repository, mapping = scene(kernel_repository, monkeypatch)
    replaced = torch.library.Library("aten", "IMPL")
    with ignored():
        replaced.impl("hardswish", lambda x: x, "CPU")
    with use_kernel_mapping(mapping):
        first, other, _ = json.loads(receipt(sys.modules["sbom_model"].make(), device="cpu").to_json())
    del replaced
    overrides = first["provenance"].pop("overrides")
    assert overrides["hardswish"].startswith(f"{__file__}:")
    files = repository.files()
    digests = {
        path: "sha256:" + hashlib.sha256(files[f"build/torch-universal/{path}"]).hexdigest()
        for path in ("__init__.py", "layers.py")
    }
    (base,) = first["provenance"].pop("dependencies")
    own = hashlib.sha256()
    for path in ("__init__.py", "layers.py", "metadata.json"):
        own.update(path.encode() + b"\0" + hashlib.sha256(files[f"build/torch-universal/{path}"]).digest())
    with_base = hashlib.sha256((own.hexdigest() + base["content"]).encode()).hexdigest()
    assert first["provenance"] == {
        "content": with_base,
        "name": "kernels",
        "version": "1",
        "repository": "acme/kernels",
        "commit": repository.head(),
        "publisher": "acme",
        "license": "apache-2.0",
        "upstream": "",
        "trust": "acme is a trusted publisher",
        "signature": "none",
        "digests": digests,
    }
    assert (base["repository"], base["license"]) == ("acme/base", "MIT")
    assert other["origin"] == "reference" and other["provenance"] == {"overrides": overrides}
    with use_kernel_mapping({"SbomScale": {"cpu": opaque(scale())}}):
        (row, *_) = receipt(nn.Sequential(Scale()), device="cpu").rows
    assert row.provenance["commit"] == repository.head()  # an adapter keeps that of the kernel inside
    (model,) = json.loads(receipt(nn.Sequential(adopted_norm()), device="cpu").to_json())
    assert model["provenance"]["package"] == "torch" and "BSD-3-Clause" in model["provenance"]["license"]


def adopted_norm() -> nn.Module:
    """Make a layer whose reference is PyTorch's own."""
    return use_kernel_forward_from_hub("SbomNorm")(type("Norm", (nn.LayerNorm,), {"forward": nn.LayerNorm.forward}))(4)


def test_a_bill_of_materials_is_valid(
    kernel_repository: Publish, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The schema accepts it; kernels, dependencies, files, PyTorch and its overrides have components; once each."""
    pytest.importorskip("jsonschema", reason="the extra cyclonedx-python-lib[json-validation] is not installed")
    validation = pytest.importorskip(
        "cyclonedx.validation.json", reason="the extra kernels-core[sbom] is not installed"
    )
    from cyclonedx.schema import SchemaVersion

    repository, mapping = scene(kernel_repository, monkeypatch)
    replaced = torch.library.Library("aten", "IMPL")
    with ignored():
        replaced.impl("hardswish", lambda x: x, "CPU")
    with use_kernel_mapping(mapping):
        done = CliRunner().invoke(command_line(), ["sbom", "sbom_model:make", "--device", "cpu", "--json"])
        arguments = ["sbom", "sbom_model:make", "--device", "cpu", "--output", str(tmp_path / "sbom.json")]
        written = CliRunner().invoke(command_line(), arguments)
    del replaced
    assert (done.exit_code, written.exit_code) == (0, 0), done.exception
    lines = [line.split() for line in written.stdout.splitlines()]
    assert ["acme/kernels", repository.head()[:12], "acme", "Apache-2.0", "none"] in lines
    for text in (done.stdout, (tmp_path / "sbom.json").read_text(encoding="utf-8")):
        assert validation.JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    bom = json.loads(done.stdout)
    assert bom["metadata"]["component"]["name"] == "Sequential"
    parts = {f"{part.get('group', '')}/{part['name']}".strip("/"): part for part in bom["components"]}
    assert len(parts) == len(bom["components"]) == 4  # two kernels, the class of the reference, PyTorch
    mine = parts["acme/kernels"]
    assert (mine["version"], mine["publisher"]) == (repository.head(), "acme")
    (content,) = {kernel.content for kernel in get_loaded_kernels() if kernel.metadata.name == "kernels"}
    assert mine["hashes"] == [{"alg": "SHA-256", "content": content}]
    assert mine["purl"] == f"pkg:huggingface/acme/kernels@{repository.head()}"
    assert mine["licenses"] == [{"license": {"id": "Apache-2.0"}}]
    assert {file["name"]: file["hashes"][0]["alg"] for file in mine["components"]} == dict.fromkeys(
        ("__init__.py", "layers.py"), "SHA-256"
    )
    said = [(entry["name"].removeprefix("kernels-core:"), entry["value"]) for entry in mine["properties"]]
    assert ("signature", "none") in said and ("calls", "SbomScale on cpu for inference") in said
    assert [value.partition(":")[0] for name, value in said if name == "layer"] == ["0", "2"]
    (override,) = (entry for entry in parts["torch"]["properties"] if "hardswish" in entry["value"])
    assert override["name"] == "kernels-core:override" and __file__ in override["value"]
    needs = {entry["ref"]: entry.get("dependsOn", []) for entry in bom["dependencies"]}
    assert needs[mine["bom-ref"]] == [parts["acme/base"]["bom-ref"]] and len(needs["model"]) == 3
    assert len(get_loaded_kernels()) == 2


def test_without_the_extra_the_command_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of ours with the line for pip, before any kernel is fetched or file is written."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "cyclonedx"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "cyclonedx", None)
    done = CliRunner().invoke(command_line(), ["sbom", "torch.nn:Identity", "--device", "cpu"])
    assert isinstance(done.exception, LoadError) and "pip install 'kernels-core[sbom]'" in str(done.exception)
