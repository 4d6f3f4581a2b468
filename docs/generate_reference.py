"""Write `reference.md`: every public name, in groups, to be filled in by mkdocstrings.

Run without arguments to write it, or with `--check` to exit with 1 where it is not current. A public
name that is in no group is an error: add it to one.
"""

from __future__ import annotations

import sys
from pathlib import Path

import kernels_core
import kernels_core.replay
import kernels_plugins

PAGE = Path(__file__).resolve().parent / "reference.md"

GROUPS: dict[str, tuple[str, list[str]]] = {
    "Decorate a layer": (
        "For library authors.",
        [
            "kernels_core.use_kernel_forward_from_hub",
            "kernels_core.replace_kernel_forward_from_hub",
        ],
    ),
    "Adopt a model": (
        "Rules, and what stays as it was: [adopt a model](adopt.md).",
        [
            "kernels_plugins.adopt",
            "kernels_plugins.Adopted",
            "kernels_plugins.AdoptedLayer",
            "kernels_plugins.RefusedLayer",
            "kernels_plugins.Rule",
            "kernels_plugins.adopted_rule",
            "kernels_core.change_class",
        ],
    ),
    "Let measurement choose": (
        "Keys, files and prices: [choice](choice.md).",
        [
            "kernels_plugins.choosing",
            "kernels_plugins.use_choice",
            "kernels_plugins.Choice",
            "kernels_plugins.ChoiceCell",
            "kernels_plugins.MeasuredOn",
            "kernels_plugins.bench",
            "kernels_plugins.BenchReport",
            "kernels_plugins.BenchRow",
        ],
    ),
    "Call kernels": (
        "Those of the pack [`triton`](packs.md#triton), for models that are written for them.",
        [
            "kernels_plugins.add_rms_norm",
            "kernels_plugins.linear_cross_entropy",
        ],
    ),
    "Map kernels to layers": (
        "For users. Forms and rules: [mappings](mapping.md).",
        [
            "kernels_plugins.register_kernel_mapping",
            "kernels_plugins.use_kernel_mapping",
            "kernels_core.Reference",
            "kernels_plugins.LayerRepository",
            "kernels_plugins.LocalLayerRepository",
            "kernels_plugins.LockedLayerRepository",
            "kernels_core.checkpoint_scopes",
            "kernels_core.Mode",
            "kernels_core.STAND_INS",
            "kernels_core.Device",
            "kernels_core.CUDAProperties",
            "kernels_core.ROCMProperties",
        ],
    ),
    "Adapt a kernel": (
        "What they do, and which kernels they refuse: [adapters](adapters.md).",
        [
            "kernels_plugins.opaque",
            "kernels_plugins.reference_backward",
        ],
    ),
    "Load a kernel": (
        "How they are found, trusted and checked: [the Hub](hub.md#kernels-by-name).",
        [
            "kernels_plugins.get_kernel",
            "kernels_plugins.get_local_kernel",
            "kernels_plugins.has_kernel",
            "kernels_plugins.install_kernel",
            "kernels_plugins.get_kernel_variants",
            "kernels_plugins.VariantAccepted",
            "kernels_plugins.VariantRejected",
            "kernels_plugins.get_loaded_kernels",
            "kernels_plugins.LoadedKernel",
            "kernels_plugins.Metadata",
            "kernels_plugins.RepoInfo",
            "kernels_plugins.get_kernel_dep",
        ],
    ),
    "Load a kernel that is locked": (
        "How a project locks its kernels: [locking](locking.md).",
        [
            "kernels_plugins.get_locked_kernel",
            "kernels_plugins.load_kernel",
        ],
    ),
    "Kernelize a model": (
        "What it does and notices: [kernelize a model](kernelize.md).",
        [
            "kernels_core.kernelize",
            "kernels_core.unkernelize",
            "kernels_core.frozen_choice",
            "kernels_core.functions_of",
            "kernels_core.module_paths",
            "kernels_core.FrozenChoice",
            "kernels_core.KernelizeFallback",
            "kernels_core.use_kernelized_func",
        ],
    ),
    "Ask what serves": (
        "How to read the answer: [reading a resolution](mapping.md#reading-a-resolution).",
        [
            "kernels_core.resolve",
            "kernels_core.find_candidates",
            "kernels_core.serving_forward",
            "kernels_core.Resolution",
            "kernels_core.Refusal",
            "kernels_core.Cause",
            "kernels_core.forget",
        ],
    ),
    "Configure": (
        "Files, settings, and who wins: [configuration](configuration.md).",
        [
            "kernels_core.configuration",
            "kernels_core.Configuration",
            "kernels_core.SettingRow",
            "kernels_core.configured",
            "kernels_core.ConfigSection",
        ],
    ),
    "Run without kernels": (
        "For comparisons; to switch kernels off in a whole process, set `DISABLE_KERNEL_MAPPING=1`.",
        [
            "kernels_core.references",
        ],
    ),
    "Look at a model": (
        "How to read, require and compare receipts: [receipt](receipt.md).",
        [
            "kernels_core.receipt",
            "kernels_core.Receipt",
            "kernels_core.ReceiptRow",
            "kernels_core.ReceiptDiff",
            "kernels_core.count_calls",
        ],
    ),
    "Many ranks": (
        "What to set for a job of many processes: [many ranks](ranks.md).",
        [
            "kernels_core.agree",
        ],
    ),
    "Freeze decisions": (
        "Elastic restarts, checkpoints and drift: [decisions](decisions.md).",
        [
            "kernels_core.DecisionFile",
            "kernels_core.FrozenModel",
            "kernels_core.FrozenLayer",
            "kernels_core.FrozenKernel",
            "kernels_core.DecisionDiff",
            "kernels_core.DecisionChange",
            "kernels_core.content_of",
        ],
    ),
    "Verify a kernel": (
        "The trials, and how numbers are judged: [verify](verify.md).",
        [
            "kernels_plugins.verify",
            "kernels_plugins.VerifyReport",
            "kernels_plugins.VerifyRow",
            "kernels_plugins.check_kernel",
            "kernels_plugins.probing",
            "kernels_plugins.Probe",
            "kernels_plugins.ProbeReport",
        ],
    ),
    "Require numbers that do not move": (
        "What each property means, and how to require it: [numerics](numerics.md).",
        [
            "kernels_plugins.numerics",
            "kernels_plugins.register_numerics",
            "kernels_core.NUMERICS",
            "kernels_core.Numeric",
            "kernels_core.WantedNumerics",
        ],
    ),
    "Take a kernel out": (
        "Why kernels are put there: [quarantine](quarantine.md).",
        [
            "kernels_plugins.canary",
            "kernels_core.quarantine",
            "kernels_core.quarantined",
            "kernels_core.release",
            "kernels_core.Quarantined",
        ],
    ),
    "Find the kernel to blame": (
        "The algorithm and its guarantees: [bisect](bisect.md).",
        [
            "kernels_plugins.bisect",
            "kernels_plugins.BisectResult",
            "kernels_plugins.Culprit",
            "kernels_plugins.CulpritSet",
            "kernels_plugins.BisectError",
        ],
    ),
    "Find the first layer that differs": (
        "Two models, or two settings of one, bit by bit: [consistency](consistency.md).",
        [
            "kernels_plugins.consistency",
            "kernels_plugins.ConsistencyReport",
            "kernels_plugins.Drift",
            "kernels_plugins.ConsistencyError",
        ],
    ),
    "Observe": (
        "Their records, and how to switch them on: [observe](observe.md).",
        [
            "kernels_plugins.LogResolutions",
            "kernels_plugins.ProfileRanges",
            "kernels_plugins.PrometheusCounters",
        ],
    ),
    "Write a plugin": (
        "For plugin authors. Start with [write a plugin](write-a-plugin.md); the [hooks](hooks.md) have a page.",
        [
            "kernels_core.hookimpl",
            "kernels_core.strict",
            "kernels_core.switch",
            "kernels_core.setting",
            "kernels_core.warn_once",
            "kernels_core.WarnOnce",
            "kernels_core.Table",
            "kernels_core.TableRow",
            "kernels_core.Tabular",
            "kernels_core.Page",
            "kernels_core.Section",
            "kernels_core.Bars",
            "kernels_core.as_json",
            "kernels_core.write_file",
            "kernels_core.alone_in",
            "kernels_core.read_json",
            "kernels_core.of_format",
            "kernels_core.visible",
            "kernels_core.error_text",
            "kernels_core.held_back",
            "kernels_core.SavedTensors",
            "kernels_core.LayerRequest",
            "kernels_core.Candidate",
            "kernels_core.KernelLayer",
            "kernels_core.Exclusive",
            "kernels_core.LoadedLayer",
            "kernels_core.Layer",
            "kernels_core.decorated_layer",
            "kernels_core.find_layer",
            "kernels_core.Scope",
            "kernels_core.authorize",
            "kernels_core.plugin_manager",
            "kernels_core.PluginManager",
            "kernels_core.PluginMapping",
            "kernels_core.check_registered_mode",
            "kernels_core.device_capability",
            "kernels_core.source_label",
            "kernels_core.require_type",
            "kernels_core.set_module",
        ],
    ),
    "Make a call again": (
        "For plugins that compare kernels with references; [an example](write-a-plugin.md#make-a-call-again).",
        [
            "kernels_core.replay.Call",
            "kernels_core.replay.Outcome",
            "kernels_core.replay.Replay",
            "kernels_core.replay.CONSTANTS",
            "kernels_core.replay.ModelState",
            "kernels_core.replay.RandomSource",
            "kernels_core.replay.RandomStates",
            "kernels_core.replay.random_states",
            "kernels_core.replay.set_random_states",
            "kernels_core.replay.host_random_states",
            "kernels_core.replay.set_host_random_states",
            "kernels_core.replay.numpy_random",
            "kernels_core.replay.same_random_states",
            "kernels_core.replay.kept_random_states",
            "kernels_core.replay.generators_of",
            "kernels_core.replay.is_observed",
            "kernels_core.replay.is_capturing",
            "kernels_core.replay.leaves",
            "kernels_core.replay.mapped",
            "kernels_core.replay.each_tensor",
            "kernels_core.replay.nodes",
            "kernels_core.replay.same_numbers",
        ],
    ),
    "Errors": (
        "What to do about each: [errors](errors.md).",
        [
            "kernels_core.KernelsError",
            "kernels_core.KernelsWarning",
            "kernels_core.ArgumentError",
            "kernels_core.ConfigurationError",
            "kernels_core.ArgumentTypeError",
            "kernels_core.DisagreementError",
            "kernels_core.ScopeError",
            "kernels_core.CanaryError",
            "kernels_core.RequirementError",
            "kernels_core.VerificationError",
            "kernels_core.PluginError",
            "kernels_core.PluginLoadError",
            "kernels_core.PluginConflictError",
            "kernels_core.ResolutionError",
            "kernels_core.NoKernelError",
            "kernels_core.DecisionError",
            "kernels_core.KernelizeError",
            "kernels_core.LoadError",
            "kernels_core.ContractError",
            "kernels_core.UntrustedError",
            "kernels_core.IntegrityError",
        ],
    ),
    "Older names": (
        "Deprecated, as in the library `kernels`.",
        [
            "kernels_plugins.FuncRepository",
            "kernels_plugins.LocalFuncRepository",
            "kernels_plugins.LockedFuncRepository",
            "kernels_plugins.use_kernel_func_from_hub",
        ],
    ),
    "Version": ("", ["kernels_core.__version__"]),
}

