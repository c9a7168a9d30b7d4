import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import constants

from demo.hub import HubAnswer, probe_hub


@pytest.fixture
def stand_in(monkeypatch):
    """A Hub on loopback whose answer the test sets."""
    release, asked = threading.Event(), []

    class Handler(BaseHTTPRequestHandler):
        status, hang = 200, False

        def do_GET(self):
            asked.append(self.path)
            if Handler.hang:
                release.wait(30)
                return
            self.send_response(Handler.status)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    Handler.asked = asked
    yield Handler
    release.set()
    server.shutdown()
    server.server_close()


def test_a_hub_that_answers_is_used(stand_in):
    assert probe_hub("owner/model") == HubAnswer(True)
    assert stand_in.asked == ["/api/models/owner/model"]


def test_a_hub_that_refuses_is_not_and_says_so(stand_in):
    stand_in.status = 403
    answer = probe_hub()
    assert not answer.ok
    assert "403" in answer.reason


def test_a_hub_that_hangs_costs_no_more_than_the_time_allowed(stand_in):
    stand_in.hang = True
    start = time.monotonic()
    answer = probe_hub(seconds=0.5)
    assert time.monotonic() - start < 2
    assert not answer.ok
    assert answer.reason


def test_a_name_resolution_that_hangs_costs_no_more_either(stand_in, monkeypatch):
    release = threading.Event()

    def hang(*args, **kwargs):
        release.wait(30)
        raise OSError("released")

    monkeypatch.setattr("urllib.request.urlopen", hang)
    start = time.monotonic()
    assert probe_hub(seconds=0.3) == HubAnswer(False, "no answer within 0.3 seconds")
    assert time.monotonic() - start < 2
    release.set()


def test_a_dead_endpoint_is_not_used(monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert "refused" in probe_hub().reason
    monkeypatch.setattr(constants, "ENDPOINT", "no address at all")
    assert "unknown url type" in probe_hub().reason


def test_offline_mode_asks_nobody(stand_in, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert probe_hub() == HubAnswer(False, "offline mode is set in the environment")
    assert stand_in.asked == []
