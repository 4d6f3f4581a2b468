"""Signatures of builds, by an authority of our own: `sigstore` verifies them for real, and sends no request."""

from __future__ import annotations

import base64
import json
import logging
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_scene import cached, call, kernel, new_process, scale, served
from typer.testing import CliRunner

from kernels_core import IntegrityError, KernelsError, UntrustedError, configuration
from kernels_core.cli import command_line
from kernels_plugins import LocalLayerRepository, get_kernel
from kernels_plugins.hub import errors
from kernels_plugins.hub.benchmark.scripts import find_scripts
from kernels_plugins.hub.builds.integrity import as_build
from kernels_plugins.hub.request import KernelRequest
from kernels_plugins.hub.signatures.signer import GITHUB, KNOWN, Signer, find_signers
from kernels_plugins.hub.signatures.verification import verify_build
from kernels_plugins.local_hub.server import LocalHub, Repository

pytest.importorskip("sigstore", reason="the extra kernels-core[sigstore] is not installed")

from signing import SOURCE, WORKFLOW, Authority, signed_files

pytest_plugins = ["kernels_plugins.hub.testing"]

Publish = Callable[..., Repository]
Set = Callable[..., None]
MAIN: dict[str, Any] = {"revision": "main"}


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """Make the authority that all builds of this file are signed by."""
    made = Authority()
    made.write_trusted_root(tmp_path_factory.mktemp("authority") / "root.json")
    return made


@pytest.fixture
def settings(authority: Authority, configure: Callable[..., Path]) -> Set:
    """Return a function that writes a configuration file: the policy, and the signers of acme."""

    def write(policy: str | None = "require", signers: str | None = None, root: object = authority.root) -> None:
        if signers is None:
            signers = f'[signers.acme]\nidentity = "{WORKFLOW}"\n'
        configure("\n".join([f'signatures = "{policy}"'] * bool(policy) + [f'trusted-root = "{root}"', signers]))

    write()
    return write


def changed(files: dict[str, Any], **bundle: Any) -> dict[str, Any]:
    """Return the files with other entries in the bundle."""
    return {**files, "metadata.json.sigstore": json.dumps({**json.loads(files["metadata.json.sigstore"]), **bundle})}


