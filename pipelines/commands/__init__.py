"""Commands of `nvila` that need no pipeline."""
