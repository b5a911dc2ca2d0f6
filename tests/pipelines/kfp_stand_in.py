"""A stand-in for the API server of Kubeflow Pipelines: holds every request and answer against its client's models."""

from __future__ import annotations

import base64
import json
import re
import threading
import time
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from email import message_from_bytes
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import kfp_server_api as api
import yaml
from google.protobuf.json_format import ParseDict
from kfp.pipeline_spec.pipeline_spec_pb2 import PipelineSpec, PlatformSpec

TOKEN = "s3cret-token"
STARTED = "2026-11-22T10:00:00Z"
_PYTHON = {"str": str, "int": int, "bool": bool, "datetime": str, "object": object, "float": (int, float)}
_KINDS = {"STRING": str, "NUMBER_DOUBLE": (int, float), "STRUCT": dict}
Answer = tuple[int, str | None, dict[str, Any]]
"""Status, name of the answer's model (None for errors and empty answers), body."""


def hold_against(kind: str, value: Any, where: str = "") -> None:
    """Raise where JSON does not fit the client's type: an unknown key, another type, a value outside an enumeration."""
    where = where or kind
    if value is None:
        return
    if found := re.fullmatch(r"list\[(.+)\]", kind):
        assert isinstance(value, list), where
        for index, item in enumerate(value):
            hold_against(found[1], item, f"{where}[{index}]")
    elif found := re.fullmatch(r"dict\(str, (.+)\)", kind):
        assert isinstance(value, dict), where
        for key, item in value.items():
            hold_against(found[1], item, f"{where}.{key}")
    elif kind in _PYTHON:
        assert isinstance(value, _PYTHON[kind]), f"{where} is no {kind}: {value!r}"
    else:
        model = getattr(api, kind)
        if allowed := getattr(model, "allowable_values", None):
            assert value in allowed, f"{where}: {value}"
            return
        unknown = set(value) - set(model.attribute_map.values())
        assert not unknown, f"{where} has no {sorted(unknown)}"
        for attribute, key in model.attribute_map.items():
            hold_against(model.openapi_types[attribute], value.get(key), f"{where}.{key}")


