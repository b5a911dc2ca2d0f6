"""DAGs, recipes and the command line: composition, no logic of a step."""
