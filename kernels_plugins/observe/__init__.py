"""Decisions and calls of the dispatcher, for logs, profilers and metrics; off until switched on."""
