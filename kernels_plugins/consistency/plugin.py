"""Plugin `consistency`: the command `kernels-core consistency`."""

from ..commands import adding

kernels_register_commands = adding("consistency.command:compare_models", "consistency")
