"""Layers that know faster ways to run: decorate a layer, install a kernel, and its forward is dispatched.

`use_kernel_forward_from_hub` marks a class or function with a layer name. Plugins offer kernels for
that name; each call is served by the best one that fits device and mode, and by the decorated
forward itself, the *reference*, where there is none. The rest is in `docs/`.
"""

from .decisions.agreement import agree
from .decisions.content import content_of
from .decisions.file import DecisionChange, DecisionDiff, DecisionFile
from .decisions.files import alone_in, of_format, read_json, write_file
from .decisions.frozen import FrozenKernel, FrozenLayer, FrozenModel
from .decorators import replace_kernel_forward_from_hub, use_kernel_forward_from_hub
from .device import CUDAProperties, Device, ROCMProperties, device_capability
from .environment import setting, strict, switch
from .errors import (
    ArgumentError,
    ArgumentTypeError,
    CanaryError,
    ConfigurationError,
    ContractError,
    DecisionError,
    DisagreementError,
    IntegrityError,
    KernelizeError,
    KernelsError,
    KernelsWarning,
    LoadError,
    NoKernelError,
    PluginConflictError,
    PluginError,
    PluginLoadError,
    RequirementError,
    ResolutionError,
    ScopeError,
    UntrustedError,
    VerificationError,
    require_type,
)
from .exports import __version__, set_module
from .guards.numerics import NUMERICS, Numeric, WantedNumerics
from .guards.quarantine import Quarantined, quarantine, quarantined, release
from .guards.saved_tensors import SavedTensors, held_back
from .hookspecs import hookimpl
from .isolation import PluginMapping
from .layer import Layer, decorated_layer, find_layer, source_label
from .loading import authorize
from .mode import STAND_INS, Mode, check_registered_mode
from .models.choice import FrozenChoice
from .models.counting import count_calls
from .models.frozen import frozen_choice
from .models.functions import functions_of
from .models.kernelize import KernelizeFallback, kernelize, unkernelize, use_kernelized_func
from .models.modules import change_class, module_paths
from .models.receipt import Receipt, receipt
from .models.receipt_row import ReceiptDiff, ReceiptRow
from .models.references import references
from .pages.bars import Bars
from .pages.page import Page, Section
from .plugins import PluginManager, plugin_manager
from .raised import error_text
from .resolution import (
    Candidate,
    Cause,
    Exclusive,
    KernelLayer,
    LayerRequest,
    LoadedLayer,
    Reference,
    Refusal,
    Resolution,
)
from .resolver import find_candidates, forget, resolve, serving_forward
from .scopes.kept import checkpoint_scopes
from .scopes.scope import Scope
from .settings.report import Configuration, SettingRow, configuration, configured
from .settings.section import ConfigSection
from .table import Table, TableRow, Tabular, as_json, visible
from .warning import WarnOnce, warn_once

__all__ = [
    "NUMERICS",
    "STAND_INS",
    "ArgumentError",
    "ArgumentTypeError",
    "Bars",
    "CUDAProperties",
    "CanaryError",
    "Candidate",
    "Cause",
    "ConfigSection",
    "Configuration",
    "ConfigurationError",
    "ContractError",
    "DecisionChange",
    "DecisionDiff",
    "DecisionError",
    "DecisionFile",
    "Device",
    "DisagreementError",
    "Exclusive",
    "FrozenChoice",
    "FrozenKernel",
    "FrozenLayer",
    "FrozenModel",
    "IntegrityError",
    "KernelLayer",
    "KernelizeError",
    "KernelizeFallback",
    "KernelsError",
    "KernelsWarning",
    "Layer",
    "LayerRequest",
    "LoadError",
    "LoadedLayer",
    "Mode",
    "NoKernelError",
    "Numeric",
    "Page",
    "PluginConflictError",
    "PluginError",
    "PluginLoadError",
    "PluginManager",
    "PluginMapping",
    "Quarantined",
    "ROCMProperties",
    "Receipt",
    "ReceiptDiff",
    "ReceiptRow",
    "Reference",
    "Refusal",
    "RequirementError",
    "Resolution",
    "ResolutionError",
    "SavedTensors",
    "Scope",
    "ScopeError",
    "Section",
    "SettingRow",
    "Table",
    "TableRow",
    "Tabular",
    "UntrustedError",
    "VerificationError",
    "WantedNumerics",
    "WarnOnce",
    "__version__",
    "agree",
    "alone_in",
    "as_json",
    "authorize",
    "change_class",
    "check_registered_mode",
    "checkpoint_scopes",
    "configuration",
    "configured",
    "content_of",
    "count_calls",
    "decorated_layer",
    "device_capability",
    "error_text",
    "find_candidates",
    "find_layer",
    "forget",
    "frozen_choice",
    "functions_of",
    "held_back",
    "hookimpl",
    "kernelize",
    "module_paths",
    "of_format",
    "plugin_manager",
    "quarantine",
    "quarantined",
    "read_json",
    "receipt",
    "references",
    "release",
    "replace_kernel_forward_from_hub",
    "require_type",
    "resolve",
    "serving_forward",
    "set_module",
    "setting",
    "source_label",
    "strict",
    "switch",
    "unkernelize",
    "use_kernel_forward_from_hub",
    "use_kernelized_func",
    "visible",
    "warn_once",
    "write_file",
]

set_module(__name__, globals(), __all__)
