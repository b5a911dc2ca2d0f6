from __future__ import annotations

import subprocess

import pytest

from nvila.components.contracts import progress
from nvila.components.contracts.progress import Progress, waiting_for
from nvila.components.contracts.text import shell_word, visible, visible_lines

HOSTILE = ["\x1b[31mred", "over\rwritten", "\x07", "\x9b2J", "\x85", "abc\u202egnp.exe", "\u2066x\u2069", "\u200f",
"\u2028",
           "\x00", "\x7f", "\u200b", "\ufeff", "\udcff", "\x1b]8;;http://evil\x1b\\link\x1b]8;;\x1b\\"]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_nothing_steers_a_terminal(text: str) -> None:
    """An escape in a file's name moves the cursor, clears the screen, or makes a link of the text."""
    for shown in (visible(text), visible_lines(text), shell_word(text)):
        assert shown.isprintable() and shown.encode("utf-8")
    assert "\\" in visible(text)


@pytest.mark.parametrize(
    "text", ["", "Which digit?", "Größe 3 µm", "数字\u3000七", "می\u200cخواهم", "👩\u200d👧", "1\u00a0000"]
)
def test_writing_of_the_world_stays(text: str) -> None:
    """A question in Persian is no attack."""
    assert visible(text) == text == visible_lines(text)


def test_lines_and_tabs_stay_where_lines_are_shown() -> None:
    """A traceback on one line helps nobody; a name of two lines must not forge a line of a log."""
    assert visible_lines("a\n\tb\x1b") == "a\n\tb\\x1b"
    assert visible("a\n\tb") == "a\\n\\tb"


@pytest.mark.parametrize(
    "text", ["plain", "it's", "$(id)", "`id`", "a b", "-n", "a\nb", "x\x1b[0m'!\\", "\u202e", "\u200b\u00e9"]
)
def test_a_word_of_the_shell_is_this_text_again(text: str) -> None:
    """A command is printed to be pasted: the name must arrive whole, and run nothing."""
    ran = subprocess.run(["bash", "-c", f"printf %s {shell_word(text)}"], capture_output=True, check=True)
    assert ran.stdout.decode() == text


def test_progress_shows_names_as_they_are(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A source's or a file's name comes from the user's data, and the log is read in a terminal."""
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.0)
    Progress("a\x1b[2J\nb", 1).update(1, "note\r")
    waiting_for("c\x07")
    counted, waited = capsys.readouterr().err.splitlines()[-2:]
    assert counted.startswith("a\\x1b[2J\\nb: 1/1 note\\r [") and waited == "c\\x07"


def test_quick_work_is_silent_and_long_work_is_not(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`plan` and `validate` wrote "media files decoded: 20/20 [0 s]" where scripts look for errors; and a step that
    works for hours must not look dead."""
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    quick, long = Progress("quick", 2), Progress("long", 100)
    quick.update(2)
    for _ in range(100):
        clock[0] += 1.0
        long.update(1)
    told = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in told] == ["5/100", "25/100", "45/100", "65/100", "85/100", "100/100"]
