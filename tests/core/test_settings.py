"""The configuration file: found, read with lines, checked as a whole, and nothing of it where it is wrong."""

from __future__ import annotations

import os
import pickle
import re
import threading
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis
from hypothesis import strategies as st
from torch import nn
from warned import ignored, never

from kernels_core import (
    ConfigSection,
    ConfigurationError,
    KernelsWarning,
    Mode,
    NoKernelError,
    PluginManager,
    Resolution,
    UntrustedError,
    authorize,
    configuration,
    configured,
    forget,
    hookimpl,
    kernelize,
    plugin_manager,
    quarantine,
    receipt,
    release,
    resolve,
)
from kernels_core.settings.file import find_settings, tomllib
from kernels_core.settings.lines import find_line
from kernels_core.settings.reader import forget_settings
from kernels_plugins import register_kernel_mapping, use_kernel_mapping

Make = Callable[..., Any]
Configure = Callable[..., Path]

X = torch.zeros(2)


def serving(layer: object = "Add") -> Resolution:
    """Return the decision for a call of a layer."""
    return resolve(layer, device="cpu", mode=Mode.INFERENCE)  # type: ignore[arg-type]


def problems() -> tuple[str, ...]:
    """Return the problems of the file, each without the path of its folder."""
    return tuple(re.sub(r"\S*/", "", problem, count=1) for problem in configuration().problems)


class Acme:
    """A plugin with settings of its own."""

    @hookimpl
    def kernels_configuration(self) -> dict[str, Callable[[ConfigSection], object]]:
        """Own `level`, and `deny`, which is that of the core only outside of its table."""
        return {"level": ConfigSection.as_number, "deny": ConfigSection.as_text, "faulty": lambda section: 1 / 0}


# --- Lines -----------------------------------------------------------------------------------------

TEXT = '''\
# [packs]
note = """
[packs]
"*" = 1
"""

[packs]
"*" = [
  "torch",  # and not "triton"
  "triton",
]
RMSNorm = ["x"]

[mapping.MLP]
cuda = {training = "y", inference = [{source = "z"}]}
a."b c".d = true
'''


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize(
    ("keys", "line"),
    [
        (("note",), 2),
        (("packs",), 7),
        (("packs", "*"), 8),
        (("packs", "*", 0), 9),
        (("packs", "RMSNorm", 0), 12),
        (("mapping",), 14),
        (("mapping", "MLP", "cuda", "inference", 0, "source"), 15),
        (("mapping", "MLP", "a", "b c", "d"), 16),
    ],
)
def test_the_line_of_a_key(keys: tuple[Any, ...], line: int, end: str) -> None:
    """The line is that where the key stands, not where its name occurs in texts; of an item, that of its text."""
    value: Any = tomllib.loads(TEXT)
    for key in keys:
        value = value[key]
    assert find_line(TEXT.replace("\n", end), keys, value) == line


NAMES = st.text(st.characters(categories=("L", "N", "P", "S", "Zs")), max_size=4)
DATA = st.recursive(
    st.booleans() | st.integers(-9, 9) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=8,
)


