"""A server that behaves as its folder says, in place of vLLM: started by the same command, in a tenth of a second.

`behaviour.json` in the served folder may say:

    answers     text by question; any other question gets `default`
    dies        ends at once, with these words
    hangs       `/health` never says yes
    logprob     of every token (-0.1)
    slow        seconds to the first token, of questions without an answer of their own
    fails       500 to those
    resets      closes the connection on those, without a byte
    breaks      closes it on those after the first token of a stream
    ends        ends the whole server on those, after the first token of a stream
"""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

SERVER = """
import json, os, pathlib, sys, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

given = dict(zip(sys.argv[1::1], sys.argv[2::1]))
folder, host, port = pathlib.Path(given["--model"]), given["--host"], int(given["--port"])
how = json.loads((folder / "behaviour.json").read_text())
if "dies" in how:
    sys.exit(how["dies"])
lock, counted = threading.Lock(), {"n": 0, "seconds": 0.0}

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def say(self, status, body, kind="application/json"):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        if self.path == "/metrics":
            lines = ["vllm:time_to_first_token_seconds_count %d" % counted["n"],
                     "vllm:time_to_first_token_seconds_sum %f" % counted["seconds"]]
            self.say(200, "\\n".join(lines).encode() + b"\\n", "text/plain")
        else:
            self.say(503 if how.get("hangs") else 200, b"{}")

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question, began = body["messages"][0]["content"][-1]["text"], time.monotonic()
        known = question in how.get("answers", {})
        text = how["answers"][question] if known else how.get("default", "yes")
        if not known:
            time.sleep(how.get("slow", 0.0))
            if how.get("resets"):
                self.close_connection = True
                return
            if how.get("fails"):
                return self.say(500, b'{"error": {"message": "it fails"}}')
        with lock:
            counted["n"] += 1
            counted["seconds"] += time.monotonic() - began
        if not body.get("stream"):
            token = {"token": text, "logprob": how.get("logprob", -0.1)}
            choice = {"message": {"content": text}, "logprobs": {"content": [token]}}
            return self.say(200, json.dumps({"choices": [choice], "model": given["--model"]}).encode())
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        end_headers, self.flush_headers = self.end_headers, lambda: None
        end_headers()  # they go out with the first token, as the middleware has it
        del self.flush_headers
        for number in range(body.get("max_tokens", 4)):
            token = {"choices": [{"delta": {"content": "" if number else text}}]}
            self.chunk(b"data: %s\\n\\n" % json.dumps(token).encode())
            if not known and how.get("ends"):
                os._exit(9)
            if not known and how.get("breaks"):
                self.close_connection = True
                self.connection.close()
                return
            time.sleep(how.get("token", 0.01))
        self.chunk(b"data: [DONE]\\n\\n")
        self.wfile.write(b"0\\r\\n\\r\\n")

    def chunk(self, data):
        head, self._headers_buffer = b"".join(getattr(self, "_headers_buffer", [])), []
        self.wfile.write(head + b"%x\\r\\n%s\\r\\n" % (len(data), data))
        self.wfile.flush()

ThreadingHTTPServer.daemon_threads = True
ThreadingHTTPServer((host, port), Handler).serve_forever()
"""


def write_interpreter(place: Path, envoy: Path, python: str = sys.executable) -> Path:
    """A program that stands in for the serving interpreter, run by `python`, with the real Envoy beside it."""
    place.mkdir()
    (place / "envoy").symlink_to(envoy)
    script = place / "python"
    script.write_text(f'#!/bin/sh\nexec {python} -c {shlex.quote(SERVER)} "$@"\n')
    script.chmod(0o755)
    return script


def write_folder(folder: Path, **behaviour: Any) -> Path:
    """A folder to be served by it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text('{"nvila": {"num_video_frames": 4}}')
    (folder / "behaviour.json").write_text(json.dumps(behaviour))
    return folder
