"""Consistency on a real GPU: digests on the device, TF32, compiled code, batches. Skipped without one."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from kernels_plugins import consistency
from kernels_plugins.consistency.bits import digest

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def model_of(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Sequential(nn.RMSNorm(256), nn.Linear(256, 256), nn.SiLU(), nn.Dropout(0.1)) for _ in range(4))
    return nn.Sequential(*layers).to("cuda", dtype)


@contextlib.contextmanager
def tf32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def test_a_flag_for_precision_is_found() -> None:
    """With TF32 on one side, the first matrix product differs; random numbers of the GPU are the same on both."""
    model, x = model_of(), torch.randn(64, 256, device="cuda")
    before = torch.cuda.get_rng_state()
    report = consistency(model, model, x, setting_b=tf32)
    assert report.drift is not None and report.drift.path == "0.1" and report.drift.inputs_agree, str(report)
    assert report.random == ("0.3", "1.3", "2.3", "3.3") and report.unsteady == ()
    assert torch.equal(before, torch.cuda.get_rng_state())


def test_one_model_is_equal() -> None:
    """The same model twice, forward and backward, in bfloat16; and a copy of it."""
    model, x = model_of(torch.bfloat16), torch.randn(64, 256, device="cuda", dtype=torch.bfloat16)
    assert consistency(model, copy.deepcopy(model), x, gradients=True).ok


def test_the_largest_batch_and_the_smallest() -> None:
    """Where rows have other bits by themselves, a layer is named; else all are the same."""
    model, x = model_of(torch.bfloat16).eval(), torch.randn(64, 256, device="cuda", dtype=torch.bfloat16)
    report = consistency(model, model, x, batch_b=1)
    print(report)
    assert report.ok or (report.drift is not None and report.drift.inputs_agree)


def test_compiled_code() -> None:
    """Inductor's layers are compared one by one, and the first that differs has inputs that agree."""
    model, x = model_of().eval(), torch.randn(64, 256, device="cuda")
    report = consistency(model, torch.compile(model), x)
    print(report)
    assert report.ok or (report.drift is not None and report.drift.inputs_agree)


def test_digests_are_those_of_the_cpu() -> None:
    """A digest depends on bits only, not on the device."""
    x = torch.randn(5, 70_000)
    assert digest(x, 5).tolist() == digest(x.cuda(), 5).tolist()


def test_memory_does_not_grow_with_layers() -> None:
    """The peak of a run is that of the model, and some megabytes: no output of a layer is kept."""
    model = nn.Sequential(*[nn.ReLU() for _ in range(40)])
    x = torch.randn(4, 2**20, device="cuda")  # 16 MB
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    assert consistency(model, model, lambda: x + 0).ok
    assert torch.cuda.max_memory_allocated() - base < 10 * 16 * 2**20  # 40 outputs would be 640 MB
