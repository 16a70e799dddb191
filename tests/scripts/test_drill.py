"""Regeneration drill and its data: altered answers are found, the proxy records replies, a cut-off array is read."""

import io
import json
import threading
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from recording_proxy import RecordingProxy
from regeneration_drill import as_written
from sharegpt import elements

QUESTION = [{"role": "user", "content": "What is 1 + 1?"}]
REPLY = {"message": {"role": "assistant", "content": "2 "}, "finish_reason": "stop", "token_ids": [7, 8, 2]}


class Answers(BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        body = json.dumps({"choices": [REPLY]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def proxy():
    server = HTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.handle_request, daemon=True).start()
    recorder = RecordingProxy(server.server_address[1])
    body = json.dumps({"messages": QUESTION}).encode()
    with urllib.request.urlopen(urllib.request.Request(f"{recorder.url}/chat/completions", data=body)) as reply:
        assert json.loads(reply.read())["choices"] == [REPLY]
    server.server_close()
    yield recorder
    recorder.close()


@pytest.mark.parametrize(
    ("content", "ids", "same"),
    [("2 ", [7, 8, 2], True), ("2", [7, 8, 2], False), ("2 ", [7, 8], False), ("2 ", None, False)],
)
def test_the_drill_finds_answers_that_the_server_did_not_write(proxy, content, ids, same):
    sample = {"id": "0", "messages": [*QUESTION, {"role": "assistant", "content": content, "token_ids": ids}]}
    if same:
        assert as_written(sample, proxy) == (1, 1)
    else:
        with pytest.raises(SystemExit, match="the server did not write"):
            as_written(sample, proxy)


def test_the_drills_proxy_reports_a_server_that_is_down(proxy):
    with pytest.raises(urllib.error.HTTPError, match="502"):
        urllib.request.urlopen(f"{proxy.url}/models")


@pytest.mark.parametrize("piece", [1, 7, 1000])
def test_an_array_is_read_up_to_its_cut_off_record(piece, capsys):
    records = [{"id": str(i), "conversations": [{"from": "human", "value": 'a "]}, é'}] * i} for i in range(4)]
    text = json.dumps(records, ensure_ascii=False, indent=2)
    assert list(elements(io.StringIO(text), piece)) == records
    assert capsys.readouterr().err == ""
    assert list(elements(io.StringIO(text[:-9]), piece)) == records[:3]
    assert "incomplete" in capsys.readouterr().err