class StandIn:
    """What the server holds, how it behaves, and what was asked of it."""

    def __init__(self) -> None:
        self.url = ""
        self.multi_user = False
        self.namespaces = {"ada"}
        """Those that the token may use."""
        self.needs_token = False
        self.page = 2
        """Most items on a page, whatever is asked for."""
        self.failing: list[tuple[str, str, int]] = []
        """Method, pattern of the path and status: each is answered once."""
        self.broken: dict[str, bytes] = {}
        """What is sent for a call, such as `POST /runs`, in place of its answer."""
        self.listings = 0
        self.hidden: Container[int] = ()
        """Which listings leave out what is there, as if it came while we looked; the next one is number 1."""
        self.pipelines: list[dict[str, Any]] = []
        self.versions: list[dict[str, Any]] = []
        self.specs: dict[str, dict[str, Any]] = {}
        self.experiments: list[dict[str, Any]] = []
        self.runs: list[dict[str, Any]] = []
        self.script: list[dict[str, Any]] = [{"state": "SUCCEEDED"}]
        """What a run looks like, each time that it is asked for; the last stays."""
        self.logs: dict[str, str] = {}
        """What Argo has archived, by node."""
        self.hangs_seconds = 0.0
        """How long it says nothing to whoever asks."""
        self.proxied: list[str] = []
        """Other hosts that were asked for through this server: it is a proxy then, and answers for them."""
        self.terminated: list[str] = []
        self.asked: list[str] = []
        self.tokens: set[str] = set()
        """Bearer tokens that came."""
        self.problems: list[str] = []

    def install(self, name: str, namespace: str | None = None, versions: int = 1) -> None:
        """A pipeline as the chart brings it; the last version is the newest."""
        pipeline = {"pipeline_id": f"p{len(self.pipelines)}", "name": name, "display_name": name}
        self.pipelines.append(pipeline | ({"namespace": namespace} if namespace else {}))
        for number in range(versions):
            self._add_version(pipeline["pipeline_id"], f"{name}-{number}")

    def answer(self, method: str, path: str, query: dict[str, str], headers: Message, body: bytes) -> Answer:
        """One request."""
        if token := headers.get("Authorization"):
            self.tokens.add(token.removeprefix("Bearer "))
        for index, (failing, pattern, status) in enumerate(self.failing):
            if failing == method and re.search(pattern, path):
                del self.failing[index]
                return status, None, {"error": "injected", "message": f"injected {headers.get('Authorization')}"}
        if self.needs_token and headers.get("Authorization") != f"Bearer {TOKEN}":
            return 401, None, {"message": "Unauthorized"}
        for verb, pattern, handler in self._routes():
            if verb == method and (found := re.fullmatch(f"/apis/v2beta1{pattern}", path)):
                return handler(*map(unquote, found.groups()), query=query, headers=headers, body=body)
        raise AssertionError(f"no such call: {method} {path}")

    def _routes(self) -> list[tuple[str, str, Callable[..., Answer]]]:
        return [
            ("GET", "/healthz", self._healthz),
            ("GET", "/pipelines/names/([^/]+)", self._by_name),
            ("POST", "/pipelines", self._create_pipeline),
            ("GET", "/pipelines/([^/]+)/versions", self._list_versions),
            ("POST", "/pipelines/upload_version", self._upload_version),
            ("GET", "/experiments", self._list_experiments),
            ("POST", "/experiments", self._create_experiment),
            ("POST", "/runs", self._create_run),
            ("GET", "/runs/([^/:]+)", self._get_run),
            ("GET", "/runs/([^/:]+)/nodes/([^/]+)/artifacts/main-logs:read", self._read_log),
            ("POST", "/runs/([^/:]+):terminate", self._terminate),
        ]

    def _healthz(self, **_: Any) -> Answer:
        return 200, "V2beta1GetHealthzResponse", {"multi_user": self.multi_user, "pipeline_store": "database"}

    def _by_name(self, name: str, query: dict[str, str], **_: Any) -> Answer:
        assert set(query) <= {"namespace"}
        namespace = query.get("namespace")
        if refusal := self._refusal(namespace):
            return refusal
        found = [p for p in self.pipelines if p["name"] == name and p.get("namespace") == namespace]
        if not found or self._hides():
            return 404, None, {"message": f"Pipeline {name} not found"}
        return 200, "V2beta1Pipeline", found[0]

    def _create_pipeline(self, body: bytes, **_: Any) -> Answer:
        wanted = self._body("V2beta1Pipeline", body)
        if refusal := self._refusal(wanted.get("namespace")):
            return refusal
        same = ("name", "namespace")
        if any(all(p.get(key) == wanted.get(key) for key in same) for p in self.pipelines):
            return 409, None, {"message": f"Failed to create a new pipeline. The name {wanted['name']} already exists"}
        self.pipelines.append(wanted | {"pipeline_id": f"p{len(self.pipelines)}"})
        return 200, "V2beta1Pipeline", self.pipelines[-1]

    def _list_versions(self, pipeline_id: str, query: dict[str, str], **_: Any) -> Answer:
        assert query["sort_by"] == "created_at desc"
        found = [v for v in reversed(self.versions) if v["pipeline_id"] == pipeline_id]
        return self._page("V2beta1ListPipelineVersionsResponse", "pipeline_versions", found, query)

    def _upload_version(self, query: dict[str, str], headers: Message, body: bytes, **_: Any) -> Answer:
        assert set(query) <= {"name", "display_name", "pipelineid", "description", "tags"}, query
        assert any(p["pipeline_id"] == query["pipelineid"] for p in self.pipelines)
        form = message_from_bytes(b"Content-Type: " + str(headers["Content-Type"]).encode() + b"\r\n\r\n" + body)
        (part,) = form.get_payload()  # type: ignore[misc]
        assert part.get_param("name", header="content-disposition") == "uploadfile"  # type: ignore[union-attr]
        spec, platform = yaml.safe_load_all(part.get_payload(decode=True))  # type: ignore[union-attr, arg-type]
        ParseDict(spec, PipelineSpec())
        ParseDict(platform, PlatformSpec())
        if any(v["name"] == query["name"] and v["pipeline_id"] == query["pipelineid"] for v in self.versions):
            return 409, None, {"message": f"The version name {query['name']} already exists"}
        self.specs[query["name"]] = spec
        return 200, "V2beta1PipelineVersion", self._add_version(query["pipelineid"], query["name"])

    def _list_experiments(self, query: dict[str, str], **_: Any) -> Answer:
        if refusal := self._refusal(query.get("namespace")):
            return refusal
        wanted = json.loads(query["filter"])
        hold_against("V2beta1Filter", wanted)
        (predicate,) = wanted["predicates"]
        assert (predicate["operation"], predicate["key"]) == ("EQUALS", "display_name")
        found = [e for e in self.experiments if e.get("namespace") == query.get("namespace")]
        # A filter by name leaves one; a server that also gives others makes the client look for itself.
        return self._page("V2beta1ListExperimentsResponse", "experiments", found, query)

    def _create_experiment(self, body: bytes, **_: Any) -> Answer:
        wanted = self._body("V2beta1Experiment", body)
        if refusal := self._refusal(wanted.get("namespace")):
            return refusal
        if any(e["display_name"] == wanted["display_name"] for e in self.experiments):
            return 409, None, {"message": "Experiment already exists"}
        self.experiments.append(wanted | {"experiment_id": f"e{len(self.experiments)}", "created_at": STARTED})
        return 200, "V2beta1Experiment", self.experiments[-1]

    def _create_run(self, body: bytes, **_: Any) -> Answer:
        wanted = self._body("V2beta1Run", body)
        assert any(e["experiment_id"] == wanted["experiment_id"] for e in self.experiments)
        reference = wanted["pipeline_version_reference"]
        (version,) = (v for v in self.versions if v["pipeline_version_id"] == reference["pipeline_version_id"])
        assert version["pipeline_id"] == reference["pipeline_id"]
        if spec := self.specs.get(version["name"]):
            declared = spec["root"]["inputDefinitions"]["parameters"]
            for name, value in wanted["runtime_config"]["parameters"].items():
                assert isinstance(value, _KINDS[declared[name]["parameterType"]]), name
        run = {"run_id": f"r{len(self.runs)}", "state": "PENDING", "created_at": STARTED}
        self.runs.append(wanted | run)
        return 200, "V2beta1Run", self.runs[-1]

    def _get_run(self, run_id: str, **_: Any) -> Answer:
        run = next((r for r in self.runs if r["run_id"] == run_id), None)
        if run is None:
            return 404, None, {"error": f"Run {run_id} not found", "code": 5}
        now = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        return 200, "V2beta1Run", run | now

    def _read_log(self, run_id: str, node: str, **_: Any) -> Answer:
        assert any(run["run_id"] == run_id for run in self.runs)
        if node not in self.logs:
            return 404, None, {"error_message": "artifact not found: <nil>", "error_details": "artifact not found"}
        return 200, None, {"data": base64.b64encode(self.logs[node].encode()).decode()}

    def _terminate(self, run_id: str, **_: Any) -> Answer:
        self.terminated.append(run_id)
        self.script = [{"state": "CANCELED"}]
        return 200, None, {}

    def _refusal(self, namespace: str | None) -> Answer | None:
        if namespace and not self.multi_user:
            return 400, None, {"message": "In single-user mode, a namespace must not be given"}
        if namespace and namespace not in self.namespaces:
            return 403, None, {"message": f"User 'ada' is not authorized in namespace {namespace}"}
        return None

    def _page(self, kind: str, key: str, items: list[Any], query: dict[str, str]) -> Answer:
        assert set(query) <= {"page_token", "page_size", "sort_by", "filter", "namespace"}
        items = [] if self._hides() else items
        start, size = int(query.get("page_token") or 0), min(self.page, int(query["page_size"]))
        body: dict[str, Any] = {key: items[start : start + size], "total_size": len(items)}
        if start + size < len(items):
            body["next_page_token"] = str(start + size)
        return 200, kind, body

    def _hides(self) -> bool:
        self.listings += 1
        return self.listings in self.hidden

    def _add_version(self, pipeline_id: str, name: str) -> dict[str, Any]:
        version = {"pipeline_id": pipeline_id, "pipeline_version_id": f"v{len(self.versions)}", "name": name}
        self.versions.append(version | {"display_name": name, "created_at": STARTED})
        return self.versions[-1]

    def _body(self, kind: str, body: bytes) -> dict[str, Any]:
        content = json.loads(body)
        hold_against(kind, content)
        return dict(content)


