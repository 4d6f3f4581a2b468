"""Settings of the plugins in a configuration file, and the command that prints them."""

from __future__ import annotations

import json
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis
from hypothesis import strategies as st
from torch import nn
from typer.testing import CliRunner
from warned import never

from kernels_core import (
    ArgumentError,
    ConfigSection,
    ConfigurationError,
    CUDAProperties,
    Device,
    KernelsWarning,
    Mode,
    PluginError,
    PluginManager,
    Reference,
    ROCMProperties,
    configuration,
    configured,
    forget,
    kernelize,
    quarantined,
    receipt,
    release,
    resolve,
    use_kernel_forward_from_hub,
)
from kernels_core.cli import command_line
from kernels_core.settings.reader import Settings, _problems
from kernels_plugins import (
    LayerRepository,
    LocalLayerRepository,
    adopt,
    canary,
    register_kernel_mapping,
    use_kernel_mapping,
)
from kernels_plugins.adoption import plugin as adoption
from kernels_plugins.canary import plugin as canary_plugin
from kernels_plugins.canary.settings import Settings as CanarySettings
from kernels_plugins.hub import plugin as hub
from kernels_plugins.layer_names import misspelt, rule_layers
from kernels_plugins.local_hub.server import LocalHub
from kernels_plugins.mapping import parse_mapping
from kernels_plugins.observe import plugin as observe
from kernels_plugins.observe.plugin import observed
from kernels_plugins.packs import inductor, liger, torch_operators
from kernels_plugins.packs.source import Pack
from kernels_plugins.sources import PythonObject

pytest_plugins = ["kernels_plugins.hub.testing"]

Configure = Callable[..., Path]


@pytest.fixture(autouse=True)
def plugins(isolated_plugins: PluginManager, mapping_plugin: object) -> PluginManager:
    """Register the plugins that have settings, and two packs."""
    found = {
        "adopt": adoption,
        "canary": canary_plugin,
        "hub": hub,
        "inductor": inductor,
        "liger": liger,
        "observe": observe,
        "torch": torch_operators,
    }
    for name, plugin in found.items():
        isolated_plugins.register(plugin, name)
    return isolated_plugins


def problems() -> list[str]:
    """Return the problems of the file, each without the path of its folder."""
    return [re.sub(r"\S*/kernels\.toml", "kernels.toml", problem, count=1) for problem in configuration().problems]


def origin(layer: object, mode: Mode = Mode.INFERENCE) -> str:
    """Return the origin of what serves a layer on the CPU."""
    return resolve(layer, device="cpu", mode=mode).origin  # type: ignore[arg-type]


