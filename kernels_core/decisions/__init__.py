"""Decisions as values: to compare between ranks, to keep in files."""
