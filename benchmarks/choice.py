"""Measured choice: a Llama with one file for prefill, decoding and training; and the regret of a choice, cell by cell.

`python benchmarks/choice.py --contexts eager,captured,compiled --parts regret,steps,compiled` prints all. The regret
of a choice is the time of the candidate that it names over that of the best one, measured anew; beside it that of each
fixed provider.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import statistics
import tempfile
import timeit
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from adopt import CALLS, LIGER, PROMPT, ROUNDS, Subject, in_turns, make_steps, mapped
from measure import Row

from kernels_core import Mode, kernelize, use_kernel_forward_from_hub
from kernels_plugins import Choice, ChoiceCell, MeasuredOn, adopt, choosing, use_choice, use_kernel_mapping
from kernels_plugins.choice.machine import machine_of

ROWS = {"cpu": (1, 32, 256), "cuda": (1, 16, 64, 256, 1024, 4096)}
TRAINED = {"cpu": (256,), "cuda": (256, 1024, 4096)}
FEW = 64
"""The most rows for which the switch by hand takes PyTorch's norm."""

PROVIDERS = ("reference", "torch", "liger", "triton", "inductor")


def run(
    contexts: tuple[Any, ...] = ("eager",),
    seconds: float = 0.1,
    parts: tuple[str, ...] = ("price", "regret", "steps"),
    file: Path | None = None,
) -> Iterator[Row]:
    """Measure on a CUDA device if there is one, else on the CPU."""
    if "price" in parts:
        yield from _prices()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    _, plain = make_steps(device)
    model, steps = make_steps(device)
    file = file or Path(tempfile.mkdtemp()) / "kernels.choice.json"
    adopt(model)
    first = Choice.load(file) if file.exists() else _measured(model, device, contexts, seconds, file)
    print(first, flush=True)
    for name in steps if "steps" in parts else ():
        chosen = {"chosen": {}, "chosen, loss mapped": {"linear_cross_entropy": {device: "pack:triton"}}}
        found = {"plain": (plain[name], contextlib.nullcontext), "adopted": mapped(steps[name], {})}
        found |= {subject: mapped(steps[name], mapping, file) for subject, mapping in chosen.items()}
        if device == "cuda":
            found |= {"pack:liger": mapped(steps[name], LIGER), "by hand": (plain[name], by_hand)}
        yield from _compared(name, found, device, CALLS[name])
    for name in ("prefill", "training") if "compiled" in parts else ():  # Liger's kernels do not serve compiled code
        step = torch.compile(steps[name])
        found = {"plain": (torch.compile(plain[name]), contextlib.nullcontext)}
        found |= {"adopted": mapped(step, {}), "chosen": mapped(step, {}, file)}
        yield from _compared(f"{name}, compiled", found, device, 1)
    if "regret" in parts:
        yield from _regrets(first, _measured(model, device, contexts, seconds, None))


def _compared(name: str, subjects: Mapping[str, Subject], device: str, calls: int) -> Iterator[Row]:
    times = in_turns(subjects, device, ROUNDS[device] * (3 if calls > 1 else 1), calls)
    for subject in list(times)[1:]:
        yield Row("choice", f"Llama, {name}, {subject} ({device})", times[subject], "ms", "plain", times["plain"])


