"""The plugins that come with kernels-core: the mapping registry and the loader of Hub repositories.

They are found through entry points like anybody's, and use nothing but the public names of
`kernels_core`. Here are the names of the library `kernels` too, for programs that used it:
`import kernels_plugins as kernels`.
"""

from kernels_core import (
    CUDAProperties,
    Device,
    KernelizeFallback,
    Mode,
    ROCMProperties,
    __version__,
    kernelize,
    replace_kernel_forward_from_hub,
    unkernelize,
    use_kernel_forward_from_hub,
    use_kernelized_func,
)

from .adapters.source import opaque, reference_backward
from .bisect.bisection import bisect
from .bisect.errors import BisectError
from .bisect.result import BisectResult, Culprit, CulpritSet
from .canary.plugin import canary
from .hub.builds.metadata import Metadata
from .hub.builds.variants import VariantAccepted, VariantRejected
from .hub.dependency import get_kernel_dep
from .hub.deprecated import FuncRepository, LocalFuncRepository, LockedFuncRepository, use_kernel_func_from_hub
from .hub.functions import (
    get_kernel,
    get_kernel_variants,
    get_loaded_kernels,
    get_local_kernel,
    has_kernel,
    install_kernel,
)
from .hub.kernel import LoadedKernel, RepoInfo
from .hub.locking.locked import LockedLayerRepository, get_locked_kernel, load_kernel
from .hub.source import LayerRepository, LocalLayerRepository
from .mapping import register_kernel_mapping, use_kernel_mapping
from .observe.counters import PrometheusCounters
from .observe.log import LogResolutions
from .observe.ranges import ProfileRanges
from .oracle.kit import check_kernel
from .oracle.probe import Probe, ProbeReport
from .oracle.prober import probing
from .oracle.report import VerifyReport, VerifyRow
from .oracle.verify import verify

__all__ = [
    "BisectError",
    "BisectResult",
    "CUDAProperties",
    "Culprit",
    "CulpritSet",
    "Device",
    "FuncRepository",
    "KernelizeFallback",
    "LayerRepository",
    "LoadedKernel",
    "LocalFuncRepository",
    "LocalLayerRepository",
    "LockedFuncRepository",
    "LockedLayerRepository",
    "LogResolutions",
    "Metadata",
    "Mode",
    "Probe",
    "ProbeReport",
    "ProfileRanges",
    "PrometheusCounters",
    "ROCMProperties",
    "RepoInfo",
    "VariantAccepted",
    "VariantRejected",
    "VerifyReport",
    "VerifyRow",
    "__version__",
    "bisect",
    "canary",
    "check_kernel",
    "get_kernel",
    "get_kernel_dep",
    "get_kernel_variants",
    "get_loaded_kernels",
    "get_local_kernel",
    "get_locked_kernel",
    "has_kernel",
    "install_kernel",
    "kernelize",
    "load_kernel",
    "opaque",
    "probing",
    "reference_backward",
    "register_kernel_mapping",
    "replace_kernel_forward_from_hub",
    "unkernelize",
    "use_kernel_forward_from_hub",
    "use_kernel_func_from_hub",
    "use_kernel_mapping",
    "use_kernelized_func",
    "verify",
]
