"""What every step agrees on: exit codes, errors, manifests, content keys, the store and the recipe (pydantic only)."""
