"""The hooks that plugins implement: one card each, and nothing else.

Mark an implementation with `hookimpl`. It may take any of the listed arguments, by name. Each card names the kind of
its hook: *first result* (the first that answers decides), *collect* (all answers are used), *veto* (a reason refuses,
None lets pass), *tell* (no answer). An exception in a hook names the plugin and does not stop the others: it refuses
the candidate (*veto*, `kernels_load_layer`), or is warned of once (all others; `KERNELS_STRICT=1` raises it).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pluggy

from .resolution import Candidate, Exclusive, KernelLayer, LayerRequest, LoadedLayer, Refusal, Resolution
from .settings.section import ConfigSection

if TYPE_CHECKING:
    import typer

PROJECT = "kernels_core"

hookimpl = pluggy.HookimplMarker(PROJECT)
"""Marks a function as the implementation of the hook that has its name."""

hookspec = pluggy.HookspecMarker(PROJECT)


@hookspec(firstresult=True)
def kernels_resolve_forward(request: LayerRequest) -> Resolution | None:
    """Answer the whole question: layer name, device and mode in, implementation out.

    Kind: first result. Called: once per layer, device and scope, off the hot path, for both modes of a call
    (`request.modes`); once per mode where the answer depends on it. The core's own answer comes last and
    runs the stages below (find, authorize, load, check); a downstream library overrides it with
    `hookimpl(tryfirst=True)` or wraps it with `hookimpl(wrapper=True)`.

    Args:
        request: The question. Where it is about two modes, reading `request.mode` tells the core that the
            answer depends on the mode: it is for that mode only, and the question is asked again for the other.

    Returns:
        The decision, or None to leave it to the next plugin. It may depend on nothing but the
        request, for it is remembered until a mapping or a plugin changes.

    Example:
        ```python
        @hookimpl(wrapper=True)
        def kernels_resolve_forward(request):
            resolution = yield
            audit_log.append(str(resolution))
            return resolution
        ```

    Used by: the resolver.
    """


@hookspec
def kernels_find_candidates(request: LayerRequest) -> Sequence[Candidate | Refusal | Exclusive] | None:
    """Offer implementations for a layer.

    Kind: collect. Called: once per decision; once more for each mode where an answer depends on it. No I/O here:
    `kernels_load_layer` is for that.

    Args:
        request: The question. `request.scopes` are the payloads of the open scopes. Where it is about two
            modes (`request.modes`), reading `request.mode` tells the core that the answer depends on the mode.

    Returns:
        Candidates, best first, or None. They are ranked with those of other plugins by tier, then
        priority, then plugin name. A `Refusal` of a candidate reports one that is for other devices or modes, so that
        the user learns why it does not serve. An `Exclusive` leaves out the offers of lower tiers.

    Example:
        ```python
        @hookimpl
        def kernels_find_candidates(request):
            if request.layer_name == "RMSNorm" and request.device.type == "cuda":
                return [Candidate(FastRMSNorm, priority=5)]
        ```

    Used by: the resolver; implemented by the plugins `mapping` and `torch`.
    """


@hookspec(firstresult=True)
def kernels_rank_candidates(request: LayerRequest, candidates: Sequence[Candidate]) -> Sequence[Candidate] | None:
    """Choose the candidates to try, and their order.

    Kind: first result. Called: once per decision, after the candidates of all plugins were ranked; once more for each
    mode where an answer depends on it. No I/O here.

    Args:
        request: The question, as for `kernels_find_candidates`.
        candidates: All that is offered, the first to be tried first.

    Returns:
        The candidates to try, in this order, or None to leave them as they are. They may be given ones or others;
        `Candidate.limit` keeps one to a part of the calls, and those after it serve the rest.

    Example:
        ```python
        @hookimpl
        def kernels_rank_candidates(request, candidates):
            return sorted(candidates, key=lambda candidate: candidate.plugin != "acme")
        ```

    Used by: the resolver; implemented by the plugin `choice`.
    """


@hookspec
def kernels_authorize(request: LayerRequest, candidate: Candidate) -> str | None:
    """Refuse a candidate by policy, before anything of it is fetched or imported.

    Kind: veto; an exception refuses too. Called: for each candidate in turn, before it is loaded; and for all code that
    loading it would run besides: for the plugin `hub`, each repository at its commit, after redirects, and each
    dependency. The same where a program loads a kernel by itself, with `get_kernel` and the like. See `authorize`.

    Args:
        request: The question. Where a program loads a kernel by itself, `layer_name` is empty and `layer` is None.
        candidate: The offer; or one whose source is a `RepoInfo` (`repo_id`, and the commit as `revision`), or the
            `Path` of a folder.

    Returns:
        None to let pass, or the reason to refuse.

    Example:
        ```python
        @hookimpl
        def kernels_authorize(request, candidate):
            repo_id = getattr(candidate.source, "repo_id", None)
            if repo_id is not None and not repo_id.startswith("acme/"):
                return "our policy allows kernels from acme only"
        ```

    Used by: the resolver, and the plugin `hub`.
    """


@hookspec(firstresult=True)
def kernels_load_layer(request: LayerRequest, source: object) -> KernelLayer | LoadedLayer | None:
    """Turn a source into a layer class or function; this is where I/O happens.

    Kind: first result. Called: after the source was authorized, by one thread at a time; once per source and
    type of device, except for classes and functions, of which nothing is remembered.
    An exception is the reason to refuse the candidate.

    A `ConnectionError` or `TimeoutError` (also a kind of `LoadError` that is one) says that the source may be there
    later: it is loaded again in the background, for a request without a layer and without scopes.

    Args:
        request: The question that made the source needed.
        source: What a candidate offers.

    Returns:
        An `nn.Module` class, a function, or either in a `LoadedLayer` that says where it came
        from; None if the source is not of a kind that this plugin knows.

    Example:
        ```python
        @hookimpl
        def kernels_load_layer(request, source):
            if isinstance(source, Path):
                return runpy.run_path(str(source))[request.layer_name]
        ```

    Used by: the resolver; implemented by the plugins `mapping`, `hub` and `adapters`.
    """


@hookspec
def kernels_check_layer(request: LayerRequest, candidate: Candidate, layer: KernelLayer) -> str | None:
    """Refuse a loaded layer, after the core's own contract check.

    Kind: veto; an exception refuses too. Called: for each layer, device and mode that it would serve.

    Args:
        request: The question.
        candidate: The offer.
        layer: The loaded class or function.

    Returns:
        None to let pass, or the reason to refuse.

    Example:
        ```python
        @hookimpl
        def kernels_check_layer(request, candidate, layer):
            if not layer.__doc__:
                return "kernels without documentation are not used here"
        ```

    Used by: the resolver.
    """


@hookspec
def kernels_resolved(resolution: Resolution) -> None:
    """Learn of a decision.

    Kind: tell. Called: when a decision is put to use, once per layer, device, scope and, where it matters, mode.

    Args:
        resolution: The decision with every refusal on the way.

    Example:
        ```python
        @hookimpl
        def kernels_resolved(resolution):
            logger.info("%s", resolution)
        ```

    Used by: the resolver.
    """


@hookspec
def kernels_wrap_forward(resolution: Resolution) -> Callable[[Callable[..., Any]], Callable[..., Any]] | None:
    """Put something around the calls that a decision is used for: count, time, compare, name.

    Kind: collect; the decorators are applied in turn. Called: when a decision is put to use for eager
    calls, also one for the reference, and not again before something changes: call `forget()` when you
    want to wrap, or do not any more. Costs nothing where no plugin answers. Compiled calls are not wrapped.

    Args:
        resolution: The decision.

    Returns:
        A decorator for the forward, or None. What it makes is called as the forward is: with the module
        first, if the layer is a class. It must return what the forward returns, also `NotImplemented`: then
        another kernel serves the call, which has a decision of its own. An exception of its own reaches the
        caller, and the kernel is not blamed for it.

    Example:
        ```python
        @hookimpl
        def kernels_wrap_forward(resolution):
            return lambda forward: functools.wraps(forward)(Timed(forward, resolution.origin))
        ```

    Used by: the dispatcher and `kernelize`.
    """


@hookspec
def kernels_kernel_failed(request: LayerRequest, candidate: Candidate, error: BaseException) -> None:
    """Learn that a kernel could not be loaded.

    Kind: tell. Called: once per source that failed.

    Args:
        request: The question that made it needed.
        candidate: The offer.
        error: What was raised.

    Example:
        ```python
        @hookimpl
        def kernels_kernel_failed(request, candidate, error):
            metrics["kernel_failures"] += 1
        ```

    Used by: the resolver.
    """


@hookspec
def kernels_mapping() -> Mapping[str, Any] | None:
    """Offer a whole mapping: the way for a plugin package to bring its kernels.

    Kind: collect. Called: once, when the plugin `mapping` first needs it, and again after plugins were registered or
    unregistered. A plugin with an integer attribute `kernels_priority` is asked before those with a smaller one.

    Returns:
        `{layer name: {device: source | [sources in order] | {Mode: source}}}`, or None; see `register_kernel_mapping`.

    Example:
        ```python
        kernels_priority = 10

        @hookimpl
        def kernels_mapping():
            return {"SiluAndMul": {"cuda": FastSiluAndMul}}
        ```

    Used by: the plugin `mapping`.
    """


@hookspec
def kernels_adoption_rules() -> Sequence[object] | None:
    """Offer rules by which `adopt` recognises layers in the classes of an undecorated model.

    Kind: collect. Called: each time a model is adopted without rules of its own.

    Returns:
        Rules (`kernels_plugins.Rule`), which are tried in this order, or None.

    Example:
        ```python
        @hookimpl
        def kernels_adoption_rules():
            return [Rule("our norm", "RMSNorm", ("acme.*Norm",), oracle=rms_norm, inputs=hidden_states)]
        ```

    Used by: `adopt`; implemented by the plugin `adopt`.
    """


@hookspec
def kernels_packs() -> Mapping[str, Callable[..., object]] | None:
    """Offer packs: kernels that serve only where a mapping asks for them, by a source such as `pack:NAME`.

    Kind: collect. Called: when a mapping that names a pack is parsed, and when a kernel of a pack is loaded.

    Returns:
        For each name, a function of a layer name and a `torch.device`. It returns what `kernels_load_layer` does, and
        None for a layer that the pack does not know. Called once per layer name and type of device, it may import
        what it needs; an exception is the reason to refuse the candidate.

    Example:
        ```python
        @hookimpl
        def kernels_packs():
            def load(layer_name, device):
                import acme  # only where it is asked for

                return acme.layers.get(layer_name)

            return {"acme": load}
        ```

    Used by: the plugin `mapping`; implemented by the plugins `torch`, `triton`, `liger` and `inductor`.
    """


@hookspec
def kernels_configuration() -> Mapping[str, Callable[[ConfigSection], object]] | None:
    """Offer functions that check settings of the configuration file: those in the plugin's own table.

    Kind: collect. Called: when a setting of a plugin is first needed, and again after `forget()`, if there is a file
    with settings of plugins.

    Returns:
        For each setting, a function of its `ConfigSection`. The plugin `acme` owns the keys of
        `[tool.kernels-core.plugin.acme]`, and `configured("plugin.acme.level")` is what the function for `level` has
        returned. A setting that it cannot use raises `section.error(...)`: then nothing of the file applies. It does no
        slow work: a module that a setting names is imported where it is needed.

    Example:
        ```python
        @hookimpl
        def kernels_configuration():
            return {"level": lambda section: section.as_number()}
        ```

    Used by: `configured`; implemented by the plugins `mapping`, `adopt`, `hub`, `canary`, `numerics` and `observe`.
    """


@hookspec
def kernels_settings_in_code() -> Mapping[str, str] | None:
    """Show the settings that code has made, named as in the configuration file, as text.

    Kind: collect. Called: when settings are shown, as by `kernels-core config`.

    Example:
        ```python
        @hookimpl
        def kernels_settings_in_code():
            return {"level": "3"}
        ```

    Used by: `configuration`; implemented by the plugins `mapping`, `canary`, `choice` and `numerics`.
    """


@hookspec
def kernels_register_commands(cli: typer.Typer) -> None:
    """Add subcommands to the command line `kernels-core`.

    Kind: tell. Called: once, when the command line starts.

    Args:
        cli: The application.

    Example:
        ```python
        @hookimpl
        def kernels_register_commands(cli):
            @cli.command()
            def greet() -> None:
                print("hello")
        ```

    Used by: the command line; implemented by each plugin that has commands.
    """
