"""Policies and the Hub: every repository whose code would run is asked about, and the Hub can be kept out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_scene import new_process

from kernels_core import (
    Candidate,
    KernelLayer,
    KernelsError,
    LayerRequest,
    LoadError,
    Mode,
    UntrustedError,
    hookimpl,
    plugin_manager,
    resolve,
)
from kernels_plugins import (
    LayerRepository,
    LocalLayerRepository,
    RepoInfo,
    get_kernel,
    get_kernel_variants,
    get_local_kernel,
    has_kernel,
    install_kernel,
    opaque,
    use_kernel_mapping,
)
from kernels_plugins.local_hub.server import LocalHub

pytest_plugins = ["kernels_plugins.hub.testing"]

Publish = Callable[..., Any]
LAYER = "import torch\nclass Double(torch.nn.Module):\n    def forward(self, x):\n        return x + x\n"
CPU: dict[str, Any] = {"device": "cpu", "mode": Mode.INFERENCE}


class NoEvil:
    """Refuses kernels of 'evil', and notes each source that it is asked about."""

    def __init__(self) -> None:
        """Start without notes."""
        self.asked: list[tuple[str, object]] = []

    @hookimpl
    def kernels_authorize(self, request: LayerRequest, candidate: Candidate) -> str | None:
        """Look at the repository."""
        self.asked.append((request.layer_name, candidate.source))
        return "nothing of evil" if str(getattr(candidate.source, "repo_id", "")).startswith("evil/") else None


pytestmark = pytest.mark.usefixtures("new_process")  # which leaves no kernel in `sys.modules`


@pytest.fixture
def policy() -> Iterator[NoEvil]:
    """Register the policy for one test."""
    plugin = NoEvil()
    plugin_manager().register(plugin, "no-evil")
    yield plugin
    plugin_manager().unregister(plugin)


def test_every_repository_is_asked_about_before_its_code_is_here(
    kernel_repository: Publish, local_hub: LocalHub, policy: NoEvil, tmp_path: Path
) -> None:
    """Redirect targets and dependencies, for layers and functions: asked with the commit, refused before a download."""
    runs = f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"
    evil = kernel_repository("evil/target", runs + LAYER)
    evil.branch("v1")
    moved = kernel_repository("acme/moved", LAYER)
    moved.commit({"kernel-status.toml": b'kind = "redirect"\ndestination = "evil/target"\nrevision = "v1"\n'})
    moved.branch("v1")
    needs = {"kernel-depends": [{"repo-id": "evil/target", "version": 1}]}
    kernel_repository("acme/needs", LAYER, metadata=needs).branch("v1")
    good = kernel_repository("acme/good", LAYER)
    good.branch("v1")
    info = RepoInfo("evil/target", evil.head())
    for number, name in enumerate(("acme/moved", "acme/needs")):
        layer, policy.asked = f"Policy{number}", []
        source = LayerRepository(name, layer_name="Double", version=1)
        with use_kernel_mapping({layer: {"cpu": source}}):
            found = resolve(layer, **CPU)
        assert found.is_reference and "nothing of evil" in str(found)
        assert isinstance(found.refusals[0].error, UntrustedError)
        assert policy.asked[0] == (layer, source) and policy.asked[-1] == (layer, info)
        for load in (get_kernel, install_kernel, has_kernel):
            policy.asked = []
            with pytest.raises(UntrustedError, match=r"evil/target.*nothing of evil"):
                load(name, version=1)
            assert policy.asked[-1] == ("", info)
    assert not (tmp_path / "ran").exists()
    assert not [request for request in local_hub.requests if "evil" in request.path and "/resolve/" in request.path]
    policy.asked = []
    get_kernel("acme/good", version=1)
    assert policy.asked == [("", RepoInfo("acme/good", good.head()))]
    folder = install_kernel("acme/good", version=1)
    get_local_kernel(folder)
    assert policy.asked[-1] == ("", folder)


def test_the_hub_is_kept_out(
    kernel_repository: Publish, local_hub: LocalHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """KERNELS_PLUGINS=-hub, or without it: nothing of the Hub loads, no request is sent, and 'hub' is named."""
    kernel_repository("acme/kept-out", LAYER).branch("v1")
    folder = install_kernel("acme/kept-out", version=1)
    before = len(local_hub.requests)
    repository = LayerRepository("acme/kept-out", layer_name="Double", version=1)

    class Mine(LayerRepository):
        def load(self) -> KernelLayer:
            return super().load()

    sources: list[Any] = [repository, "acme/kept-out:Double", opaque(repository)]
    sources.append(Mine("acme/kept-out", layer_name="Double", version=1))
    for number, choice in enumerate(("-hub", "mapping,adapters")):
        monkeypatch.setenv("KERNELS_PLUGINS", choice)
        for load in (get_kernel, has_kernel, install_kernel, get_kernel_variants):
            with pytest.raises(LoadError, match="plugin 'hub' is left out by KERNELS_PLUGINS"):
                load("acme/kept-out", version=1)
        for place, source in enumerate(sources):
            layer = f"KeptOut{number}{place}"
            with use_kernel_mapping({layer: {"cpu": source}}):
                found = resolve(layer, **CPU)
            assert found.is_reference and "plugin 'hub' is left out by KERNELS_PLUGINS" in str(found)
        get_local_kernel(folder)  # a folder is not the Hub
    assert len(local_hub.requests) == before


def test_subclasses_load_as_they_say(kernel_repository: Publish) -> None:
    """The own `load` of a subclass of any repository is used, also within `opaque`; its error is the reason."""

    class Fast(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + x

    class Mine(LayerRepository):
        def load(self) -> KernelLayer:
            return Fast

    class Local(LocalLayerRepository):
        def load(self) -> KernelLayer:
            return Fast

    class Fails(Mine):
        def load(self) -> KernelLayer:
            raise KernelsError("the registry is closed")

    where: dict[str, Any] = {"layer_name": "Double", "version": 1}
    sources: dict[str, Any] = {"A": Mine("acme/x", **where), "B": Local("/nowhere", layer_name="Double")}
    with use_kernel_mapping({name: {"cpu": source} for name, source in sources.items()}):
        for name, source in sources.items():
            found = resolve(name, **CPU)
            assert found.implementation is Fast.forward and type(source).__name__ in found.origin
    with use_kernel_mapping({"C": {"cpu": Fails("acme/x", **where)}}):
        assert "the registry is closed" in str(resolve("C", **CPU))
