"""Decision files on a GPU: the class of hardware is that of the device, and a file of another one is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from kernels_core import DecisionError, DecisionFile, Mode, receipt, use_kernel_forward_from_hub
from kernels_plugins import register_kernel_mapping

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@use_kernel_forward_from_hub("Frozen on a GPU")
class Layer(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1


class Two(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 2


class Three(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 3


def test_decisions_are_by_capability(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The frozen kernel serves on this GPU, in CUDA graphs too; a file for a GPU of another capability raises."""
    place, x = tmp_path / "kernels.decisions.json", torch.zeros(4, device="cuda")
    register_kernel_mapping({"Frozen on a GPU": {"cuda": Two}})
    receipt(Layer(), device="cuda", mode=Mode.INFERENCE).freeze(place)
    (model,) = DecisionFile.from_file(place).models
    major, minor = torch.cuda.get_device_capability()
    assert (model.capability, model.where.split()[1]) == (10 * major + minor, f"{major}.{minor}")
    register_kernel_mapping({"Frozen on a GPU": {"cuda": [Three, Two]}})
    monkeypatch.setenv("KERNELS_DECISIONS", str(place))
    register_kernel_mapping({})
    with torch.no_grad():
        assert Layer()(x)[0].item() == 2
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = Layer()(x)
        graph.replay()
        assert y[0].item() == 2
    value = json.loads(place.read_text())
    value["models"][0]["capability"] = 61
    place.write_text(json.dumps(value))
    register_kernel_mapping({})
    with pytest.raises(DecisionError, match=r"some for cuda 6.1"), torch.no_grad():
        Layer()(x)
