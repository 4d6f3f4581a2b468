"""Scopes: blocks in which dispatch may decide otherwise, the frames of their decisions, and the calls made again."""
