"""Adopted transformers models compute what they computed: each cell of the table in docs/adopt.md is a test."""

from __future__ import annotations

import copy
import importlib
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FEATURES, HEADS, MODELS, WIDE, compiled, logits, made, tokens
from fresh_process import run_python
from warned import never

from kernels_core import Mode, count_calls, kernelize, receipt
from kernels_plugins import adopt, use_kernel_mapping

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

PAGE = Path(__file__).parents[2] / "docs" / "adopt.md"


def table() -> dict[str, dict[str, str]]:
    """Return the cells of the table on the page, by model and column."""
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    first = next(i for i, line in enumerate(lines) if "static cache" in line)
    columns, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines[first : first + 15])
    return {row[0]: dict(zip(columns[1:], row[1:], strict=True)) for row in rows}


CELLS = [(name, feature) for name in MODELS for feature in FEATURES]


@pytest.mark.parametrize(("name", "feature"), CELLS, ids=[re.sub(r"\W+", "-", "-".join(cell)) for cell in CELLS])
def test_a_cell_of_the_table(name: str, feature: str) -> None:
    """An adopted model computes what the untouched one does, or neither has the feature, as the page says."""
    cell = table()[name][feature]
    assert cell in ("equal", "none")
    model, adopted, inputs, _ = made(name)
    try:
        wanted = FEATURES[feature](model, inputs)
    except pytest.skip.Exception:
        assert cell == "none"
        return
    assert cell == "equal"
    found = FEATURES[feature](adopted, inputs)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a compiler")
