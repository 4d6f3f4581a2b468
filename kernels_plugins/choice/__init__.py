"""Choice: which candidate serves a layer for which shapes, measured on this machine."""
