"""How long tests wait for something that takes a moment: one variable scales this bound, as that of a whole test."""

from __future__ import annotations

import os

PATIENCE = 0.5 * float(os.environ.get("PYTEST_TIMEOUT", 900))
"""Seconds; half of those until a test counts as hung, so that the message is that of the test."""
