"""Where modules of other folders are found that the night test uses."""

import sys
from pathlib import Path

for name in ("cluster", "charts"):
    sys.path.append(str(Path(__file__).parents[1] / name))