def written(value: Any, across: bool) -> str:
    """Write a value as TOML, lists over several lines if `across`."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{written(key, across)} = {written(item, False)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        start, between = ("[\n ", ",\n ") if across else ("[", ", ")
        return start + between.join(written(item, across) for item in value) + "]"
    if isinstance(value, str):
        return '"' + "".join(c if c.isalnum() and c.isascii() else f"\\U{ord(c):08x}" for c in value) + '"'
    return str(value).lower()


@hypothesis(max_examples=60, deadline=None)
@given(st.dictionaries(NAMES, DATA, min_size=1, max_size=4), st.booleans(), st.data())
def test_lines_of_any_file(table: dict[str, Any], across: bool, data: st.DataObject) -> None:
    """For every key of any file, the line is one of the statement that sets it."""
    statements = [f"{written(key, across)} = {written(value, across)}" for key, value in table.items()]
    assert tomllib.loads("\n".join(statements)) == table
    chosen = data.draw(st.integers(0, len(table) - 1))
    value: Any = list(table.values())[chosen]
    keys: list[str | int] = [list(table)[chosen]]
    while isinstance(value, dict | list) and value:
        keys.append(data.draw(st.sampled_from(list(value) if isinstance(value, dict) else range(len(value)))))
        value = value[keys[-1]]
    first = 1 + sum(statement.count("\n") + 1 for statement in statements[:chosen])
    found = find_line("\n".join(statements), keys, value)
    assert first <= found <= first + statements[chosen].count("\n")


# --- Which file ------------------------------------------------------------------------------------


def test_which_file_applies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first folder upwards with settings, kernels.toml before pyproject.toml; KERNELS_CONFIG names one, or none."""
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)

    def choice(place: Path = inner, config: str | None = None) -> str | None:
        monkeypatch.chdir(place)
        monkeypatch.delenv("KERNELS_CONFIG", raising=False)
        if config is not None:
            monkeypatch.setenv("KERNELS_CONFIG", config)
        forget()
        found = configured("choice")
        return None if found is None else str(found.relative_to(tmp_path))

    (tmp_path / "pyproject.toml").write_text('[tool.kernels-core]\nchoice = "top"\n')
    (inner / "pyproject.toml").write_text('[project]\ndependencies = ["kernels-core"]\n')
    (inner / "kernels.toml").mkdir()
    assert choice() == "top"
    (tmp_path / "a" / "pyproject.toml").write_text('[tool]\nkernels-core = {choice = "project"}\n')
    assert choice() == "a/project"
    (tmp_path / "a" / "kernels.toml").write_text('choice = "~/../own"\n')
    monkeypatch.setenv("HOME", str(tmp_path))
    assert choice().endswith("own")  # type: ignore[union-attr]
    (tmp_path / "a" / "kernels.toml").write_text('choice = "own"\n')
    assert choice() == "a/own"
    assert choice(tmp_path) == "top"
    assert choice(config="../../pyproject.toml") == "top"
    assert choice(config=str(tmp_path / "a" / "kernels.toml")) == "a/own"
    assert [choice(config=off) for off in ("", "0", "off", "No")] == [None] * 4
    assert choice(config="1") == "a/own"
    (inner / "pyproject.toml").write_text("[project]\nname = broken, with kernels-core\n")  # not ours to complain about
    assert choice() == "a/own" and not configuration().problems


def test_a_working_directory_that_was_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There are no settings, and kernels serve."""
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert find_settings() is None
    assert configuration().file is None
    monkeypatch.chdir(tmp_path)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="Windows has no owners of this kind")
@pytest.mark.parametrize("how", ["owner", "link", "writable"])
def test_files_of_other_users(configure: Configure, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, how: str) -> None:
    """A file that another user has, has linked, or may write is not used, with a warning, unless it is named."""
    path = configure('deny = ["x"]\n')
    if how == "writable":
        path.chmod(0o666)
    elif how == "link":
        path.rename(tmp_path / "target")
        path.symlink_to(tmp_path / "target")
        if os.geteuid() != 0:
            pytest.skip("only root can give a link away")
        os.chown(path, 12345, 12345, follow_symlinks=False)
    else:
        me = os.geteuid()
        monkeypatch.setattr(os, "geteuid", lambda: me + 1)
        if me == 0:  # files of root are trusted
            os.chown(path, 12345, 12345)
    with pytest.warns(KernelsWarning, match=r"kernels\.toml is not used: (it belongs|every user).*KERNELS_CONFIG"):
        forget()  # models that are kernelized, of other tests, read it at once
        assert configured("deny") is None
    with never():
        monkeypatch.setenv("KERNELS_CONFIG", str(path))
        forget()
        assert configured("deny") == ("x",)


def test_discovery_costs_two_stats_a_folder(make_layer: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without settings, a decision looks for two names in each folder, once until `forget`; a warm call for none."""
    monkeypatch.chdir(tmp_path)
    looked: list[Path] = []
    real = os.path.lexists
    monkeypatch.setattr(os.path, "lexists", lambda path: looked.append(path) or real(path))
    monkeypatch.setattr("kernels_core.settings.file._found", lambda *_: pytest.fail("a file was opened"))
    forget()
    layer = make_layer()()
    layer(X)
    serving()
    assert looked[:2] == [tmp_path / "kernels.toml", tmp_path / "pyproject.toml"]
    assert len(looked) == 2 * (len(tmp_path.parents) + 1)
    layer(X)
    serving()
    forget_settings()
    assert len(looked) == 2 * (len(tmp_path.parents) + 1)
    serving()
    assert len(looked) == 4 * (len(tmp_path.parents) + 1)


