"""Step `report`: one self-contained HTML page about this run. It runs last and always, whatever happened before."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from nvila.components.contracts.environment import Environment
from nvila.components.contracts.manifest import Manifest, write_atomic
from nvila.components.contracts.recipe.section import Section
from nvila.components.contracts.step import Outcome
from nvila.components.contracts.steps import REPORT
from nvila.components.contracts.text import duration
from nvila.components.report.ending import ending
from nvila.components.report.flow import css
from nvila.components.report.page import context
from nvila.components.runner.execute import Place
from nvila.components.runner.status import Run
from nvila.components.tracking.redact import tell

PAGE = "report.html"
HERE = Path(__file__).parent


class Settings(Section):
    """What KFP says of the run (see `ending`)."""

    state: str = ""
    message: str | None = None


def run(settings: Settings, inputs: Mapping[str, Manifest], out: Path, here: Environment) -> Outcome:
    """Write `report.html` into `out` and into the folder of the run, whose status files it reads."""
    run_dir = Place.of(here).run_dir
    found = Run.read(run_dir, alive=(REPORT,))
    write_atomic(out / PAGE, render(found))
    shutil.copyfile(out / PAGE, run_dir / PAGE)
    ended = ending(found, settings.state, settings.message)
    return Outcome(kind="report", result=ended, files=(PAGE,))


def render(run: Run) -> str:
    """The page. Every text from outside is escaped and without secrets or signs that turn the direction of writing.

    The page may load nothing and run nothing (its own CSP says so).
    """
    import jinja2
    from markupsafe import Markup

    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        finalize=lambda value: tell(value) if type(value) is str else value,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {
        "percent": lambda value: f"{100 * value:.1f}%",
        "points": lambda value: f"{100 * value:+.1f}",
        "duration": duration,
        "bytes": _bytes,
        "css": css,
        "ours": Markup,
    }
    style = Markup((HERE / "style.css").read_text(encoding="utf-8"))
    return templates.get_template("page.html").render(style=style, **context(run))


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
