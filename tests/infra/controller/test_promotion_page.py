"""The state machine in docs/promotion.md is the controller's own."""

from pathlib import Path

from nvila.infra.controller.page import PAGE, TABLES
from nvila.pipelines.show.readme import fill

ROOT = Path(__file__).parents[3]


def test_the_page_shows_the_rules_of_the_code() -> None:
    """Whoever reads it at night acts by it: a rule that has moved on sends them the wrong way."""
    text = (ROOT / PAGE).read_text(encoding="utf-8")
    assert fill(text, TABLES) == text, "`make docs`, then look at the diff"
