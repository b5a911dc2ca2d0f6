"""The recipe, one module per section, so that a step depends only on the settings it reads."""
