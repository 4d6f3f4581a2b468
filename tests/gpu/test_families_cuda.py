"""The families of the table in docs/adopt.md on a GPU, with the kernels of each pack for all of their layers."""

from __future__ import annotations

import copy
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
if not torch.cuda.is_available():
    pytest.skip("no CUDA device is visible", allow_module_level=True)
pytest.importorskip("triton", reason="Triton is not installed")

from families import FEATURES, MODELS, gradients, logits, made, tokens  # noqa: E402

from kernels_core import count_calls, receipt  # noqa: E402
from kernels_plugins import use_kernel_mapping  # noqa: E402
from kernels_plugins.packs.triton.layers import KERNELS  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::kernels_core.KernelsWarning")


def padded(model: Any, inputs: Any) -> Any:
    """Generate tokens after a prompt of which one row starts with padding."""
    given = dict(inputs)
    if "input_ids" in given:
        given["attention_mask"] = torch.ones_like(given["input_ids"])
        given["attention_mask"][0, :4] = 0
    return tokens(model, given)


def in_bfloat16(model: Any, inputs: Any) -> Any:
    """Return logits of a copy in bfloat16."""
    given = {name: t.bfloat16() if t.is_floating_point() else t for name, t in inputs.items()}
    return logits(copy.deepcopy(model).bfloat16(), given)


def autocast(model: Any, inputs: Any) -> Any:
    """Return the gradients of a step under autocast."""
    with torch.autocast("cuda", torch.bfloat16):
        return gradients(model, inputs)


WAYS = {
    **{name: FEATURES[name] for name in ("logits", "tokens", "static cache", "gradients", "checkpointing", "compile")},
    **{"padded": padded, "bfloat16": in_bfloat16, "autocast": autocast},
}
NONE = {"BERT", "ViT", "Whisper"}
"""Families that have only norms of PyTorch."""

LOOSE = dict.fromkeys(("bfloat16", "autocast"), (0.05, 0.05))


@pytest.mark.parametrize("pack", ["triton", "liger", "torch"])
@pytest.mark.parametrize("name", MODELS)
def test_a_family_on_the_kernels_of_a_pack(name: str, pack: str) -> None:
    """In each way that the model has, an adopted one computes the untouched one's numbers, and kernels serve it."""
    if pack == "liger":
        pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")
    model, adopted, inputs, _ = made(name, "cuda")
    mapping: Any = dict.fromkeys(KERNELS, f"pack:{pack}")
    for way, run in WAYS.items():
        try:
            wanted = run(model, inputs)
        except pytest.skip.Exception:  # it generates no tokens, for example
            continue
        with use_kernel_mapping(mapping):
            found = run(adopted, inputs)
        rtol, atol = LOOSE.get(way, (1e-3, 1e-4))
        torch.testing.assert_close(found, wanted, rtol=rtol, atol=atol, msg=f"{way}: {{}}".format)
    with use_kernel_mapping(mapping), count_calls():
        gradients(adopted, inputs)
        served = {row.layer_name for row in receipt(adopted).rows if (row.calls or {}).get(row.origin)}
    assert served & KERNELS.keys() or name in (NONE if pack == "triton" else NONE | {"ModernBERT"})
