"""Plugin `authoring`: the command `kernels-core new-plugin`."""

from ..commands import adding

kernels_register_commands = adding("authoring.command:new_plugin")
