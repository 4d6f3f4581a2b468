"""`bench` on a GPU: times from CUDA graphs beside launched ones, and a copy that is timed in both ways."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

from torch import nn  # noqa: E402

from kernels_core import use_kernel_forward_from_hub  # noqa: E402
from kernels_plugins import bench, use_kernel_mapping  # noqa: E402
from kernels_plugins.choice.timing import device_times  # noqa: E402
from kernels_plugins.oracle.probe import captured  # noqa: E402

WIDTH = 4096


@use_kernel_forward_from_hub("Twice")
class Twice(nn.Module):
    def forward(self, x: Any) -> Any:
        return x + x


class Waiting(nn.Module):
    """Right, but a CUDA graph cannot have it: it waits for the device."""

    def forward(self, x: Any) -> Any:
        return x * 2 if bool(x.sum() == x.sum()) else x


class Right(nn.Module):
    def forward(self, x: Any) -> Any:
        return x * 2


def test_times_of_both_contexts() -> None:
    """Every candidate has a time in both contexts, or the reason; none is much quicker than the copy in a graph."""
    x = torch.randn(2, WIDTH, device="cuda", dtype=torch.bfloat16)
    with use_kernel_mapping({"Twice": {"cuda": [Waiting, Right]}}):
        report = bench(Twice(), x, rows=[1, 4096], modes=["inference"], seconds=0.05)
    rows = {(row.context, row.rows, row.candidate.rpartition(".")[2]): row for row in report.rows}
    for size in (1, 4096):
        for context in ("eager", "captured"):
            for name in ("reference", "Right"):
                row = rows[context, size, name]
                assert row.seconds and row.copy and row.bytes == 2 * 2 * size * WIDTH, row
        assert rows["eager", size, "Waiting"].seconds
        waiting = rows["captured", size, "Waiting"]
        assert waiting.seconds is None and "cannot be captured" in waiting.reason and waiting.ok
    share = rows["captured", 4096, "Right"].share
    assert share is not None and 0.3 < share < 1.5, share
    assert report.ok and report.machine["device"] == "cuda"


def test_all_packs_on_a_norm() -> None:
    """A norm of PyTorch's own: those that are right are timed, and none is at fault, in training, too."""
    norm = nn.RMSNorm(WIDTH, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(2, WIDTH, device="cuda", dtype=torch.bfloat16)
    report = bench(norm, x, rows=[1, 4096], seconds=0.05)
    print(report)
    assert report.ok, report
    assert {row.context for row in report.rows if row.seconds} == {"eager", "captured"}
    assert norm.weight.grad is None and type(norm) is nn.RMSNorm


def test_after_a_capture_that_failed() -> None:
    """Random numbers can be drawn, the stream is the one before, and an earlier graph replays."""
    x, stream = torch.ones(8, device="cuda"), torch.cuda.current_stream()
    earlier, noise = captured(lambda: torch.rand_like(x))
    with pytest.raises(Exception, match="captur"):
        captured(lambda: bool(x.sum() == 8))
    assert torch.cuda.current_stream() == stream
    torch.randn(8, device="cuda")
    earlier.replay()
    first = noise.clone()
    earlier.replay()
    assert not torch.equal(first, noise)
    later, doubled = captured(lambda: x * 2)
    later.replay()
    assert torch.equal(doubled, x + x)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
def test_a_gpu_that_is_not_the_current_one_is_timed() -> None:
    """Its work is captured and timed, and not that of the current GPU, which does nothing."""
    x = torch.rand(4096, 4096, device="cuda:1")
    with torch.cuda.device(0):
        launched, replayed, why = device_times({"": lambda: x @ x}, x.device, 0.2)[""]
        assert torch.cuda.current_device() == 0
    assert replayed is not None and not why
    assert min(launched, replayed) > 1e-5  # of a graph without any work, it is 1e-7
