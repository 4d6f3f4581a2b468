"""Plugin `bisect`: the command `kernels-core bisect`."""

from ..commands import adding

kernels_register_commands = adding("bisect.command:bisect_model", "bisect")
