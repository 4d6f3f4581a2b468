"""Fixtures for the authors of kernel plugins: the import path that documentation gives to them.

The fixtures themselves live in `kernels_plugins.local_hub.testing`.
"""

from ..local_hub.testing import *  # noqa: F403