@contextmanager
def standing_in(address: str = "127.0.0.1") -> Iterator[StandIn]:
    """A stand-in that listens there. At the end it must have had nothing to complain of."""
    stand_in = StandIn()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _serve(self) -> None:
            url = urlsplit(self.path)
            query = {key: values[0] for key, values in parse_qs(url.query, strict_parsing=bool(url.query)).items()}
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            time.sleep(stand_in.hangs_seconds)
            stand_in.proxied += [url.netloc] if url.netloc else []
            stand_in.asked.append(f"{self.command} {url.path.removeprefix('/apis/v2beta1')}")
            try:
                status, kind, answer = stand_in.answer(self.command, url.path, query, self.headers, body)
                if kind:
                    hold_against(kind, answer)
            except Exception as problem:
                stand_in.problems.append(f"{self.command} {self.path}: {problem!r}")
                status, answer = 400, {"message": repr(problem)}
            content = stand_in.broken.get(stand_in.asked[-1], json.dumps(answer).encode())
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_DELETE = _serve

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing: the tests look at `asked`."""

    server = ThreadingHTTPServer((address, 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    stand_in.url = f"http://{address}:{server.server_port}"
    try:
        yield stand_in
    finally:
        server.shutdown()
        server.server_close()
    assert stand_in.problems == []
