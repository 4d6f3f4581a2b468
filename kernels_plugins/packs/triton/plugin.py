"""Plugin `triton`: kernels of ours in Triton, for norms, gated MLPs and rotary embeddings on GPUs.

Licence: Apache 2.0, as kernels-core. Tried with Triton 3.6 and PyTorch 2.11. Served only where a mapping names
`"pack:triton"`. Limits: dtypes of the tensors of a call must be equal; no second derivatives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from kernels_core import LoadedLayer, LoadError, hookimpl


def _load(layer_name: str, device: torch.device) -> LoadedLayer | None:
    if device.type != "cuda":
        raise LoadError(f"the kernels in Triton are for GPUs, and this call is on {device.type}")
    try:
        import triton

        from .layers import KERNELS
    except ImportError as error:
        raise LoadError(f"{error}: PyTorch for CUDA installs Triton") from error
    kernel = KERNELS.get(layer_name)
    return LoadedLayer(kernel, f"pack triton, Triton {triton.__version__}") if kernel is not None else None


@hookimpl
def kernels_packs() -> Mapping[str, Callable[..., object]]:
    """Offer the pack; Triton is not imported before it serves."""
    return {"triton": _load}
