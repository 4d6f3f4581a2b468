"""`references`, `find_candidates`, and `resolve` for one candidate: trying other kernels than the serving one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from kernels_core import (
    Candidate,
    Mode,
    find_candidates,
    frozen_choice,
    kernelize,
    quarantine,
    references,
    release,
    resolve,
    unkernelize,
    use_kernel_forward_from_hub,
    use_kernelized_func,
)
from kernels_plugins.mapping import use_kernel_mapping

Make = Callable[..., Any]
X = torch.zeros(1)


def test_every_layer_runs_its_reference(make_layer: Make, make_kernel: Make) -> None:
    """Classes and functions, also in mappings that are opened inside, and where the reference is no fallback."""
    layer = make_layer(use_fallback=False)()

    @use_kernel_forward_from_hub("double")
    def double(x: torch.Tensor) -> torch.Tensor:
        return x + 2

    mapping = {"Add": {"cpu": make_kernel(10)}, "double": {"cpu": lambda x: x + 20}}
    with use_kernel_mapping(mapping):
        with references():
            assert (layer(X), double(X)) == (1, 2)
            with use_kernel_mapping(mapping):
                assert (layer(X), double(X)) == (1, 2)
            assert layer(X.clone().requires_grad_()) == 1
            decision = resolve(layer, device="cpu", mode=Mode.INFERENCE)
            assert decision.is_reference and decision.note == "references() is open"
        assert (layer(X), double(X)) == (10, 20)


def test_only_some_layers_or_calls(make_layer: Make, make_kernel: Make, compiled: Make) -> None:
    """Others are served as without."""
    one, other = make_layer()(), make_layer()()
    with use_kernel_mapping({"Add": {"cpu": make_kernel(10)}}), references(layers=[type(one).forward.kernels_layer]):
        assert (one(X), other(X)) == (1, 10)
    with use_kernel_mapping({"Add": {"cpu": make_kernel(10, can_torch_compile=True)}}):
        with references(mode=Mode.TORCH_COMPILE):
            assert (one(X), compiled(one)[0](X)) == (10, 1)


def test_warm_calls_are_as_they_were(make_layer: Make, make_kernel: Make, hook_recorder: Any) -> None:
    """Neither entering nor leaving makes anything be decided anew, and the second time nothing is decided inside."""
    layer = make_layer()()
    with use_kernel_mapping({"Add": {"cpu": make_kernel(10)}}):
        layer(X)
        with references():
            layer(X)
        before = len(hook_recorder.calls)
        for _ in range(3):
            assert layer(X) == 10
            with references():
                assert layer(X) == 1
        assert len(hook_recorder.calls) == before


def test_other_threads_keep_their_kernels(make_layer: Make, make_kernel: Make) -> None:
    """Scopes belong to a thread."""
    layer, found = make_layer()(), []

    def work() -> None:
        with use_kernel_mapping({"Add": {"cpu": make_kernel(10)}}):
            found.append(layer(X).item())

    with references():
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert found == [10]


def test_compiled_code_follows(make_layer: Make, make_kernel: Make, compiled: Make) -> None:
    """With one graph for each, and no third when it is entered again."""
    layer = make_layer()()
    run, counter = compiled(layer)
    with use_kernel_mapping({"Add": {"cpu": make_kernel(10, can_torch_compile=True)}}):
        for _ in range(2):
            assert run(X) == 10
            with references():
                assert run(X) == 1
    assert counter.frame_count == 2


@pytest.mark.parametrize("mode", [Mode.INFERENCE, Mode.TRAINING, Mode.INFERENCE | Mode.TORCH_COMPILE])
def test_kernelized_models(make_layer: Make, make_kernel: Make, mode: Mode) -> None:
    """Named, they run their references, whatever the block does with their mode; afterwards, they are as before."""
    model = nn.Sequential(make_layer()(), nn.Identity()).eval()
    with use_kernel_mapping({"Add": {"cpu": make_kernel(10, can_torch_compile=True)}}):
        kernelize(model, mode=mode, device="cpu")
    with references():
        assert model(X) == 10
    with references(model):
        assert model(X) == 1
        model.eval()
        assert model(X) == 1
    assert model(X) == 10 and "forward" not in model[0].__dict__
    with pytest.raises(KeyError), references(model):
        raise KeyError
    assert model(X) == 10
    with references(model, layers=[]):
        assert model(X) == 10
    unkernelize(model)


def test_a_kernelized_model_that_begins_to_train(make_layer: Make, make_kernel: Make) -> None:
    """After the block it decides by itself, as after any `train()`, until `eval()`."""
    model = make_layer()().eval()
    with use_kernel_mapping({"Add": {"cpu": make_kernel(10)}}):
        kernelize(model, mode=Mode.INFERENCE, device="cpu")
    with references(model):
        model.train()
    with pytest.warns(match=r"train\(\) on a model"):
        assert model(X) == 1
    assert model.eval()(X) == 10


def test_functions_of_kernelized_models() -> None:
    """Functions that were chosen with the model run their references, too."""

    @use_kernel_forward_from_hub("add")
    def add(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    @use_kernelized_func(add)
    class Calls(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return add(x)

    model = Calls().eval()
    with use_kernel_mapping({"add": {"cpu": lambda x: x + 10}}):
        kernelize(model, mode=Mode.INFERENCE, device="cpu")
    assert model(X) == 10
    with references(model):
        assert model(X) == 1


def test_candidates_are_found_and_decided_one_by_one(
    make_layer: Make, make_kernel: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the order in which they would be tried, without loading; each decision is for that candidate only."""
    layer = make_layer()()
    kernels = [make_kernel(10), make_kernel(20, has_backward=False)]
    found: dict[str, Any] = {"device": "cpu", "mode": Mode.TRAINING}
    with use_kernel_mapping({"Add": {"cpu": kernels, "cuda": make_kernel(30)}}):
        candidates, refusals = find_candidates(layer, **found)
        assert [candidate.source for candidate in candidates] == kernels
        assert ["cuda" in str(refusal) for refusal in refusals] == [True]
        with references():  # which says nothing about candidates
            assert find_candidates(layer, **found)[0] == candidates
            first, second = (resolve(layer, candidate=candidate, **found) for candidate in candidates)
        assert first.implementation is kernels[0].forward and first.refusals == ()
        assert second.is_reference and "has_backward = False" in second.refusals[0].reason
        entry = quarantine(type(layer).forward.kernels_layer, kernels[0].forward, kernel="ten", reason="of a test")
        assert "quarantine" in resolve(layer, candidate=candidates[0], **found).refusals[0].reason
        release(entry)
        assert resolve(layer, candidate=Candidate(int), **found).refusals[0].candidate == Candidate(int)
        monkeypatch.setenv("DISABLE_KERNEL_MAPPING", "1")
        assert find_candidates(layer, **found) == ([], [])
        assert resolve(layer, candidate=candidates[0], **found).note == "DISABLE_KERNEL_MAPPING is on"


def test_a_module_that_comes_back_in_a_block_is_restored_after_it(make_layer: Make, make_kernel: Make) -> None:
    """Also where the block is about another model: its kernel waits for the end of the block, and serves again."""
    model = nn.Sequential(make_layer("Add")()).eval()
    with use_kernel_mapping({"Add": {"cpu": make_kernel(10)}}), torch.no_grad():
        kernelize(model, mode=Mode.INFERENCE, device="cpu")
        choice: Any = frozen_choice(model[0])
        choice.notice_move(model[0], torch.device("cuda:0"))
        assert choice.suspended_by(model[0]) == "move to cuda:0"
        with references(nn.Identity()):
            choice.notice_move(model[0], torch.device("cpu"))
            assert choice.suspended_by(model[0]) is not None
        assert choice.suspended_by(model[0]) is None
