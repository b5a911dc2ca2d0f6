"""Alerts and the dashboard: that Prometheus can read every expression, and that they ask for what exists."""

import json
import re
from collections.abc import Iterator

import pytest
from helming import EVERYTHING, find, render, serving_pod, template

from nvila.components.serve.exporter import Told, write
from nvila.infra.controller.tell import Metrics

EXPORTED = {
    # kube-state-metrics
    "kube_cronjob_created",
    "kube_cronjob_status_last_successful_time",
    "kube_deployment_status_replicas_available",
    "kube_job_failed",
    "kube_pod_container_status_restarts_total",
    "kube_pod_container_status_terminated_reason",
    "kube_pod_status_phase",
    # the kubelet, and cAdvisor within it
    "container_memory_working_set_bytes",
    "container_network_receive_bytes_total",
    "kubelet_volume_stats_available_bytes",
    "kubelet_volume_stats_capacity_bytes",
    # the DCGM exporter
    "DCGM_FI_DEV_FB_USED",
    "DCGM_FI_DEV_GPU_UTIL",
    # MLflow with --expose-prometheus
    "mlflow_http_request_duration_seconds_bucket",
    "mlflow_http_request_total",
}


def _expressions() -> Iterator[str]:
    documents = render(EVERYTHING)
    groups = find(documents, "PrometheusRule", "nvila")["spec"]["groups"]
    yield from (rule["expr"] for group in groups for rule in group["rules"])
    dashboard = json.loads(find(documents, "ConfigMap", "nvila-dashboard")["data"]["nvila.json"])
    yield from (target["expr"] for panel in dashboard["panels"] for target in panel["targets"])


def test_prometheus_reads_every_expression() -> None:
    """One wrong expression and the operator refuses the whole file; a panel only stays empty."""
    parser = pytest.importorskip("promql_parser", reason="make tools")
    expressions = list(_expressions())
    assert len(expressions) >= 15
    for expression in expressions:
        parser.parse(expression)


def _ours() -> set[str]:
    """What the controller and the pods that serve write, of their own code."""
    tails = {"counter": ("_total",), "histogram": ("_bucket", "_count", "_sum"), "gauge": ("",)}
    controller = {f"{m.name}{tail}" for m in Metrics().registry.collect() for tail in tails[m.type]}
    return controller | set(re.findall(r"(?m)^(nvila_\w+)\{", write(Told(), "model", "1")))


def test_expressions_ask_for_metrics_that_exist() -> None:
    """An alert on a misspelt metric never fires."""
    assert len(_ours()) > 18
    name = re.compile(r"\b((?:kube|kubelet|container|mlflow|nvila|DCGM)_\w+)")
    assert {metric for expression in _expressions() for metric in name.findall(expression)} <= EXPORTED | _ours()


def test_a_backup_that_never_worked_counts_as_old() -> None:
    """The time of the last success does not exist before the first: a wrong password would never be noticed."""
    (expression,) = [e for e in _expressions() if "nvila-backup" in e and ">" in e]
    assert re.search(r"last_successful_time\{[^}]*\} or kube_cronjob_created\{[^}]*\}\)", expression)


def test_the_monitor_selects_the_server() -> None:
    """A ServiceMonitor that selects nothing is no error anywhere."""
    documents = render(EVERYTHING)
    monitor = find(documents, "ServiceMonitor", "nvila-mlflow")["spec"]
    service = find(documents, "Service", "nvila-mlflow")
    assert monitor["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert monitor["endpoints"][0]["port"] in {port["name"] for port in service["spec"]["ports"]}
    pod = find(documents, "Deployment", "nvila-mlflow")["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= pod.items()


def test_the_monitors_select_the_pods_of_promotions() -> None:
    """The same of a PodMonitor, which also passes over a port that no container names."""
    documents = render(EVERYTHING)
    monitors = {d["metadata"]["name"]: d["spec"] for d in documents if d["kind"] == "PodMonitor"}
    pod = find(documents, "Deployment", "nvila-controller")["spec"]["template"]
    for name, made in {"nvila-controller": pod, "nvila-serving": serving_pod("team-a")}.items():
        assert monitors[name]["selector"]["matchLabels"].items() <= made["metadata"]["labels"].items()
        (endpoint,) = monitors[name]["podMetricsEndpoints"]
        assert endpoint["port"] in {port["name"] for port in made["spec"]["containers"][0]["ports"]}
    assert monitors["nvila-serving"]["namespaceSelector"] == {"matchNames": ["team-a", "team-b"]}
    # The controller speaks of namespaces other than its own.
    assert monitors["nvila-controller"]["podMetricsEndpoints"][0]["honorLabels"] is True


def test_a_label_of_the_site_replaces_the_charts() -> None:
    """The same key twice in a document is an error for strict readers, and a matter of luck for others."""
    ran = template(EVERYTHING, sets=['monitoring.labels={"app.kubernetes.io/instance":"prometheus"}'])
    parts = [part for part in ran.stdout.split("\n---\n") if "\napiVersion: monitoring.coreos.com/" in part]
    assert len(parts) == 4
    for part in parts:
        labels = part.partition("\nspec:")[0]
        assert labels.count("app.kubernetes.io/instance") == 1 and "instance: prometheus" in labels