# --- Wrong files -----------------------------------------------------------------------------------

WRONG = {
    "deny = 3": "kernels.toml:1: deny: write a list, not 3.",
    '\ndeny = ["a",\n  3]': "kernels.toml:2: deny[1]: write a text, not 3.",
    'deny = ["a",\n  " "]': "kernels.toml:1: deny[1]: ' ' is empty or has control characters: write a word or a name.",
    'deny = ["https://huggingface.co/acme/norm"]': "kernels.toml:1: deny[0]: kernels have names, not addresses",
    "dney = []": "kernels.toml:1: dney: there is no such setting: did you mean deny?",
    "choice = true": "kernels.toml:1: choice: write a text, not True.",
    "choice = 2020-02-02": "kernels.toml:1: choice: write a text, not datetime.date(2020, 2, 2).",
    "require-plugins = {}": "kernels.toml:1: require-plugins: write a list, not {}.",
    'plugins = "mapping"': "kernels.toml:1: plugins: write a list, not 'mapping'.",
    "[mapping]\n\nAdd = 3": "kernels.toml:3: mapping.Add: write a text, not 3.",
    "[plugin]\nacme = 3": "kernels.toml:2: plugin.acme: write a table, not 3.",
    "[plugin.acme]\n\nlevel = true": "kernels.toml:3: plugin.acme.level: write a whole number, not True.",
    "[plugin.acme]\nlevel = 1.5": "kernels.toml:2: plugin.acme.level: write a whole number, not 1.5.",
    "[plugin.acme]\nfaulty = 1": "kernels.toml:2: plugin.acme.faulty: plugin 'acme' cannot read it: ZeroDivisionError",
    "[plugin.acme]\nother = 1": "kernels.toml:2: plugin.acme.other: there is no such setting: is the plugin 'acme'",
    "[plugin.none]\nx = 1": "kernels.toml:2: plugin.none.x: there is no such setting: is the plugin 'none' installed",
    "level = 1": "kernels.toml:1: level: there is no such setting: ",
    "[mapping\nx = 1": "kernels.toml:1: this is no TOML: ",
    "a = 1\nb = ": "kernels.toml:2: this is no TOML: ",
    "a = 1\na = 2": "kernels.toml:2: this is no TOML: ",
    'a = ["x",\n': "kernels.toml:1: this is no TOML: ",
    'a = "x': "kernels.toml:1: this is no TOML: ",
    '\na = """x\n': "kernels.toml:2: this is no TOML: ",
    "a = " + "[" * 100_000: "kernels.toml:1: this is no TOML: ",
    "a = " + "9" * 10_000: "kernels.toml:1: this is no TOML: ",
}


@pytest.mark.parametrize("text", WRONG, ids=lambda text: text[:30])
def test_a_wrong_file_applies_in_no_part(
    configure: Configure, isolated_plugins: PluginManager, make_layer: Make, make_kernel: Make, text: str
) -> None:
    """Nothing applies, no kernel serves on any way, one warning names file and line, and `forget` reads it again."""
    isolated_plugins.register(Acme(), "acme")
    path = configure(f"{text}\n")
    layer = make_layer()
    with use_kernel_mapping({"Add": {"cpu": make_kernel(10)}}), torch.no_grad():
        with pytest.warns(KernelsWarning) as caught:
            instance = layer()
            assert [instance(X)[0], instance(X)[0]] == [1, 1]
            assert configured("deny") is None and configured("plugin.acme.level") is None
            assert "kernels.toml" in serving(layer).refusals[0].reason
            assert receipt(instance, device="cpu").rows[0].refusals[0][0] == "all kernels"
            assert resolve(layer, device="cpu", mode=Mode.INFERENCE, candidate=serving(layer).candidate).is_reference
            with pytest.raises(UntrustedError, match=r"kernels\.toml"):
                authorize("the code of a kernel")
        assert len(caught) == 1 and str(caught[0].message).startswith(
            "No kernel serves, for the configuration is wrong"
        )
        assert any(problem.startswith(WRONG[text]) for problem in problems()), problems()
        with pytest.raises(NoKernelError) as raised:
            make_layer(use_fallback=False)()(X)
        assert isinstance(raised.value.__cause__, ConfigurationError) and raised.value.__cause__.file == str(path)
        assert raised.value.__cause__.line == int(WRONG[text].split(":")[1])
        configure('choice = "x"\n')
        assert instance(X)[0] == 10 and not problems()


