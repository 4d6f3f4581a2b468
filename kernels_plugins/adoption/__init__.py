"""Adoption: the layers of an undecorated model are made to dispatch."""
