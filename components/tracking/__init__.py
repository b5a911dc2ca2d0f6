"""MLflow: runs, the registry, and the walk back from a served model to its source files."""
