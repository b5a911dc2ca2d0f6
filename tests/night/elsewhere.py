"""Imported for what it does: modules of other folders of tests are found from here on."""

import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path += map(str, (TESTS, *(TESTS / name for name in ("charts", "cluster", "components"))))
