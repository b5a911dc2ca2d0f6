"""Where the night test's modules are found."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "cluster"))
