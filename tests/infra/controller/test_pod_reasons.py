"""Why a pod is not ready, by name, from statuses as kubelets and schedulers write them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from serving_pods import BACK_OFF, COMPLETED, RUNNING, Object, condition, container, ended, pod, ready, waiting

from nvila.infra.controller.reasons import DAMAGED, MOST_CHARACTERS, pod_of, unmade

UNREADY = condition("Ready", "False", "ContainersNotReady", "containers with unready status: [endpoint]")
LOG = "Traceback (most recent call last):\n  ...\nRuntimeError: Engine core initialization failed"


def unscheduled(message: str, reason: str = "Unschedulable", **how: Any) -> Object:
    return pod(conditions=(condition("PodScheduled", "False", reason, message),), phase="Pending", podIP="", **how)


def fetched(state: Object, last: Object | None = None, **how: Any) -> Object:
    weights = container("weights", state, last, restarts=int(last is not None))
    endpoint = container("endpoint", waiting("PodInitializing"))
    return pod(weights=weights, endpoint=endpoint, conditions=(UNREADY,), phase="Pending", **how)


def serving(state: Object, last: Object | None = None, restarts: int = 0, **how: Any) -> Object:
    endpoint = container("endpoint", state, last, restarts)
    return pod(weights=container("weights", COMPLETED), endpoint=endpoint, conditions=(UNREADY,), **how)


NO_GPU = (
    "0/3 nodes are available: 1 node(s) had untolerated taint {a: }, 2 Insufficient nvidia.com/gpu. preemption: ..."
)
NO_LABEL = "0/3 nodes are available: 3 node(s) didn't match Pod's node affinity/selector. preemption: 0/3 nodes ..."
OLD_LABEL = "0/1 nodes are available: 1 node(s) didn't match node selector."
SOME_LABEL = "0/3 nodes are available: 1 Insufficient cpu, 2 node(s) didn't match Pod's node affinity/selector."
NO_CLAIM = 'persistentvolumeclaim "nvila-cache" not found'
UNBOUND = "0/3 nodes are available: pod has unbound immediate PersistentVolumeClaims. preemption: 0/3 nodes ..."
PULL = 'failed to pull and unpack image "nvila/serve:9": not found'

CASES: list[tuple[str, Object, str]] = [
    ("no GPU is free", unscheduled(NO_GPU), f"NoGPU: {NO_GPU}"),
    ("no node has the label of GPUs", unscheduled(NO_LABEL), f"NoGPU: {NO_LABEL}"),
    ("the same of Kubernetes 1.20", unscheduled(OLD_LABEL), f"NoGPU: {OLD_LABEL}"),
    ("a pod without GPUs finds no node", unscheduled(NO_LABEL, gpus=0), f"Unschedulable: {NO_LABEL}"),
    ("nodes are full", unscheduled(SOME_LABEL), f"Unschedulable: {SOME_LABEL}"),
    ("no cache", unscheduled(NO_CLAIM), f"Volume: {NO_CLAIM}"),
    ("a cache that nothing provides", unscheduled(UNBOUND), f"Volume: {UNBOUND}"),
    ("Kueue holds it", unscheduled("gated", "SchedulingGated"), "SchedulingGated: gated"),
    ("just made", pod(phase="Pending", podIP=""), "NotReady"),
    ("the image of the weights", fetched(waiting("ErrImagePull", PULL)), f"ImagePull: ErrImagePull: {PULL}"),
    ("a wrong name", fetched(waiting("InvalidImageName", "x")), "ImagePull: InvalidImageName: x"),
    ("the weights come", fetched(RUNNING), "NotReady: its weights are being fetched"),
    ("not yet", fetched(waiting("PodInitializing")), "NotReady: PodInitializing"),
    ("damaged", fetched(ended(DAMAGED, message="model/x: other bytes")), "Digest: (exit code 3) model/x: other bytes"),
    ("damaged, again", fetched(BACK_OFF, ended(DAMAGED, message="x")), "Digest: (exit code 3) x"),
    ("no disk", fetched(ended(1, message="no space")), "Weights: (exit code 1) no space"),
    ("the registry was away", fetched(RUNNING, ended(75, message="away")), "Weights: (exit code 75) away"),
    (
        "too little memory",
        fetched(ended(137, "OOMKilled")),
        "OOMKilled: while its weights were fetched (exit code 137)",
    ),
    ("the image", serving(waiting("ImagePullBackOff", PULL)), f"ImagePull: ImagePullBackOff: {PULL}"),
    ("no Secret", serving(waiting("CreateContainerConfigError", "secret")), "CreateContainerConfigError: secret"),
    ("being made", serving(waiting("ContainerCreating")), "NotReady: ContainerCreating"),
    ("loading", serving(RUNNING), "NotReady: containers with unready status: [endpoint]"),
    ("crashes", serving(BACK_OFF, ended(1, message=LOG), 3), f"CrashLoop: (exit code 1) {' '.join(LOG.split())}"),
    ("has just crashed", serving(ended(1, message="x"), restarts=0), "CrashLoop: (exit code 1) x"),
    ("starts again", serving(RUNNING, ended(0, "Completed"), 1), "CrashLoop: (exit code 0)"),
    ("memory", serving(BACK_OFF, ended(137, "OOMKilled"), 1), "OOMKilled: (exit code 137)"),
    ("evicted", pod(phase="Failed", reason="Evicted", message="low on memory"), "Evicted: low on memory"),
    ("no room after all", pod(phase="Failed", reason="OutOfnvidia.com/gpu"), "OutOfnvidia.com/gpu"),
    ("serves", ready(), ""),
]


@pytest.mark.parametrize(("found", "why"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_each_reason_has_its_name(found: Object, why: str) -> None:
    """At three at night `not ready` sends people to look for what the cluster has said all the time."""
    seen = pod_of(found)
    assert seen.why == why
    assert seen.fatal == why.startswith("Digest")
    assert seen.ready == (why == "")


def test_only_its_own_ends_count() -> None:
    """A node that was drained, lost or started anew would roll a good version back."""
    crashed: dict[str, Any] = {"endpoint": container("endpoint", RUNNING, ended(1, message="died"), 2)}
    assert pod_of(ready(**crashed)).restarts == 2
    assert pod_of(ready(**crashed)).why == "CrashLoop: (exit code 1) died", "the policy's reason says how it ended"
    moved = (condition("Ready"), condition("DisruptionTarget", "True", "EvictionByEvictionAPI"))
    assert pod_of(ready(**crashed, conditions=moved)).restarts == 0
    assert pod_of(ready(**crashed, reason="NodeLost")).restarts == 0
    assert pod_of(ready(**crashed, phase="Failed")).restarts == 0
    for unseen in ("Unknown", "ContainerStatusUnknown"):
        rebooted = container("endpoint", RUNNING, ended(255, unseen), 2)
        assert pod_of(ready(endpoint=rebooted)).restarts == 1


def test_the_last_words_of_a_log_show_no_secret() -> None:
    """Reasons go to the status, to the registry and to the webhook."""
    log = "x" * 5000 + "\nAuthorization: Bearer hf_abcdefghijklmnopqrstuvwxyz0123456789\n\x1b[31mdied"
    why = pod_of(serving(BACK_OFF, ended(1, message=log), 1)).why
    assert "hf_abc" not in why and "\x1b" not in why and why.endswith("died")
    assert len(why) < MOST_CHARACTERS + 100


QUOTA = 'pods "m-v2-6c9-x7" is forbidden: exceeded quota: gpus, requested: requests.nvidia.com/gpu=1, used: ...'


@pytest.mark.parametrize(
    ("conditions", "why"),
    [
        ([], ""),
        ([condition("Progressing", "False", "ProgressDeadlineExceeded", "x")], ""),
        ([condition("ReplicaFailure", "True", "FailedCreate", QUOTA)], f"Quota: {QUOTA}"),
        (
            [condition("ReplicaFailure", "True", "FailedCreate", "violates PodSecurity")],
            "FailedCreate: violates PodSecurity",
        ),
        ([condition("ReplicaFailure", "False", "", QUOTA)], ""),
    ],
)
def test_why_no_pod_is_made(conditions: list[Object], why: str) -> None:
    """A canary needs room for two; without a pod no pod says so."""
    assert unmade({"status": {"conditions": conditions}}) == why


states = st.sampled_from(
    [
        *(
            {},
            RUNNING,
            COMPLETED,
            BACK_OFF,
            ended(1),
            ended(DAMAGED),
            waiting("PodInitializing"),
            waiting("ErrImagePull"),
        ),
        waiting("SomethingNew"),
    ]
)
containers = st.none() | st.tuples(states, states, st.integers(0, 3))
some_conditions = st.lists(
    st.builds(
        condition, st.sampled_from(["PodScheduled", "Ready", "X"]), st.sampled_from(["True", "False", "Unknown"])
    ),
    max_size=3,
)


@given(containers, containers, some_conditions, st.sampled_from(["Pending", "Running", "Failed", "Unknown"]))
def test_a_pod_in_any_state_is_read(weights: Any, endpoint: Any, conditions: list[Object], phase: str) -> None:
    """One odd status ended the loop for all models."""
    found = pod_of(
        pod(
            weights=container("weights", *weights) if weights else None,
            endpoint=container("endpoint", *endpoint) if endpoint else None,
            conditions=tuple(conditions),
            phase=phase,
        )
    )
    assert found.ready or found.why
    assert not found.fatal or found.why.startswith("Digest: ")
    assert pod_of({"metadata": {"name": "p"}, "spec": {"containers": []}}).why == "NotReady"
