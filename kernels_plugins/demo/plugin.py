"""Plugin `demo`: the command `kernels-core demo`."""

from ..commands import adding

kernels_register_commands = adding("demo.command:demo")
