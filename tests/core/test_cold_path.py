"""The cold path: its price in calls, its ten hops, and one question to each plugin for a decision."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

from kernels_core import (
    Candidate,
    Exclusive,
    LayerRequest,
    Mode,
    PluginManager,
    Refusal,
    Resolution,
    Scope,
    hookimpl,
    resolve,
    use_kernel_forward_from_hub,
)
from kernels_core.testing import HookRecorder
from kernels_plugins.mapping import register_kernel_mapping, use_kernel_mapping

Make = Callable[..., Any]
ROOT = Path(__file__).parents[2]
X = torch.zeros(2)
RECORDED = torch.zeros(2, requires_grad=True)

# --- Price ------------------------------------------------------------------------------------------

PRICE = """
    import sys

    import torch
    from torch import nn

    from kernels_core import plugin_manager, use_kernel_forward_from_hub
    from kernels_plugins import register_kernel_mapping


    class Fast(nn.Module):
        def forward(self, x):
            return x * 2


    @use_kernel_forward_from_hub("Scale")
    class Scale(nn.Module):
        def forward(self, x):
            return x + x


    register_kernel_mapping({"Scale": {"cpu": Fast}})
    assert len(plugin_manager().plugins()) > 5  # those that are installed
    x, layer, calls, deepest = torch.ones(1), Scale(), [], 0


    def profile(frame, event, argument):
        global deepest
        code = frame.f_code
        ours = "/kernels_core/" in code.co_filename or "/kernels_plugins/" in code.co_filename
        if event != "call" or not (ours or code.co_filename.startswith("<kernels_core")):
            return
        files = []
        while frame is not top:
            files.append(frame.f_code.co_filename)
            frame = frame.f_back
        if any(file.startswith("<frozen importlib") for file in files):
            return  # plugins import modules of theirs when they first need them
        calls.append(code.co_name)
        deepest = max(deepest, sum(not file.endswith("nn/modules/module.py") for file in files))


    top = sys._getframe()
    sys.setprofile(profile)
    y = layer(x)
    sys.setprofile(None)
    assert y.item() == 2
    once = {name: calls.count(name) for name in ("decide", "check_contract", "rank_offers", "load")}
    print(len(calls), deepest, sorted(once.items()), sep="\\n")
