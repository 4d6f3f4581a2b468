"""Copies of decorated and kernelized things: by copy, by pickle, by value, and through wrappers of others."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import sys
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import pytest
import torch
from fresh_process import run_python
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations, parametrize
from warned import ignored

from kernels_core import (
    Mode,
    decorated_layer,
    frozen_choice,
    kernelize,
    replace_kernel_forward_from_hub,
    unkernelize,
    use_kernel_forward_from_hub,
)
from kernels_core.errors import NoKernelError
from kernels_core.scopes.frame import root
from kernels_plugins.mapping import use_kernel_mapping

X = torch.ones(2, 4)


@use_kernel_forward_from_hub("CopiesShift")
class Shift(nn.Linear):
    """A layer that can be pickled, with parameters."""

    def __init__(self) -> None:
        super().__init__(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


class Shifted(nn.Module):
    """Visibly another function."""

    weight: torch.Tensor
    bias: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight, self.bias) + 100


class Passing(nn.Module):
    """A wrapper that passes on all attributes that it lacks, as those of FSDP, DeepSpeed and diffusers do."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.inner = module

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, x: torch.Tensor) -> Any:
        return self.inner(x) * 2


class Plain:
    """The same, for a wrapper that is no module."""

    def __init__(self, module: nn.Module) -> None:
        self.inner = module

    def __getattr__(self, name: str) -> Any:
        if name == "inner" or (name.startswith("__") and name != "__deepcopy__"):
            raise AttributeError(name)
        return getattr(self.inner, name)

    def __call__(self, x: torch.Tensor) -> Any:
        return self.inner(x) * 2


class Copying(Shift):
    """A decorated layer that says itself how it is copied."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Copying:
        twin = type(self)()
        twin.load_state_dict(self.state_dict())
        twin.__dict__["was_copied"] = True
        return twin


def kernelized(module: Any) -> Any:
    """Kernelize for inference, with a kernel whose result differs."""
    with use_kernel_mapping({"CopiesShift": {"cpu": Shifted}}):
        return kernelize(module, mode=Mode.INFERENCE)


@pytest.mark.parametrize("wrap", [checkpoint_wrapper, Passing, Plain, torch.compile], ids=lambda wrap: wrap.__name__)
@pytest.mark.parametrize("clone", [copy.deepcopy, copy.copy, lambda w: pickle.loads(pickle.dumps(w))])
def test_a_copy_of_a_wrapper_is_a_wrapper(wrap: Callable[[Any], Any], clone: Callable[[Any], Any]) -> None:
    """Copying a wrapper that passes attributes on to a kernelized layer returns a wrapper around a copy."""
    wrapper = wrap(kernelized(Shift()))
    with ignored():  # of a pickle: choices are not saved
        twin = clone(wrapper)
    assert type(twin) is type(wrapper)
    if wrap is not torch.compile:  # a second is too much for a compilation
        added = 100 if clone in (copy.copy, copy.deepcopy) else 0
        right = wrapper(X) - (100 - added) * (1 if wrap is checkpoint_wrapper else 2)
        torch.testing.assert_close(twin(X), right)


def test_copies_keep_their_class_and_what_suspends_them() -> None:
    """Deep and shallow copies of a kernelized layer are kernelized, suspended where it is, and run on themselves."""
    layer = kernelized(Shift())
    with ignored():
        layer.train()
    twin: Any
    for twin in (copy.deepcopy(layer), copy.copy(layer), copy.deepcopy(nn.Sequential(layer))[0]):
        assert type(twin) is type(layer) and twin.forward.__self__ is twin
        assert torch.equal(twin.eval()(X), layer(X) + 100)
    pair = copy.deepcopy([layer, layer])
    assert pair[0] is pair[1]


def test_a_layer_that_copies_itself_still_does() -> None:
    """A `__deepcopy__` of the layer's own class is used, and the copy is kernelized."""
    layer = kernelized(Copying())
    twin = copy.deepcopy(layer)
    assert twin.was_copied and frozen_choice(twin) is frozen_choice(layer)
    assert torch.equal(twin(X), layer(X))


