"""Makes a bill of materials of a receipt: a component for each kernel, package and PyTorch, with its provenance."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from kernels_core import LoadError, Receipt, __version__

if TYPE_CHECKING:
    from cyclonedx.model import HashType, Property
    from cyclonedx.model.component import Component
    from cyclonedx.model.license import License

_ALGORITHMS = {"sha256": "SHA-256", "sha512": "SHA-512"}


def bill_of_materials(receipt: Receipt) -> str:
    """Return the bill of materials of a model as CycloneDX 1.6 in JSON.

    Raises:
        LoadError: `cyclonedx-python-lib` is not installed.
    """
    try:
        from cyclonedx.model.bom import Bom
        from cyclonedx.model.component import Component, ComponentType
        from cyclonedx.output import make_outputter
        from cyclonedx.schema import OutputFormat, SchemaVersion
    except ImportError as error:
        raise LoadError(
            f"A bill of materials needs the package cyclonedx-python-lib, which is not installed ({error}): "
            "pip install 'kernels-core[sbom]'."
        ) from error
    about = dict(receipt.about)
    name = about.pop("model", "model")
    model = Component(name=name, type=ComponentType.MACHINE_LEARNING_MODEL, bom_ref="model")
    model.properties.update(_properties(about))
    bom = Bom()
    bom.metadata.component = model
    bom.metadata.tools.components.add(
        Component(name="kernels-core", version=__version__, type=ComponentType.APPLICATION)
    )
    made: dict[str, Component] = {}
    served: dict[str, list[tuple[str, str]]] = {}
    overrides: dict[str, str] = {}
    for row in json.loads(receipt.to_json()):
        if row["origin"] == "bypassed":
            continue
        found = row["provenance"]
        overrides |= found.pop("overrides", {})
        key = _add(found or {"name": row["implementation"]}, made, bom)
        texts = [("layer", f"{path}: {row['layer_name']}, {row['origin']}") for path in (row["path"], *row["aliases"])]
        calls = f"{row['layer_name']} on {row['device']} for {row['mode']}"
        served.setdefault(key, []).extend([*texts, ("calls", calls), ("plugin", row["plugin"])])
    torch = _add({"name": "torch", "version": about["torch"], "package": "torch"}, made, bom)
    served.setdefault(torch, []).extend(("override", f"{name}: {place}") for name, place in overrides.items())
    for key, properties in served.items():
        made[key].properties.update(_properties(properties))
    bom.components.update(made.values())
    bom.register_dependency(model, [made[key] for key in served])
    return make_outputter(bom, OutputFormat.JSON, SchemaVersion.V1_6).output_as_string(indent=2)


def _add(found: Mapping[str, Any], made: dict[str, Component], bom: Any) -> str:
    """Make the component of some code and of all that it depends on, unless they are made; return its reference."""
    place = found.get("repository") or found.get("package") or found["name"]
    # A commit has a build for each machine, and a folder has no commit: the hash tells them apart.
    version = found.get("commit") or found.get("version") or ""
    key = "#".join(filter(None, (f"{place}@{version}", found.get("content", "")[:12])))
    if key not in made:
        made[key] = _component(key, found)
        needed = [_add(one, made, bom) for one in found.get("dependencies", ())]
        bom.register_dependency(made[key], [made[one] for one in needed])
    return key


def _component(key: str, found: Mapping[str, Any]) -> Component:
    from cyclonedx.model.component import Component, ComponentType
    from packageurl import PackageURL

    owner, _, name = found.get("repository", "").rpartition("/")
    version = found.get("commit") or found.get("version") or None
    purl = PackageURL("huggingface", owner, name, version) if owner else None
    if package := found.get("package"):
        purl = PackageURL("pypi", None, package.lower().replace("_", "-"), version)
    shown = {name: found.get(name, "") for name in ("name", "version", "upstream", "trust", "signature")}
    files = [
        Component(name=path, type=ComponentType.FILE, bom_ref=f"{key}:{path}", hashes=_hashes(digest))
        for path, digest in found.get("digests", {}).items()
    ]
    return Component(
        name=name or found.get("package") or found["name"],
        type=ComponentType.LIBRARY,
        bom_ref=key,
        group=owner or None,
        version=version,
        publisher=found.get("publisher") or None,
        licenses=_licenses(found.get("license", "")),
        hashes=_hashes(found.get("content", "")),
        purl=purl,
        properties=_properties(shown),
        components=files,
    )


def _properties(values: Mapping[str, str] | Iterable[tuple[str, str]]) -> list[Property]:
    from cyclonedx.model import Property

    pairs = values.items() if isinstance(values, Mapping) else values
    return [Property(name=f"kernels-core:{name}", value=value) for name, value in pairs if value]


def _hashes(digest: str) -> list[HashType]:
    """Return a hash, such as `sha256:<hex>`; one without a name is SHA-256."""
    from cyclonedx.model import HashAlgorithm, HashType

    algorithm, _, text = digest.rpartition(":")
    if not re.fullmatch("[0-9a-f]{64}|[0-9a-f]{128}", text):
        return []
    return [HashType(alg=HashAlgorithm(_ALGORITHMS.get(algorithm, "SHA-256")), content=text)]


def _licenses(text: str) -> list[License]:
    """Return a license by its SPDX name or expression, where the text is one, else by that text."""
    from cyclonedx.model.license import DisjunctiveLicense, LicenseExpression
    from cyclonedx.spdx import fixup_id, is_expression

    if not text:
        return []
    if known := fixup_id(text):
        return [DisjunctiveLicense(id=known)]
    return [LicenseExpression(text) if is_expression(text) else DisjunctiveLicense(name=text)]
