"""What the platform costs around the work: starting, compiling, and skipping what is finished."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from nvila.pipelines.local.forks import put_client, start

SCRATCH = Path("runs/bench/scratch")
"""Keeps its store, so that only the first bench trains the micro recipe."""


def rows() -> list[tuple[str, str, float, float, str]]:
    """Work, unit, baseline, ours, what the baseline is."""
    return [_help(), _compile(), _start(), _skip()]


def _help() -> tuple[str, str, float, float, str]:
    ours = _seconds([sys.executable, "-m", "nvila.pipelines.cli", "--help"])
    plain = _seconds([sys.executable, "-c", "import typer"])
    return "nvila --help", "s", plain, ours, "a Python process that imports typer"


def _compile() -> tuple[str, str, float, float, str]:
    with tempfile.TemporaryDirectory() as folder:
        target = str(Path(folder, "out.yaml"))
        ours = _seconds([sys.executable, "-m", "nvila.pipelines.cli", "compile", target])
        code = (
            "from kfp.compiler import Compiler; from nvila.pipelines.build import build; "
            f"Compiler().compile(build(), {target!r})"
        )
        plain = _seconds([sys.executable, "-c", code])
    return "compile the lifecycle", "s", plain, ours, "KFP's compiler without resources and checks"


def _start() -> tuple[str, str, float, float, str]:
    """A local step that needs torch, transformers and MLflow, up to its first line."""
    source = "def step(): import transformers.models.qwen2.modeling_qwen2, mlflow"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        put_client(folder)
        quiet = "import os, sys; os.dup2(os.open(os.devnull, os.O_WRONLY), 1)"
        imported = "from nvila.pipelines.local import forks; forks.ALWAYS_NEEDED += forks.FOR_WORK"
        server = start(folder, folder, ("-c", f"{quiet}; {imported}; forks.main(sys.argv[1:])"))
        given = json.dumps({"outputs": {"outputFile": str(folder / "output.json")}})
        took = []
        for _ in range(11):
            script = Path(tempfile.mkdtemp(dir=folder), "ephemeral_component.py")
            script.write_text(source)
            words = ["--component_module_path", str(script), "--executor_input", given, "--function_to_execute", "step"]
            took.append(_seconds([str(folder / "python3"), "-m", "kfp.dsl.executor_main", *words], times=1))
        server.terminate()
        server.wait()
        ours = sum(took[1:]) / 10  # the first waits for what all need
    imports = "import kfp.dsl.executor_main, mlflow, torch, transformers.models.qwen2.modeling_qwen2"
    plain = _seconds([sys.executable, "-c", imports])
    return "start a step that works", "s", plain, ours, "a new Python process that imports the same"


def _skip() -> tuple[str, str, float, float, str]:
    """Per skipped step of an unchanged micro run; the baseline does the same in one bare process per step."""
    SCRATCH.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "nvila.pipelines.cli", "run", "micro"]
    for _ in range(2):
        subprocess.run(command, cwd=SCRATCH, check=True, stdout=subprocess.DEVNULL)
    run = (SCRATCH / "runs/latest").resolve()
    steps = [step for step in json.loads((run / "summary.json").read_text())["steps"] if step["cached"]]
    records = [json.loads((run / "steps" / f"{step['name']}.json").read_text()) for step in steps]
    everything = sorted(json.loads(path.read_text())["started"] for path in (run / "steps").glob("*.json"))
    # From the start of one step to the start of the next: what a skipped step takes of the user's time.
    ours = [min(t for t in everything if t > r["started"]) - r["started"] for r in records]
    names = [step["name"] for step in steps]
    began = time.monotonic()
    for name in names:
        _bare(name, run)
    return (
        "skip a finished step",
        "s",
        (time.monotonic() - began) / len(names),
        sum(ours) / len(ours),
        ("a Python process that computes the key and finds the manifest, without KFP"),
    )


def _bare(step: str, run: Path) -> None:
    """Key and look-up of one step in a process of its own."""
    code = (
        "import json, sys; from pathlib import Path\n"
        "from nvila.components.contracts.manifest import Manifest\n"
        "from nvila.components.contracts.keys import content_key\n"
        "from nvila.components.contracts.store import Store\n"
        "status = json.loads(Path(sys.argv[2], 'steps', sys.argv[1] + '.json').read_text())\n"
        "manifest = Manifest.load(status['manifest'])\n"
        "content_key('nvila.components.runner.execute', {}, {n: r.digest for n, r in manifest.inputs.items()})\n"
        "assert Store(Path(manifest.folder).parents[1]).finished(manifest.step, manifest.key)"
    )
    subprocess.run([sys.executable, "-c", code, step, str(run)], check=True)


def _seconds(command: list[str], times: int = 3) -> float:
    """Best wall-clock time of a command."""
    taken = []
    for _ in range(times):
        began = time.monotonic()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ)
        taken.append(time.monotonic() - began)
    return min(taken)
