"""A small real HTTP server on this machine that speaks the chat-completions protocol, for tests of endpoints."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class OpenAIServer:
    """`with OpenAIServer(reply) as server: Endpoint("m", server.url)`.

    `reply(messages)` gives the text of the answer, an HTTP status to fail with, or bytes to send as they are (garbage).
    It runs on the server's threads and may sleep. Retries are asked for at once, so that tests do not wait.

    Attributes:
        url: to give to a client, ends in /v1.
        requests: bodies of all requests that came, in order.
    """

    def __init__(self, reply: Callable[[list[dict]], str | int | bytes]) -> None:
        self.requests: list[dict] = []
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                owner.requests.append(body)
                found = self.path == "/v1/chat/completions"
                answer = reply(body["messages"]) if found else 404
                status = answer if isinstance(answer, int) else 200
                if isinstance(answer, str):
                    message = {"role": "assistant", "content": answer}
                    choice = {"index": 0, "message": message, "finish_reason": "stop"}
                    kind = {"id": "c", "object": "chat.completion", "created": 0, "model": body["model"]}
                    answer = json.dumps(kind | {"choices": [choice]}).encode()
                elif isinstance(answer, int):
                    answer = json.dumps({"error": {"message": f"status {status} asked for"}}).encode()
                try:
                    self.send_response(status)
                    self.send_header("Content-Type", "application/json")
                    self.send_header("Content-Length", str(len(answer)))
                    if status >= 400:
                        self.send_header("retry-after-ms", "1")
                    self.end_headers()
                    self.wfile.write(answer)
                except ConnectionError:  # a client that waited too long has hung up
                    pass

            def log_message(self, *arguments: object) -> None:
                """Tests print nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> OpenAIServer:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()
