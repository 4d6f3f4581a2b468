"""Decisions as log records with fields."""

from __future__ import annotations

import logging

from kernels_core import Resolution, hookimpl

logger = logging.getLogger("kernels_core")


class LogResolutions:
    """A plugin that logs every decision that is put to use, and every refusal on the way.

    The logger is `kernels_core`: decisions have the level `INFO`, refusals `WARNING`. All records have the fields
    `event` (`"resolution"` or `"refusal"`), `layer`, `device`, `mode`, `origin` and `plugin`; refusals also
    `candidate`, `reason` and `cause`. There `origin` is the origin of the kernel that serves instead,
    and `plugin` the one that offered the candidate.

    Example:
        >>> plugin_manager().register(LogResolutions(), "log")
        'log'
        >>> plugin = plugin_manager().unregister("log")
    """

    @hookimpl
    def kernels_resolved(self, resolution: Resolution) -> None:
        """Log a decision."""
        request = resolution.request
        fields = {
            "event": "resolution",
            "layer": request.layer_name,
            "device": str(request.device),
            "mode": request.mode_text.replace("inference", "every") if resolution.every_mode else request.mode_text,
            "origin": resolution.origin,
            "plugin": resolution.plugin,
        }
        note = f" ({resolution.note})" if resolution.note else ""
        logger.info("%s: %s%s", resolution.subject, resolution.origin, note, extra=fields)
        for refusal in resolution.refusals:
            more = {
                "event": "refusal",
                "plugin": refusal.plugin,
                "candidate": refusal.candidate.label if refusal.candidate else "",
                "reason": refusal.reason,
                "cause": refusal.cause.name.lower(),
            }
            logger.warning("%s: refused %s", resolution.subject, refusal, extra={**fields, **more})
