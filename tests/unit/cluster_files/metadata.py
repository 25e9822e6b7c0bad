"""A stand-in for a cloud's metadata service: real HTTP, with the answers that a test lays down."""

import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "of-this-machine"


class Metadata:
    """Serves until the end of the block.

    `answers` holds (status, body) by path; `requests` what has been asked: method, path, and whether the request
    carried what the service demands (EC2's session token, Google's flavor).
    """

    def __init__(self) -> None:
        self.answers: dict[str, tuple[int, str]] = {}
        self.requests: list[tuple[str, str, bool]] = []
        self.delay = 0.0
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "Metadata":
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                known = {
                    self.headers.get("X-aws-ec2-metadata-token"): TOKEN,
                    self.headers.get("Metadata-Flavor"): "Google",
                }
                allowed = any(given is not None and given == wanted for given, wanted in known.items())
                service.requests.append(("GET", self.path, allowed))
                self._answer(*(service.answers.get(self.path, (404, "not found")) if allowed else (401, "")))

            def do_PUT(self) -> None:
                allowed = bool(self.headers.get("X-aws-ec2-metadata-token-ttl-seconds"))
                service.requests.append(("PUT", self.path, allowed))
                self._answer(*service.answers.get(self.path, (200, TOKEN) if allowed else (400, "")))

            def _answer(self, status: int, body: str) -> None:
                time.sleep(service.delay)
                try:
                    self.send_response(status)
                    self.end_headers()
                    self.wfile.write(body.encode())
                except OSError:  # the client has given up
                    pass

            def log_message(self, format: str, *args: Any) -> None:
                pass

        return Handler