def test_a_signed_kernel_serves_also_offline_without_a_request_to_anybody(
    kernel_repository: Publish,
    local_hub: LocalHub,
    authority: Authority,
    settings: Set,
    new_process: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The receipt names the signer; a later process verifies again, from the cache, while nothing can be asked."""
    kernel_repository("acme/kernels", signed_files(authority, kernel()))
    first = call(scale())
    assert (first.value, first.said) == (3, [])
    assert first.resolution.checked["signature"] == f"by {WORKFLOW} (issuer {GITHUB})"
    new_process()
    local_hub.fail("", status=500)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    again = call(scale())
    assert (again.value, again.resolution.checked["signature"]) == (3, first.resolution.checked["signature"])


def test_each_fault_of_a_signature_has_a_reason_of_its_own_before_any_import(
    kernel_repository: Publish, authority: Authority, settings: Set, tmp_path: Path
) -> None:
    """Another signer or source, expired, missing, tampered, malformed, foreign: refused with its own error."""
    ran = tmp_path / "ran"
    source = f"open({str(ran)!r}, 'w').close()\n" + kernel()
    good = signed_files(authority, source)
    other = signed_files(authority, source + "# another\n")
    bare = {**good, "metadata.json": json.dumps({**json.loads(good["metadata.json"]), "digest": None})}
    bare["metadata.json"] = json.dumps({k: v for k, v in json.loads(bare["metadata.json"]).items() if v is not None})
    faults: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
        "nobody": ({k: v for k, v in good.items() if "sigstore" not in k}, errors.UnsignedError, "has no signature"),
        "person": (
            signed_files(authority, source, identity="https://github.com/eve/kernels/.github/workflows/b.yaml@x"),
            errors.SignerError,
            "signed by https://github.com/eve/kernels.*not by https://github.com/acme",
        ),
        "issuer": (signed_files(authority, source, issuer="https://eve.invalid"), errors.SignerError, "eve.invalid"),
        "called": (
            signed_files(authority, source, source=f"https://github.com/{'e' * 150}/own"),
            errors.SignerError,
            "from https://github.com/e+/own, not by",
        ),
        "late": (signed_files(authority, source, late=11), errors.ExpiredError, "it had expired"),
        "early": (signed_files(authority, source, late=-1), errors.ExpiredError, "was not valid yet"),
        "metadata": (
            {**good, "metadata.json": good["metadata.json"] + b" "},
            errors.TamperedError,
            "it was changed",
        ),
        "signature": (
            {**good, "metadata.json.sigstore": other["metadata.json.sigstore"]},
            errors.TamperedError,
            "it was changed",
        ),
        "malformed": ({**good, "metadata.json.sigstore": "{}"}, errors.SignatureError, "is malformed"),
        "kind": (changed(good, mediaType="other"), errors.SignatureError, "is malformed"),
        "authority": (signed_files(Authority(), source), errors.AuthorityError, "authority that is trusted"),
        "digestless": (
            {**bare, "metadata.json.sigstore": authority.sign(bare["metadata.json"].encode())},
            errors.SignatureError,
            "covers none of its files",
        ),
    }
    for name, (files, kind, reason) in faults.items():
        kernel_repository(f"acme/{name}", files)
        with pytest.raises(UntrustedError, match=rf"acme/{name} .*{reason}") as caught:
            get_kernel(f"acme/{name}", **MAIN)
        assert type(caught.value) is kind, name
    assert not ran.exists()
    outcome = call(scale("acme/nobody"))
    assert outcome.value == 2 and "metadata.json.sigstore is missing" in outcome.why
    kernel_repository("acme/good", good)
    get_kernel("acme/good", **MAIN)
    assert ran.exists()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no command openssl, which makes timestamps")
def test_the_time_of_a_timestamp_decides_too(kernel_repository: Publish, authority: Authority, settings: Set) -> None:
    """Newer logs note no time: that of a timestamp has to be one at which the certificate was valid."""
    kernel_repository("acme/good", signed_files(authority, kernel(), stamped=True))
    assert served(scale("acme/good")) == 3
    kernel_repository("acme/late", signed_files(authority, kernel(), stamped=True, late=11))
    with pytest.raises(errors.ExpiredError, match="it had expired"):
        get_kernel("acme/late", **MAIN)
    bundle = json.loads(authority.sign(b"", stamped=True))
    good = signed_files(authority, kernel(4), stamped=True)
    other = {**json.loads(good["metadata.json.sigstore"])["verificationMaterial"]}
    other["timestampVerificationData"] = bundle["verificationMaterial"]["timestampVerificationData"]
    kernel_repository("acme/other", changed(good, verificationMaterial=other))
    with pytest.raises(errors.AuthorityError, match="not enough sources of verified time"):
        get_kernel("acme/other", **MAIN)


def test_a_log_that_does_not_prove_the_signature_is_tampering(
    kernel_repository: Publish, authority: Authority, settings: Set
) -> None:
    """Another root of the log, another time, another record: each breaks a proof in the bundle."""
    good = signed_files(authority, kernel())
    for number, (key, value) in enumerate(
        {"integratedTime": "1700000000", "canonicalizedBody": base64.b64encode(b"{}").decode(), "logIndex": "7"}.items()
    ):
        bundle = json.loads(good["metadata.json.sigstore"])
        bundle["verificationMaterial"]["tlogEntries"][0][key] = value
        kernel_repository(f"acme/log{number}", {**good, "metadata.json.sigstore": json.dumps(bundle)})
        with pytest.raises(errors.SignatureError):
            get_kernel(f"acme/log{number}", **MAIN)


def test_a_bundle_that_somebody_made_up_raises_no_foreign_error(authority: Authority) -> None:
    """Any byte of it changed or cut: it is refused with an error of ours, or it is still the same signature."""
    files = signed_files(authority, kernel())
    files = {path: data.encode() if isinstance(data, str) else data for path, data in files.items()}
    bundle, refused = files["metadata.json.sigstore"], 0
    for place in range(0, len(bundle), 23):
        for other in (bundle[:place], bundle[:place] + bytes([bundle[place] ^ 1]) + bundle[place + 1 :]):
            build = as_build(Path("build"), {**files, "metadata.json.sigstore": other})
            try:
                assert verify_build(build, [Signer(WORKFLOW)], authority.root).identity == WORKFLOW
            except errors.SignatureError:
                refused += 1
    assert refused > len(bundle) / 23


def test_a_byte_that_changes_after_a_verification_is_refused(
    kernel_repository: Publish, authority: Authority, settings: Set, new_process: Callable[[], None]
) -> None:
    """Files and metadata are compared at each load, so an earlier success excuses nothing."""
    for number, (name, before, after) in enumerate((("layers.py", b"3", b"4"), ("metadata.json", b"{", b" {"))):
        repository = kernel_repository(f"acme/kernel{number}", signed_files(authority, kernel()))
        assert served(scale(repository.id)) == 3
        path = (cached(repository) / name).resolve()
        path.write_bytes(path.read_bytes().replace(before, after, 1))
        new_process()
        with pytest.raises(IntegrityError, match=f"not those on the Hub: {name} has"):
            get_kernel(repository.id, revision=repository.head())


def test_a_folder_with_a_signature_is_verified_too(
    authority: Authority, settings: Set, tmp_path: Path, local_hub: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a Hub: a right one serves, a changed file or metadata is refused, an unsigned one where required."""

    def folder(name: str, files: dict[str, Any]) -> LocalLayerRepository:
        place = tmp_path / name / "build" / "torch-universal"
        place.mkdir(parents=True)
        for path, data in files.items():
            (place / path).write_bytes(data.encode() if isinstance(data, str) else data)
        return LocalLayerRepository(tmp_path / name, layer_name="Scale")

    good = signed_files(authority, kernel())
    monkeypatch.setenv("LOCAL_KERNELS", f"acme/mine={tmp_path / 'good'}:acme/bad={tmp_path / 'bad'}")
    assert call(folder("good", good)).resolution.checked["signature"].startswith(f"by {WORKFLOW}")
    assert "layers.py has other bytes" in call(folder("file", {**good, "layers.py": kernel(5)})).why
    other = {**good, "layers.py": kernel(5), "metadata.json": signed_files(authority, kernel(5))["metadata.json"]}
    assert "is not one of this metadata.json" in call(folder("both", other)).why
    unsigned = {path: data for path, data in good.items() if "sigstore" not in path}
    assert "has no signature" in call(folder("unsigned", unsigned)).why
    folder("bad", unsigned)
    assert served(scale("acme/mine")) == 3 and "has no signature" in call(scale("acme/bad")).why
    settings("warn")
    assert served(folder("own", unsigned)) == 3


def test_policies(
    kernel_repository: Publish,
    authority: Authority,
    settings: Set,
    new_process: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Off looks at nothing, warn loads with one warning, no policy verifies only what is signed; a variable wins."""
    kernel_repository("acme/good", signed_files(authority, kernel()))
    kernel_repository("acme/bad", signed_files(authority, kernel(4), late=11))
    kernel_repository("acme/unsigned", kernel(5))
    kernel_repository("other/good", signed_files(authority, kernel(6)))
    for policy, bad, unsigned, unknown in (
        ("off", "", "", ""),
        ("warn", "it had expired", "has no signature", "has none for 'other'"),
        (None, "it had expired", "", ""),
    ):
        new_process()
        settings(policy)
        for name, said in {"acme/good": "", "acme/bad": bad, "acme/unsigned": unsigned, "other/good": unknown}.items():
            outcome = call(scale(name))
            assert outcome.value in (3, 4, 5, 6) and not outcome.resolution.is_reference
            assert len(outcome.said) == bool(said) and said in "".join(outcome.said)
    assert "has none to compare it with" in call(scale("other/good")).resolution.checked["signature"]
    new_process()
    monkeypatch.setenv("KERNELS_SIGNATURES", "require")
    assert "[signers.other]" in call(scale("other/good")).why
    with pytest.raises(errors.UnsignedError, match="no signature covers them"):  # before it looks for scripts
        find_scripts(KernelRequest("acme/good", **MAIN))
    row = next(row for row in configuration().settings if row.name == "signatures")
    assert (row.value, row.source) == ("require", "environment")
    monkeypatch.setenv("KERNELS_SIGNATURES", "sometimes")
    assert "is no policy: set it to off, warn, require" in call(scale("acme/good")).why
    new_process()
    settings("require")
    monkeypatch.setenv("KERNELS_SIGNATURES", "")  # set, so it wins: no policy
    assert not call(scale("acme/unsigned")).resolution.is_reference
    new_process()
    monkeypatch.setenv("KERNELS_SIGNATURES", "warn")
    monkeypatch.setenv("KERNELS_STRICT", "1")
    with pytest.raises(errors.ExpiredError):
        get_kernel("acme/bad", **MAIN)


def test_dependencies_and_targets_of_redirects_are_verified(
    kernel_repository: Publish, authority: Authority, settings: Set
) -> None:
    """A signed kernel that depends on an unsigned one is refused; where one was moved, the new owner has to sign."""
    kernel_repository("acme/base", kernel())
    files = signed_files(authority, kernel())
    metadata = {**json.loads(files["metadata.json"]), "kernel-depends": [{"repo-id": "acme/base", "revision": "main"}]}
    text = json.dumps(metadata).encode()
    kernel_repository("acme/top", {**files, "metadata.json": text, "metadata.json.sigstore": authority.sign(text)})
    with pytest.raises(errors.UnsignedError, match=r"acme/base at main.*has no signature"):
        get_kernel("acme/top", **MAIN)
    kernel_repository("eve/target", signed_files(authority, kernel()))
    moved = kernel_repository("acme/moved", kernel())
    moved.commit({"kernel-status.toml": b'kind = "redirect"\ndestination = "eve/target"\n'})
    with pytest.raises(errors.SignerError, match=r"\[signers\.eve\]"):
        get_kernel("acme/moved", **MAIN)


def test_without_the_extra(
    kernel_repository: Publish,
    authority: Authority,
    settings: Set,
    new_process: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Require refuses with the line for pip, warn warns once for all kernels, no policy notes it without a word."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "sigstore"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sigstore", None)
    for number in range(2):
        kernel_repository(f"acme/kernel{number}", signed_files(authority, kernel(number + 3)))
    with pytest.raises(errors.PackageError, match=r"pip install 'kernels-core\[sigstore\]'"):
        get_kernel("acme/kernel0", **MAIN)
    settings(None)
    assert call(scale("acme/kernel0")).said == []
    new_process()
    settings("warn")
    first, second = (call(scale(f"acme/kernel{number}")) for number in range(2))
    assert (first.value, second.value, len(first.said), second.said) == (3, 4, 1, [])
    assert "pip install 'kernels-core[sigstore]'" in first.said[0]


def test_settings_that_cannot_be_used(settings: Set) -> None:
    """Each names its line, and nothing of the file applies; entries of repositories win over those of owners."""
    for signers, problem in (
        ('[signers."a b"]\nidentity = "x"', "neither an organisation nor a repository"),
        ('[signers.acme]\nissuer = "x"', "identity is missing"),
        ("[signers]\nacme = []", "names no signer"),
        ('[signers.acme]\nidentity = "x"\nname = "y"', "there is no such setting"),
    ):
        settings("require", signers)
        (found,) = configuration().problems
        assert problem in found
    settings("sometimes")
    assert "is no policy" in configuration().problems[0]
    settings("require", '[[signers.acme]]\nidentity = "a@b.c"\nissuer = "i"\n[signers."acme/one"]\nidentity = "w"')
    assert find_signers("acme/two") == (Signer("a@b.c", "i"),) and find_signers("acme/one") == (Signer("w"),)
    assert find_signers("kernels-community/relu") == KNOWN["kernels-community"] and find_signers("eve/x") == ()
    assert {signer.source for signer in KNOWN["kernels-community"]} == {
        "https://github.com/huggingface/kernels-community"
    }


def test_a_trusted_root_that_cannot_be_read_is_named(
    kernel_repository: Publish, authority: Authority, settings: Set
) -> None:
    """A missing file refuses what is signed: it does not fall back to the authorities of Sigstore."""
    settings(root="missing.json")
    kernel_repository("acme/kernels", signed_files(authority, kernel()))
    with pytest.raises(errors.AuthorityError, match=r"missing\.json cannot be used"):
        get_kernel("acme/kernels", **MAIN)


def test_the_authorities_of_sigstore_come_with_it(
    kernel_repository: Publish,
    authority: Authority,
    configure: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without the setting, the root inside of the package decides, offline and without a log record."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    configure('signatures = "require"')
    kernel_repository("kernels-community/kernels", signed_files(authority, kernel()))
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logging.getLogger("sigstore").addHandler(handler)
    try:
        with pytest.raises(errors.AuthorityError, match="authority that is trusted"):
            get_kernel("kernels-community/kernels", **MAIN)
    finally:
        logging.getLogger("sigstore").removeHandler(handler)
    assert records == []


def test_the_command_verifies_repositories_and_folders(
    kernel_repository: Publish, authority: Authority, settings: Set, new_process: Callable[[], None], tmp_path: Path
) -> None:
    """One row per build, and exit code 1 where one is not right; policy and trust do not matter."""

    def run(*arguments: str) -> tuple[int, list[dict[str, str]]]:
        done = CliRunner().invoke(command_line(), ["verify-signature", *arguments, "--json"])
        return (2, []) if isinstance(done.exception, KernelsError) else (done.exit_code, json.loads(done.stdout))

    good = signed_files(authority, kernel())
    repository = kernel_repository("acme/good", good, trusted=False)
    repository.branch("v1")
    valid = {
        "variant": "torch-universal",
        "signature": "valid",
        "signer": f"{WORKFLOW} (issuer {GITHUB})",
        "reason": "",
    }
    assert run("acme/good") == run("acme/good", "1") == run("acme/good", "--revision", "main") == (0, [valid])
    code, (row,) = run("acme/good", "--identity", "someone@acme.org", "--issuer", "https://accounts.acme.org")
    assert (code, row["signature"]) == (1, "refused") and "someone@acme.org" in row["reason"]
    kernel_repository("other/good", good)
    code, (row,) = run("other/good", "--revision", "main")
    assert code == 1 and "--identity" in row["reason"]
    assert run("other/good", "--revision", "main", "--identity", WORKFLOW)[0] == 0
    tree = {f"build/torch-universal/{path}": data for path, data in good.items()}
    unsigned = {path.replace("universal", "cpu"): data for path, data in tree.items() if "sigstore" not in path}
    repository.commit({**tree, **unsigned})
    new_process()
    code, rows = run("acme/good", "--revision", "main", "--all-variants")
    assert code == 1 and {row["variant"]: row["signature"] for row in rows} == {
        "torch-cpu": "none",
        "torch-universal": "valid",
    }
    assert run("acme/good", "--revision", "main", "--all-variants", "--filter-unsigned") == (0, [valid])
    for path, data in {**tree, **unsigned}.items():
        (tmp_path / "own" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "own" / path).write_bytes(data.encode() if isinstance(data, str) else data)
    assert run(str(tmp_path / "own"), "--all-variants")[0] == 1
    place = tmp_path / "own" / "build" / "torch-universal"
    assert run(str(place)) == (0, [valid])
    (place / "layers.py").write_text("tampered")
    code, (row,) = run(str(place))
    assert (code, row["signature"]) == (1, "refused") and "layers.py has other bytes" in row["reason"]
    assert run("eve/nothing")[0] == run(str(place), "1")[0] == 2
