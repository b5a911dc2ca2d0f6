"""The launcher against a real API server with Kubeflow Trainer's resources; the job's status is written by hand."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from kube import ApiServer, default_account, service_account, wait_for, write_kubeconfig
from launches import Launch

from nvila.components.contracts.environment import Environment
from nvila.components.contracts.errors import ConfigError, PreflightError, Rejected
from nvila.components.contracts.site import Site
from nvila.components.kube.cluster import Cluster
from nvila.components.kube.connect import connect
from nvila.components.kube.requests import MERGE, Patience, Requests
from nvila.components.runner.handover import write_verdict
from nvila.infra.launch import launcher as site
from nvila.infra.launch.follow import answers, obtain
from nvila.infra.launch.job import Job
from nvila.infra.launch.jobs import ADVICE, JOBSET_LABEL, TRAIN_JOB, Jobs
from nvila.infra.launch.trainjob import KEY_LABEL, QUEUE_LABEL, RUN_LABEL, train_job

SetStatus = Callable[..., None]


def test_the_api_server_keeps_every_field_of_the_job(cluster: Cluster, launch: Launch) -> None:
    """A field that the resource does not have is dropped without a word, and the job runs otherwise than asked."""
    nodes = Site(queue="research")
    job = obtain(launch.jobs, launch.work, nodes, 0)
    wanted = train_job(launch.work, job.attempt, _assignment(launch), nodes)
    kept = cluster.get(TRAIN_JOB, job.name) or {}
    assert kept["spec"] == wanted["spec"] | {
        key: kept["spec"][key] for key in ("managedBy", "suspend") if key in kept["spec"]
    }
    assert kept["metadata"]["labels"] == wanted["metadata"]["labels"]
    assert kept["metadata"]["labels"][QUEUE_LABEL] == "research"


def test_a_job_that_the_api_refuses_is_an_error_of_the_settings(cluster: Cluster, launch: Launch) -> None:
    """Asking again would go on for ever."""
    body = train_job(launch.work, "0", Path("/job.json"), Site())
    body["spec"]["trainer"]["numNodes"] = "two"
    with pytest.raises(ConfigError, match="numNodes"):
        cluster.create(TRAIN_JOB, body)


def test_a_complete_job_gives_its_outcome_without_ever_running(launch: Launch, set_status: SetStatus) -> None:
    """A job that Kueue resumes may never show that it runs: whoever waits for that waits for ever."""
    process = launch.start()
    launch.attached()
    set_status(launch.name, "Suspended", message="waiting for quota of flavor h100")
    progress = launch.work.run_dir / "progress" / "train-1.json"
    wait_for(lambda: progress.exists() and "quota" in progress.read_text(), "nobody is told that the job is queued")
    launch.answer(final_loss=1.5)
    set_status(launch.name, "!Suspended", "Complete")
    assert launch.ends(process) == 0, launch.said()
    assert '"final_loss": 1.5' in launch.said()


def test_a_failed_job_is_final_for_its_run_only(launch: Launch, set_status: SetStatus) -> None:
    """A retry that makes the job again spends the nodes a second time on what is known; a new run must not be stuck."""
    process = launch.start()
    first = launch.attached()
    write_verdict(answers(launch.work, first), 0, Rejected("the data is unfit"))
    set_status(launch.name, "Failed")
    assert launch.ends(process) == 3
    assert "Rejected: the data is unfit" in launch.said()
    assert launch.ends(launch.start()) == 3, launch.said()
    assert launch.job().uid == first.uid
    process = launch.start(run="r2")
    second = launch.attached()
    assert second.uid != first.uid
    launch.answer(steps=2)
    set_status(launch.name, "Complete")
    assert launch.ends(process) == 0, launch.said()


def test_a_job_whose_pod_was_killed_says_how(launch: Launch, set_status: SetStatus, admin: Requests) -> None:
    """A pod that runs out of memory leaves no word of its own; `the job failed` helps nobody."""
    process = launch.start()
    launch.attached()
    pod = _pod(admin, launch, "train-1-node-0-1", index="1")
    ended = {"exitCode": 137, "reason": "OOMKilled", "finishedAt": "2026-01-01T00:00:00Z"}
    _pod_status(admin, pod, {"phase": "Failed", "containerStatuses": [_container({"terminated": ended})]})
    set_status(launch.name, "Failed", message="jobset failed")
    assert launch.ends(process) == 1
    for part in ("train-1-node-0-1", "OOMKilled", "137", "jobset failed", "memory"):
        assert part in launch.said()


def test_what_the_pods_wait_for_is_shown(launch: Launch, admin: Requests) -> None:
    """A wrong image name looks like a long queue for as long as nobody asks the pods."""
    launch.start()
    launch.attached()
    pod = _pod(admin, launch, "train-1-node-0-0", index="0")
    waiting = {"reason": "ImagePullBackOff", "message": "no such image"}
    _pod_status(admin, pod, {"phase": "Pending", "containerStatuses": [_container({"waiting": waiting})]})
    wait_for(lambda: "ImagePullBackOff: no such image" in launch.said(), launch.said())


def test_a_deleted_job_is_not_made_again(launch: Launch) -> None:
    """Somebody took the nodes away on purpose; bringing the job back would take them again."""
    process = launch.start()
    job = launch.attached()
    launch.jobs.delete(job)
    assert launch.ends(process) == 2
    assert "Cancelled" in launch.said() and "deleted" in launch.said()
    assert launch.jobs.get(launch.name) is None


def test_two_launchers_share_one_job(launch: Launch, set_status: SetStatus) -> None:
    """Two jobs on one folder write over each other's checkpoints."""
    both = [launch.start(), launch.start()]
    uids = {launch.attached(number).uid for number in (0, 1)}
    assert len(uids) == 1
    launch.answer(steps=3)
    set_status(launch.name, "Complete")
    assert [launch.ends(process) for process in both] == [0, 0], launch.said(0) + launch.said(1)
    assert launch.said(0).count(" created in ") + launch.said(1).count(" created in ") == 1


