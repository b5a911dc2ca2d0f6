"""Alerts and the dashboard: that Prometheus can read every expression, and that they ask for what exists."""

import json
import re
from collections.abc import Iterator

import pytest
from helming import EVERYTHING, find, render, template

from nvila.components.contracts.modelrollout import PART_LABELS

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
    # the controller
    "nvila_controller_errors_total",
    "nvila_controller_leader",
    "nvila_controller_round_seconds",
    "nvila_controller_rounds_total",
    "nvila_registry_reachable",
    "nvila_rollout_decisions_total",
    "nvila_rollout_phase",
    "nvila_rollout_step",
    "nvila_rollout_weight",
    # the pods that serve
    "nvila_endpoint_active",
    "nvila_endpoint_errors_total",
    "nvila_endpoint_first_token_seconds_total",
    "nvila_endpoint_first_tokens_total",
    "nvila_endpoint_requests_total",
    "nvila_endpoint_restarts_total",
    "nvila_endpoint_tokens_total",
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


def test_expressions_ask_for_metrics_that_exist() -> None:
    """An alert on a misspelt metric never fires."""
    name = re.compile(r"\b((?:kube|kubelet|container|mlflow|nvila|DCGM)_\w+)")
    assert {metric for expression in _expressions() for metric in name.findall(expression)} <= EXPORTED


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
    wanted = {"nvila-controller": pod["metadata"]["labels"], "nvila-serving": PART_LABELS}
    for name, labels in wanted.items():
        assert monitors[name]["selector"]["matchLabels"].items() <= labels.items()
        (endpoint,) = monitors[name]["podMetricsEndpoints"]
        assert endpoint["port"] == "metrics" and endpoint["path"] == "/metrics"
    assert pod["spec"]["containers"][0]["ports"][0]["name"] == "metrics"
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