@pytest.fixture
def acme(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A module `acme.layers` with kernels and rules."""

    class Twice(nn.Module):
        has_backward = False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2

    module: Any = types.ModuleType("acme.layers")
    module.Twice = module.Thrice = Twice
    module.Holder = types.SimpleNamespace(function=lambda x: x)
    module.instance, module.number = Twice(), 3
    monkeypatch.setitem(sys.modules, "acme", types.ModuleType("acme"))
    monkeypatch.setitem(sys.modules, "acme.layers", module)
    return module  # type: ignore[no-any-return]


@use_kernel_forward_from_hub("Same")
class Same(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


# --- mapping ---------------------------------------------------------------------------------------

FORMS: dict[str, tuple[Any, str]] = {
    "reference": ("reference", '"reference"'),
    "pack": ("pack:torch", '"pack:torch"'),
    "python": ("python:acme.layers:Holder.function", '"python:acme.layers:Holder.function"'),
    "text": ("acme/x:Y", '"acme/x:Y"'),
    "revision": ("acme/x@refs/pr/1:Y", '"acme/x@refs/pr/1:Y"'),
    "options": (
        ("acme/x:Y", {"version": 2, "trust_remote_code": True}),
        '{source = "acme/x:Y", version = 2, trust_remote_code = true}',
    ),
    "absolute": ("/opt/x:Y", '"/opt/x:Y"'),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("device", "mode"), [("", ""), ("cpu", ""), ("cpu", "training"), ("cuda:sm>=80,<90", "inference-compile")]
)
def test_a_mapping_is_that_of_python(configure: Configure, form: str, device: str, mode: str) -> None:
    """Sources, devices and modes in the file are the same as the same texts in a mapping in Python."""
    source, written = FORMS[form]
    inner = f'{{{mode} = [{written}, "reference"]}}' if mode else written
    configure(f'[mapping.Layer]\n"{device}" = {inner}' if device else f"[mapping]\nLayer = {inner}")
    modes = {"training": Mode.TRAINING, "inference-compile": Mode.INFERENCE | Mode.TORCH_COMPILE}
    value: Any = {modes[mode]: [source, "reference"]} if mode else source
    wanted = parse_mapping({"Layer": {device: value} if device else value})
    assert not problems()
    assert configured("mapping").sources == wanted.sources


def test_what_the_texts_mean() -> None:
    """Each text in a mapping in Python is the object that it names."""
    pairs = {
        "acme/x@main:Y": LayerRepository("acme/x", layer_name="Y", revision="main"),
        "acme/x:Y": LayerRepository("acme/x", layer_name="Y", version=1),
        "./x@y/z:Y": LocalLayerRepository("x@y/z", layer_name="Y"),
        "python:acme.layers:A.b": PythonObject("acme.layers", "A.b"),
        "pack:torch": Pack("torch", "L"),
        "reference": Reference,
    }
    level = parse_mapping({"L": {"cpu": list(pairs)}})
    assert level.sources["L"] == {(Device("cpu"), Mode.FALLBACK): tuple(pairs.values())}
    level = parse_mapping({"L": {"rocm:gfx<=94": "reference"}})
    assert list(level.sources["L"]) == [(Device("rocm", ROCMProperties(0, 94)), Mode.FALLBACK)]


@pytest.mark.parametrize(
    ("text", "low", "high"),
    [("sm>=90", 90, sys.maxsize), ("sm>80", 81, sys.maxsize), ("sm<=89", 0, 89), ("sm<90", 0, 89), ("sm==86", 86, 86),
     ("sm >= 80, < 90", None, None), ("sm>=80, <90", 80, 89)],
)  # fmt: skip
def test_devices_with_bounds(text: str, low: int | None, high: int | None) -> None:
    """The bounds of a device hold together; blanks are allowed only after commas."""
    if low is None or high is None:
        with pytest.raises(ValueError, match="has the bound"):
            Device.parse(f"cuda:{text}")
    else:
        assert Device.parse(f"cuda:{text}") == Device("cuda", CUDAProperties(low, high))


WRONG = {
    "[mapping.L]\ncuda = []\nkuda = 'reference'": "2: mapping.L.cuda: it names no source",
    "[mapping.'*Norm']\ncpu = 'pack:torch'": "1: mapping.*Norm: '*Norm' is a glob, and matches no layer: write an "
    "entry for each layer name, such as LayerNorm, RMSNorm.",
    "[packs]\n'Layer?' = ['torch']": "2: packs.Layer?: 'Layer?' is a glob, and matches no layer: write",
    "[mapping.L]\n[mapping.M]\ncpu = 'reference'": "1: mapping.L: it names no source",
    "[mapping.L]\ncpu = {}": "2: mapping.L.cpu: it names no source",
    "[mapping.L]\nkuda = 'reference'": "2: mapping.L.kuda: In the mapping of layer 'L': Unknown devi",
    "[mapping.L]\n'cuda:0' = 'reference'": "2: mapping.L.cuda:0: In the mapping of layer 'L': Device typ",
    "[mapping.L]\n'cuda:sm=>9' = 'reference'": "2: mapping.L.cuda:sm=>9: In the mapping of layer 'L': 'cuda:",
    "[mapping.L]\n'cuda:sm>9,<5' = 'reference'": "2: mapping.L.cuda:sm>9,<5: In the mapping of layer 'L': min_",
    "[mapping.L]\n'mps:sm>9' = 'reference'": "2: mapping.L.mps:sm>9: In the mapping of layer 'L': Device t",
    "[mapping.L]\ncpu = {train = 'reference'}": "2: mapping.L.cpu.train: there is no such mode: write any of fallback",
    "[mapping.L]\ncpu = [\n'reference',\n'pack:x']": "4: mapping.L.cpu[1]: In the mapping of layer 'L', device 'cp",
    "[mapping.L]\ncpu = 'nothing'": "2: mapping.L.cpu: In the mapping of layer 'L', device 'cpu':",
    "[mapping.L]\ncpu = 'python:a b:c'": "2: mapping.L.cpu: In the mapping of layer 'L', device 'cpu':",
    "[mapping.L]\ncpu = 'acme/x@..:Y'": "2: mapping.L.cpu: revision is '..'",
    "[mapping.L]\ncpu = {source = 'acme/x:Y', versoin = 1}": "2: mapping.L.cpu.versoin: there is no such setting",
    "[mapping.L]\ncpu = {source = 'acme/x:Y', version = 'a'}": "2: mapping.L.cpu: version is 'a'",
    "[mapping.L]\ncpu = [{version = 1}]": "2: mapping.L.cpu[0]: it has no source",
    "[mapping.L]\nmps = 'reference'\nmetal = 3": "3: mapping.L.metal: write a text, not 3",
    "[mapping.L]\n'cuda:sm>9' = 'reference'\n'cuda:sm>=10' = 'pack:torch'": "3: mapping.L.cuda:sm>=10: an entry above",
    "[packs]\nL = 'torch'": "2: packs.L: write a list, not 'torch'",
    "[packs]\nL = [\n'torch',\n'jax']": "4: packs.L[1]: In the mapping of layer 'L': there is no pack",
    "canary = 3": "1: canary: write a table, not 3",
    "[canary]\nfirst = 1\nevery = -1": "3: canary.every: every is -1: a number of calls is 0 or more",
    "[canary]\naction = 'stop'": "2: canary.action: action is 'stop': use one of",
    "[canary]\nlast = 1": "2: canary.last: there is no such setting: write any of actio",
    "observers = [\n'log',\n'logs']": "3: observers[1]: there is no such observer",
    "adoption = 'acme.rules:RULES'": "1: adoption: 'acme.rules:RULES' names no object",
    "trusted = ['acme', 'a/b/c']": "1: trusted[1]: 'a/b/c' is neither an organisation nor a repo",
}


@pytest.mark.parametrize("text", WRONG, ids=[wrong.partition(": ")[2][:40] for wrong in WRONG.values()])
def test_wrong_settings_have_their_line(configure: Configure, text: str) -> None:
    """Each wrong setting of a plugin is an error with its line, and other settings of the file do not apply."""
    configure(f"{text}\n")
    with pytest.warns(KernelsWarning, match=r"kernels\.toml"):
        assert problems()[0].startswith(f"kernels.toml:{WRONG[text]}"), problems()
        assert [configured(key) for key in ("mapping", "packs", "canary", "observers")] == [None] * 4
        assert origin("L") == "reference"


ANY = st.recursive(
    st.booleans() | st.integers() | st.floats() | st.dates()
    | st.sampled_from(["reference", "pack:torch", "a/b:C", "python:a:b", "torch", "log", "acme", "~x/y:Z", "\0", ""])
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["cuda", "cpu", "*", "training", "source", "version", "first", "a"]), inner),
    max_leaves=6,
)  # fmt: skip


@hypothesis(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(["mapping", "packs", "canary", "observers", "adoption", "trusted"]), ANY)
def test_any_value_is_taken_or_refused(plugins: PluginManager, key: str, value: Any) -> None:
    """Whatever TOML may have for a setting of a plugin: it applies, or an error of ours names it."""
    settings = Settings(ConfigSection(Path("/x/kernels.toml"), (), {key: value}))
    for problem in _problems(settings, plugins):
        assert isinstance(problem, ConfigurationError) and "/x/kernels.toml:1: " in str(problem)
        assert "cannot read it" not in str(problem)


def test_a_configured_mapping_serves(configure: Configure, acme: types.ModuleType, tmp_path: Path) -> None:
    """Its sources serve after those of code and before the reference, each in its modes; folders are below the file."""
    configure(
        """
        [tool.kernels-core.mapping.Same]
        cpu = {inference = ["./kernel:Layer", "python:acme.layers:Twice"], training = "reference"}
        """,
        "pyproject.toml",
    )
    with never():
        assert Same()(torch.ones(1, requires_grad=True)).item() == 1
    with pytest.warns(KernelsWarning, match=re.escape(f"{tmp_path}/kernel: there is no such folder")):
        assert Same()(torch.ones(1)).item() == 2
    assert (
        origin(Same).endswith("Twice")
        and resolve(Same, device="cpu", mode=Mode.TRAINING).note == "the mapping names it"
    )

    class Mine(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 5

    register_kernel_mapping({"Same": {"cpu": Mine}})
    assert Same()(torch.ones(1)).item() == 6
    register_kernel_mapping({}, inherit_mapping=False)
    assert origin(Same) == "reference"
    register_kernel_mapping({})
    with use_kernel_mapping({}, inherit_mapping=False):
        assert origin(Same) == "reference"
    assert origin(Same).endswith("Twice")
    configure("", "kernels.toml")  # it wins over pyproject.toml, and has no mapping
    assert origin(Same) == "reference"


@pytest.mark.parametrize("place", ["[mapping]\nSmae = 'reference'", "[packs]\nSmae = ['torch']", "code"])
def test_a_name_that_is_misspelt(configure: Configure, place: str) -> None:
    """A mapping for nearly the name of a layer changes nothing, and receipts and `kernelize` say that it is there."""
    configure("" if place == "code" else place)
    register_kernel_mapping(
        {"Smae": {"cpu": "pack:torch"}, "Sameness": {"cpu": "reference"}} if place == "code" else {}
    )
    (row,) = receipt(nn.Sequential(Same()), device="cpu").rows
    assert row.is_reference and not row.refusals
    assert row.misfits == (("'Smae'", row.misfits[0][1]),)
    assert "this layer is 'Same': correct the mapping if that is meant" in row.misfits[0][1]
    with pytest.warns(KernelsWarning, match="this layer is 'Same'"):
        kernelize(nn.Sequential(Same()), mode=Mode.INFERENCE, device="cpu")


@pytest.mark.parametrize(
    ("written", "meant", "near"),
    [("RMSNrom", "RMSNorm", True), ("RmsNorm", "RMSNorm", True), ("RMSNom", "RMSNorm", True),
     ("RMSNoorm", "RMSNorm", True), ("RMSNorm", "RMSNorm", False), ("RMSNorm2", "RMSNorm", False),
     ("rms_norm", "RMSNorm", False), ("q_norm", "k_norm", False), ("q_a_norm", "q_b_norm", False),
     ("layer1_norm", "layer11_norm", False), ("SwiGLUMLP", "GeGLUMLP", False), ("RMSNormOffset", "RMSNorm", False),
     ("GELU", "GLU", False), ("qk_norm", "q_norm", False), ("", "RMSNorm", False)],
)  # fmt: skip
def test_which_names_are_near(written: str, meant: str, near: bool) -> None:
    """Letters in another order, one more or less inside, or another case; not names that differ on purpose."""
    assert (misspelt(written, [meant]) == meant) is near


def test_no_mapping_has_a_glob() -> None:
    """A glob as a layer name raises in code, too; none of the shipped layer names is near to another one."""
    with pytest.raises(ArgumentError, match=r"'\*MLP' is a glob.* such as GeGLUMLP, .*SwiGLUMLP\."):
        register_kernel_mapping({"*MLP": {"cpu": "reference"}})
    assert not [name for name in rule_layers() if misspelt(name, rule_layers())] and "RMSNorm" in rule_layers()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("acme.layers:nothing", "AttributeError: module 'acme.layers' has no attribute 'nothing'"),
        ("acme.absent:x", "ModuleNotFoundError: No module named 'acme.absent'"),
        ("acme.layers:number", "3 is neither a class of nn.Module nor a function"),
        ("acme.layers:instance", "neither a class of nn.Module nor a function"),
    ],
)
def test_python_sources_that_are_none(acme: types.ModuleType, name: str, reason: str) -> None:
    """A text that names no class or function is a refusal with the reason, not an error of the program."""
    with use_kernel_mapping({"Same": {"cpu": f"python:{name}"}}):
        found = resolve(Same, device="cpu", mode=Mode.INFERENCE)
    assert (
        found.is_reference and reason in found.refusals[0].reason and str(found.refusals[0]).startswith("python:acme.")
    )


# --- packs -----------------------------------------------------------------------------------------


def test_the_order_of_packs(configure: Configure) -> None:
    """Names serve in order; `*` is for adopted layers, and passes over packs without a kernel, with no warning."""
    configure('[packs]\n"*" = ["torch", "reference"]\nLayerNorm = ["inductor", "pack:torch"]\n')

    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-6

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))

    class Gelu(nn.Module):
        def forward(self, gate_up: torch.Tensor) -> torch.Tensor:
            gate, up = gate_up.chunk(2, dim=-1)
            return nn.functional.silu(gate) * up

    Norm.__qualname__, Gelu.__qualname__ = "RMSNorm", "SiluAndMul"
    with adopt(nn.Sequential(Norm(), Gelu(), nn.LayerNorm(4))) as adopted, never():
        adopted.model[1](adopted.model[0](torch.ones(2, 8)))
        served = {row.path: (row.origin, row.plugin) for row in adopted.receipt(device="cpu").rows}
    assert served["0"] == ("kernels_plugins.packs.torch_operators.TorchRMSNorm", "mapping")
    assert served["1"] == ("reference", "")
    assert served["2"][0].startswith("inductor of torch") and served["2"][1] == "mapping"
    assert origin("RMSNorm") == "reference"  # that is not adopted
    assert origin("LayerNorm").startswith("inductor of torch")  # named: the user knows


def test_packs_give_way_to_the_mapping(configure: Configure, acme: types.ModuleType) -> None:
    """A mapping for the same layer comes before the order of packs."""
    configure('[packs]\nSame = ["torch", "reference"]\n[mapping.Same]\ncpu = "python:acme.layers:Twice"\n')
    assert origin(Same).endswith("Twice")
    configure('[packs]\nSame = ["torch", "reference"]\n')
    assert "it has no kernel for 'Same'" in str(resolve(Same, device="cpu", mode=Mode.INFERENCE))


# --- canary, observers, adoption, trusted ----------------------------------------------------------


@pytest.mark.parametrize("glob", ["pack:torch", "pack:t*", "*.packs.torch_operators.*", "torch.*", "python:*"])
def test_a_pack_is_denied_by_name(configure: Configure, acme: types.ModuleType, glob: str) -> None:
    """A glob is compared with the name of a pack, too, also where a model is kernelized with it."""
    mapping = '[packs]\nGeluTanh = ["torch"]\n'
    configure(mapping)
    model = kernelize(nn.Sequential(Gelu()), mode=Mode.INFERENCE, device="cpu")
    assert not receipt(model, device="cpu").rows[0].is_reference
    configure(f'deny = ["{glob}"]\n{mapping}')
    denied = glob not in ("torch.*", "python:*")
    assert resolve("GeluTanh", device="cpu", mode=Mode.INFERENCE).is_reference is denied
    assert receipt(model, device="cpu").rows[0].is_reference is denied


@use_kernel_forward_from_hub("GeluTanh")
class Gelu(nn.Module):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return nn.functional.gelu(input, approximate="tanh")


def test_a_configured_canary(configure: Configure, acme: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """It compares calls as `canary` does; KERNELS_CANARY wins over it, and code over both."""
    mapping = '[mapping]\nSame = "python:acme.layers:Twice"\n'
    configure(f'{mapping}[canary]\nfirst = 1\naction = "quarantine"\n')
    with pytest.warns(KernelsWarning):
        assert Same()(torch.ones(1)).item() == 1
    assert [entry.layer_name for entry in quarantined()].count("Same") == 1 and release()
    monkeypatch.setenv("KERNELS_CANARY", "0")
    forget()
    assert Same()(torch.ones(1)).item() == 2
    monkeypatch.delenv("KERNELS_CANARY")
    active = canary_plugin.active_settings
    for written, settings in {"true": CanarySettings(), "false": None, "{every = 0}": CanarySettings(every=0)}.items():
        configure(f"canary = {written}\n")
        assert active() == settings
    with canary(first=7, every=0, action="warn"):
        assert active() == CanarySettings(7, 0, "warn")


def test_configured_observers(configure: Configure, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """They observe decisions; KERNELS_OBSERVE wins over them, also where it is empty."""
    caplog.set_level("DEBUG")
    configure('observers = ["log"]\n')
    assert observed() == ("log",)
    Same()(torch.ones(1))
    assert "Same" in caplog.text
    for value, names in {"": (), "ranges": ("ranges",)}.items():
        monkeypatch.setenv("KERNELS_OBSERVE", value)
        assert observed() == names


def test_configured_rules(configure: Configure, acme: Any, plugins: PluginManager) -> None:
    """`adopt` imports a rule or a list of them, before shipped ones, and reports others with the line."""
    from kernels_plugins import Rule

    class Doubles(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + x

    def rule(name: str) -> Rule:
        return Rule(
            name,
            name.title(),
            ("*.Doubles",),
            oracle=lambda self, x: 2 * x,
            inputs=lambda module: (torch.randn(4, dtype=torch.float64),),
        )

    acme.ONE, acme.LIST = rule("one"), [rule("two"), 3]
    configure('adoption = ["python:acme.layers:LIST",\n"python:acme.layers:absent",\n"python:acme.layers:ONE"]')
    with pytest.warns(KernelsWarning) as caught, adopt(nn.Sequential(Doubles())) as adopted:
        assert [layer.rule for layer in adopted.layers] == ["two"]
    told = [str(warning.message) for warning in caught]
    assert [re.search(r"kernels\.toml:(\d): ", text)[1] for text in told] == ["1", "2"]  # type: ignore[index]
    assert "is a Rule, not 3" in told[0] and "no attribute 'absent'" in told[1]
    assert [type(fault) for fault in plugins.faults] == [PluginError, PluginError]
    configure('adoption = "python:acme.layers:ONE"')
    assert [layer.layer_name for layer in adopt(nn.Sequential(Doubles())).layers] == ["One"]
    assert adopt(nn.Sequential(Doubles()), rules=[acme.LIST[0]]).layers[0].rule == "two"  # code wins


def test_trusted_organisations(
    configure: Configure, kernel_repository: Callable[..., Any], local_hub: LocalHub
) -> None:
    """Code of trusted organisations and repositories runs, and the decision names the line; of others not."""
    code = "import torch\nclass Twice(torch.nn.Module):\n    def forward(self, x):\n        return 2 * x\n"
    for owner in ("mine", "yours"):
        kernel_repository(f"{owner}/double", code).branch("v1")
        local_hub.organization(owner, trusted=False)
    mapping = '[mapping]\nSame = ["yours/double:Twice", "mine/double:Twice"]\n'
    path = configure(mapping)
    assert origin(Same) == "reference"
    for trusted in ("mine", "mine/double"):
        configure(f'trusted = [\n  "other",\n  "{trusted}"]\n{mapping}')
        found = resolve(Same, device="cpu", mode=Mode.INFERENCE)
        assert found.origin.startswith("mine/double") and found.checked["trust"] == f"trusted by {path}:3"
        assert "'yours' is not a trusted publisher" in found.refusals[0].reason
    configure(f"deny = 3\n{mapping}")
    with pytest.warns(KernelsWarning):
        assert origin(Same) == "reference"


def test_settings_of_a_plugin_that_is_blocked(configure: Configure, plugins: PluginManager) -> None:
    """A setting whose plugin is not loaded is no error, and is shown as not used."""
    plugins.unregister("canary")
    configure("[canary]\nfirst = 1\n")
    assert not problems() and "not used: plugin 'canary' is not loaded" in str(configuration())


# --- The command -----------------------------------------------------------------------------------


def test_the_command(configure: Configure) -> None:
    """`kernels-core config` prints settings with their lines, and JSON; it exits with 1 where the file is wrong."""
    run = CliRunner().invoke
    cli = command_line()
    configure('observers = ["log"]\n[canary]\nfirst = 1\n')
    done = run(cli, ["config"])
    assert done.exit_code == 0 and re.search(r"^canary\.first +1 +line 3$", done.stdout, re.MULTILINE)
    assert '"name": "canary.first"' in run(cli, ["config", "--json"]).stdout
    configure("canary = 3")
    done = run(cli, ["config"])
    assert done.exit_code == 1 and "kernels.toml:1: canary: write a table, not 3" in done.stdout


@pytest.mark.parametrize("name", ["choice", "decisions", "trusted-root"])
def test_the_command_looks_for_files(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    """It exits with 1 where a file that a setting or a variable names is not there; all other settings apply."""
    run, cli = CliRunner().invoke, command_line()
    path = configure(f'observers = ["log"]\n{name} = "no.json"\n')
    done = run(cli, ["config"])
    assert done.exit_code == 1 and f"kernels.toml:2: {name} is no.json: there is no such file" in done.stdout
    assert re.search(r"^observers +log", done.stdout, re.MULTILINE) and not problems()
    assert json.loads(run(cli, ["config", "--json"]).stdout)["missing"] == list(configuration().missing)
    (path.parent / "no.json").write_text("{}")
    assert run(cli, ["config"]).exit_code == 0
    if name == "trusted-root":  # which has no variable
        return
    monkeypatch.setenv(f"KERNELS_{name.upper()}", str(tmp_path / "elsewhere.json"))
    done = run(cli, ["config"])
    assert done.exit_code == 1 and "elsewhere.json: there is no such file" in done.stdout
    monkeypatch.setenv(f"KERNELS_{name.upper()}", "")
    assert run(cli, ["config"]).exit_code == 0


def test_the_files_on_the_page_are_right(configure: Configure) -> None:
    """Each file that docs/configuration.md shows has settings, and no problem."""
    text = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text(encoding="utf-8")
    shown = re.findall(r"^```toml\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    for settings in shown:
        path = configure(settings, "pyproject.toml" if "[tool" in settings else "kernels.toml")
        assert configuration().file == str(path) and not problems()
    assert len(shown) == 2