def test_bytes_that_are_no_text(configure: Configure) -> None:
    """A file in another encoding is named with the line."""
    path = configure("")
    path.write_bytes(b"choice = 'x'\ndeny = ['\xff']\n")
    forget()
    assert problems()[0].startswith("kernels.toml:2: this is no TOML")
    path.write_bytes(b"")
    forget()
    assert problems() == () and configuration().file == str(path)


@pytest.mark.parametrize("named", ["missing.toml", "folder", "pyproject.toml", "a\udc80b.toml"])
def test_a_file_that_is_named_and_cannot_be_used(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, named: str
) -> None:
    """KERNELS_CONFIG with no file, a folder, or a file without settings: no kernel serves, and the name is shown."""
    configure("[tool]\n", "pyproject.toml")
    (tmp_path / "folder").mkdir()
    monkeypatch.setenv("KERNELS_CONFIG", named)
    forget()
    assert re.match(
        r"KERNELS_CONFIG names .*(there is no such file|it has no \[tool\.kernels-core\])", configuration().problems[0]
    )
    with pytest.warns(KernelsWarning, match="KERNELS_CONFIG names"):
        assert "KERNELS_CONFIG names" in str(serving())


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names")
def test_a_pipe_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe of that name is passed over, and does not block."""
    os.mkfifo(tmp_path / "kernels.toml")
    monkeypatch.chdir(tmp_path)
    assert find_settings() is None


def test_a_file_that_may_not_be_read(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    """An own file that cannot be read may have a policy: no kernel serves; a folder that is closed has none."""
    configure("")
    real = os.open

    def refuse(path: Any, *more: Any) -> int:
        if str(path).endswith("kernels.toml"):
            raise PermissionError(13, "Permission denied")
        return real(path, *more)

    monkeypatch.setattr(os, "open", refuse)
    forget()
    assert "cannot be read: " in problems()[0]


def test_strict_mode_raises_for_a_wrong_file(
    configure: Configure, make_layer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With KERNELS_STRICT, a call of a layer raises with file and line, without a warning."""
    monkeypatch.setenv("KERNELS_STRICT", "1")
    configure("deny = 3")
    with never():
        with pytest.raises(NoKernelError, match=r"kernels\.toml:1: deny: write a list, not 3"):
            make_layer()()(X)
    error = configuration().problems
    assert len(error) == 1