HEAD = """\
<!-- Written by docs/generate_reference.py: change the groups there, and the text in the docstrings. -->

# Reference

Every public name of `kernels_core` and `kernels_plugins`. All other names may change without notice. The examples
assume that `torch` and the public names are imported. `kernels_plugins` also exports the names of `kernels_core` that
the library `kernels` has.
"""


def public_names() -> set[str]:
    """Return the public names of both packages; those of the core are not listed again for the plugins."""
    replay = {f"kernels_core.replay.{name}" for name in kernels_core.replay.__all__}
    own = set(kernels_plugins.__all__) - set(kernels_core.__all__)
    core = {f"kernels_core.{name}" for name in kernels_core.__all__} | replay
    return core | {f"kernels_plugins.{name}" for name in own}


def render() -> str:
    """Return the page.

    Raises:
        ValueError: If the groups and the public names are not the same.
    """
    grouped = [name for _, names in GROUPS.values() for name in names]
    wrong = public_names().symmetric_difference(grouped)
    if wrong or len(grouped) != len(set(grouped)):
        raise ValueError(f"in GROUPS, missing, unknown or twice: {', '.join(sorted(wrong)) or 'a name twice'}")
    parts = [HEAD]
    for title, (text, names) in GROUPS.items():
        parts += [f"## {title}", "", *([text, ""] if text else []), *(f"::: {name}\n" for name in names)]
    return "\n".join(parts)


def main(arguments: list[str]) -> int:
    """Write the page, or check it; return the exit code."""
    text = render()
    if PAGE.exists() and PAGE.read_text(encoding="utf-8") == text:
        return 0
    if "--check" in arguments:
        print("docs/reference.md is not current: run python docs/generate_reference.py")
        return 1
    PAGE.write_text(text, encoding="utf-8")
    print("wrote docs/reference.md")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