@contextlib.contextmanager
def by_hand() -> Iterator[None]:
    """Switch by the number of rows, as without this library: PyTorch's norm for few, Liger's kernels for many."""
    from liger_kernel.ops import LigerRMSNormFunction, LigerSiLUMulFunction
    from liger_kernel.transformers.rope import liger_rotary_pos_emb
    from transformers.models.llama import modeling_llama as llama

    norm, mlp, rotary = llama.LlamaRMSNorm.forward, llama.LlamaMLP.forward, llama.apply_rotary_pos_emb

    def norm_by_rows(self: Any, x: torch.Tensor) -> Any:
        if x.shape[1] <= FEW:
            return torch.nn.functional.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)
        return LigerRMSNormFunction.apply(x, self.weight, self.variance_epsilon, 0.0, "llama", False)

    def mlp_by_rows(self: Any, x: torch.Tensor) -> Any:
        if x.shape[1] <= FEW:
            return mlp(self, x)
        return self.down_proj(LigerSiLUMulFunction.apply(self.gate_proj(x), self.up_proj(x)))

    def rotary_by_rows(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> Any:
        if q.shape[2] <= FEW:
            return rotary(q, k, cos, sin, unsqueeze_dim)
        return liger_rotary_pos_emb(q, k, cos, sin, None, unsqueeze_dim)

    changed: Any = llama
    changed.LlamaRMSNorm.forward, changed.LlamaMLP.forward = norm_by_rows, mlp_by_rows
    changed.apply_rotary_pos_emb = rotary_by_rows
    try:
        yield
    finally:
        changed.LlamaRMSNorm.forward, changed.LlamaMLP.forward, changed.apply_rotary_pos_emb = norm, mlp, rotary


def _prices() -> Iterator[Row]:
    """Yield the time of a call of a layer that does nothing, where one candidate wins everywhere and where two do."""

    @use_kernel_forward_from_hub("Nothing")
    class Nothing(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    kernels = [type(name, (torch.nn.Module,), {"forward": lambda self, x: x, "__module__": "price"}) for name in "abc"]
    labels = [f"price.{kernel.__qualname__}" for kernel in kernels]
    on, x = machine_of(torch.device("cpu")), torch.ones(64, 8)

    def choice(*winners: int) -> Choice:
        """Let one of the kernels win for 1 row, one for 16, and one for 64."""
        cells = []
        for winner, bucket in zip(winners, (1, 5, 7), strict=True):
            times = {"reference": 3.0, **dict.fromkeys(labels, 2.0), labels[winner]: 1.0}
            for mode in ("inference", "training"):
                cells.append(ChoiceCell("Nothing", "cpu", "eager", mode, "float32", 8, bucket, times))
        return Choice((MeasuredOn(on, tuple(cells)),))

    one, three = choice(0, 0, 0), choice(0, 1, 2)
    base, dispatched = "one wins everywhere", Nothing().eval()
    best: dict[tuple[str, str], float] = {}
    with use_kernel_mapping({"Nothing": {"cpu": kernels}}), torch.no_grad():
        for _ in range(9):
            for used, rows in ((one, {base: 64}), (three, {"the first": 1, "the second": 16, "the third": 64})):
                with use_choice(used):
                    kernelized = kernelize(Nothing().eval(), device="cpu", mode=Mode.INFERENCE)
                    for how, module in (("dispatched", dispatched), ("kernelized", kernelized)):
                        for given in [x[:count] for count in rows.values()] * 2:
                            module(given)
                        for name, count in rows.items():
                            call = functools.partial(module.forward, x[:count])
                            taken = min(timeit.repeat(call, number=2000, repeat=5)) / 2000
                            best[how, name] = min(best.get((how, name), taken * 1e6), taken * 1e6)
    for (how, name), taken in best.items():
        if name != base:
            yield Row("choice", f"{how}, three win, {name} (cpu)", taken, "us", base, best[how, base])


def _measured(model: Any, device: str, contexts: Any, seconds: float, file: Path | None) -> Choice:
    ids = torch.randint(0, 32000, (1, PROMPT[device]), device=device)
    with choosing(save=file, contexts=contexts, seconds=seconds, progress=False) as chosen:
        for rows in ROWS[device]:
            with torch.no_grad():
                model(ids[:, :rows], use_cache=False, logits_to_keep=1)
        for rows in TRAINED[device]:
            model(ids[:, :rows], use_cache=False, logits_to_keep=1)
    return chosen.choice


def _regrets(first: Choice, second: Choice) -> Iterator[Row]:
    """Yield the regret of the first choice by the times of the second measurement, and those of fixed providers."""
    again = {cell.place: cell for one in second.machines for cell in one.cells}
    regrets: dict[str, list[float]] = {}
    to_reference: list[float] = []
    for cell in (cell for one in first.machines for cell in one.cells):
        times = again[cell.place].times
        best = min(times.values())
        chosen = times.get(cell.winner, times["reference"])
        regrets.setdefault("the choice", []).append(chosen / best - 1)
        to_reference.append(chosen / times["reference"])
        for provider in PROVIDERS:
            own = [time for name, time in times.items() if _provider(name) == provider]
            regrets.setdefault(f"{provider} everywhere", []).append((own or [times["reference"]])[0] / best - 1)
    for name, found in regrets.items():
        cells = f"{len(found)} cells"
        yield Row("choice", f"regret of {name}, mean over {cells}", statistics.mean(found) * 100, "%", "", None)
        yield Row("choice", f"regret of {name}, worst of {cells}", max(found) * 100, "%", "", None)
    slower = sum(ratio > 1.02 for ratio in to_reference)
    yield Row("choice", "cells where the choice is 2 % slower than the reference", slower, "", "", None)
    yield Row("choice", "the slowest cell of the choice, to the reference", max(to_reference), "x", "", None)


def _provider(name: str) -> str:
    return name.split(":")[1] if name.startswith("pack:") else "torch" if ".packs." in name else name


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--contexts", default="eager")
    parser.add_argument("--seconds", type=float, default=0.1)
    parser.add_argument("--rows", help="The rows to measure in inference, such as 1,4096.")
    parser.add_argument("--trained", help="The same in training.")
    parser.add_argument("--parts", default="regret,steps")
    parser.add_argument("--file", type=Path, help="A choice to use, or where to keep the one that is measured.")
    given = parser.parse_args()
    for table, text in ((ROWS, given.rows), (TRAINED, given.trained)):
        if text:
            table.update(dict.fromkeys(table, tuple(map(int, text.split(",")))))
    chosen = tuple(given.contexts.split(",")), given.seconds, tuple(given.parts.split(",")), given.file
    for row in run(*chosen):
        print(f"{row.subject}: {row.value:.2f} {row.unit}" + (f" ({row.ratio:.3f})" if row.ratio else ""), flush=True)
