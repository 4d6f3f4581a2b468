"""How many requests a start costs: the Hub on this machine counts, each start is a process of its own."""

from __future__ import annotations

import pytest
from parity_scene import OURS, THEIRS, Both, Side, kernel_source, publish_kernels

WAYS = {
    "layer": 'served(lib.LayerRepository("acme/kernels", layer_name="Scale", {pin}))',
    "get_kernel": 'lib.get_kernel("acme/kernels", {pin}).layers.Scale()(torch.ones(1)).item()',
}


def count(both: Both, side: Side, code: str) -> int:
    """Run in a new process; return the number of requests about the kernel, without those of the client for itself."""
    assert both.hub is not None
    both.hub.forget()
    assert both.process(side, f"tell({code})") == 3.0
    assert all("acme" in request.path or "agent-harnesses" in request.path for request in both.hub.requests)
    return both.hub.count("acme")


@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.parametrize("pinned", ["commit", "version"])
def test_requests_of_a_start(kernels_hub: Both, record_property: pytest.RecordProperty, pinned: str, way: str) -> None:
    """A warm start of ours asks nothing for a commit and once for a version; theirs asks more."""
    assert kernels_hub.hub is not None
    published = publish_kernels(kernels_hub.hub, "acme/kernels", kernel_source(3))
    published.branch("v1")
    pin = f'revision="{published.head()}"' if pinned == "commit" else "version=1"
    code = WAYS[way].format(pin=pin)
    counts = {side.name: [count(kernels_hub, side, code) for _ in ("cold", "warm")] for side in (THEIRS, OURS)}
    print(f"requests, cold and warm, of a start with a {pinned} through {way}: {counts}")
    record_property("requests", counts)
    (their_cold, their_warm), (cold, warm) = counts["theirs"], counts["ours"]
    assert warm == (0 if pinned == "commit" else 1)
    assert 0 < their_warm < their_cold and warm < their_warm and cold > 0
