"""Adoption: the layers of a model that nobody decorated are made to dispatch."""