@pytest.mark.parametrize("undo", [False, True])
def test_parametrizations_come_and_go_after_kernelize(undo: bool) -> None:
    """A kernelized layer's parametrizations are removed one by one, and added, in or out of `kernelize`."""
    layer = Shift()
    right = layer(X).detach()
    parametrizations.weight_norm(layer)
    parametrize.register_parametrization(layer, "bias", nn.Identity())
    kernelized(layer)
    assert parametrize.type_before_parametrizations(layer) is Shift
    assert torch.allclose(copy.deepcopy(layer)(X), right + 100, atol=1e-5)
    parametrize.remove_parametrizations(layer, "bias")
    torch.testing.assert_close(layer(X), right + 100)
    if undo:
        unkernelize(layer)
        torch.testing.assert_close(layer(X), right)
        kernelized(layer)
    parametrize.register_parametrization(layer, "bias", nn.Identity())
    torch.testing.assert_close(unkernelize(layer)(X), right)
    kernelized(layer)
    parametrize.remove_parametrizations(layer, "weight")
    parametrize.remove_parametrizations(layer, "bias")
    assert type(layer) is Shift and isinstance(layer.weight, nn.Parameter) and isinstance(layer.bias, nn.Parameter)
    torch.testing.assert_close(layer(X), right)


# --- By value ------------------------------------------------------------------------------------

SCRIPT = '''
import importlib, subprocess, sys, torch
from torch import nn
from kernels_core import Mode, kernelize, use_kernel_forward_from_hub
from kernels_plugins import use_kernel_mapping
how = importlib.import_module(sys.argv[1])

class Base(nn.Module):
    def forward(self, x): return x

@use_kernel_forward_from_hub("SentDouble")
class Double(Base):
    def __init__(self):
        super().__init__()
        self.by = nn.Parameter(torch.full((), 2.0))
    def forward(self, x): return super().forward(x) * self.by

class Derived(Double): pass

@use_kernel_forward_from_hub("SentCount", condition=lambda x, n: n < 5)
def count(x, n=3): return x if n == 0 else count(x + 1, n - 1)

class Fast(nn.Module):
    def forward(self, x): return x * 7 * self.by

def work(x): return Double()(x) + count(x)

frozen = nn.Sequential(Double())
with use_kernel_mapping({"SentDouble": {"cpu": Fast}}):
    kernelize(frozen, mode=Mode.INFERENCE)
    frozen(torch.ones(1)), Double()(torch.ones(1))  # something is published and unproven
things = (Double, Derived, Double(), Derived(), nn.Sequential(Double(), Derived()), frozen, count, work)
with open("things", "wb") as file: how.dump(things, file)
worker = """
import importlib, sys, warnings, torch
from torch import nn
warnings.simplefilter("ignore")
from kernels_core import Mode, kernelize, receipt, use_kernel_forward_from_hub
from kernels_plugins import use_kernel_mapping
how = importlib.import_module(sys.argv[1])

if __name__ == "__main__":
    @use_kernel_forward_from_hub("Other")  # takes the number that a layer has in the other process
    class Other(nn.Module):
        def forward(self, x): return x * 1000
    assert Other()(torch.ones(1)).item() == 1000

Double, Derived, one, derived, model, frozen, count, work = how.load(open("things", "rb"))

class Quick(nn.Module):
    def forward(self, x): return x * 70

x = torch.ones(1)
with torch.no_grad():
    for layer in (Double(), Derived(), one, derived, frozen): assert layer(x).item() == 2
    assert model(x).item() == 4 and count(x).item() == 4 and work(x).item() == 6
    with use_kernel_mapping({"SentDouble": {"cpu": Quick}, "SentCount": {"cpu": lambda x, n=3: x * 50}}):
        for layer in (Double(), Derived(), one, derived, frozen): assert layer(x).item() == 70
        assert model(x).item() == 4900 and count(x).item() == 50 and count(x, n=9).item() == 300
        assert work(x).item() == 120
        assert [row.layer_name for row in receipt(model, device="cpu").rows] == ["SentDouble"] * 2
        kernelize(model, mode=Mode.INFERENCE, device="cpu")
    assert model(x).item() == 4900
y = torch.ones(1, requires_grad=True)
one(y).backward()
assert y.grad.item() == 2
"""
subprocess.run([sys.executable, "-c", worker, *sys.argv[1:]], check=True)
exec(compile(worker, "worker", "exec"), {"__name__": "same process"})
assert Double()(torch.ones(1)).item() == 2 and frozen(torch.ones(1)).item() == 14
print("right")
'''


@pytest.mark.parametrize("how", ["cloudpickle", "dill"])
def test_what_a_script_defines_is_sent_by_value(how: str, tmp_path: Path) -> None:
    """A class, instances, subclasses, a model, a function, and one that names them, all of `__main__`, work as copies.

    They do in another process and in this one: gradients, conditions, mappings, receipts and `kernelize` find them.
    """
    pytest.importorskip(how)
    (tmp_path / "script.py").write_text(SCRIPT)
    assert _run(tmp_path, how) == "right"


