"""Plugin `oracle`: the command `kernels-core verify`."""

from ..commands import adding

kernels_register_commands = adding("oracle.command:verify_command", "verify")
