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
    """`with StubServer() as server: server.url`; each request consumes one of `faults` before any answer.

    Args:
        says: messages -> content of the answer, or its message with further keys.
        finish: finish_reason, or a function of the messages.
        poison: fault of all requests whose last message contains "poison".
        encoder: a `ChatEncoder`; the stub then returns token ids as vLLM does, and the number of prompt tokens.
        ids: which request fields the stub knows: "vllm", "logprobs" (earlier vLLM), None (ignores both) or "reject".
        cut: number of tokens of an answer that fit; longer ones are cut off. Needs `encoder`.
    """

    def __init__(self, faults=(), delay=0.0, says=rule, finish="stop", poison=None, encoder=None, ids="vllm", cut=None):
        self.faults, self.delay, self.says, self.finish = list(faults), delay, says, finish
        self.poison, self.encoder, self.ids, self.cut = poison, encoder, ids, cut
        self.asked, self.bodies = Counter(), []
        self.lock, self.at_once, self.most_at_once = threading.Lock(), 0, 0

    def reply(self, body):
        """Return the reply to a request: a conversation, or a prompt as token ids."""
        if "prompt" in body:
            text = self.says(body["prompt"])
            ids = [*self.encoder.backend.encode(text).ids, min(self.encoder.token_ids.stop_ids)]
            choice = {"index": 0, "text": text, "finish_reason": "stop", "token_ids": ids}
            return {"choices": [choice], "usage": {"completion_tokens": len(ids)}, "prompt_token_ids": body["prompt"]}
        messages = body["messages"]
        said = self.says(messages)
        message = {"role": "assistant"} | (said if isinstance(said, dict) else {"content": said})
        ending = self.finish(messages) if callable(self.finish) else self.finish
        choice = {"index": 0, "message": message, "finish_reason": ending}
        reply = {"choices": [choice], "usage": {"completion_tokens": 3}}
        if self.encoder:
            self._add_tokens(body, message, choice, reply)
        return reply

    def _add_tokens(self, body, message, choice, reply):
        """Write the answer one character at a time, so that its tokens are not those that its text is read as."""
        from data.sources.records import parsed

        text = message.get("raw") or message["content"]
        ids = [token for character in text for token in self.encoder.backend.encode(character).ids]
        ids.append(min(self.encoder.token_ids.stop_ids))
        if self.cut is not None and len(ids) > self.cut:
            ids, choice["finish_reason"] = ids[: self.cut], "length"
            message["content"] = self.encoder.backend.decode(ids)
        prompt = self.encoder.prompt(parsed({"messages": body["messages"], "tools": body.get("tools")}))
        reply["usage"] = {"completion_tokens": len(ids), "prompt_tokens": len(prompt)}
        if self.ids == "vllm" and body.get("return_token_ids"):
            reply["prompt_token_ids"], choice["token_ids"] = prompt, ids
        if self.ids == "logprobs" and body.get("return_tokens_as_token_ids") and body.get("logprobs"):
            choice["logprobs"] = {"content": [{"token": f"token_id:{token}"} for token in ids]}
        message.pop("raw", None)

    def rejects(self, body):
        """Return whether the stub rejects unknown fields and the request has one."""
        return self.ids == "reject" and body.keys() & {"return_token_ids", "return_tokens_as_token_ids"}

    def __enter__(self):
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                self._send(200, b'{"data": []}')  # /models: alive

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if stub.rejects(body):
                    return self._send(400, b'{"error": "Unrecognized request argument"}')
                last = body["messages"][-1]["content"] if "messages" in body else "token ids"
                with stub.lock:
                    fault = stub.faults.pop(0) if stub.faults else None
                    fault = stub.poison if stub.poison and "poison" in last else fault
                    stub.asked[last] += 1
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
                self._send(200, json.dumps(stub.reply(body)).encode())

            def _send(self, status, content):
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, args=[0.01], daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()
