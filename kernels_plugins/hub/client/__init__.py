"""Talks to the Hub: revisions, downloads, the cache, and who may be trusted."""
