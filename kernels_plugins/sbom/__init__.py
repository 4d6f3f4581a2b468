"""A bill of materials: the code that serves the layers of a model, as CycloneDX."""
