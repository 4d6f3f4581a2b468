"""Where `kernels` 0.17.2 goes wrong: each test shows its behaviour, and ours.

The tests are named after the lines of the second table in docs/coming-from-kernels.md.
"""

from __future__ import annotations

import contextvars
import importlib
import io
import pickle
import sys
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from parity_scene import (
    OURS,
    REFERENCE,
    THEIRS,
    Both,
    Side,
    Source,
    able,
    call,
    capability,
    kernel_class,
    kernel_source,
    lock,
    offline,
    publish_kernels,
    telemetry,
    write_kernel,
)
from patience import PATIENCE
from torch import nn

X = torch.ones(1)

# --- Choosing ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sources", "mode"),
    [
        (lambda side: {"cuda": able(3)}, "INFERENCE"),
        (lambda side: {"cpu": {side.lib.Mode.INFERENCE: able(3)}}, "TRAINING"),
    ],
    ids=["device", "mode"],
)
def test_silent_fallback(both: Both, sources: Callable[[Side], Any], mode: str) -> None:
    """Theirs keeps the reference without a record; ours says so once, with the reason."""

    def scenario(side: Side) -> float:
        layer = side.layer()
        model = nn.Sequential(layer(), layer())
        return side.freeze(model, {layer.kernel_layer_name: sources(side)}, mode)

    pair = both.run(scenario)
    pair.agree(REFERENCE**2)
    assert pair.theirs.said == []
    (said,) = pair.ours.said
    assert "Source" in said and "mapped for" in said


def test_subclass_with_its_own_forward(both: Both) -> None:
    """Theirs gives it the kernel of its parent; ours runs its forward."""

    def scenario(side: Side) -> float:
        layer = side.layer()

        class Child(layer):  # type: ignore[misc,valid-type]
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x * 100

        return side.freeze(Child(), {layer.kernel_layer_name: {"cpu": able(3)}})

    pair = both.run(scenario)
    assert (pair.theirs.get(), pair.ours.get()) == (3.0, 100.0)


