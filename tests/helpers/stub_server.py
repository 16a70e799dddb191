"""An OpenAI-compatible server for tests, with deterministic answers, delays and failures."""

import json
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def rule(messages):
    """Return the stub's answer, which depends on the full conversation, so that a wrong history is detected."""
    return f"answer {len(messages)} to {messages[-1]['content']}"


class StubServer:
    """`with StubServer() as server: server.url`; each request consumes one of `faults` before any answer."""

    def __init__(self, faults=(), delay=0.0, says=rule, finish="stop", poison=None):
        self.faults, self.delay, self.says, self.finish = list(faults), delay, says, finish
        self.poison = poison  # response to requests that contain "poison"
        self.asked, self.bodies = Counter(), []
        self.lock, self.at_once, self.most_at_once = threading.Lock(), 0, 0

    def __enter__(self):
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                self._send(200, b'{"data": []}')  # /models: alive

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with stub.lock:
                    fault = stub.faults.pop(0) if stub.faults else None
                    fault = stub.poison if stub.poison and "poison" in body["messages"][-1]["content"] else fault
                    stub.asked[body["messages"][-1]["content"]] += 1
                    stub.bodies.append(body | {"key": self.headers.get("Authorization")})
                    stub.at_once += 1
                    stub.most_at_once = max(stub.most_at_once, stub.at_once)
                time.sleep(stub.delay)
                with stub.lock:
                    stub.at_once -= 1
                if fault == "hang up":
                    self.close_connection = True
                    return self.connection.close()
                if fault == "half":
                    return self._send(200, b'{"choices": [')
                if fault is not None:
                    return self._send(fault, b'{"error": "no"}')
                ending = stub.finish(body["messages"]) if callable(stub.finish) else stub.finish
                message = {"role": "assistant", "content": stub.says(body["messages"])}
                choice = {"index": 0, "message": message, "finish_reason": ending}
                self._send(200, json.dumps({"choices": [choice], "usage": {"completion_tokens": 3}}).encode())

            def _send(self, status, content):
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()
