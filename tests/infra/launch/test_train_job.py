"""The TrainJob as data: what it is called, how many nodes it has and what it asks of each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nvila.components.contracts.environment import Environment
from nvila.components.contracts.errors import ConfigError, PreflightError
from nvila.components.contracts.site import Site
from nvila.components.runner.work import Work
from nvila.infra.launch import launcher as site
from nvila.infra.launch.trainjob import label, train_job


def work(step: str = "train-1", **settings: Any) -> Work:
    folders = Path("/nvila/store/s/k"), Path("/nvila/runs/run-1")
    return Work(step, "m", "0123456789abcdef" * 4, settings, {}, *folders, Environment())


def job(of: Work, **of_nodes: Any) -> dict[str, Any]:
    return train_job(of, "ab", Path("/nvila/store/s/k/.job/ab/job.json"), Site(**of_nodes))


def test_the_same_work_has_the_same_name_in_every_run() -> None:
    """A name of its own per run would train the same stage twice at once."""
    made = job(work())
    assert made["metadata"]["name"] == "nvila-train-1-0123456789abcdef0123"
    assert made["metadata"]["labels"]["nvila.io/run"] == "run-1"
    assert "kueue.x-k8s.io/queue-name" not in made["metadata"]["labels"]
    assert {"name": "NVILA_STORE", "value": "/nvila/store"} in made["spec"]["trainer"]["env"]


@pytest.mark.parametrize(("gpus", "shape"), [(1, (1, 1)), (4, (1, 4)), (8, (1, 8)), (16, (2, 8)), (128, (16, 8))])
def test_processes_fill_nodes(gpus: int, shape: tuple[int, int]) -> None:
    """Too many nodes wait for each other; too few run out of GPUs."""
    trainer = job(work(run={"gpus": gpus}))["spec"]["trainer"]
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == shape


def test_processes_that_do_not_fill_nodes_are_refused() -> None:
    """Rounding up would train with other batches than the recipe says."""
    with pytest.raises(ConfigError, match=r"train\.gpus.*multiple of 8"):
        job(work(run={"gpus": 12}))


def test_whole_nodes_are_the_runtimes() -> None:
    """Resources of the job's own take the place of the runtime's, and with them its network devices."""
    assert "resourcesPerNode" not in job(work(run={"gpus": 16}))["spec"]["trainer"]
    assert "resourcesPerNode" not in job(work(run={"gpus": 2}), gpus_per_node=0)["spec"]["trainer"]


def test_a_part_of_a_node_asks_for_its_part() -> None:
    """An evaluation on one GPU that asks for the whole node keeps seven idle; one without memory is killed."""
    asked = job(work("evaluate"), gpu_resource="amd.com/gpu", node_cpu="90", node_memory="1.5Ti")["spec"]["trainer"]
    part = {"cpu": "11250m", "memory": "196608Mi", "amd.com/gpu": "1"}
    assert asked["resourcesPerNode"] == {"requests": part, "limits": part}


def test_labels_are_what_kubernetes_takes() -> None:
    """A run with a long name would have no job at all."""
    assert label("a" * 80) == "a" * 63
    assert label("-run one/two-") == "run-one-two"


def test_without_a_cluster_the_message_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`NVILA_SITE` left in a shell makes every local run want a cluster."""
    for name in ("KUBECONFIG", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(PreflightError, match="unset NVILA_SITE"):
        site.run(work())
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    with pytest.raises(PreflightError, match=f"KUBECONFIG={tmp_path}"):
        site.close("r1", Environment.read())


def test_heavy_steps_become_jobs() -> None:
    """A light step as a job waits minutes for a node; pruning without a source, or by chance, has little to do."""
    pruning = {"sources": ["clips"], "prune": {"gpus": 4}}
    heavy = [work("train-5"), work("prune-video", **pruning), work("evaluate")]
    light = [work("prune-video", sources=[]), work("evaluate-quantized"), work("quantize"), work("initialize")]
    light.append(work("prune-video", sources=["clips"], prune={"method": "random"}))
    assert [site.takes(w) for w in heavy] == [True] * 3
    assert [site.takes(w) for w in light] == [False] * 5


def test_pruning_takes_its_gpus_of_one_node(tmp_path: Path) -> None:
    """Eight GPUs in the recipe and one in the job score an eighth as fast; on two nodes the second would do nothing."""
    for gpus, asked in ((1, 1), (4, 4), (16, 8)):
        made = train_job(work("prune-video", sources=["clips"], prune={"gpus": gpus}), "1", tmp_path, Site())
        assert (made["spec"]["trainer"]["numNodes"], made["spec"]["trainer"]["numProcPerNode"]) == (1, asked)
