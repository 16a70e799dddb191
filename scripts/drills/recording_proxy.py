"""HTTP proxy between a client and a server that records every reply of the server, for regeneration_drill.py."""

import json
import threading
import urllib.error
import urllib.request
from http.client import HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TIMEOUT = 1200  # seconds for one reply


class RecordingProxy:
    """Forwards requests to `http://127.0.0.1:<port>`; `replies` maps each list of messages to its complete replies.

    Like a gateway, it answers 502 while the server is down. If the server dies while it generates, the client's
    connection breaks as well.
    """

    def __init__(self, port: int) -> None:
        self.upstream = f"http://127.0.0.1:{port}"
        self.replies: dict[str, list[dict[str, Any]]] = {}
        self.unanswered = 0  # requests that a dead server left without a reply
        self._lock = threading.Lock()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                proxy.forward(self, None)

            def do_POST(self) -> None:
                proxy.forward(self, self.rfile.read(int(self.headers["Content-Length"])))

            def log_message(self, *_: Any) -> None:
                pass

        self._server = _Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def forward(self, client: BaseHTTPRequestHandler, body: bytes | None) -> None:
        """Pass a request on, record the reply, then send it to the client."""
        request = urllib.request.Request(
            self.upstream + client.path, data=body, headers={"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT) as reply:
                status, answer = reply.status, reply.read()
        except urllib.error.HTTPError as error:
            status, answer = error.code, error.read()
        except urllib.error.URLError as error:  # before a reply began: refused, or closed while generating
            status, answer = 502, str(error.reason).encode()
            if not isinstance(error.reason, ConnectionRefusedError):
                return self._break(client)
        except (OSError, HTTPException):
            return self._break(client)
        if status == 200 and body is not None:
            self._record(json.loads(body)["messages"], json.loads(answer))
        try:
            client.send_response(status)
            client.send_header("Content-Type", "application/json")
            client.send_header("Content-Length", str(len(answer)))
            client.end_headers()
            client.wfile.write(answer)
        except OSError:  # the client was killed
            client.close_connection = True
        return None

    def _break(self, client: BaseHTTPRequestHandler) -> None:
        with self._lock:
            self.unanswered += 1
        client.close_connection = True

    def _record(self, messages: list[dict[str, Any]], reply: dict[str, Any]) -> None:
        with self._lock:
            self.replies.setdefault(key(messages), []).append(reply["choices"][0])

    def close(self) -> None:
        """Stop the proxy."""
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        """Ignore the broken connections of killed clients."""


def key(messages: list[dict[str, Any]]) -> str:
    """Return a dictionary key for a list of messages: their roles and texts."""
    return json.dumps([(message["role"], message["content"]) for message in messages])
