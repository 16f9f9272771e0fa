"""Real HTTP servers that misbehave when they are told to: one with OpenAI's completions API answers known problems."""

import hashlib
import json
import threading
import time
from collections.abc import Iterable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self

from rtd_jax.data.trace import Trace


def answer(traces: Sequence[Trace], body: dict) -> tuple[str, str]:
    """(text, finish_reason), decided by prompt and seed: of ten chains seven right, and one each wrong, cut, vague."""
    asked = body["messages"][0]["content"] if "messages" in body else body["prompt"]
    trace = next(trace for trace in traces if trace.prompt in asked)
    draw = hashlib.sha256(f"{asked} {body['seed']}".encode()).digest()[0] % 10
    text = trace.completion
    if draw == 0:
        return text.replace("####", "#### 9"), "stop"
    if draw == 1:
        return text[: len(text) // 2], "length"
    if draw == 2:
        return "It depends.", "stop"
    return f"{text}\n\nQuestion: another" if draw == 3 else text, "stop"


class FaultyServer:
    """Serves on a free port of the loopback until closed. `failures` are used up by the first POSTs, one each."""

    def __init__(self, failures: Iterable[str] = (), *, delay: float = 0.0, port: int = 0):
        self.seen: list[tuple[float, str]] = []  # time and id of every request
        self.bodies: list[dict] = []
        self.in_flight = self.most_in_flight = 0
        remaining, lock, outer = list(failures), threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args) -> None:
                pass

            def do_GET(self) -> None:
                self._send(200, json.dumps(outer.listed()).encode())

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    outer.seen.append((time.monotonic(), self.headers["X-Request-Id"]))
                    outer.bodies.append(body)
                    outer.in_flight += 1
                    outer.most_in_flight = max(outer.most_in_flight, outer.in_flight)
                    failure = remaining.pop(0) if remaining else ""
                time.sleep(delay)
                reply = json.dumps(outer.reply(self.path, body, failure)).encode()
                with lock:
                    outer.in_flight -= 1
                if failure == "dropped":
                    self.close_connection = True
                elif failure == "truncated":
                    self._send(200, reply[: len(reply) // 2], len(reply))
                    self.close_connection = True
                elif failure == "garbage":
                    self._send(200, b'{"choices": [{"te\x00\xff')
                elif failure == "html":
                    self._send(200, b"<html>hello</html>", kind="text/html")
                elif failure == "empty":
                    self._send(200, b'{"choices": []}')
                elif failure in ("null", "[1, 2]", "7", '{"choices": [7]}'):
                    self._send(200, failure.encode())
                elif failure.isdigit():
                    self._send(int(failure), b'{"error": {"message": "as told"}}', retry_after="0.3")
                else:
                    self._send(200, reply)

            def _send(self, status, content, length=None, kind="application/json", retry_after=None) -> None:
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(content) if length is None else length))
                if retry_after:
                    self.send_header("Retry-After", retry_after)
                self.end_headers()
                self.wfile.write(content)

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 64

            def handle_error(self, request, client_address) -> None:  # a client that was killed is no news
                pass

        self._server = Server(("127.0.0.1", port), Handler)
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def reply(self, path: str, body: dict, failure: str) -> dict:
        """The answer to a POST."""
        raise NotImplementedError

    def listed(self) -> dict:
        """The answer to a GET: the list of models."""
        return {"object": "list", "data": []}

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *args) -> None:
        self.close()


class CompletionsServer(FaultyServer):
    """Answers known problems."""

    def __init__(self, traces: Sequence[Trace], failures: Iterable[str] = (), *, delay: float = 0.0, port: int = 0):
        self._traces = traces
        super().__init__(failures, delay=delay, port=port)

    def reply(self, path: str, body: dict, failure: str) -> dict:
        text, finish = answer(self._traces, body)
        choice = {"index": 0, "finish_reason": "abort" if failure == "aborted" else finish}
        chat = path.endswith("/chat/completions")
        choice |= {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        return {"id": "x", "object": "o", "created": 1, "model": "m", "choices": [choice]}