def test_kernelized_models_follow(configure: Configure, make_layer: Make, make_kernel: Make) -> None:
    """A model that is kernelized runs its references while the file is wrong, and its kernels before and after."""
    configure("")
    with use_kernel_mapping({"Add": {"cpu": make_kernel(10)}}), torch.no_grad():
        model = kernelize(nn.Sequential(make_layer()()), mode=Mode.INFERENCE, device="cpu")
        assert model(X)[0] == 10
        with pytest.warns(KernelsWarning, match=r"kernels\.toml:1"):
            configure("deny = 3")
            assert model(X)[0] == 1
        configure("")
        assert model(X)[0] == 10


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.dates() | st.datetimes(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
KEYS = st.sampled_from(["deny", "require-plugins", "plugins", "choice", "mapping", "packs", "canary", "plugin", "x"])


@hypothesis(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(KEYS, ANY)
def test_any_value_is_taken_or_refused(isolated_plugins: PluginManager, key: str, value: Any) -> None:
    """Whatever TOML may have for a setting: it applies, or an error of ours names it; nothing else is raised."""
    from kernels_core.settings.reader import Settings, _problems

    settings = Settings(ConfigSection(Path("/x/kernels.toml"), (), {key: value}))
    for problem in _problems(settings, isolated_plugins):
        assert isinstance(problem, ConfigurationError) and "/x/kernels.toml:1: " in str(problem)
        assert "cannot read it" not in str(problem)


@hypothesis(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=40) | st.text("[]{}=\"'#.\n\\ abde1-", max_size=40).map(str.encode))
def test_any_bytes_are_read_or_refused(configure: Configure, content: bytes) -> None:
    """Whatever a file has: its settings, or an error of ours with its path."""
    path = configure("")
    path.write_bytes(content)
    try:
        found = find_settings()
        assert found is not None and isinstance(found.value, dict)
    except ConfigurationError as error:
        assert str(error).startswith(f"{path}:{error.line}: ") and error.line >= 1


def test_the_error_can_be_pickled() -> None:
    """File and line travel between processes."""
    error = pickle.loads(pickle.dumps(ConfigurationError("wrong", file="kernels.toml", line=3)))
    assert (str(error), error.file, error.line) == ("wrong", "kernels.toml", 3)


# --- Settings of the core, and who wins ------------------------------------------------------------


def test_denied_kernels(
    configure: Configure, make_layer: Make, make_kernel: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`deny` excludes kernels and says where it stands; the variable replaces it; code adds to both."""
    configure('[tool.kernels-core]\n\ndeny = ["*.Add10", "acme/*"]\n', "pyproject.toml")
    with pytest.raises(UntrustedError, match=r"pyproject\.toml:3 has 'acme/\*'"):
        authorize("acme/silu")
    layer = make_layer()()
    mapping = use_kernel_mapping({"Add": {"cpu": [make_kernel(10), make_kernel(20), make_kernel(30)]}})
    with mapping, torch.no_grad(), ignored(KernelsWarning):
        assert layer(X)[0] == 20
        assert str(serving(layer).refusals[0]).endswith("pyproject.toml:3 has '*.Add10'")
        monkeypatch.setenv("KERNELS_DENY", "*.Add20")
        forget()
        assert layer(X)[0] == 10
        monkeypatch.setenv("KERNELS_DENY", "")
        entry = quarantine("*.Add10", reason="slow")
        assert layer(X)[0] == 20
        assert [row.source for row in configuration().settings if row.name == "deny"] == [
            "environment, over line 3",
            "code",
        ]
        release(entry)


def test_threads_decide_while_the_file_changes(configure: Configure, make_layer: Make, make_kernel: Make) -> None:
    """Every call gets a right answer by one of the files, and the last file applies at the end."""
    allows, denies = "deny = []\n", 'deny = ["*.Add10"]\n'
    configure(allows)
    register_kernel_mapping({"Add": {"cpu": make_kernel(10)}})
    layer, done, answers = make_layer()(), threading.Event(), set()

    def call() -> None:
        with torch.no_grad(), warnings.catch_warnings():
            while not done.is_set():
                answers.add(float(layer(X)[0]))

    threads = [threading.Thread(target=call) for _ in range(3)]
    with ignored():
        for thread in threads:
            thread.start()
        for _ in range(20):
            configure(denies)
            configure(allows)
        configure(denies)
        done.set()
        for thread in threads:
            thread.join()
        assert answers <= {1.0, 10.0} and layer(X)[0] == 1


def test_required_and_chosen_plugins(
    configure: Configure, make_layer: Make, make_kernel: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`require-plugins` refuses all kernels and names its place; `plugins` is as KERNELS_PLUGINS; variables win."""
    configure('require-plugins = ["guard"]\nplugins = ["mapping", "-hub"]\n')
    assert [plugin_manager().allows(name) for name in ("mapping", "hub", "canary")] == [True, False, False]
    with use_kernel_mapping({"Add": {"cpu": make_kernel(10)}}):
        assert re.search(r"'guard' is not loaded.*kernels\.toml:1 names it", str(serving(make_layer())))
        monkeypatch.setenv("KERNELS_REQUIRE_PLUGINS", "")
        monkeypatch.setenv("KERNELS_PLUGINS", "-canary")
        assert not serving(make_layer()).is_reference
        assert [plugin_manager().allows(name) for name in ("mapping", "hub", "canary")] == [True, True, False]


@pytest.mark.filterwarnings("ignore")  # from kernelized models of other tests, if there are any left
def test_settings_of_a_plugin(configure: Configure, isolated_plugins: PluginManager, monkeypatch: Any) -> None:
    """A plugin gets the settings of its own table, cannot take those of others, and is left out while it is blocked."""
    configure('deny = ["x"]\n[plugin.acme]\nlevel = 3\ndeny = "mine"\n')
    assert "plugin 'acme' installed" in problems()[0]
    monkeypatch.setenv("KERNELS_PLUGINS", "-acme")
    forget()
    assert not problems()
    assert "plugin.acme.level  not used: plugin 'acme' is not loaded" in re.sub(r"  +", "  ", str(configuration()))
    monkeypatch.delenv("KERNELS_PLUGINS")
    isolated_plugins.register(Acme(), "acme")
    assert [configured(f"{table}{key}") for table in ("", "plugin.acme.") for key in ("deny", "level")] == [
        ("x",),
        None,
        "mine",
        3,
    ]


def test_a_setting_is_asked_for_while_settings_are_checked(
    configure: Configure, isolated_plugins: PluginManager
) -> None:
    """A plugin whose check asks for a setting, or decides about a layer, gets none: there is no recursion."""
    asked: list[object] = []

    def level(section: ConfigSection) -> int:
        asked.append((configured("choice"), serving().is_reference))
        return section.as_number()

    plugin = types.SimpleNamespace(kernels_configuration=hookimpl(lambda: {"level": level}))
    plugin.kernels_configuration.__name__ = "kernels_configuration"
    isolated_plugins.register(plugin, "mine")
    configure('choice = "x"\n[plugin.mine]\nlevel = 3\n')
    assert configured("plugin.mine.level") == 3 and asked == [(None, True)]


def test_the_report(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each setting with its value and place fits 80 columns; variables are listed; JSON has whole places."""
    settings = (
        'choice = "kernels.choice.json"',
        'deny = ["a"]',
        "[mapping.Add]",
        '"cuda:sm>=90" = "python:acme.layers:Add"',
    )
    path = configure("\n".join(settings))
    path.with_name("kernels.choice.json").touch()  # a file that is not there would be reported
    monkeypatch.setenv("KERNELS_DENY", "c")
    monkeypatch.setenv("KERNELS_PROBE", "1")
    report = configuration()
    lines = str(report).splitlines()
    assert max(map(len, lines[1:])) <= 80 and lines[0] == str(path)
    assert [re.split("  +", line) for line in lines if "not set" not in line][2:] == [
        ["choice", "kernels.choice.json", "line 1"],
        ["deny", "c", "environment, over line 2"],
        ["mapping.Add.cuda:sm>=90", "python:acme.layers:Add", "line 4"],
        ["KERNELS_PROBE", "1", "environment"],
    ]
    assert f'"source": "{path}:4"' in report.to_json() and "<table>" in report.to_html()


def test_the_report_shows_no_password(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    """Passwords in addresses are left out of the values themselves, and so of the JSON that is pasted into issues."""
    configure('[mapping.Add]\ncpu = "https://me:hush@host/a:Add"')
    monkeypatch.setenv("KERNELS_CACHE", "https://me:hush@host/cache")
    report = configuration()
    assert "hush" not in report.to_json() and "https://***@host/cache" in report.to_json()


def test_importing_the_core_reads_no_file(python: Make, tmp_path: Path) -> None:
    """`import kernels_core` and decorating read no configuration; the first decision does; `plugins` applies."""
    (tmp_path / "kernels.toml").write_text('plugins = ["mapping", "nope"]\n')
    done = python(
        """
        import sys, warnings
        warnings.simplefilter("ignore")
        opened = []
        sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
        import kernels_core, kernels_plugins, torch
        @kernels_core.use_kernel_forward_from_hub("Add")
        def add(x):
            return x + 1
        assert not [name for name in opened if name.endswith("kernels.toml")]
        assert add(torch.zeros(1)).item() == 1
        assert [name for name in opened if name.endswith("kernels.toml")]
        manager = kernels_core.plugin_manager()
        assert list(manager.plugins()) == ["core", "mapping"]
        (fault,) = manager.faults
        assert "kernels.toml:1 names 'nope', which no installed distribution offers" in str(fault)
        print("read")
        """
    )
    assert done.stdout == "read\n"
