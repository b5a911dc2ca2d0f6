"""A small S3 server for tests: real HTTP, real checksums, and one fault at a time."""

from __future__ import annotations

import base64
import hashlib
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape


@dataclass
class Stored:
    """One object."""

    body: bytes
    part_bytes: int = 0
    """Sent in parts of this size; 0 in one piece."""
    headers: dict[str, str] = field(default_factory=dict)
    etag: str = ""

    def __post_init__(self) -> None:
        if not self.etag:
            step = self.part_bytes or len(self.body) or 1
            parts = [self.body[i : i + step] for i in range(0, len(self.body), step)]
            digests = b"".join(hashlib.md5(part).digest() for part in parts) if self.part_bytes else self.body
            self.etag = hashlib.md5(digests).hexdigest() + (f"-{len(parts)}" if self.part_bytes else "")


@dataclass
class Bucket:
    """Objects of the bucket `b`, what was asked, and what goes wrong."""

    objects: dict[str, Stored] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    """`GET key`, `HEAD key`, `LIST prefix`."""
    faults: dict[str, list[Any]] = field(default_factory=dict)
    """By request as above: what happens to it, one after the other; the last one for ever when it is `...`.

    A number is an answer with that status, a pair one with a status and a code; `silent`, `cut`, `short`, `long`,
    `garbled`, `reset` are what they say; a function is called before the request is answered.
    """
    tells_parts: bool = True
    knows_ranges: bool = True
    endpoint: str = ""

    def put(self, key: str, body: bytes, **more: Any) -> None:
        """Store an object."""
        self.objects[key] = Stored(body, **more)

    def downloads(self) -> list[str]:
        """Keys of the objects that were asked for."""
        return [line.removeprefix("GET ") for line in self.asked if line.startswith("GET ")]

    def next_fault(self, request: str) -> Any:
        """The fault of this request, None for none."""
        planned = self.faults.get(request, [])
        if not planned:
            return None
        if len(planned) == 2 and planned[1] is ...:
            return planned[0]
        return planned.pop(0)


@contextmanager
def served(bucket: Bucket) -> Iterator[Bucket]:
    """The bucket at an endpoint of its own."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"bucket": bucket}))
    server.daemon_threads = True
    server.block_on_close = False
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    bucket.endpoint = f"http://127.0.0.1:{server.server_port}"
    try:
        yield bucket
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    bucket: Bucket
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer("HEAD")

    def do_GET(self) -> None:
        self._answer("GET")

    def _answer(self, method: str) -> None:
        url = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query, keep_blank_values=True).items()}
        name, _, key = unquote(url.path).removeprefix("/").partition("/")
        request = f"LIST {query.get('prefix', '')}" if "list-type" in query else f"{method} {key}"
        self.bucket.asked.append(request)
        fault = self.bucket.next_fault(request)
        if callable(fault):
            fault = fault()
        if fault == "silent":
            time.sleep(3)
            self.close_connection = True
        elif fault == "reset":
            self.close_connection = True
            self.connection.close()
        elif isinstance(fault, int):
            self._error(fault, "Fault")
        elif isinstance(fault, tuple):
            self._error(*fault)
        elif name != "b":
            self._error(404, "NoSuchBucket")
        elif "list-type" in query:
            self._list(query.get("prefix", ""), fault)
        elif key not in self.bucket.objects:
            self._error(404, "NoSuchKey")
        else:
            self._object(method, self.bucket.objects[key], query, fault)

    def _list(self, prefix: str, fault: Any) -> None:
        rows = "".join(
            f"<Contents><Key>{escape(key)}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
            f"<ETag>&quot;{one.etag}&quot;</ETag><Size>{len(one.body)}</Size></Contents>"
            for key, one in sorted(self.bucket.objects.items())
            if key.startswith(prefix)
        )
        body = f"<ListBucketResult><Name>b</Name><IsTruncated>false</IsTruncated>{rows}</ListBucketResult>".encode()
        self._send(200, body[: len(body) // 2] if fault == "garbled" else body, {"Content-Type": "application/xml"})

    def _object(self, method: str, one: Stored, query: dict[str, str], fault: Any) -> None:
        if (wanted := self.headers.get("If-Match")) and wanted.strip('"') != one.etag:
            return self._error(412, "PreconditionFailed")
        headers = {"ETag": f'"{one.etag}"'} | one.headers
        if self.headers.get("x-amz-checksum-mode") != "ENABLED":
            headers = {name: value for name, value in headers.items() if "checksum" not in name}
        if "partNumber" in query and one.part_bytes and self.bucket.tells_parts:
            start = (int(query["partNumber"]) - 1) * one.part_bytes
            return self._send(206, one.body[start : start + one.part_bytes], headers, method)
        start, status = 0, 200
        if (asked := self.headers.get("Range")) and self.bucket.knows_ranges:
            start, status = int(asked.removeprefix("bytes=").rstrip("-")), 206
            headers["Content-Range"] = f"bytes {start}-{len(one.body) - 1}/{len(one.body)}"
        body = one.body[start:]
        if fault == "garbled":
            body = body[:-1] + bytes([body[-1] ^ 1])
        elif fault == "short":
            body = body[: len(body) // 2]
        elif fault == "long":
            body += b"more"
        self._send(status, body, headers, method, cut=fault == "cut")
        return None

    def _error(self, status: int, code: str) -> None:
        body = f"<Error><Code>{code}</Code><Message>because</Message></Error>".encode()
        self._send(status, body, {"Content-Type": "application/xml"}, self.command)

    def _send(self, status: int, body: bytes, headers: dict[str, str], method: str = "GET", cut: bool = False) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if method != "HEAD":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(2)


def sha256_header(body: bytes) -> dict[str, str]:
    """What a server sends that was given a SHA-256 with the object."""
    return {"x-amz-checksum-sha256": base64.b64encode(hashlib.sha256(body).digest()).decode()}
