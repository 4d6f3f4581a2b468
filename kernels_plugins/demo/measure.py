"""The process that `kernels-core demo` starts: runs a block on kernels from the Hub, and compares; then a whole model.

A process of its own, because the Hub's client reads where the Hub is when it is imported.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kernels_core import Layer, Mode, Resolution, Scope, hookimpl, plugin_manager, references, resolve
from kernels_plugins import LayerRepository, use_kernel_mapping

from ..files import write_file
from ..oracle.inputs import decorated, record
from .block import Block
from .chosen import difference, measure_model, say

REPOSITORY = "kernels-demo/llama-layers"
LAYERS = ("GeluAndMul", "RMSNorm", "RotaryEmbedding", "SiluAndMul")

SIZES = {
    "cpu": ({"hidden": 256, "heads": 8, "inner": 512, "length": 128}, 2),
    "cuda": ({"hidden": 4096, "heads": 32, "inner": 11008, "length": 2048}, 2),
}
"""Size of the block and of a batch, by type of device."""

Step = Callable[[], tuple[list[Tensor], list[Tensor]]]


@dataclass
class Row:
    """One layer, or the whole block, run with and without kernels.

    Differences are the largest of any output or gradient, in units of `atol + rtol * magnitude of the
    tensor`, and of as many of these as there are layers in it: more than 1 is off.
    """

    module: str
    layer: str
    device: str
    mode: str
    implementation: str
    served: bool
    forward_difference: float
    gradient_difference: float

    @property
    def is_right(self) -> bool:
        """Whether all numbers are within tolerance; NaN is not."""
        return self.forward_difference <= 1 and self.gradient_difference <= 1


@dataclass(frozen=True)
class Part:
    """A layer of the block, or the whole block, with its inputs."""

    path: str
    module: nn.Module
    inputs: tuple[Tensor, ...]

    @property
    def layers(self) -> list[Layer]:
        """The decorated layers in it, each as often as it occurs."""
        return [layer for _, _, layer in decorated(self.module)]

    def step(self, call: Callable[..., Any]) -> Step:
        """Return one step of training, the same each time: outputs, and gradients of all that has some."""
        wanted = [x for x in (*self.inputs, *self.module.parameters()) if x.requires_grad]
        torch.manual_seed(0)  # kernel and reference start from the same gradients
        with torch.no_grad():
            seeds = [torch.randn_like(y) for y in _as_list(self.module(*self.inputs))]

        def step() -> tuple[list[Tensor], list[Tensor]]:
            outputs = _as_list(call(*self.inputs))
            return outputs, list(torch.autograd.grad(outputs, wanted, seeds))

        return step


class Recorder:
    """A plugin that notes which decision each layer was called by."""

    def __init__(self) -> None:
        self.used: dict[Layer, Resolution] = {}
        self.refusals: set[str] = set()

    @hookimpl
    def kernels_resolved(self, resolution: Resolution) -> None:
        """Note a decision that is put to use, and its refusals."""
        self.refusals.update(map(str, resolution.refusals))
        if resolution.request.layer is not None:
            self.used[resolution.request.layer] = resolution


def main() -> None:
    """Measure, and write the report to a file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", type=torch.device, required=True)
    parser.add_argument("--dtype", type=lambda name: getattr(torch, name), required=True)
    parser.add_argument("--report", type=Path, help="Where to write; without it, only load the kernels.")
    parser.add_argument("--html", type=Path, help="Where to write a page.")
    parser.add_argument("--seconds", type=float, default=3.0, help="How long each step of a model is timed.")
    options = parser.parse_args()
    torch.set_num_threads(1)  # on a busy machine, several wait for each other, and times mean nothing
    if options.report is None:
        with use_kernel_mapping(mapping(options.device)):
            for name in LAYERS:
                resolve(name, device=options.device, mode=Mode.TRAINING)
    else:
        options.report.write_text(json.dumps(measure(options.device, options.dtype, options.html, options.seconds)))


def mapping(device: torch.device) -> dict[str, Any]:
    """Map every layer of the demo to the demo's repository."""
    return {name: {device.type: LayerRepository(REPOSITORY, layer_name=name, revision="main")} for name in LAYERS}


def measure(device: torch.device, dtype: torch.dtype, html: Path | None = None, seconds: float = 3.0) -> dict[str, Any]:
    """Compare layers and block in eager mode; then, if all is well, measure a model."""
    recorder = Recorder()
    plugin_manager().register(recorder, "demo-recorder")
    say("kernels from the Hub, compared with their references")
    # A scope of its own for each, because a scope that is entered again keeps its decisions, and records none.
    rows = [
        _compare(part, "training", part.module, use_kernel_mapping(mapping(device)), recorder)
        for part in _parts(*_block(device, dtype))
    ]
    plugin_manager().unregister(recorder)
    compilers = (os.environ.get("CXX", ""), "g++", "clang++")
    can_compile = device.type != "cpu" or any(map(shutil.which, compilers))  # on a CPU, Inductor writes C++
    found: dict[str, Any] = {}
    if all(row.served and row.is_right for row in rows):
        model = measure_model(device, dtype, mapping(device), can_compile, seconds)
        if html is not None:
            write_file(html, model.page.to_html())
        found = {
            "model": model.model,
            "steps": [{**asdict(step), "ratio": step.ratio} for step in model.steps],
            "choice": json.loads(model.choice.to_json()),
            "receipt": json.loads(model.receipt.to_json()),
        }
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "compiler": can_compile,
        "rows": [{**asdict(row), "is_right": row.is_right} for row in rows],
        "refusals": sorted(recorder.refusals),
        **found,
    }


def _block(device: torch.device, dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    """Make a block with random weights, and an input."""
    torch.manual_seed(0)
    size, batch = SIZES.get(device.type, SIZES["cpu"])
    block = Block(**size).to(device, dtype)
    for parameter in block.parameters():
        if parameter.dim() == 1:  # ones would hide a norm that forgets its weight
            nn.init.normal_(parameter, 1.0, 0.1)
    return block, torch.randn(batch, size["length"], size["hidden"], device=device, dtype=dtype, requires_grad=True)


def _parts(block: nn.Module, x: Tensor) -> Iterator[Part]:
    """Yield every decorated layer with the inputs that the block passes to it, then the block."""
    with record(block) as calls, references():
        block(x)
    for recorded in calls:
        yield Part(recorded.path, block.get_submodule(recorded.path), recorded.call.args)
    yield Part("(block)", block, (x,))


def _compare(part: Part, mode: str, call: Callable[..., Any], kernels: Scope, recorder: Recorder) -> Row:
    """Compare a part, called with kernels, with its reference."""
    recorder.used.clear()
    step = part.step(call)
    with references():
        expected = part.step(part.module)()  # eager also where `call` is compiled
    with kernels:
        actual = step()
    used = [recorder.used.get(layer) for layer in set(part.layers)]
    return Row(
        module=part.path,
        layer=part.layers[0].name if len(used) == 1 else f"all {len(used)}",
        device=str(part.inputs[0].device),
        mode=mode,
        implementation=", ".join(sorted({resolution.origin for resolution in used if resolution})),
        served=all(resolution is not None and not resolution.is_reference for resolution in used),
        forward_difference=difference(actual[0], expected[0]) / len(part.layers),
        gradient_difference=difference(actual[1], expected[1]) / len(part.layers),
    )


def _as_list(outputs: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


if __name__ == "__main__":
    main()