def test_a_name_that_is_taken_by_other_work_is_an_error(launch: Launch) -> None:
    """Attaching by name alone would pass off another model as this one."""
    body = train_job(launch.work, "0", Path("/job.json"), Site())
    body["metadata"]["labels"][KEY_LABEL] = "another"
    launch.jobs.create(body)
    with pytest.raises(ConfigError, match="other work"):
        obtain(launch.jobs, launch.work, Site(), 0)


def test_a_killed_launcher_finds_its_job_again(launch: Launch, set_status: SetStatus) -> None:
    """A lost launcher pod must cost nothing: neither the job nor a second one beside it."""
    first = launch.start()
    uid = launch.attached().uid
    first.kill()
    first.wait()
    second = launch.start()
    assert launch.attached().uid == uid
    launch.answer(steps=4)
    set_status(launch.name, "Complete")
    assert launch.ends(second) == 0, launch.said()
    assert len(launch.jobs.find(f"{RUN_LABEL}=r1")) == 1


def test_what_was_complete_before_the_launcher_came_back_counts(launch: Launch, set_status: SetStatus) -> None:
    """The job may end while nobody looks."""
    first = launch.start()
    launch.attached()
    first.kill()
    launch.answer(steps=5)
    set_status(launch.name, "Complete")
    assert launch.ends(launch.start()) == 0, launch.said()
    assert '"steps": 5' in launch.said()


def test_a_complete_job_with_nothing_to_show_is_made_anew(launch: Launch, set_status: SetStatus) -> None:
    """Someone who has removed the folder from the store could never have the work done again."""
    obtain(launch.jobs, launch.work, Site(), 0)
    old = launch.job().uid
    set_status(launch.name, "Complete")
    launch.start()
    assert launch.attached().uid != old


