"""Plugin `doctor`: the command `kernels-core doctor`."""

from ..commands import adding

kernels_register_commands = adding("doctor.command:doctor")