"""


def test_price_of_a_first_call() -> None:
    """With all installed plugins, a class kernel on a CPU costs under 200 calls, 16 frames deep with pluggy's."""
    ran = subprocess.run([sys.executable, "-c", textwrap.dedent(PRICE)], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    calls, depth, once = ran.stdout.splitlines()
    assert int(calls) < 200
    assert int(depth) <= 16
    assert once == str([("check_contract", 1), ("decide", 1), ("load", 1), ("rank_offers", 1)])


# --- Ten hops ---------------------------------------------------------------------------------------


def hops() -> list[tuple[str, str]]:
    """Return file and function of each hop that docs/path-of-a-call.md lists, in order."""
    page = (ROOT / "docs" / "path-of-a-call.md").read_text(encoding="utf-8")
    return re.findall(r"^\| \d+ \| `([\w/<>]+(?:\.py)?)` \| `([\w.]+)` \|", page, re.MULTILINE)


def test_the_page_lists_ten_hops() -> None:
    """From decorator to kernel, a reader needs ten hops."""
    assert len(hops()) == 10


def test_a_first_call_takes_the_hops_in_order() -> None:
    """Each hop exists, and a real call takes them all, in the order of the page."""
    taken: list[tuple[str, str]] = []

    def profile(frame: FrameType, event: str, argument: object) -> None:
        if event == "call":
            file = frame.f_code.co_filename
            found = re.search(r"kernels_(?:core|plugins)/[\w/]+\.py$", file.replace("\\", "/"))
            known = {"forward": "<generated>"} if file.startswith("<kernels_core forward") else {}
            place = found[0] if found else known.get(frame.f_code.co_name, "<kernel>")
            taken.append((place, frame.f_code.co_name))

    class Fast(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 10

    register_kernel_mapping({"Hops": {"cpu": Fast}})
    sys.setprofile(profile)
    try:

        @use_kernel_forward_from_hub("Hops")
        class Hops(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x

        result = Hops()(torch.ones(1))
    finally:
        sys.setprofile(None)
    assert result.item() == 10
    remaining: Iterator[tuple[str, str]] = iter(taken)
    for file, function in hops():
        hop = (file, function.rpartition(".")[2])
        assert hop in remaining, f"{function} of {file} is not called, or not in this order"


# --- Each plugin is asked once ------------------------------------------------------------------------


class Offers:
    """A plugin that offers kernels, and counts the questions."""

    def __init__(self, offer: Callable[[LayerRequest], Any]) -> None:
        self.offer = offer
        self.asked: list[tuple[Mode, ...]] = []

    @hookimpl
    def kernels_find_candidates(self, request: LayerRequest) -> Any:
        self.asked.append(request.modes)
        return self.offer(request)


EAGER = (Mode.INFERENCE, Mode.TRAINING)


def test_one_question_serves_training_and_inference(
    make_layer: Make, make_kernel: Make, isolated_plugins: PluginManager, hook_recorder: HookRecorder
) -> None:
    """A plugin whose answer does not depend on the mode is asked once; loading, policy and checks happen once."""
    plugin, kernel = Offers(lambda request: [Candidate(kernel)]), make_kernel(10)
    isolated_plugins.register(plugin)
    layer = make_layer()()
    assert layer(X)[0] == layer(RECORDED)[0] == 10
    assert plugin.asked == [EAGER]
    assert hook_recorder.names().count("kernels_find_candidates") == 1
    for hook in ("kernels_resolve_forward", "kernels_authorize", "kernels_load_layer", "kernels_check_layer"):
        assert hook_recorder.names().count(hook) == 1, hook
    (told,) = hook_recorder.of("kernels_resolved")
    assert told.arguments["resolution"].every_mode and type(told.arguments["resolution"].request) is LayerRequest


def test_an_answer_that_reads_the_mode_is_asked_for_again(
    make_layer: Make, make_kernel: Make, isolated_plugins: PluginManager
) -> None:
    """A plugin that knows nothing of several modes, and offers by `request.mode`, serves each mode as it means to."""
    loads: list[str] = []

    def source(name: str, added: float) -> Any:
        return type(name, (), {"load": lambda self: loads.append(name) or make_kernel(added)})()

    sources = {Mode.INFERENCE: source("inference", 10), Mode.TRAINING: source("training", 20)}
    plugin = Offers(lambda request: [Candidate(sources[request.mode])])
    isolated_plugins.register(plugin)
    layer = make_layer()()
    assert layer(RECORDED)[0] == 20
    assert loads == ["training"], "a training run fetches nothing for inference"
    assert layer(X)[0] == 10 and loads == ["training", "inference"]
    assert plugin.asked == [EAGER, (Mode.TRAINING,), (Mode.TRAINING,), (Mode.INFERENCE,)]


def test_an_answer_that_reads_the_mode_in_vain_is_one_decision(
    make_layer: Make, make_kernel: Make, isolated_plugins: PluginManager, hook_recorder: HookRecorder
) -> None:
    """Where both modes get the same candidates, one decision serves both, however the plugin came to them."""
    kernel = make_kernel(10)
    plugin = Offers(lambda request: [Candidate(kernel)] if Mode.TORCH_COMPILE not in request.mode else None)
    isolated_plugins.register(plugin)
    layer = make_layer()()
    assert layer(X)[0] == layer(RECORDED)[0] == 10
    (told,) = hook_recorder.of("kernels_resolved")
    assert told.arguments["resolution"].every_mode


@pytest.mark.parametrize("hook", ["kernels_authorize", "kernels_check_layer", "kernels_resolve_forward"])
def test_any_hook_may_depend_on_the_mode(
    make_layer: Make, make_kernel: Make, isolated_plugins: PluginManager, hook: str
) -> None:
    """A policy for training only, in whichever hook, refuses training only; it is asked about each mode."""
    kernel = make_kernel(10)

    def veto(request: LayerRequest) -> Any:
        if Mode.TRAINING not in request.mode:
            return None
        return Resolution(request, note="not for training") if hook == "kernels_resolve_forward" else "not for training"

    isolated_plugins.register(type("Policy", (), {hook: staticmethod(hookimpl(tryfirst=True)(veto))})())
    layer = make_layer()()
    with (
        use_kernel_mapping({"Add": {"cpu": kernel}}),
        pytest.warns() if hook != "kernels_resolve_forward" else Scope(0),
    ):
        assert layer(RECORDED)[0] == 1
        assert layer(X)[0] == 10


def test_a_wrapper_sees_questions_and_answers_only(
    make_layer: Make, make_kernel: Make, isolated_plugins: PluginManager
) -> None:
    """Where modes differ, the question about both is cut off: no wrapper of the hook gets an answer that is none."""
    seen: list[str] = []

    class Audit:
        @hookimpl(wrapper=True)
        def kernels_resolve_forward(self, request: LayerRequest) -> Any:
            resolution = yield
            seen.append(str(resolution).splitlines()[0])
            return resolution

    isolated_plugins.register(Audit())
    layer, inference, training = make_layer()(), make_kernel(10), make_kernel(20)
    with use_kernel_mapping({"Add": {"cpu": {Mode.INFERENCE: inference, Mode.TRAINING: training}}}):
        assert (layer(X)[0], layer(RECORDED)[0]) == (10, 20)
    assert [line.partition(":")[0] for line in seen] == [
        "layer 'Add' on cpu for inference",
        "layer 'Add' on cpu for training",
    ]
    seen.clear()
    with use_kernel_mapping({"Add": {"cpu": inference}}):
        layer(X)
    assert [line.partition(":")[0] for line in seen] == ["layer 'Add' on cpu for inference or training"]


def test_a_wrapper_that_stops_everything_does_not_stop_the_question(
    make_layer: Make, make_kernel: Make, isolated_plugins: PluginManager
) -> None:
    """A wrapper that answers whatever is raised is not at fault where modes differ: the core asks on."""

    class Stops:
        @hookimpl(wrapper=True)
        def kernels_resolve_forward(self, request: LayerRequest) -> Any:
            try:
                return (yield)
            except BaseException:
                return None

    isolated_plugins.register(Stops())
    layer = make_layer()()
    with use_kernel_mapping({"Add": {"cpu": {Mode.INFERENCE: make_kernel(10), Mode.TRAINING: make_kernel(20)}}}):
        assert (layer(X)[0], layer(RECORDED)[0]) == (10, 20)
    assert not isolated_plugins.faults


def test_requests_about_two_modes_are_values(
    make_kernel: Make, isolated_plugins: PluginManager, make_layer: Make
) -> None:
    """A plugin may replace fields of such a request, use it as a key, or print it."""
    known: dict[LayerRequest, Any] = {}

    def offer(request: LayerRequest) -> Any:
        other = dataclasses.replace(request, layer_name="Other")
        assert (other.layer_name, other.mode, request.layer_name) == ("Other", request.mode, "Add")
        assert dataclasses.replace(request, mode=Mode.TRAINING).mode is Mode.TRAINING
        assert not request.is_traced and "'Add' on cpu" in str(request) and "layer_name='Add'" in repr(request)
        return known.setdefault(request, [Candidate(kernel)])

    kernel = make_kernel(10)
    isolated_plugins.register(Offers(offer))
    layer = make_layer()()
    assert layer(X)[0] == layer(RECORDED)[0] == 10
    assert isolated_plugins.faults == []


# --- Exclusive ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("last", "kept"),
    [("scope", ["scope"]), ("user", ["scope", "user"]), ("plugin", ["scope", "user", "plugin"])],
)
def test_exclusive_leaves_out_lower_tiers(isolated_plugins: PluginManager, last: Any, kept: list[str]) -> None:
    """Candidates and inapplicable ones of the tiers after it are left out; failures of plugins are shown."""
    tiers: list[Any] = ["scope", "user", "plugin"]
    for tier in tiers:
        refusals = [Refusal(f"{tier} is for winter", Candidate(f"winter {tier}", tier=tier))]
        offers = [Candidate(nn.Linear, tier=tier), *refusals]
        isolated_plugins.register(Offers(lambda request, offers=offers: offers), tier)
    isolated_plugins.register(Offers(lambda request: [Exclusive(last)]), "only")
    isolated_plugins.register(Offers(lambda request: 1 / 0), "fails")
    with pytest.warns(match="ZeroDivisionError"):
        resolution = resolve("Layer", device="cpu", mode=Mode.INFERENCE)
    assert [refusal.candidate.tier for refusal in resolution.refusals if refusal.candidate] == kept
    assert sorted(misfit.candidate.tier for misfit in resolution.misfits if misfit.candidate) == sorted(kept)
    assert [refusal.plugin for refusal in resolution.refusals if refusal.candidate is None] == ["fails"]


def test_exclusive_with_an_impossible_tier_is_isolated(make_kernel: Make, isolated_plugins: PluginManager) -> None:
    """A tier that does not exist costs the plugin its answer, and is reported in its name."""
    isolated_plugins.register(Offers(lambda request: [Exclusive("bogus")]), "odd")  # type: ignore[arg-type]
    isolated_plugins.register(Offers(lambda request: [Candidate(make_kernel(10))]), "other")
    with pytest.warns(match="Plugin 'odd': kernels_find_candidates returned"):
        assert resolve("Layer", device="cpu", mode=Mode.INFERENCE).plugin == "other"