def test_another_run_takes_a_running_job_over(launch: Launch) -> None:
    """The end of the first run would cancel what the second one waits for."""
    launch.start(run="r1")
    launch.attached()
    launch.start(run="r2")
    launch.attached()
    assert launch.job().run == "r2"


def test_a_stopped_step_cancels_its_job(launch: Launch) -> None:
    """A terminated pipeline run would hold the nodes for days."""
    process = launch.start()
    launch.attached()
    process.send_signal(signal.SIGTERM)
    assert launch.ends(process) == 75
    assert "cancelled" in launch.said()
    wait_for(lambda: launch.jobs.get(launch.name) is None, "the job goes on")


def test_a_step_whose_pod_is_moved_leaves_its_job_alone(launch: Launch, admin: Requests) -> None:
    """Draining the node of a small waiting pod must not end training on sixteen other nodes."""
    pod = _pod(admin, launch, "the-step", index=None)
    moved = {"type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI"}
    _pod_status(admin, pod, {"conditions": [moved]})
    process = launch.start(KUBERNETES_SERVICE_HOST="in-a-pod", HOSTNAME="the-step")
    uid = launch.attached().uid
    process.send_signal(signal.SIGTERM)
    assert launch.ends(process) == 75
    assert "goes on" in launch.said()
    assert launch.job().uid == uid
    assert not launch.job().deleting


def test_the_end_of_a_run_cancels_its_jobs_only(launch: Launch, set_status: SetStatus) -> None:
    """The exit task cleans up after steps that were killed outright, and must not touch other runs."""
    names = []
    for run, key in (("r1", "a" * 64), ("r1", "b" * 64), ("r2", "c" * 64)):
        launch.record |= {
            "key": key,
            "run_dir": str(launch.folder / "runs" / run),
            "out": str(launch.folder / "s" / key),
        }
        names.append(obtain(launch.jobs, launch.work, Site(), 0).name)
    set_status(names[1], "Complete")
    site.close("r1", Environment.read())
    wait_for(lambda: launch.jobs.get(names[0]) is None, "the job goes on")
    assert launch.jobs.get(names[1]) and launch.jobs.get(names[2])


