"""Plugin `sbom`: the command `kernels-core sbom`."""

from ..commands import adding

kernels_register_commands = adding("sbom.command:sbom")
