"""Lets these tests use the little model of the components' tests."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "components"))