@pytest.mark.parametrize("name", ["Mistral", "Qwen3-MoE"])
def test_a_model_with_inductor(name: str) -> None:
    """Machine code for an adopted model, without a graph break, computes what the untouched model does."""
    model, adopted, inputs, _ = made(name)
    torch.testing.assert_close(compiled(adopted, inputs, "inductor"), logits(model, inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_the_layers_of_the_table(name: str) -> None:
    """The page says how many layers of each name are adopted in two blocks of a model."""
    counts = made(name)[3]
    wanted = ", ".join(f"{count} {layer}" for layer, count in sorted(counts.items()))
    assert table()[name]["layers"] == wanted


@pytest.mark.parametrize(
    "name", ["t5.T5", "switch_transformers.SwitchTransformers", "udop.Udop", "pix2struct.Pix2Struct"]
)
def test_layer_norms_that_are_none(name: str) -> None:
    """The norms of T5 and its kin are called LayerNorm, and adopted as what they are."""
    package, _, prefix = name.partition(".")
    module = importlib.import_module(f"transformers.models.{package}.modeling_{package}")
    norm = getattr(module, f"{prefix}LayerNorm")(16)
    assert [layer.layer_name for layer in adopt(norm).layers] == ["RMSNorm"]


# --- Kernels for several parts at once -------------------------------------------------------------


NAMES = ("add_rms_norm", "add_rms_norm_offset", "linear_cross_entropy")
FUSED: Any = {name: {"cpu": "pack:torch"} for name in NAMES}


@pytest.mark.parametrize("name", ["Llama", "Gemma3", "GPT-OSS"])
def test_blocks_with_a_kernel(name: str) -> None:
    """A kernel for the sum and the norm of blocks serves with caches, checkpointing and compilers, and is as right."""
    model, adopted, inputs, _ = made(name)
    for feature in ("tokens", "static cache", "gradients", "checkpointing", "compile"):
        wanted = FEATURES[feature](model, inputs)
        with use_kernel_mapping(FUSED), count_calls():
            found = FEATURES[feature](adopted, inputs)
            (row, *_) = (row for row in receipt(adopted).rows if row.path.endswith(":add_rms_norm"))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        assert feature == "compile" or (row.calls or {}).get(row.origin), feature
        assert row.bypasses


def test_an_adapter_beside_a_fused_norm(llama: Any) -> None:
    """LoRA on the attention and the MLP of blocks is computed, and the kernel for their sum and norm serves."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    inputs = made("Llama")[2]
    config = peft.LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    model = peft.get_peft_model(llama, config)
    wanted = model(**inputs, labels=inputs["input_ids"]).loss
    slopes = torch.autograd.grad(wanted, [each for each in model.parameters() if each.requires_grad])
    adopt(model)
    with use_kernel_mapping(FUSED), count_calls():
        loss = model.train()(**inputs, labels=inputs["input_ids"]).loss
        rows = {row.layer_name: row for row in receipt(model).rows}
    torch.testing.assert_close(loss, wanted)
    found = torch.autograd.grad(loss, [each for each in model.parameters() if each.requires_grad])
    torch.testing.assert_close(found, slopes)
    assert rows["add_rms_norm"].calls and rows["linear_cross_entropy"].calls


def step(model: Any, **given: Any) -> tuple[Any, list[torch.Tensor | None]]:
    """Return the output of a training step, and the gradients."""
    model.zero_grad(set_to_none=True)
    output = model.train()(**given)
    (output.loss if hasattr(output, "loss") else output[0]).backward()
    return output, [parameter.grad for parameter in model.eval().parameters()]


@pytest.mark.parametrize("name", ["Llama", "Qwen3-MoE", "Gemma3", "Mistral"])
def test_the_loss_of_a_training_step(name: str) -> None:
    """A kernel computes the loss in chunks, with equal gradients, and the model returns no logits."""
    model, adopted, inputs, _ = made(name)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] % 3 == 0, -100)
    for more in (
        {},
        {"num_items_in_batch": 5},
        {"num_items_in_batch": torch.tensor(5), "output_hidden_states": True},
        {"shift_labels": labels.roll(2), "position_ids": torch.arange(9).expand(2, 9)},
        {"output_router_logits": True} if name == "Qwen3-MoE" else {"ignore_index": 0, "labels": labels.relu()},
    ):
        given = {**inputs, "labels": labels, **more}
        (wanted, slopes), (plain, _) = step(model, **given), step(adopted, **given)
        torch.testing.assert_close(plain.logits, wanted.logits, rtol=1e-4, atol=1e-5)
        with use_kernel_mapping(FUSED):
            output, found = step(adopted, **given)
            torch.testing.assert_close(adopted(**given).logits, wanted.logits, rtol=1e-4, atol=1e-5)
        assert type(output) is type(wanted) and output.logits is None and "logits" not in output
        torch.testing.assert_close((output.loss, found), (wanted.loss, slopes), rtol=1e-4, atol=1e-5)
    with use_kernel_mapping(FUSED):
        assert isinstance(adopted.train()(**inputs, labels=labels, return_dict=False), tuple)
        adopted.eval()


def test_measuring_leaves_generators_and_devices_alone(llama: Any) -> None:
    """Random numbers go on as without adoption, and a default device of the caller does not matter."""
    before = torch.get_rng_state()
    for device in ("cpu", "meta"):
        with torch.device(device), adopt(llama) as adopted:
            assert {"add_rms_norm", "linear_cross_entropy"} <= {layer.layer_name for layer in adopted.layers}
        assert torch.equal(torch.get_rng_state(), before)


def test_losses_that_stay_as_they_are(llama: Any) -> None:
    """Hooks and adapters on the head, other losses, and calls that record nothing run the forward with its logits."""
    inputs = made("Llama")[2]
    given = {**inputs, "labels": inputs["input_ids"]}
    adopted = adopt(llama)
    llama.train()
    with use_kernel_mapping(FUSED):
        assert llama(**given).logits is None
        for mode, served in (
            (Mode.TRAINING, True),
            (Mode.INFERENCE, False),
            (Mode.TRAINING | Mode.TORCH_COMPILE, False),
        ):
            (row,) = (row for row in adopted.receipt(mode=mode).rows if row.layer_name == "linear_cross_entropy")
            assert row.is_reference is not served and row.bypasses == ("lm_head",) * served
        with torch.no_grad():
            assert llama(**given).logits is not None
        handle = llama.lm_head.register_forward_hook(lambda *_: None)
        assert llama(**given).logits is not None
        handle.remove()
        torch._dynamo.reset()
        assert torch.compile(llama, backend="eager")(**given).logits is not None
        with pytest.raises(ValueError, match="batch_size"):
            llama(**given, logits_to_keep=2)
        llama.loss_function = lambda logits, **_: logits.sum()
        output = llama(**given)
        torch.testing.assert_close(output.loss, output.logits.sum())


@pytest.mark.parametrize(
    ("cls", "changes"),
    [("Gemma2", {"final_logit_softcapping": 30.0}), ("Granite", {"logits_scaling": 2.0}), ("Cohere", {})],
)
def test_models_that_change_their_logits_are_refused(cls: str, changes: dict[str, Any]) -> None:
    """Logits that are scaled or capped are no product of hidden states and head: such models keep their loss."""
    config = getattr(transformers, f"{cls}Config")(**{**WIDE, **changes})
    model = getattr(transformers, f"{cls}ForCausalLM")(config)
    (refused,) = (each for each in adopt(model).refused if each.path == "")
    assert "logits are scaled, capped or cast" in refused.reason


GPT: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 100}
IMAGES: dict[str, Any] = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}
OTHERS: dict[str, tuple[str, dict[str, Any], set[str], dict[str, str]]] = {
    "Falcon": ("ForCausalLM", GPT, {"LayerNorm", "linear_cross_entropy", "rotary_pos_emb"}, {
        "SwiGLU MLP": "it has dense_h_to_4h, act, dense_4h_to_h, and rules know layers of gate_proj, up_proj",
    }),
    "Bloom": ("ForCausalLM", GPT, {"LayerNorm", "linear_cross_entropy"}, {"SwiGLU MLP": "it has dense_h_to_4h"}),
    "OPT": ("ForCausalLM", {**GPT, "ffn_dim": 96, "word_embed_proj_dim": 64, "dropout": 0.0},
            {"LayerNorm", "linear_cross_entropy"}, {}),
    "GPT2": ("LMHeadModel", {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 100, "resid_pdrop": 0.0,
             "embd_pdrop": 0.0, "attn_pdrop": 0.0}, {"LayerNorm", "GeluTanh"}, {"SwiGLU MLP": "it has c_fc, c_proj"}),
    "Cohere": ("ForCausalLM", HEADS, {"LayerNorm", "SwiGLUMLP"}, {
        "rotary": "it computes something else: it differs by",
        "loss of a causal model": "its loss is not that of its lm_head: logits are scaled, capped or cast before",
    }),
    "Olmo": ("ForCausalLM", HEADS, {"SwiGLUMLP", "linear_cross_entropy", "rotary_pos_emb"}, {
        "LayerNorm": "it has no attribute weight or gamma, which kernels for the layer read",
    }),
    "Olmo2": ("ForCausalLM", HEADS, {"RMSNorm", "SwiGLUMLP", "linear_cross_entropy", "rotary_pos_emb"}, {
        "add and RMSNorm": "it has no input_layernorm, and rules know blocks of input_layernorm, self_attn, ",
    }),
    "ConvNext": ("Model", IMAGES, {"LayerNorm"}, {
        "LayerNorm": "it normalises over the channels of images, the second dimension, and the layer over the last",
    }),
}  # fmt: skip
"""For families that are not in the table: the end of the class's name, sizes, layers that are adopted, and reasons."""


@pytest.mark.parametrize("name", OTHERS)
def test_other_families(name: str) -> None:
    """What is adopted computes the same, in training with kernels for it, too; no reason is an error of a class."""
    end, sizes, layers, reasons = OTHERS[name]
    if not hasattr(transformers, f"{name}{end}"):
        pytest.skip(f"this transformers has no {name}{end}")
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}{end}")(getattr(transformers, f"{name}Config")(**sizes)).eval()
    ids = torch.randint(3, 100, (2, 9))
    given = {"pixel_values": torch.randn(2, 3, 32, 32)} if end == "Model" else {"input_ids": ids, "labels": ids}
    wanted, slopes = (model(**given), []) if end == "Model" else step(model, **given)
    adopted = adopt(model)
    assert {layer.layer_name for layer in adopted.layers} == layers, adopted
    found = {each.rule: each.reason for each in adopted.refused}
    assert found.keys() == reasons.keys() and all(found[rule].startswith(reasons[rule]) for rule in reasons), found
    assert not [reason for reason in found.values() if "Error" in reason]
    if end == "Model":
        torch.testing.assert_close(model(**given)[0], wanted[0])
        return
    torch.testing.assert_close(model(**given).logits, wanted.logits, rtol=1e-4, atol=1e-5)
    with use_kernel_mapping(FUSED), never():
        output, gradients = step(model, **given)
    assert (output.logits is None) is ("linear_cross_entropy" in layers)
    torch.testing.assert_close((output.loss, gradients), (wanted.loss, slopes), rtol=1e-4, atol=1e-5)


def test_a_model_that_changes_its_logits_later() -> None:
    """A model whose configuration caps logits from now on computes the loss of capped logits."""
    model, adopted, inputs, _ = copy.deepcopy(made("Gemma3"))
    given = {**inputs, "labels": inputs["input_ids"]}
    for each in (model, adopted):
        each.config.final_logit_softcapping = 0.1
    with use_kernel_mapping(FUSED):
        output, found = step(adopted, **given)
    wanted, slopes = step(model, **given)
    torch.testing.assert_close((output.loss, output.logits), (wanted.loss, wanted.logits), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found, slopes, rtol=1e-4, atol=1e-5)


# --- Among other libraries -------------------------------------------------------------------------


@pytest.fixture
def llama() -> Any:
    return copy.deepcopy(made("Llama")[0])


def test_peft_before_and_after(llama: Any) -> None:
    """With an adapter inside, an MLP is refused; one that is added later is computed, and goes as it came."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    inputs, config = made("Llama")[2], peft.LoraConfig(target_modules=["up_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    plain = peft.get_peft_model(copy.deepcopy(llama), config)
    with adopt(plain) as adopted:
        assert {each.path.rpartition(".")[2] for each in adopted.refused} == {"mlp"}
        names = {layer.layer_name for layer in adopted.layers}
        assert names == {"RMSNorm", "rotary_pos_emb", "add_rms_norm", "linear_cross_entropy"}
    adopted = adopt(llama)
    torch.manual_seed(0)
    later = peft.get_peft_model(llama, config)
    with torch.no_grad():
        torch.testing.assert_close(later(**inputs).logits, plain(**inputs).logits, rtol=1e-4, atol=1e-5)
    adopted.undo()
    assert type(llama.model.norm).__mro__[1] is torch.nn.Module


def test_save_pretrained(llama: Any, tmp_path: Path) -> None:
    """An adopted model saves the same files as the untouched one."""
    llama.save_pretrained(tmp_path / "plain")
    adopt(llama)
    llama.save_pretrained(tmp_path / "adopted")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "adopted" / name).read_bytes()
    again = type(llama).from_pretrained(tmp_path / "adopted")
    torch.testing.assert_close(again.state_dict(), llama.state_dict(), rtol=0, atol=0)


def test_accelerate_moves_an_adopted_model(llama: Any) -> None:
    """A model whose weights wait elsewhere for their calls computes the same, adopted before."""
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    inputs = made("Llama")[2]
    wanted = logits(llama, inputs)
    adopt(llama)
    accelerate.cpu_offload(llama, "cpu")
    torch.testing.assert_close(logits(llama, inputs), wanted)


def test_kernelized_and_compiled(llama: Any) -> None:
    """An adopted model is kernelized as any other, generates the same tokens, and is given back as it was."""
    inputs = made("Llama")[2]
    wanted = tokens(llama, inputs)
    adopted = adopt(llama)
    kernelize(llama, mode=Mode.INFERENCE, device="cpu")
    assert torch.equal(tokens(llama, inputs), wanted)
    assert adopted.receipt().rows and all(row.frozen for row in adopted.receipt().rows)
    adopted.undo()
    assert type(llama.model.norm).__mro__[1] is torch.nn.Module
    assert torch.equal(tokens(llama, inputs), wanted)


def test_training_steps_are_equal(llama: Any) -> None:
    """Ten steps of an optimizer leave the same weights, adopted and untouched."""
    inputs, losses = made("Llama")[2], []
    for model in (llama, copy.deepcopy(llama)):
        if losses:
            adopt(model)
        optimizer = torch.optim.AdamW(model.train().parameters(), 1e-3)
        for _ in range(10):
            loss = model(**inputs, labels=inputs["input_ids"]).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


BESIDE = """
import collections, sys, torch
if sys.argv[1] == "absent":
    sys.modules["kernels"] = None  # an import of it fails
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils.import_utils import is_kernels_available
from kernels_plugins import adopt

torch.manual_seed(0)
sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=100)
model, ids = LlamaForCausalLM(LlamaConfig(**sizes)).eval(), torch.arange(9)[None]
wanted = model(ids).logits
layers = collections.Counter(layer.layer_name for layer in adopt(model).layers)
torch.testing.assert_close(model(ids).logits, wanted)
print(is_kernels_available(), *sorted(layers.items()))
"""


@pytest.mark.slow
@pytest.mark.parametrize("state", ["as it is", "absent", "too old"])
def test_hugging_face_kernels(tmp_path: Path, state: str) -> None:
    """A model is adopted alike, whether transformers decorates its layers with marks of `kernels` or cannot."""
    environment = dict(os.environ)
    if state == "too old":
        (tmp_path / "kernels").mkdir()
        (tmp_path / "kernels" / "__init__.py").write_text("raise ImportError('too old')")
        (tmp_path / "kernels-0.0.9.dist-info").mkdir()
        (tmp_path / "kernels-0.0.9.dist-info" / "METADATA").write_text("Name: kernels\nVersion: 0.0.9\n")
        environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), *filter(None, [environment.get("PYTHONPATH")])])
    script = tmp_path / "script.py"
    script.write_text(BESIDE)
    done = run_python(str(script), state, environment=environment, folder=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    available, _, layers = done.stdout.strip().partition(" ")
    counts = made("Llama")[3]
    assert layers == " ".join(map(str, sorted(counts.items())))
    assert available == "False" or state == "as it is"


MEMORY = """
import re
from pathlib import Path
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from kernels_plugins import adopt, choosing

