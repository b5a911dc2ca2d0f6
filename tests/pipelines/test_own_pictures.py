"""The way of somebody with 60 pictures of her own, by the README's words: look, run, ask, read what was set aside."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from nvila.components.contracts import jsonlines

pytestmark = [pytest.mark.slow, pytest.mark.turns(3, 1)]

README = Path(__file__).parents[2] / "README.md"
COLOURS = {"Red": (220, 40, 40), "Green": (40, 180, 60), "Blue": (40, 60, 220), "Light grey": (200, 200, 200)}
SMALL = """
quantize: {through_vllm: false, gate: {max_loss: 0.5, least_questions: 10}}
rollout: {target: none}
"""
"""A dozen held-out questions tell little: what the model learns is not asked here, and no server is wanted."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Her pictures, with names as a camera and a person give them; JSON lines; no labels, no captions."""
    home = tmp_path_factory.mktemp("her own")
    root = home / "data" / "plates"
    (root / "my photos").mkdir(parents=True)
    records = []
    for i in range(60):
        name, colour = f"my photos/IMG {i:02d}.JPG", list(COLOURS)[i % 4]
        picture = Image.new("RGB", (160, 120), (i, 20, 30))
        ImageDraw.Draw(picture).rectangle((10 + i, 30, 80 + i, 90), fill=COLOURS[colour])
        picture.save(root / name)
        asked = ["<image>\nWhich colour is the box?", "Which colour is the box? <image>", "What has <image>?"][i % 3]
        turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": f"{colour}."}]
        records.append({"id": i, "image": name, "conversations": turns})
    records[7] = {"image": "my photos/IMG 07.JPG", "conversations": "red"}
    texts = [
        {"messages": [{"role": "user", "content": f"{i}+1?"}, {"role": "assistant", "content": f"{i + 1}"}]}
        for i in (1, 2)
    ]
    (root / "sft.jsonl").write_text("\n".join(map(json.dumps, records[:48] + texts)), encoding="utf-8-sig")
    (root / "heldout.jsonl").write_text("\r\n".join(map(json.dumps, records[48:])))
    (recipe,) = re.findall(r"```yaml\n(.*?)```", README.read_text(), flags=re.DOTALL)
    lines = [line.removeprefix("   ") for line in recipe.split("\n")]
    text = "\n".join(lines).replace(", plates.captions: 0.5", "").replace("plates.captions", "plates.sft")
    for stage, passes in enumerate((2, 2, 16, 10, 8), 1):
        text = re.sub(rf"(train-{stage}: {{data: {{plates.sft: )\d+(}}}})", rf"\g<1>{passes}}}, batch: 8}}", text)
    gate = "gate: {min_accuracy: {plates: 0.5}"
    assert gate in text
    modest = "gate: {min_accuracy: {plates: 0}, above_question_only: false, least_questions: 10"
    (home / "mine.yaml").write_text(text.replace(gate, modest) + SMALL)
    return home


def nvila(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "nvila.pipelines.cli", *args]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)


def test_from_pictures_to_answers(folder: Path) -> None:
    """A user needed five refusals before a first good run; each of them was a default or a message that misled."""
    looked = nvila(folder, "plan", "mine.yaml", "--no-cluster")
    assert looked.returncode == 0, looked.stdout + looked.stderr
    assert "1 would go to quarantine" in looked.stdout

    checked = nvila(folder, "validate", "mine.yaml")
    assert checked.returncode == 0, checked.stderr
    assert "sft 49 of 50" in checked.stdout and "`conversations` must be a list of turns" in checked.stdout

    ran = nvila(folder, "run", "mine.yaml")
    assert ran.returncode == 0, ran.stdout[-5000:]
    summary = json.loads((folder / "runs/latest/summary.json").read_text())
    assert summary["accuracy"]["plates"]["full"]["n"] == 12

    (line,) = jsonlines.whole(Path(summary["paths"]["quarantine"]))
    assert line["reason"] == "bad_conversation" and line["line"] == 7
    assert re.search(r"^quarantine +\S*quarantine.jsonl", ran.stdout, re.MULTILINE), ran.stdout

    picture = "data/plates/my photos/IMG 48.JPG"
    answered = nvila(folder, "infer", "plates/1", "--image", picture, "Which colour is the box?")
    assert answered.returncode == 0, answered.stderr
    assert answered.stdout.strip()