def _run(folder: Path, *arguments: str, **environ: str) -> str:
    paths = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
    env = {**os.environ, "PYTHONPATH": paths, "PYTHONWARNINGS": "ignore", **environ}
    done = run_python("script.py", *arguments, environment=env, folder=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def test_precompiled_models_hold_decorated_layers(tmp_path: Path) -> None:
    """With `TORCH_CACHING_PRECOMPILE=1`, a model with decorated layers compiles, and mappings apply."""
    (tmp_path / "script.py").write_text("""
import torch
from torch import nn
from kernels_core import use_kernel_forward_from_hub
from kernels_plugins import use_kernel_mapping
@use_kernel_forward_from_hub("Precompiled")
class Double(nn.Module):
    def forward(self, x): return x * 2
class Fast(nn.Module):
    can_torch_compile = True
    def forward(self, x): return x * 7
model = torch.compile(nn.Sequential(Double()), backend="eager")
with torch.no_grad():
    print(model(torch.ones(1)).item())
    torch._dynamo.reset()
    with use_kernel_mapping({"Precompiled": {"cpu": Fast}}): print(model(torch.ones(1)).item())
""")
    assert _run(tmp_path, TORCH_CACHING_PRECOMPILE="1", TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache")) == "2.0\n7.0"


def test_copies_of_all_kinds_of_layers_dispatch() -> None:
    """Whatever a forward reads is sent along: with conditions, packed arguments, no fallback; also of a copy."""
    dill = pytest.importorskip("dill")  # cloudpickle finds a class of its own process again

    class Packed(nn.Module):
        def forward(*args: Any, **kwargs: Any) -> Any:
            return args[1] * 2

    class Conditional(nn.Module):
        def forward(self, x: Any, *, by: Any = 2) -> Any:
            return x * 2

    class Strict(nn.Module):
        def forward(self, x: Any, mask: Any = None) -> Any:
            return x * 2

    class Fast(nn.Module):
        can_torch_compile = True

        def forward(self, x: Any) -> Any:
            return x * 7

    class FastPacked(Fast):
        def forward(*args: Any, **kwargs: Any) -> Any:
            return args[1] * 7

    class FastConditional(Fast):
        def forward(self, x: Any, *, by: Any = 2) -> Any:
            return x * 7

    class FastStrict(Fast):
        def forward(self, x: Any, mask: Any = None) -> Any:
            return x * 7

    replace_kernel_forward_from_hub(Packed, "CopiedPacked")
    use_kernel_forward_from_hub("CopiedConditional", condition=lambda module: not module.training)(Conditional)
    use_kernel_forward_from_hub("CopiedStrict", use_fallback=False)(Strict)
    half = {"dtypes": (torch.float16,)}  # passes each call on
    mapping = {
        f"Copied{kind.__name__[4:]}": {"cpu": [type("Half", (kind,), half), kind]}
        for kind in (FastPacked, FastConditional, FastStrict)
    }
    for original in (Packed, Conditional, Strict):
        with use_kernel_mapping(mapping), torch.no_grad():
            original()(X)  # something is published
            sent = original
            for _ in range(2):
                sent = dill.loads(dill.dumps(sent))
                assert decorated_layer(sent).number != decorated_layer(original).number
                torch.testing.assert_close(sent().eval()(X), X * 7)
                if original is Conditional:
                    torch.testing.assert_close(sent()(X), X * 2)
            torch.testing.assert_close(torch.compile(sent().eval(), backend="eager")(X), X * 7)
        if original is Strict:
            with pytest.raises(NoKernelError):
                sent()(X)


def test_gone_copies_leave_nothing_in_frames() -> None:
    """Whatever calls of a copy published is withdrawn when the copy is gone."""
    dill = pytest.importorskip("dill")  # cloudpickle finds a class of its own process again

    class Original(nn.Module):
        def forward(self, x: Any) -> Any:
            return x * 2

    sent = dill.dumps(use_kernel_forward_from_hub("CopiedAndGone")(Original))
    gc.collect()
    before = set(root.published)
    copied = dill.loads(sent)
    copied()(X)
    assert root.published - before
    del copied
    gc.collect()
    assert root.published <= before


def test_only_what_can_be_a_copy_is_pickled() -> None:
    """A context variable of another library cannot be pickled, as ever; nor can an open scope."""
    with pytest.raises(TypeError, match="cannot pickle"):
        pickle.dumps(ContextVar("theirs"))
    with use_kernel_mapping({}), pytest.raises(TypeError, match="scope"):
        pickle.dumps(root.active)
