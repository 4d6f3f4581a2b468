"""`kernels-core doctor` on a machine with a GPU."""

from __future__ import annotations

import pytest
import torch

from kernels_plugins.doctor.machine import check_machine

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")


def test_each_gpu_is_named_with_its_capability() -> None:
    """Each GPU that PyTorch has is listed with name and capability, and none is a problem."""
    found = {one.subject: one for one in check_machine() if one.area == "gpu"}
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        assert f"{about.name}, capability {about.major}.{about.minor}" in found[f"cuda:{index}"].found
        assert found[f"cuda:{index}"].state == "ok"
