"""The plugins that come with kernels-core: the mapping registry and the loader of Hub repositories.

They are found through entry points as those of any package, and use only the public names of `kernels_core`.
Here are the names of the library `kernels` too, for programs that used it: `import kernels_plugins as kernels`.

A name is imported when it is first used: importing this package imports neither `torch` nor any plugin.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the same names, for type checkers and editors
    from kernels_core import (
        CUDAProperties,
        Device,
        KernelizeFallback,
        Mode,
        Reference,
        ROCMProperties,
        __version__,
        kernelize,
        replace_kernel_forward_from_hub,
        unkernelize,
        use_kernel_forward_from_hub,
        use_kernelized_func,
    )

    from .adapters.source import opaque, reference_backward
    from .adoption.adopted import Adopted, AdoptedLayer, RefusedLayer, adopt
    from .adoption.classes import adopted_rule
    from .adoption.rule import Rule
    from .bisect.bisection import bisect
    from .bisect.result import BisectError, BisectResult, Culprit, CulpritSet
    from .canary.plugin import canary
    from .choice.bench.report import BenchReport, BenchRow
    from .choice.bench.sweep import bench
    from .choice.cell import ChoiceCell
    from .choice.choice import Choice
    from .choice.choosing import choosing
    from .choice.machine import MeasuredOn
    from .choice.plugin import use_choice
    from .consistency.consistency import consistency
    from .consistency.report import ConsistencyError, ConsistencyReport, Drift
    from .hub.builds.metadata import Metadata
    from .hub.builds.variants import VariantAccepted, VariantRejected
    from .hub.dependency import get_kernel_dep
    from .hub.deprecated import FuncRepository, LocalFuncRepository, LockedFuncRepository, use_kernel_func_from_hub
    from .hub.functions import get_kernel, get_kernel_variants, get_local_kernel, has_kernel, install_kernel
    from .hub.kernel import LoadedKernel, get_loaded_kernels
    from .hub.locking.locked import LockedLayerRepository, get_locked_kernel, load_kernel
    from .hub.request import RepoInfo
    from .hub.source import LayerRepository, LocalLayerRepository
    from .mapping import register_kernel_mapping, use_kernel_mapping
    from .numerics.plugin import numerics, register_numerics
    from .observe.observers import LogResolutions, ProfileRanges, PrometheusCounters
    from .oracle.kit import check_kernel
    from .oracle.probe import Probe, ProbeReport
    from .oracle.prober import probing
    from .oracle.report import VerifyReport, VerifyRow
    from .oracle.verify import verify
    from .packs.triton.functions import add_rms_norm, linear_cross_entropy

_NAMES = {
    "kernels_core": (
        "CUDAProperties Device KernelizeFallback Mode ROCMProperties Reference __version__ kernelize unkernelize "
        "replace_kernel_forward_from_hub use_kernel_forward_from_hub use_kernelized_func"
    ),
    ".adapters.source": "opaque reference_backward",
    ".adoption.adopted": "Adopted AdoptedLayer RefusedLayer adopt",
    ".adoption.classes": "adopted_rule",
    ".adoption.rule": "Rule",
    ".bisect.bisection": "bisect",
    ".bisect.result": "BisectError BisectResult Culprit CulpritSet",
    ".canary.plugin": "canary",
    ".choice.bench.report": "BenchReport BenchRow",
    ".choice.bench.sweep": "bench",
    ".choice.cell": "ChoiceCell",
    ".choice.choice": "Choice",
    ".choice.choosing": "choosing",
    ".choice.machine": "MeasuredOn",
    ".choice.plugin": "use_choice",
    ".consistency.consistency": "consistency",
    ".consistency.report": "ConsistencyError ConsistencyReport Drift",
    ".hub.builds.metadata": "Metadata",
    ".hub.builds.variants": "VariantAccepted VariantRejected",
    ".hub.dependency": "get_kernel_dep",
    ".hub.deprecated": "FuncRepository LocalFuncRepository LockedFuncRepository use_kernel_func_from_hub",
    ".hub.functions": "get_kernel get_kernel_variants get_local_kernel has_kernel install_kernel",
    ".hub.kernel": "LoadedKernel get_loaded_kernels",
    ".hub.locking.locked": "LockedLayerRepository get_locked_kernel load_kernel",
    ".hub.request": "RepoInfo",
    ".hub.source": "LayerRepository LocalLayerRepository",
    ".mapping": "register_kernel_mapping use_kernel_mapping",
    ".numerics.plugin": "numerics register_numerics",
    ".observe.observers": "LogResolutions ProfileRanges PrometheusCounters",
    ".oracle.kit": "check_kernel",
    ".oracle.probe": "Probe ProbeReport",
    ".oracle.prober": "probing",
    ".oracle.report": "VerifyReport VerifyRow",
    ".oracle.verify": "verify",
    ".packs.triton.functions": "add_rms_norm linear_cross_entropy",
}
"""The public names by the module that defines them."""

_HOMES = {name: home for home, names in _NAMES.items() for name in names.split()}

__all__ = [
    "Adopted",
    "AdoptedLayer",
    "BenchReport",
    "BenchRow",
    "BisectError",
    "BisectResult",
    "CUDAProperties",
    "Choice",
    "ChoiceCell",
    "ConsistencyError",
    "ConsistencyReport",
    "Culprit",
    "CulpritSet",
    "Device",
    "Drift",
    "FuncRepository",
    "KernelizeFallback",
    "LayerRepository",
    "LoadedKernel",
    "LocalFuncRepository",
    "LocalLayerRepository",
    "LockedFuncRepository",
    "LockedLayerRepository",
    "LogResolutions",
    "MeasuredOn",
    "Metadata",
    "Mode",
    "Probe",
    "ProbeReport",
    "ProfileRanges",
    "PrometheusCounters",
    "ROCMProperties",
    "Reference",
    "RefusedLayer",
    "RepoInfo",
    "Rule",
    "VariantAccepted",
    "VariantRejected",
    "VerifyReport",
    "VerifyRow",
    "__version__",
    "add_rms_norm",
    "adopt",
    "adopted_rule",
    "bench",
    "bisect",
    "canary",
    "check_kernel",
    "choosing",
    "consistency",
    "get_kernel",
    "get_kernel_dep",
    "get_kernel_variants",
    "get_loaded_kernels",
    "get_local_kernel",
    "get_locked_kernel",
    "has_kernel",
    "install_kernel",
    "kernelize",
    "linear_cross_entropy",
    "load_kernel",
    "numerics",
    "opaque",
    "probing",
    "reference_backward",
    "register_kernel_mapping",
    "register_numerics",
    "replace_kernel_forward_from_hub",
    "unkernelize",
    "use_choice",
    "use_kernel_forward_from_hub",
    "use_kernel_func_from_hub",
    "use_kernel_mapping",
    "use_kernelized_func",
    "verify",
]


class _Package(types.ModuleType):
    """This package: it imports a public name on first use, and keeps its names from its sub-packages.

    A class and no `__getattr__` of the module: for that, type checkers would take any name to exist, and only a
    class has a say when `import kernels_plugins.bisect.plugin` puts the sub-package where the function `bisect` is.
    """

    def __getattr__(self, name: str) -> Any:
        """Import a public name; threads that do so together get one and the same object."""
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name, obj=self)
        value = getattr(importlib.import_module(_HOMES[name], __name__), name)
        setattr(self, name, value)
        return value

    def __setattr__(self, name: str, value: object) -> None:
        """Set an attribute, unless the import system is about to set a sub-package in place of a public name."""
        if not (name in _HOMES and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        """List the attributes, and the public names that are not imported yet."""
        return sorted({*vars(self), *__all__})


sys.modules[__name__].__class__ = _Package
