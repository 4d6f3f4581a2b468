"""A whole model with measured kernels: adopted, its candidates measured, and its steps timed without and with them."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kernels_core import Bars, Mode, Page, Receipt, Section, TableRow, receipt
from kernels_plugins import Choice, adopt, choosing, use_choice, use_kernel_mapping

from ..choice.timing import time_runs
from ..comparison.tolerance import tolerance_of
from ..oracle.inputs import decorated
from .block import Block

LLAMA = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 4, "num_attention_heads": 32}
GPT2 = {"n_embd": 128, "n_layer": 4, "n_head": 4, "vocab_size": 65}
"""The size that nanoGPT trains on a CPU: wider models spend its time in matrix products, where nothing is to be won."""

BLOCK = {
    "cpu": {"hidden": 256, "heads": 8, "inner": 704, "length": 128},
    "cuda": {"hidden": 4096, "heads": 32, "inner": 11008, "length": 2048},
}

Step = Callable[[], list[Tensor]]
Made = tuple[str, nn.Module, int, Callable[..., list[Tensor]]]
"""The name of a model, itself, the tokens of a prefill, and a step for a number of tokens."""


@dataclass
class Timed:
    """A step of the model, as it was and with kernels.

    Differences are those of `measure.Row`.
    """

    name: str
    difference: float
    plain_ms: float
    chosen_ms: float

    @property
    def ratio(self) -> float:
        """The time with kernels as a multiple of that without."""
        return self.chosen_ms / self.plain_ms


@dataclass(frozen=True)
class Result:
    """All that was measured."""

    model: str
    steps: list[Timed]
    choice: Choice
    receipt: Receipt
    page: Page


def measure_model(
    device: torch.device, dtype: torch.dtype, mapping: Mapping[str, Any], compiler: bool, seconds: float
) -> Result:
    """Adopt a model, let candidates race for its layers, also those of a mapping, and time each step so long."""
    torch.manual_seed(0)
    make = _block if not importlib.util.find_spec("transformers") else _gpt2 if device.type == "cpu" else _llama
    name, model, tokens, run = make(device, dtype)
    with adopt(model), use_kernel_mapping(mapping):
        say(f"{name}: candidates for {len(receipt(model, device=device).rows)} layers are measured")
        steps: dict[str, Step] = {
            f"prefill of {tokens:,} tokens": lambda: run(tokens),
            "one token": lambda: run(1),
            "training step": lambda: run(tokens, training=True),
        }
        with choosing(contexts=["eager"], seconds=0.1) as chosen:
            for step in steps.values():
                step()
        if compiler:
            steps[f"prefill of {tokens:,} tokens, compiled"] = torch.compile(lambda: run(tokens))
        timed = []
        with use_choice(chosen.choice):
            for title, step in steps.items():
                say(f"{title}: without kernels, and with them")
                timed.append(_timed(title, model, step, device, seconds))
            found = receipt(model, device=device, mode=Mode.INFERENCE)
    return Result(name, timed, chosen.choice, found, _page(name, timed, chosen.choice, found))


def say(text: str) -> None:
    """Report progress, beside the answer of the command."""
    print(f"demo: {text}", file=sys.stderr, flush=True)


def _gpt2(device: torch.device, dtype: torch.dtype) -> Made:
    library: Any = importlib.import_module("transformers")  # which need not be installed
    # The tokens that begin and end texts: those of its tokenizer are not among so few.
    model = library.GPT2LMHeadModel(library.GPT2Config(**GPT2, bos_token_id=0, eos_token_id=0)).to(device, dtype).eval()
    return f"GPT-2 of transformers {library.__version__}", model, 768, _steps(model, GPT2["vocab_size"], (12, 64))


def _llama(device: torch.device, dtype: torch.dtype) -> Made:
    library: Any = importlib.import_module("transformers")
    config = library.LlamaConfig(**LLAMA, num_key_value_heads=LLAMA["num_attention_heads"] // 4, vocab_size=2000)
    with torch.device(device):
        model = library.LlamaForCausalLM(config).to(dtype).eval()
    return f"Llama of transformers {library.__version__}", model, 2048, _steps(model, 2000, (1, 2048))


def _steps(model: nn.Module, vocabulary: int, shape: tuple[int, int]) -> Callable[..., list[Tensor]]:
    ids = torch.randint(0, vocabulary, shape, device=next(model.parameters()).device)

    def run(tokens: int, training: bool = False) -> list[Tensor]:
        given = ids if tokens > 1 else ids[:1, :1]
        with torch.set_grad_enabled(training):
            output = model(given, labels=given if training else None, use_cache=False, logits_to_keep=0)
        return _with_gradients(model, output.loss) if training else [output.logits]

    return run


def _block(device: torch.device, dtype: torch.dtype) -> Made:
    size = BLOCK.get(device.type, BLOCK["cpu"])
    block = Block(**size).to(device, dtype)
    x = torch.randn(1, size["length"], size["hidden"], device=device, dtype=dtype)

    def run(tokens: int, training: bool = False) -> list[Tensor]:
        with torch.set_grad_enabled(training):
            output = block(x[:, :tokens])
        return _with_gradients(block, output.float().pow(2).mean()) if training else [output]

    return "A block of Llama (install transformers for a whole model)", block, size["length"], run


def _with_gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, [each for each in model.parameters() if each.requires_grad])]


def _timed(title: str, model: nn.Module, step: Step, device: torch.device, seconds: float) -> Timed:
    """Compare a step on the references with one on kernels, and time both in turns."""
    plain = use_kernel_mapping({}, inherit_mapping=False)  # no kernel is offered; it keeps its decisions

    def without() -> list[Tensor]:
        with plain:
            return step()

    expected, actual = without(), step()
    off = difference(actual, expected) / len(list(decorated(model)))
    times = dict(time_runs({"plain": without, "chosen": step}, device, budget=seconds, capture=False))
    milliseconds = []
    for timing in times.values():
        if isinstance(timing, Exception):
            raise timing
        milliseconds.append(timing.launched * 1e3)
    return Timed(title, off, *milliseconds)


def difference(actual: list[Tensor], expected: list[Tensor]) -> float:
    """Return the largest difference in units of the tolerance; NaN is infinitely large."""
    worst = 0.0
    for a, e in zip(actual, expected, strict=True):
        relative, absolute = tolerance_of(e.dtype)
        off = (a.float() - e.float()).abs().max() / (absolute + relative * e.float().abs().max())
        worst = max(worst, off.nan_to_num(nan=float("inf")).item())
    return worst


def _page(name: str, steps: list[Timed], choice: Choice, found: Receipt) -> Page:
    bars = []
    for step in steps:  # each in parts of its own time: those of a token and of a training step differ by hundreds
        bars += [
            TableRow((step.name, None)),
            TableRow(("as it was", 100.0, f"{step.plain_ms:.2f} ms"), "dim"),
            TableRow(
                ("with kernels", 100.0 * step.ratio, f"{step.chosen_ms:.2f} ms, {1 / step.ratio:.2f}x"),
                "green" if step.ratio < 1 else "yellow",
            ),
        ]
    cards = [TableRow((f"{1 / step.ratio:.2f}x", step.name), "green" if step.ratio < 1 else "yellow") for step in steps]
    chosen, receipt_page = choice.as_page(), found.as_page()
    parts = [
        Section("Each step, as a share of its time before", [Bars(bars, unit="%")]),
        Section("Each layer, as a share of the time of its reference", []),
        *chosen.parts,
        *receipt_page.parts,
    ]
    return Page(f"{name}, with measured kernels", parts, "How many times as fast it became, on this machine.", cards)
