"""The process that `kernels-core demo` starts: runs the model with and without kernels, and compares.

A process of its own, because the Hub's client reads where the Hub is when it is imported.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from kernels_core import (
    ArgumentTypeError,
    KernelsWarning,
    Layer,
    Mode,
    Resolution,
    decorated_layer,
    hookimpl,
    plugin_manager,
    resolve,
)
from kernels_plugins import LayerRepository, use_kernel_mapping

from .block import Model

REPOSITORY = "kernels-demo/llama-layers"
LAYERS = ("RMSNorm", "RotaryEmbedding", "SiluAndMul", "GeluAndMul")

SIZES = {
    "cpu": ({"hidden": 256, "heads": 8, "inner": 512, "length": 128}, 2),
    "cuda": ({"hidden": 4096, "heads": 32, "inner": 11008, "length": 4096}, 1),
}
"""Size of the model, and of a batch."""

TOLERANCES = {torch.float32: (1.3e-6, 1e-5), torch.bfloat16: (1.6e-2, 1e-5), torch.float16: (1e-3, 1e-5)}
"""Relative and absolute, as in `torch.testing.assert_close`."""


@dataclass
class Row:
    """One layer, or the whole model, run in one mode.

    Differences are the largest in any output or gradient, in units of `atol + rtol * largest magnitude`
    of that tensor: more than 1 is off. Times are of forward and backward, in milliseconds.
    """

    module: str
    layer: str
    device: str
    mode: str
    implementation: str
    served: bool
    forward: float
    gradients: float
    reference_ms: float
    kernel_ms: float

    @property
    def is_right(self) -> bool:
        """Whether all numbers are within tolerance; NaN is not."""
        return self.forward <= 1 and self.gradients <= 1


class Recorder:
    """A plugin that notes what really served each layer."""

    def __init__(self) -> None:
        """Start with nothing."""
        self.resolutions: dict[Layer, Resolution] = {}

    @hookimpl
    def kernels_resolved(self, resolution: Resolution) -> None:
        """Note a decision when a call puts it to use."""
        if resolution.request.layer is not None:
            self.resolutions[resolution.request.layer] = resolution


class Comparison:
    """The model and what is needed to run its parts with and without kernels."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        """Make a model with random weights, and an input."""
        torch.manual_seed(0)
        size, batch = SIZES.get(device.type, SIZES["cpu"])
        self.device, self.dtype = device, dtype
        self.model = Model(**size).to(device, dtype)
        for parameter in self.model.parameters():
            if parameter.dim() == 1:  # norms start at one, which would hide a kernel that forgets the weight
                nn.init.normal_(parameter, 1.0, 0.1)
        self.input = torch.randn(batch, size["length"], size["hidden"], device=device, dtype=dtype)
        self.nothing = use_kernel_mapping({}, inherit_mapping=False)
        self.recorder = Recorder()
        plugin_manager().register(self.recorder, "demo-recorder")

    def eager(self) -> Iterator[Row]:
        """Compare every layer, and the whole model."""
        kernels = use_kernel_mapping(mapping(self.device))
        inputs = self._inputs_of_layers()
        for path, (module, arguments) in {**inputs, "model": (self.model, (self.input,))}.items():
            yield self._row(path, "training", kernels, module, module, arguments)

    def compiled(self, backend: str) -> Row:
        """Compare the whole model, compiled to one graph."""
        kernels = use_kernel_mapping(mapping(self.device))
        compiled = torch.compile(self.model, fullgraph=True, backend=backend)
        return self._row("model", "training, compiled", kernels, self.model, compiled, (self.input,))

    def refusals(self) -> list[str]:
        """Tell why layers were not served."""
        return sorted({str(refusal) for found in self.recorder.resolutions.values() for refusal in found.refusals})

    def _inputs_of_layers(self) -> dict[str, tuple[nn.Module, tuple[Tensor, ...]]]:
        """Run the model once and note what each decorated layer is called with."""
        found: dict[str, tuple[nn.Module, tuple[Tensor, ...]]] = {}
        paths = {module: path for path, module in self.model.named_modules() if is_decorated(module)}

        def note(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            found[paths[module]] = (module, tuple(x.detach().clone() for x in arguments))

        handles = [module.register_forward_pre_hook(note) for module in paths]
        with self.nothing:
            self.model(self.input)
        for handle in handles:
            handle.remove()
        return found

    def _row(
        self,
        path: str,
        mode: str,
        kernels: use_kernel_mapping,
        module: nn.Module,
        call: Callable[..., Any],
        arguments: tuple[Tensor, ...],
    ) -> Row:
        step = make_step(module, call, arguments)
        eager = make_step(module, module, arguments)
        with self.nothing:
            expected = eager()
        self.recorder.resolutions.clear()
        with kernels:
            actual = step()
        layers = {decorated_layer(part) for part in module.modules() if is_decorated(part)}
        resolutions = [self.recorder.resolutions[layer] for layer in layers if layer in self.recorder.resolutions]
        served = sum(not resolution.is_reference for resolution in resolutions)
        (forward, gradients) = (
            max(self._difference(a, e) for a, e in zip(*pair, strict=True)) for pair in zip(actual, expected, strict=True)
        )
        reference_ms, kernel_ms = times([(self.nothing, step), (kernels, step)])
        ...
