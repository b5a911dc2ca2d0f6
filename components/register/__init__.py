"""A model version in the registry, with signature, card and lineage."""