def test_a_job_that_is_taken_over_meanwhile_is_not_cancelled(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between looking which jobs a run has and deleting them, another run may have begun to wait for one."""
    first = obtain(launch.jobs, launch.work, Site(), 0)
    find = Jobs.find

    def found_and_taken(jobs: Jobs, labels: str) -> list[Job]:
        found = find(jobs, labels)
        launch.jobs.take_over(launch.name, "r2")
        return found

    monkeypatch.setattr(Jobs, "find", found_and_taken)
    site.close("r1", Environment.read())
    assert launch.job().uid == first.uid
    assert not launch.job().deleting


def test_a_job_that_is_cancelled_meanwhile_is_made_anew(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that took over a job in the moment of its end failed for good: somebody had deleted its job."""
    first = obtain(launch.jobs, launch.work, Site(), 0)
    take_over = Jobs.take_over

    def too_late(jobs: Jobs, name: str, run: str) -> None:
        jobs.delete(first)
        take_over(jobs, name, run)

    monkeypatch.setattr(Jobs, "take_over", too_late)
    launch.record["run_dir"] = str(launch.folder / "runs" / "r2")
    second = obtain(launch.jobs, launch.work, Site(), 0)
    assert second.uid != first.uid


def test_without_rights_the_message_names_the_role(
    launch: Launch, admin: Requests, namespace: str, kubeconfig: Path
) -> None:
    """A forbidden request would otherwise be repeated, or end as a traceback."""
    token = service_account(admin, namespace, "nobody", [])
    stranger = _as(launch, kubeconfig, namespace, token, Patience(denied_seconds=0.5))
    with pytest.raises(PreflightError, match=r"forbidden.*nvila-launcher"):
        obtain(stranger, launch.work, Site(), 0)


def test_a_cluster_without_trainer_is_named_as_such(admin: Requests, namespace: str) -> None:
    """`404 page not found` tells nobody what to install."""
    with pytest.raises(PreflightError, match="Install Kubeflow Trainer"):
        admin.ask("GET", f"/apis/not-trainer.kubeflow.org/v1alpha1/namespaces/{namespace}/trainjobs")


def test_a_missing_namespace_is_named(crds: Path, admin: Requests, launch: Launch) -> None:
    """It is a 404 like a missing job, and must not be taken for one."""
    body = train_job(launch.work, "0", Path("/job.json"), Site())
    with pytest.raises(PreflightError, match="no-such-namespace"):
        admin.ask("POST", "/apis/trainer.kubeflow.org/v1alpha1/namespaces/no-such-namespace/trainjobs", body=body)


def test_an_api_server_that_dies_does_no_harm(
    launch: Launch, set_status: SetStatus, kubeconfig: Path, api_server: ApiServer
) -> None:
    """An upgrade of the control plane would end a training job of days, or start a second one."""
    process = launch.start()
    uid = launch.attached().uid
    old = launch.job()
    time.sleep(1)  # the watch is open
    api_server.kill()
    wait_for(lambda: "asking again" in launch.said(), "the launcher has not noticed")
    time.sleep(3)
    assert process.poll() is None, launch.said()
    api_server.start()
    wait_for(lambda: "answers again" in launch.said(), launch.said())
    expired = replace(old, version="1")
    assert _watch_has_expired(launch, kubeconfig, expired)
    launch.jobs.wait_for_change(expired, 5)
    launch.answer(steps=6)
    set_status(launch.name, "Complete")
    assert launch.ends(process) == 0, launch.said()
    assert launch.said().count("asking again") == 1
    assert launch.job().uid == uid
    assert len(launch.jobs.find(f"{RUN_LABEL}=r1")) == 1


def _watch_has_expired(launch: Launch, kubeconfig: Path, job: Job) -> bool:
    """Whether the API server answers 410 to a watch from that version: its cache begins after its restart."""
    query = {"watch": "true", "resourceVersion": job.version, "timeoutSeconds": 2}
    path = f"/apis/trainer.kubeflow.org/v1alpha1/namespaces/{launch.jobs.namespace}/trainjobs"
    with Requests(connect(str(kubeconfig))).lines(path, query, silence_seconds=5) as lines:
        return any(json.loads(line)["object"].get("code") == 410 for line in lines)


def _assignment(launch: Launch) -> Path:
    return answers(launch.work, launch.job()) / "job.json"


def _as(launch: Launch, kubeconfig: Path, namespace: str, token: str, patience: Patience) -> Jobs:
    path = write_kubeconfig(kubeconfig, launch.folder / "other", namespace, token)
    return Jobs(Cluster(Requests(connect(str(path)), patience, ADVICE)))


def _pod(admin: Requests, launch: Launch, name: str, index: str | None) -> str:
    """A pod as JobSet would make it for the job (without an index: any pod); returns its path."""
    path = f"/api/v1/namespaces/{launch.jobs.namespace}/pods"
    metadata: dict[str, Any] = {"name": name}
    if index is not None:
        metadata |= {"labels": {JOBSET_LABEL: launch.name, "batch.kubernetes.io/job-completion-index": index}}
    default_account(admin, launch.jobs.namespace)
    # No scheduler takes it, so that no kubelet writes over the status.
    spec = {"schedulerName": "nobody", "containers": [{"name": "node", "image": "nowhere.invalid/none"}]}
    admin.ask("POST", path, body={"metadata": metadata, "spec": spec})
    return f"{path}/{name}"


def _pod_status(admin: Requests, pod: str, status: dict[str, Any]) -> None:
    admin.ask("PATCH", f"{pod}/status", body={"status": status}, form=MERGE)


def _container(state: dict[str, Any]) -> dict[str, Any]:
    kept = {"name": "node", "image": "nowhere.invalid/none", "imageID": "", "ready": False, "restartCount": 0}
    return kept | {"state": state}
