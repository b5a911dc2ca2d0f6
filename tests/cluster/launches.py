"""Launchers of one piece of work in processes of their own, and the part that the job plays."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kube import wait_for
from launcher import work_from
from telling import training

from nvila.components.contracts.step import Outcome
from nvila.components.runner.handover import write_outcome
from nvila.components.runner.work import Work
from nvila.infra.launch.follow import answers
from nvila.infra.launch.job import Job
from nvila.infra.launch.jobs import Jobs
from nvila.infra.launch.trainjob import job_name

LAUNCHER = Path(__file__).with_name("launcher.py")


@dataclass
class Launch:
    """Starts launchers of one piece of work, and plays the job's part."""

    folder: Path
    jobs: Jobs
    record: dict[str, Any]
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @classmethod
    def of_new_work(cls, folder: Path, jobs: Jobs) -> Launch:
        """Work for two whole nodes that nobody has done before."""
        key = os.urandom(32).hex()
        record = {
            "step": "train-1",
            "module": "nvila.components.train.step",
            "key": key,
            "settings": {"run": {"gpus": 16}},
            "inputs": {},
            "out": str(folder / "store" / "train-1" / key[:20]),
            "run_dir": str(folder / "runs" / "r1"),
        }
        return cls(folder, jobs, record)

    def end(self) -> None:
        """Nothing that was started here outlives the test."""
        for process in self.started:
            process.kill()
            process.wait()

    @property
    def work(self) -> Work:
        return work_from(self.record)

    @property
    def name(self) -> str:
        return job_name(self.work)

    def start(self, run: str = "r1", **environment: str) -> subprocess.Popen[bytes]:
        """A launcher of the pipeline run `run`, in a process of its own; what it prints goes to `log.N`."""
        self.record["run_dir"] = str(self.folder / "runs" / run)
        number = len(self.started)
        arguments = self.folder / f"work-{number}.json"
        arguments.write_text(json.dumps(self.record))
        with (self.folder / f"log.{number}").open("wb") as log:
            command = [sys.executable, str(LAUNCHER), str(arguments)]
            process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | environment)
        self.started.append(process)
        return process

    def said(self, number: int = -1) -> str:
        """What that launcher has printed."""
        return (self.folder / f"log.{range(len(self.started))[number]}").read_text()

    def job(self) -> Job:
        """The job, once it is there."""
        return wait_for(lambda: self.jobs.get(self.name), "there is no job")

    def attached(self, number: int = -1) -> Job:
        """The job, once that launcher follows it."""
        wait_for(lambda: " created in " in self.said(number) or "attached" in self.said(number), self.said(number))
        return self.job()

    def answer(self, **told: Any) -> None:
        """What the job's first node would leave."""
        write_outcome(answers(self.work, self.job()), Outcome(kind="model", result=training(**told)))

    def ends(self, process: subprocess.Popen[bytes], seconds: float = 30) -> int:
        """Exit code of a launcher that ends by itself."""
        return process.wait(seconds)
