"""Locks: the commit and the hashes of each kernel that a project depends on."""
