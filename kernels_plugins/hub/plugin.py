"""Plugin `hub`: loads layers from kernel repositories, on the Hub or on disk.

The way of a load: revision to commit, once; trust in who serves it; the best build variant for this
machine; its files; their digests; import of the bytes that were checked; the layer.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from kernels_core import IntegrityError, KernelLayer, LayerRequest, LoadedLayer, LoadError, ResolutionError, hookimpl

from .cache import COMMIT, Pin, Record
from .importing import find_layer, import_variant
from .integrity import Variant, as_variant, check_digest, check_transfer, read_files
from .metadata import METADATA, check_metadata
from .source import LayerRepository, LocalLayerRepository
from .variants import Machine, choose_variants


@hookimpl(tryfirst=True)
def kernels_load_layer(request: LayerRequest, source: object) -> LoadedLayer | None:
    """Load repositories; leave everything else to others."""
    if isinstance(source, LayerRepository):
        return load_repository(source)
    if isinstance(source, LocalLayerRepository):
        return load_local(source)
    return None


def load_repository(source: LayerRepository) -> LoadedLayer:
    """Load a layer from a repository on the Hub.

    Raises:
        ResolutionError: One of its kinds, naming repository, revision, variant and what to do.
    """
    from . import download  # imports huggingface_hub: only when a repository is really loaded
    from .trust import require_trust

    where = f"{source.repo_id} at {source.wanted}"
    with _named(where):
        pin, how = _pin(source)
        trust = require_trust(source, pin)
        record = _record(pin)
        name = _choose(record.variants)
    with _named(f"{where} (commit {pin.commit[:12]}), variant {name}"):
        variant, transfer = _fetch(pin, name, record)
        try:
            digest = check_digest(variant)
        except IntegrityError:
            download.discard(variant.folder)
            raise
        layer = _import(variant, source.layer_name)
        download.notes(source.repo_id).write_pin(source.wanted, pin)
        download.notes(source.repo_id).write_pin(pin.commit, pin)
    checked = {"digest": digest, "transfer": transfer, "trust": trust, "revision": how}
    return LoadedLayer(layer, f"{pin} ({name})", checked)


def load_local(source: LocalLayerRepository) -> LoadedLayer:
    """Load a layer from a folder on disk.

    Raises:
        ResolutionError: One of its kinds, naming folder, variant and what to do.
    """
    with _named(str(source.repo_path)):
        if not source.path.is_dir():
            raise LoadError("there is no such folder: check the path")
        folder = _local_variant(source.path)
    with _named(f"{source.repo_path}, variant {folder.name}"):
        variant = as_variant(folder, read_files(folder))
        digest = check_digest(variant)
        layer = _import(variant, source.layer_name)
    return LoadedLayer(layer, str(folder), {"digest": digest, "trust": "local files"})


# --- Steps ---------------------------------------------------------------------------------------


_pinning = threading.Lock()
_pins: dict[tuple[str, str], Pin] = {}
"""What the Hub said in this process: the layers of one model come from one commit, whatever is pushed meanwhile."""


def _pin(source: LayerRepository) -> tuple[Pin, str]:
    """Return the commit of a revision and how it is known; asks the Hub at most once in a process."""
    from . import download

    key = (str(download.cache_folder(source.repo_id, download.REPO_TYPES[0])), source.wanted)
    with _pinning:
        if key not in _pins:
            pin, how = _find_pin(source)
            if how != "from the Hub":
                return pin, how
            _pins[key] = pin
        return _pins[key], "from the Hub"


def _find_pin(source: LayerRepository) -> tuple[Pin, str]:
    from . import download

    known = download.notes(source.repo_id).pin(source.wanted)
    if known is not None and COMMIT.fullmatch(source.wanted):
        return known, "a commit that is in the cache"
    if download.is_offline():
        if known is None:
            raise LoadError("it is not in the cache, and HF_HUB_OFFLINE is set: load it once online, or unset that")
        return known, "from the cache: HF_HUB_OFFLINE is set"
    try:
        return download.find_pin(source.repo_id, source.wanted), "from the Hub"
    except download.UnreachableError as error:
        if known is None:
            raise
        return known, f"from the cache: {error}"


def _record(pin: Pin) -> Record:
    """Return the files of a commit; asks the Hub if they are not known."""
    from . import download

    notes = download.notes(pin.repo_id)
    record = notes.record(pin.commit) or Record()
    if not record.variants:
        record = Record(record.publisher_trusted, download.list_variants(pin))
        notes.write_record(pin.commit, record)
    return record


def _fetch(pin: Pin, name: str, record: Record) -> tuple[Variant, str]:
    """Return the files of a variant as listed by the Hub, downloaded if they are not there."""
    from . import download

    folder = download.variant_folder(pin, name)
    if not all((folder / file.path).is_file() for file in record.variants[name]):
        download.fetch_variant(pin, name, record.variants[name])
    try:
        files = read_files(folder)
        transfer = check_transfer(files, record.variants[name])
    except IntegrityError as error:
        download.discard(folder)
        raise IntegrityError(f"{error}. They were removed from the cache: try again") from error
    return as_variant(folder, files), transfer


def _choose(names: Iterable[str]) -> str:
    choice = choose_variants(names, _machine())
    if choice.accepted:
        return str(choice.accepted[0])
    why = "\n".join(f"    {name}: {reason}" for name, reason in choice.rejected) or "    `build` is empty"
    raise LoadError(f"no build variant fits this machine:\n{why}\n  Ask the publisher for a build, or try another one")


def _local_variant(path: Path) -> Path:
    if (path / METADATA).is_file():
        return path
    base = path / "build" if (path / "build").is_dir() else path
    return base / _choose(folder.name for folder in base.iterdir() if folder.is_dir())


def _import(variant: Variant, layer_name: str) -> KernelLayer:
    check_metadata(variant.metadata)
    return find_layer(import_variant(variant), layer_name)


@cache
def _machine() -> Machine:
    return Machine.here()


@contextmanager
def _named(where: str) -> Iterator[None]:
    """Put the name of what is being loaded before the message of an error."""
    try:
        yield
    except ResolutionError as error:
        raise type(error)(f"{where}: {error}") from error
    except OSError as error:
        raise LoadError(f"{where}: {type(error).__name__}: {error}. Check the disk and its permissions") from error
