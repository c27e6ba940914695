"""A user's OpenAI-compatible server, on loopback: it answers what a test's function says."""

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self

Say = Callable[[str, dict], tuple[int, object]]
"""(question, request) → (status, text of the answer or JSON of the whole reply)"""


class FakeServer:
    """`with FakeServer(say) as server`: `server.url`, and in `server.requests` all it was asked."""

    def __init__(self, say: Say) -> None:
        self.requests: list[dict] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                status, said = outer._answer(self.path, dict(self.headers), body, say)
                payload = json.dumps(said).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(payload)))
                self.end_headers()
                self.wfile.write(payload)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _answer(self, path: str, headers: dict, body: dict, say: Say) -> tuple[int, object]:
        question = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
        with self._lock:
            if body["max_tokens"] != 1:  # that one only asks whether the server is there
                self.requests.append(body)
                self.headers.append(headers)
                self.paths.append(path)
            status, said = say(question, body)
        if not isinstance(said, str):
            return status, said
        if status != 200:
            return status, {"error": {"message": said}}
        choice = {"index": 0, "finish_reason": "stop"}
        choice |= {"message": {"role": "assistant", "content": said}} if "messages" in body else {}
        choice |= {} if "messages" in body else {"text": said}
        return 200, {"choices": [choice], "usage": {"completion_tokens": len(said.split())}}
