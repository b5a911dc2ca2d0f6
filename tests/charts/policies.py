"""NetworkPolicies as a network plugin reads them: whether one pod may open a connection to another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from typing import Any

from helming import Document


@dataclass(frozen=True)
class Pod:
    """A pod, or with an empty namespace what is not of this cluster."""

    namespace: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    ports: tuple[int, ...] = ()
    """That its containers listen on."""
    address: str = "203.0.113.7"


def allowed(policies: Sequence[Document], source: Pod, target: Pod, port: int, protocol: str = "TCP") -> bool:
    """Both sides have a say: the policies that select the source, and those that select the target."""
    out = _open(policies, source, "Egress", "to", target, port, protocol)
    return out and _open(policies, target, "Ingress", "from", source, port, protocol)


def _open(
    policies: Sequence[Document], pod: Pod, direction: str, side: str, other: Pod, port: int, protocol: str
) -> bool:
    mine = [policy for policy in policies if direction in policy["spec"]["policyTypes"] and selects(policy, pod)]
    rules = [rule for policy in mine for rule in policy["spec"].get(direction.lower(), [])]
    return not mine or any(
        _has_port(rule, port, protocol)
        and (side not in rule or any(matches(peer, other, pod.namespace) for peer in rule[side]))
        for rule in rules
    )


def selects(policy: Document, pod: Pod) -> bool:
    """Whether it is one of the pods that the policy is about."""
    here = pod.namespace == policy["metadata"]["namespace"]
    return here and fits(policy["spec"]["podSelector"], pod.labels)


def matches(peer: Mapping[str, Any], pod: Pod, home: str) -> bool:
    """Whether the pod is one of this peer's, as a policy of the namespace `home` names it."""
    if block := peer.get("ipBlock"):
        return not pod.namespace and ip_address(pod.address) in ip_network(block["cidr"])
    if not pod.namespace:
        return False
    if "namespaceSelector" in peer:
        there = fits(peer["namespaceSelector"], {"kubernetes.io/metadata.name": pod.namespace})
    else:
        there = pod.namespace == home
    return there and fits(peer.get("podSelector", {}), pod.labels)


def fits(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """Whether the selector takes an object with these labels; an empty one takes every object."""
    for rule in selector.get("matchExpressions", []):
        assert rule["operator"] == "In", "another operator than the chart uses"
        if labels.get(rule["key"]) not in rule["values"]:
            return False
    return bool(selector.get("matchLabels", {}).items() <= labels.items())


def peers(policy: Document) -> Iterator[Mapping[str, Any]]:
    """All that it names as the other side."""
    for direction, side in (("ingress", "from"), ("egress", "to")):
        for rule in policy["spec"].get(direction) or []:
            yield from rule.get(side, [])


def _has_port(rule: Mapping[str, Any], port: int, protocol: str) -> bool:
    return "ports" not in rule or any(
        one["port"] == port and one.get("protocol", "TCP") == protocol for one in rule["ports"]
    )
