"""Modules of other folders that the night test uses."""

import elsewhere  # noqa: F401