def test_signature_checked_once_per_repository(both: Both) -> None:
    """Theirs lets a second layer of another signature have the kernel; ours compares for each layer."""

    def scenario(side: Side) -> float:
        first, source = side.layer(), able(3)
        name = first.kernel_layer_name + "_three"

        @side.lib.use_kernel_forward_from_hub(name)
        class Three(nn.Module):
            def forward(self, x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
                return x * y * z

        with side.lib.use_kernel_mapping({first.kernel_layer_name: {"cpu": source}, name: {"cpu": source}}):
            side.lib.kernelize(first(), mode=side.lib.Mode.INFERENCE, device="cpu")
            flags = side.lib.KernelizeFallback.ALL
            model = side.lib.kernelize(Three(), mode=side.lib.Mode.INFERENCE, device="cpu", use_fallback=flags)
        return float(model(X, X, X * 5).item())

    pair = both.run(scenario)
    assert isinstance(pair.theirs.error, TypeError) and "positional argument" in str(pair.theirs.error)
    assert pair.ours.get() == 5.0
    assert any("parameters" in said for said in pair.ours.said)


def test_capability_of_one_gpu_for_all(both: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    """Theirs asks the first GPU and takes its answer for all; ours asks each."""

    def scenario(side: Side) -> list[float]:
        layer = side.layer()
        lib = side.lib
        old, new = (lib.Device("cuda", lib.CUDAProperties(*span)) for span in ((75, 79), (90, 99)))
        mapping = {layer.kernel_layer_name: {old: able(3), new: able(5)}}
        return [side.freeze(layer(), mapping, device=torch.device("cuda", index)) for index in (0, 1)]

    with capability(monkeypatch, 75, 90):
        pair = both.run(scenario)
    assert (pair.theirs.get(), pair.ours.get()) == ([3.0, 3.0], [3.0, 5.0])


def test_unknown_device_name() -> None:
    """Theirs accepts it when it is written and refuses it when it is used; ours refuses it at once."""
    assert THEIRS.lib.Device("abacus").type == "abacus"
    with pytest.raises(ValueError, match="abacus"):
        OURS.lib.Device("abacus")


def test_narrowest_range_without_the_mode(both: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    """Theirs looks no further than the narrowest range, though a wider one has the mode; ours does."""

    def scenario(side: Side) -> float:
        layer = side.layer()
        lib = side.lib
        narrow = lib.Device("cuda", lib.CUDAProperties(90, 90))
        devices = {narrow: {lib.Mode.INFERENCE: able(3)}, "cuda": {lib.Mode.TRAINING: able(5)}}
        return side.freeze(layer(), {layer.kernel_layer_name: devices}, "TRAINING", device="cuda")

    with capability(monkeypatch, 90):
        pair = both.run(scenario)
    assert (pair.theirs.get(), pair.ours.get()) == (REFERENCE, 5.0)


@pytest.mark.parametrize("frozen", [True, False])
def test_kernel_with_other_names_and_defaults(both: Both, frozen: bool) -> None:
    """Theirs lets the kernel's names and defaults show; to callers of ours, the layer's signature counts."""

    class Renamed(nn.Module):
        def forward(self, y: torch.Tensor, by: float = 10.0) -> torch.Tensor:
            return y * 3 * by

    def scenario(side: Side) -> list[float | str]:
        name = side.layer().kernel_layer_name + "_scaled"

        @side.lib.use_kernel_forward_from_hub(name)
        class Scaled(nn.Module):
            def forward(self, x: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
                return x * REFERENCE * factor

        found: list[float | str] = []
        with side.lib.use_kernel_mapping({name: {"cpu": Source(Renamed)}}):
            model = Scaled()
            if frozen or not side.is_ours:
                model = side.lib.kernelize(model, mode=side.lib.Mode.INFERENCE, device="cpu")
            found.append(float(model(X).item()))
            try:
                found.append(float(model(x=X, factor=2.0).item()))
            except TypeError as error:
                found.append(str(error))
        return found

    pair = both.run(scenario)
    default, refused = pair.theirs.get()
    assert default == 30.0 and "unexpected keyword argument" in refused
    assert pair.ours.get() == [3.0, 6.0]


def test_layer_that_is_a_function(both: Both) -> None:
    """Theirs refuses functions in a kernel's `layers`; in ours, a function there serves a decorated one."""
    folder = write_kernel(both.home / "kernel", "def scale(x):\n    return x * 7\n")

    def scenario(side: Side) -> float:
        name, _, calls = side.function()
        return side.freeze(calls(), {name: {"cpu": side.lib.LocalLayerRepository(folder, layer_name="scale")}})

    pair = both.run(scenario)
    assert isinstance(pair.theirs.error, TypeError)
    assert pair.ours.get() == 7.0


def test_registered_for_compile_alone(both: Both) -> None:
    """Theirs takes a source for TORCH_COMPILE alone and never uses it; ours says that it never would."""

    def scenario(side: Side) -> set[float]:
        return {
            side.served({side.lib.Mode.TORCH_COMPILE: able(3)}, mode)
            for mode in ("INFERENCE", "TRAINING|TORCH_COMPILE")
        }

    pair = both.run(scenario)
    assert pair.theirs.get() == {2.0}
    assert isinstance(pair.ours.error, ValueError) and "TORCH_COMPILE" in str(pair.ours.error)


# --- Models --------------------------------------------------------------------------------------


def test_half_swapped_model(both: Both) -> None:
    """Theirs leaves the first layers swapped when a later one raises; ours changes nothing."""

    def scenario(side: Side) -> float:
        good, bad = side.layer(), side.layer()
        model = nn.Sequential(good(), bad())
        mapping = {
            good.kernel_layer_name: {"cpu": able(3)},
            bad.kernel_layer_name: {"cpu": Source(FileNotFoundError("gone"))},
        }
        with pytest.raises((FileNotFoundError, ValueError)):
            side.freeze(model, mapping)
        return call(model)

    pair = both.run(scenario)
    assert (pair.theirs.get(), pair.ours.get()) == (3 * REFERENCE, REFERENCE**2)


def test_a_function_shared_by_models(both: Both) -> None:
    """Theirs changes model B when model A is kernelized, if both call one function; ours does not."""

    def scenario(side: Side) -> tuple[float, float]:
        name, _, calls = side.function()
        other = calls()
        return side.freeze(calls(), {name: {"cpu": able(3)}}), call(other)

    pair = both.run(scenario)
    assert (pair.theirs.get(), pair.ours.get()) == ((3.0, 3.0), (3.0, REFERENCE))


def test_function_as_an_attribute(both: Both) -> None:
    """Theirs freezes a decorated function in an attribute, for it is a module; ours, a function, too."""

    def scenario(side: Side) -> list[float]:
        name, scale, _ = side.function()

        class Holds(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.scale = scale

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.scale(x)

        model, mapping = Holds(), {name: {"cpu": able(3)}}
        found = [side.freeze(model, mapping)]
        with side.lib.use_kernel_mapping(mapping):
            found.append(call(model))
        attached = side.lib.use_kernelized_func(scale)(Holds)
        return [*found, side.freeze(attached(), mapping), len(list(model.modules()))]

    pair = both.run(scenario)
    assert (pair.theirs.get(), pair.ours.get()) == ([3.0, 3.0, 3.0, 2], [3.0, 3.0, 3.0, 1])


@pytest.mark.parametrize("device", ["neuron", "npu", "tpu"])
def test_device_that_this_torch_does_not_know(both: Both, device: str) -> None:
    """Theirs kernelizes for a device that no tensor here can be on; ours refuses that."""

    def scenario(side: Side) -> float:
        layer = side.layer()
        return side.freeze(layer(), {layer.kernel_layer_name: {device: able(3)}}, device=device)

    pair = both.run(scenario)
    assert pair.theirs.get() == 3.0
    assert isinstance(pair.ours.error, ValueError) and device in str(pair.ours.error)


def test_inference_kernel_after_train(both: Both) -> None:
    """Theirs trains with the inference kernel, without gradients or a word; ours goes back and says so."""

    class Inference(nn.Module):
        has_backward = False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.detach() * 3

    def scenario(side: Side) -> tuple[float, bool]:
        layer = side.layer()
        model = layer().eval()
        side.freeze(model, {layer.kernel_layer_name: {"cpu": Source(Inference)}})
        model.train()
        output = model(torch.ones(1, requires_grad=True))
        return output.item(), output.requires_grad

    pair = both.run(scenario)
    assert pair.theirs.get() == (3.0, False)
    assert not any("train" in said for said in pair.theirs.said)
    assert pair.ours.get() == (REFERENCE, True)
    assert any("train()" in said for said in pair.ours.said)


class Loses(nn.Module):
    """A kernel that computes outside of autograd, and does not say so."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.detach() * 3


def test_gradients_lost_in_silence(both: Both) -> None:
    """Theirs trains nothing with a kernel that has no backward and does not say so; ours refuses it."""

    def scenario(side: Side) -> tuple[bool, float]:
        layer = side.layer()
        model = nn.Sequential(nn.Linear(1, 1), layer())
        side.freeze(model, {layer.kernel_layer_name: {"cpu": Source(Loses)}}, "TRAINING")
        output = model(X)
        if output.requires_grad:
            output.sum().backward()
        return output.requires_grad, 0.0 if model[0].weight.grad is None else float(model[0].weight.grad.abs().sum())

    pair = both.run(scenario)
    assert pair.theirs.get() == (False, 0.0)
    recorded, gradient = pair.ours.get()
    assert recorded and gradient > 0
    assert any("gradient" in said for said in pair.ours.said)


@pytest.mark.parametrize("how", ["pickle", "torch.save"])
def test_saved_and_loaded_model(both: Both, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """Theirs returns a model without its kernels and says nothing; ours says so, and obeys registered mappings."""
    module = sys.modules[__name__]

    def scenario(side: Side) -> tuple[float, float]:
        layer = side.layer()
        layer.__qualname__, layer.__module__ = "Saved", module.__name__
        monkeypatch.setattr(module, "Saved", layer, raising=False)
        model, mapping = layer(), {layer.kernel_layer_name: {"cpu": Source(Times)}}
        before = side.freeze(model, mapping)
        file = io.BytesIO()
        if how == "pickle":
            pickle.dump(model, file)
        else:
            torch.save(model, file)
        file.seek(0)
        with side.lib.use_kernel_mapping(mapping):
            loaded = pickle.load(file) if how == "pickle" else torch.load(file, weights_only=False)
            return before, call(loaded)

    pair = both.run(scenario)
    assert pair.theirs.get() == (3.0, REFERENCE)
    assert not any("saved" in said for said in pair.theirs.said)
    assert pair.ours.get() == (3.0, 3.0)
    assert any("saved" in said for said in pair.ours.said)


class Times(nn.Module):
    """A kernel that can be pickled."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 3


# --- Threads -------------------------------------------------------------------------------------


def in_thread(work: Callable[[], Any]) -> Any:
    """Run in a new thread, and return its result or raise its error."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(work())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(PATIENCE)
    (value,) = found
    if isinstance(value, Exception):
        raise value
    return value


def test_registration_invisible_to_threads(both: Both) -> None:
    """Theirs registers for the calling thread alone after `inherit_mapping=False`; ours for the process."""

    def scenario(side: Side) -> float:
        layer = side.layer()
        side.lib.register_kernel_mapping({layer.kernel_layer_name: {"cpu": able(3)}}, inherit_mapping=False)
        return float(in_thread(lambda: side.freeze(layer(), {})))

    pair = both.run(scenario)
    assert (pair.theirs.get(), pair.ours.get()) == (REFERENCE, 3.0)


def test_registration_inside_of_a_scope(both: Both) -> None:
    """Theirs drops mappings registered for the process when the scope around it ends; ours does not."""

    def scenario(side: Side) -> float:
        layer = side.layer()
        with side.lib.use_kernel_mapping({}):
            side.lib.register_kernel_mapping({layer.kernel_layer_name: {"cpu": able(3)}})
        return side.freeze(layer(), {})

    pair = both.run(scenario)
    assert (pair.theirs.get(), pair.ours.get()) == (REFERENCE, 3.0)


def test_one_scope_in_two_threads(both: Both) -> None:
    """Theirs breaks when two threads are in one scope object, and stays in it; ours serves both, and leaves."""

    def scenario(side: Side) -> tuple[float, str, float]:
        layer = side.layer()
        scope = side.lib.use_kernel_mapping({layer.kernel_layer_name: {"cpu": able(3)}})
        entered, leave = threading.Event(), threading.Event()
        inside: list[float] = []

        def other() -> None:
            with scope:
                inside.append(call(side.lib.kernelize(layer(), mode=side.lib.Mode.INFERENCE, device="cpu")))
                entered.set()
                leave.wait(PATIENCE)

        thread = threading.Thread(target=other)
        said = ""
        try:
            with scope:
                thread.start()
                entered.wait(PATIENCE)
        except ValueError as error:
            said = str(error)
        leave.set()
        thread.join(PATIENCE)
        after = call(side.lib.kernelize(layer(), mode=side.lib.Mode.INFERENCE, device="cpu"))
        return inside[0], said, after

    pair = both.run(lambda side: contextvars.copy_context().run(scenario, side))
    inside, said, after = pair.theirs.get()
    assert (inside, after) == (3.0, 3.0) and "different Context" in said
    assert pair.ours.get() == (3.0, "", REFERENCE)


def test_eight_threads_eight_loads(both: Both) -> None:
    """Theirs loads a source in each thread that needs it at the same time; ours once."""
    threads = 8

    def scenario(side: Side) -> int:
        layer = side.layer()
        barrier = threading.Barrier(threads)

        class Slow(Source):
            def load(self) -> Any:
                done.wait(0.3)
                return super().load()

        done, source = threading.Event(), Slow(kernel_class(3))
        mapping = {layer.kernel_layer_name: {"cpu": source}}

        def work() -> None:
            barrier.wait(PATIENCE)
            values.append(side.freeze(layer(), mapping))

        values: list[float] = []
        workers = [threading.Thread(target=work) for _ in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(PATIENCE)
        assert values == [3.0] * threads
        return source.loads

    pair = both.run(scenario)
    assert pair.theirs.get() > 1
    assert pair.ours.get() == 1


# --- Settings and values -------------------------------------------------------------------------


def test_disable_kernel_mapping_true(both: Both) -> None:
    """Theirs cannot be imported with DISABLE_KERNEL_MAPPING=true; ours runs the reference."""
    code = "tell(served(type('S', (), {'load': lambda self: torch.nn.Identity})()))"
    theirs = both.process(THEIRS, code, check=False, DISABLE_KERNEL_MAPPING="true")
    assert theirs.returncode != 0 and "invalid literal for int()" in theirs.stderr
    assert both.process(OURS, code, DISABLE_KERNEL_MAPPING="true") == REFERENCE


def test_str_of_a_repository_asks_the_hub(kernels_hub: Both) -> None:
    """Theirs sends requests to write itself down; ours sends none."""
    publish_kernels(kernels_hub.hub, "acme/kernels", kernel_source(3)).branch("v1")
    pair = kernels_hub.run(lambda side: str(side.lib.LayerRepository("acme/kernels", layer_name="Scale", version=1)))
    assert len(pair.theirs.requests) >= 1
    assert (pair.ours.requests, "acme/kernels" in pair.ours.get()) == ([], True)


def test_trust_as_a_tuple(kernels_hub: Both) -> None:
    """Theirs takes a tuple of trusted repositories for no trust at all; ours reads it as the list that it is."""
    publish_kernels(kernels_hub.hub, "stranger/kernels", kernel_source(3), trusted=False).branch("v1")

    def scenario(side: Side) -> float:
        trust = ("stranger/kernels",)
        repository = side.lib.LayerRepository(
            "stranger/kernels", layer_name="Scale", version=1, trust_remote_code=trust
        )
        return side.served(repository)

    pair = kernels_hub.run(scenario)
    assert isinstance(pair.theirs.error, ValueError) and "not from a trusted publisher" in str(pair.theirs.error)
    assert pair.ours.get() == 3.0


# --- Errors --------------------------------------------------------------------------------------


def repository(side: Side, repo_id: str = "acme/kernels", **options: Any) -> Any:
    """Name the layer of a repository, by default of version 1."""
    if "revision" not in options:
        options.setdefault("version", 1)
    return side.lib.LayerRepository(repo_id, layer_name="Scale", **options)


def test_network_failure_told_as_distrust(kernels_hub: Both) -> None:
    """Theirs says that trust could not be verified when the Hub is in trouble; ours names the trouble."""
    publish_kernels(kernels_hub.hub, "acme/kernels", kernel_source(3)).branch("v1")

    def scenario(side: Side) -> float:
        kernels_hub.hub.heal()
        kernels_hub.hub.fail("/api/organizations/", status=503, times=None)
        return side.served(repository(side))

    pair = kernels_hub.run(scenario)
    assert "could not verify publisher trust" in str(pair.theirs.error)
    assert "503" not in str(pair.theirs.error)
    assert "503" in str(pair.ours.error) and "not a trusted publisher" not in str(pair.ours.error)


@pytest.mark.parametrize(
    "what", ["import error", "no build folder", "refused", "gated", "wrong mode said", "another signature"]
)
def test_fallback_all_raises(kernels_hub: Both, what: str) -> None:
    """With `KernelizeFallback.ALL`, theirs raises where no kernel can be had; ours keeps the reference and says why."""
    hub = kernels_hub.hub
    source = "import no_such_module\n" if what == "import error" else kernel_source(3)
    if what == "another signature":
        source = source.replace("(self, x)", "(self, x, y)")
    if what == "no build folder":
        hub.organization("acme", trusted=True)
        published = hub.add("acme/kernels", {"README.md": "to be built"})
    elif what == "gated":
        hub.organization("acme", trusted=True)
        described = dict(publish_kernels(hub, "acme/draft", kernel_source(3)).files())
        published = hub.add("acme/kernels", described, gated=True)
    else:
        published = publish_kernels(hub, "acme/kernels", source, trusted=what != "refused")
    published.branch("v1")

    def scenario(side: Side) -> float:
        layer = side.layer()
        sources: Any = repository(side)
        if what == "wrong mode said":
            sources = {side.lib.Mode.TRAINING: Source(kernel_class(3, has_backward=False))}
        fallback = side.lib.KernelizeFallback.ALL
        return side.freeze(layer(), {layer.kernel_layer_name: {"cpu": sources}}, use_fallback=fallback, mode=mode)

    mode = "TRAINING" if what == "wrong mode said" else "INFERENCE"
    pair = kernels_hub.run(scenario)
    assert pair.theirs.error is not None
    assert pair.ours.get() == REFERENCE
    assert len(pair.ours.said) == 1


def test_has_kernel_without_a_build(kernels_hub: Both) -> None:
    """Theirs raises where a repository has no build folder; ours says that it has no kernel."""
    kernels_hub.hub.organization("acme", trusted=True)
    kernels_hub.hub.add("acme/kernels", {"README.md": "to be built"}).branch("v1")
    pair = kernels_hub.run(lambda side: side.lib.has_kernel("acme/kernels", version=1))
    assert pair.theirs.error is not None
    assert pair.ours.get() is False


# --- Integrity -----------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["wrong", "missing", "unknown"])
@pytest.mark.parametrize("how", ["get_kernel", "get_local_kernel", "layer"])
def test_digest_not_compared(kernels_hub: Both, what: str, how: str) -> None:
    """Theirs loads a kernel whose files are not those of its digest; ours refuses it."""
    sealed = {"__init__.py": "from . import layers\n", "layers.py": kernel_source(3), "data.txt": "as sealed"}
    files = dict(sealed)
    if what == "wrong":
        files["layers.py"] = kernel_source(5)
    elif what == "missing":
        del files["data.txt"]
    else:
        files["more.py"] = "added later"
    seal = OURS_METADATA(sealed)

    def scenario(side: Side) -> float:
        if how == "get_local_kernel":
            folder = write_kernel(kernels_hub.home / side.name / "kernel", files, changes={"digest": seal})
            return call(side.lib.get_local_kernel(folder).layers.Scale())
        if kernels_hub.hub.repository("acme/kernels") is None:
            publish_kernels(kernels_hub.hub, "acme/kernels", files, metadata={"digest": seal}).branch("v1")
        if how == "layer":
            return side.served(repository(side))
        return call(side.lib.get_kernel("acme/kernels", version=1).layers.Scale())

    pair = kernels_hub.run(scenario)
    assert pair.theirs.get() == (5.0 if what == "wrong" else 3.0)
    assert pair.ours.error is not None and "digest" in pair.ours.why


def OURS_METADATA(files: dict[str, str]) -> dict[str, object]:  # noqa: N802
    """Seal files."""
    from kernels_plugins.local_hub.testing import file_digests

    return {"algorithm": "sha256", "files": file_digests(files)}


def test_flipped_byte(kernels_hub: Both) -> None:
    """Theirs hands a file that was damaged on its way to the importer; ours refuses it, and mends it next time."""
    source = "# -*- coding: latin-1 -*-\nLETTER = 'A'\n" + kernel_source(3)
    publish_kernels(kernels_hub.hub, "acme/kernels", source, digest=False).branch("v1")

    def scenario(side: Side) -> str:
        kernels_hub.hub.heal()
        kernels_hub.hub.fail("layers.py", flip=source.index("'A'") + 1, times=1)
        layer = repository(side).load()
        return str(sys.modules[layer.__module__].LETTER)  # type: ignore[attr-defined]

    pair = kernels_hub.run(scenario)
    assert pair.theirs.get() == chr(ord("A") ^ 0xFF)
    assert type(pair.ours.error).__name__ == "IntegrityError"


def test_branch_resolved_twice(kernels_hub: Both) -> None:
    """Theirs checks the metadata of one commit and runs the code of the next; ours asks once which commit it is."""
    checked = publish_kernels(kernels_hub.hub, "acme/kernels", kernel_source(3), digest=False)
    first = checked.head()

    def scenario(side: Side) -> float:
        checked.branch("main", first)

        def push(request: Any) -> bool:
            """Push once the metadata was read: the next steps need packages that are not here."""
            if request.method == "GET" and "metadata.json" in request.path and checked.branches["main"] == first:
                changes = {"python-depends": ["nvidia-cutlass-dsl"]}
                publish_kernels(kernels_hub.hub, "acme/kernels", kernel_source(5), digest=False, metadata=changes)
            return False

        kernels_hub.hub.heal()
        kernels_hub.hub.fail(push, times=None, status=500)
        return side.served(repository(side, revision="main"))

    pair = kernels_hub.run(scenario)
    assert pair.theirs.get() == 5.0
    assert pair.ours.get() == 3.0


def test_metadata_without_a_licence(both: Both) -> None:
    """Theirs cannot read the metadata of a kernel that names no licence; ours can, and tells that there is none."""
    folder = write_kernel(both.home / "kernel", kernel_source(3), changes={"license": None})

    def scenario(side: Side) -> tuple[float, object]:
        kernel = side.lib.get_local_kernel(folder)
        (loaded,) = [one for one in side.lib.get_loaded_kernels() if one.module is kernel]
        return call(kernel.layers.Scale()), loaded.metadata.license

    pair = both.run(scenario)
    assert isinstance(pair.theirs.error, ValueError) and "missing field `license`" in str(pair.theirs.error)
    assert pair.ours.get() == (3.0, None)


def test_calls_on_the_cpu(both: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch was built for CUDA, theirs runs the build for CUDA on the CPU; ours the one for the CPU."""
    from kernels_plugins.hub.builds.machine import this_machine

    monkeypatch.setattr(torch.version, "cuda", "12.8")
    this_machine.cache_clear()
    for variant, factor in {"torch-cuda": 5, "torch-cpu": 3}.items():
        write_kernel(both.home / "kernel", kernel_source(factor), variant=variant, changes={"id": f"_{factor}"})

    def scenario(side: Side) -> float:
        layer = side.layer()
        source = side.lib.LocalLayerRepository(both.home / "kernel", layer_name="Scale")
        return side.freeze(layer(), {layer.kernel_layer_name: {"cpu": source}})

    try:
        pair = both.run(scenario)
    finally:
        this_machine.cache_clear()
    assert (pair.theirs.get(), pair.ours.get()) == (5.0, 3.0)


# --- Trust ---------------------------------------------------------------------------------------


def test_renamed_to_a_stranger(kernels_hub: Both) -> None:
    """Theirs runs code of an untrusted organisation, under the name that it had before; ours does not."""
    publish_kernels(kernels_hub.hub, "acme/kernels", kernel_source(3)).branch("v1")
    kernels_hub.hub.organization("stranger", trusted=False)
    kernels_hub.hub.rename("acme/kernels", "stranger/kernels")
    pair = kernels_hub.run(lambda side: side.served(repository(side)))
    assert pair.theirs.get() == 3.0
    assert "not a trusted publisher" in pair.ours.why and "stranger" in pair.ours.why


def test_two_kernels_with_one_id(both: Both) -> None:
    """Theirs lets the second kernel of one id stand where the first is looked for; ours keeps both."""
    init = "from . import layers\n\ndef late():\n    from . import extra\n    return extra.VALUE\n"

    def scenario(side: Side) -> list[int]:
        loaded = [
            side.lib.get_local_kernel(
                write_kernel(
                    both.home / side.name / str(value),
                    {"__init__.py": init, "layers.py": "", "extra.py": f"VALUE = {value}\n"},
                )
            )
            for value in (1, 2)
        ]
        return [kernel.late() for kernel in loaded]

    pair = both.run(scenario)
    assert (pair.theirs.get(), pair.ours.get()) == ([2, 2], [1, 2])


def test_kernel_status_is_not_read(kernels_hub: Both) -> None:
    """Theirs does not look whether a repository says where it moved; ours follows, and says so."""
    publish_kernels(kernels_hub.hub, "acme/successor", kernel_source(3)).branch("v1")
    status = 'kind = "redirect"\ndestination = "acme/successor"\nrevision = "v1"\n'
    publish_kernels(kernels_hub.hub, "acme/kernels", kernel_source(5)).branch("v1")
    old = kernels_hub.hub.repository("acme/kernels")
    assert old is not None
    old.commit({**old.files(), "kernel-status.toml": status})
    old.branch("v1")
    pair = kernels_hub.run(lambda side: call(side.lib.get_kernel("acme/kernels", version=1).layers.Scale()))
    assert pair.theirs.get() == 5.0
    assert pair.theirs.asked("kernel-status") == 0
    assert pair.ours.get() == 3.0
    assert any("acme/successor" in said for said in pair.ours.said)


# --- Offline -------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["branch", "version", "commit", "locked"])
@pytest.mark.parametrize("how", ["HF_HUB_OFFLINE", "no Hub"])
def test_offline_start(kernels_hub: Both, new_process: Any, fresh_theirs: Any, what: str, how: str) -> None:
    """Theirs cannot start without the Hub with a kernel that it loaded with it; ours can.

    The repository has more builds than the one that this machine loads, as all published ones have. With
    `HF_HUB_OFFLINE`, theirs takes what it has for an incomplete download; a version it cannot find at all. Where
    the Hub is merely away, it tells of distrust.
    """
    published = publish_kernels(kernels_hub.hub, "acme/kernels", kernel_source(3))
    files = dict(published.files())
    other = "build/torch29-cxx11-cu128-x86_64-linux"
    files |= {path.replace("build/torch-universal", other): data for path, data in files.items()}
    commit = published.commit(files)
    published.branch("v1")
    lockfile = lock(kernels_hub, commit)

    def load(side: Side) -> float:
        if what == "locked":
            return side.served(side.lib.LockedLayerRepository("acme/kernels", lockfile=lockfile, layer_name="Scale"))
        options = {"branch": {"revision": "main"}, "version": {"version": 1}, "commit": {"revision": commit}}
        return side.served(repository(side, **options[what]))

    kernels_hub.run(load).agree(3.0)
    new_process()
    fresh_theirs()
    if how == "no Hub":
        kernels_hub.hub.stop()

    def again(side: Side) -> float:
        with pytest.MonkeyPatch.context() as patch:
            if how == "HF_HUB_OFFLINE":
                offline(patch)
            return load(side)

    pair = kernels_hub.run(again)
    assert pair.theirs.error is not None
    if how == "HF_HUB_OFFLINE":
        assert isinstance(pair.theirs.error, ValueError if what == "version" else FileNotFoundError)
    else:
        assert ("could not verify publisher trust" in str(pair.theirs.error)) is (what != "version")
    assert pair.ours.get() == 3.0


# --- Locked ---------------------------------------------------------------------------------------


@pytest.fixture
def package(kernels_hub: Both, monkeypatch: pytest.MonkeyPatch) -> Callable[[Side, str], ModuleType]:
    """Install a package that uses a library, with a lock file in its metadata."""

    def install(side: Side, commit: str) -> ModuleType:
        name = f"locked_by_{side.name}"
        site = kernels_hub.home / f"site of {side.name}"
        info = site / f"{name}-1.0.dist-info"
        info.mkdir(parents=True)
        (site / name).mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "top_level.txt").write_text(f"{name}\n")
        (info / "RECORD").write_text(f"{name}/__init__.py,,\n")
        (info / "kernels.lock").write_text(lock(kernels_hub, commit).read_text())
        (site / name / "__init__.py").write_text(
            f"import {side.lib.__name__} as lib\n\n\n"
            "def layer():\n    return lib.LockedLayerRepository('acme/kernels', layer_name='Scale')\n\n\n"
            "def module():\n    return lib.get_locked_kernel('acme/kernels', lockfile=None)\n\n\n"
            "def loaded():\n    return lib.load_kernel('acme/kernels', lockfile=None)\n"
        )
        monkeypatch.syspath_prepend(str(site))
        return importlib.import_module(name)

    return install


def test_lock_of_the_calling_package(kernels_hub: Both, package: Callable[[Side, str], ModuleType]) -> None:
    """Theirs looks for a lock file in its own metadata; ours in that of the package that calls."""
    commit = publish_kernels(kernels_hub.hub, "acme/kernels", kernel_source(3)).branch("v1")

    def scenario(side: Side) -> list[float]:
        caller = package(side, commit)
        return [side.served(caller.layer()), call(caller.module().layers.Scale()), call(caller.loaded().layers.Scale())]

    pair = kernels_hub.run(scenario)
    assert isinstance(pair.theirs.error, ValueError) and "Could not find a `kernels.lock`" in str(pair.theirs.error)
    assert pair.ours.get() == [3.0, 3.0, 3.0]


# --- Telemetry -----------------------------------------------------------------------------------


def test_user_agent_missing_from_requests(kernels_hub: Both) -> None:
    """Theirs tells who calls in some requests only; ours in all of them."""
    publish_kernels(kernels_hub.hub, "acme/kernels", kernel_source(3)).branch("v1")
    pair = kernels_hub.run(lambda side: side.served(repository(side, user_agent="caller/7")))
    pair.agree(3.0)
    told = [
        ["caller/7" in request.headers.get("user-agent", "") for request in outcome.requests]
        for outcome in (pair.theirs, pair.ours)
    ]
    assert any(told[0]) and not all(told[0])
    assert told[1] and all(told[1])


def test_telemetry_opt_out(kernels_hub: Both) -> None:
    """Theirs cannot send a request where telemetry is switched off; ours leaves out the details in the user agent."""
    publish_kernels(kernels_hub.hub, "acme/kernels", kernel_source(3)).branch("v1")

    def scenario(side: Side) -> float:
        with pytest.MonkeyPatch.context() as patch:
            telemetry(patch, on=False)
            return side.served(repository(side, user_agent="caller/7"))

    pair = kernels_hub.run(scenario)
    assert "Illegal header value" in pair.theirs.why and pair.theirs.requests == []
    assert pair.ours.get() == 3.0
    assert pair.ours.requests
    agents = [request.headers.get("user-agent", "") for request in pair.ours.requests]
    assert not any("caller" in agent or torch.__version__ in agent for agent in agents)