def made(width, inner, layers):
    sizes = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers, "vocab_size": 100}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=8)).eval()

def status(name):
    return int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) << 10

def peak(act):
    Path("/proc/self/clear_refs").write_text("5")  # the highest memory is that of now
    before = status("VmRSS")
    act()
    return status("VmHWM") - before

def choose(model, training):
    with choosing(contexts=["eager"], seconds=0.01), torch.set_grad_enabled(training):
        model(torch.arange(16)[None], use_cache=False)

def size(module):
    return sum(4 * each.numel() for each in module.parameters())

small = made(64, 128, 2)
adopt(small)  # modules are imported now
choose(small, False), choose(small, True)
model = made(512, 2048, 24)
acts = [lambda: adopt(model), lambda: choose(model, False), lambda: choose(model, True)]
print(size(model), size(model.model.layers[0].mlp), *map(peak, acts))
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the system does not tell its peak memory")
def test_the_memory_of_adopting_and_choosing(tmp_path: Path) -> None:
    """Adopting copies no weights; choosing holds copies of one module at a time, never of the weights of a model."""
    environment = {**os.environ, "KERNELS_PLUGINS": "-inductor,-liger,-triton"}
    done = run_python("-c", MEMORY, environment=environment, folder=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    weights, largest, adopting, inferring, training = map(int, done.stdout.split())
    assert weights > 30 * largest
    assert adopting < largest
    assert max(inferring, training) < 8 * largest  # those of several candidates, and gradients


SHARDED = """
import copy, os, torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM
from kernels_core import KernelizeError, count_calls
from kernels_plugins import adopt, use_kernel_mapping

dist.init_process_group("gloo", init_method="file://" + os.path.abspath("store"), rank=0, world_size=1)
sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=100)
plain, ids = LlamaForCausalLM(LlamaConfig(**sizes)).train(), torch.randint(0, 100, (2, 9))
model, mesh = copy.deepcopy(plain), init_device_mesh("cpu", (1,))
adopted = adopt(model)
for block in model.model.layers:
    fully_shard(block, mesh=mesh)
fully_shard(model, mesh=mesh)
loss = plain(ids, labels=ids).loss
loss.backward()
names = ("add_rms_norm", "linear_cross_entropy")
with use_kernel_mapping({name: {"cpu": "pack:torch"} for name in names}), count_calls():
    output = model(ids, labels=ids)
    output.loss.backward()
    rows = [row for row in adopted.receipt().rows if row.layer_name in names]
assert output.logits is None and len(rows) == 3
assert all(not row.is_reference and dict(row.calls) and set(row.calls) == {row.origin} for row in rows), rows
torch.testing.assert_close(output.loss, loss)
for one, other in zip(model.parameters(), plain.parameters()):
    torch.testing.assert_close(one.grad.full_tensor(), other.grad)
try:
    adopted.undo()
except KernelizeError as error:
    print(error)
dist.destroy_process_group()
"""


@pytest.mark.skipif(not hasattr(torch.cpu.Stream(), "record_event"), reason="PyTorch 2.6 shards on GPUs only")
def test_a_sharded_model(tmp_path: Path) -> None:
    """FSDP2 shards the blocks of an adopted model: kernels for several parts serve, and the receipt says so."""
    done = run_python("-c", SHARDED, environment=os.environ, folder=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "FSDPLlamaForCausalLM: undo that first" in done.stdout
