"""RemoteReward against a server on this machine."""

import base64
import io
import json
import socket
import threading
import traceback
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
import torch
from PIL import Image
from reward_cases import random_images

from trl_leapalign.rewards import RemoteReward, RewardSet, remote

PROMPTS = ["a red circle", "two dogs"]


@pytest.fixture
def server():
    """Answers with what is in `answers`, one (status, body) a request, and keeps the requests."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            server.requests.append((self.headers["Content-Type"], json.loads(body)))
            status, answer, *headers = server.answers.pop(0)
            server.authorization = self.headers["Authorization"]
            content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            for name, value in headers:
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    server.requests, server.answers = [], []
    server.url = f"http://127.0.0.1:{server.server_port}/score"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def pauses(monkeypatch):
    pauses = []
    monkeypatch.setattr(remote.time, "sleep", pauses.append)
    return pauses


def test_images_prompts_and_metadata_are_posted(server):
    server.answers = [(200, {"scores": [0.25, -3]})]
    images = random_images(2, 3, 5, 7)
    scores = RemoteReward(server.url)(images, PROMPTS, [{"tag": "counting"}, {}])
    assert torch.equal(scores, torch.tensor([0.25, -3.0]))
    [(kind, content)] = server.requests
    assert kind == "application/json" and set(content) == {"images", "prompts", "metadata"}
    assert (content["prompts"], content["metadata"]) == (PROMPTS, [{"tag": "counting"}, {}])
    for image, png in zip(images, content["images"], strict=True):
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(png))))
        assert pixels.shape == (5, 7, 3)
        assert torch.equal(torch.tensor(pixels).permute(2, 0, 1), (image * 255).round().to(torch.uint8))


def test_it_serves_evaluation_and_has_no_gradient(server):
    server.answers = [(200, {"scores": [1, 2]})] * 2
    reward, images = RewardSet(RemoteReward(server.url)), random_images(2, 3, 4, 4)
    with torch.no_grad():
        assert reward(images, PROMPTS, [{}, {}]).total.tolist() == [1, 2]
    assert reward.black_boxes == ["RemoteReward"]
    assert not reward(images.requires_grad_(), PROMPTS, [{}, {}]).rewards.requires_grad


def test_failures_of_the_server_are_tried_again(server, pauses):
    server.answers = [(503, {}), (500, {}), (200, {"scores": [1]})]
    assert RemoteReward(server.url)(random_images(1, 3, 4, 4), ["a"], [{}]).tolist() == [1]
    assert len(server.requests) == 3 and pauses == [1.0, 2.0]


def test_after_the_last_attempt_the_failure_is_said(server, pauses):
    server.answers = [(503, {})] * 3
    with pytest.raises(ConnectionError, match=r"/score gives no answer in 3 attempts within 60 s: HTTP Error 503"):
        RemoteReward(server.url, retries=2)(random_images(1, 3, 4, 4), ["a"], [{}])
    assert pauses == [1.0, 2.0]


def test_a_refused_request_is_not_repeated(server):
    server.answers = [(404, {})]
    with pytest.raises(ConnectionError, match="refuses the request: HTTP Error 404"):
        RemoteReward(server.url)(random_images(1, 3, 4, 4), ["a"], [{}])
    assert len(server.requests) == 1


def test_no_server(server):
    reward = RemoteReward("http://127.0.0.1:1/", retries=1, timeout=5)
    with pytest.raises(ConnectionError, match=r"gives no answer in 2 attempts within 5 s: .*refused"):
        reward(random_images(1, 3, 4, 4), ["a"], [{}])


def test_a_slow_server():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        reward = RemoteReward(f"http://127.0.0.1:{silent.getsockname()[1]}", retries=0, timeout=0.1)
        with pytest.raises(ConnectionError, match=r"gives no answer in 1 attempts within 0.1 s: timed out"):
            reward(random_images(1, 3, 4, 4), ["a"], [{}])


@pytest.mark.parametrize(
    "answer",
    [
        {"scores": [1]},
        {"scores": [1, "2"]},
        {"scores": [1, None]},
        [1, 2],
        {"scores": [1, True]},
        {},
        {"scores": [1, 1e39]},
        {"scores": [1, 10**400]},
    ],
)
def test_other_answers_are_refused(server, answer):
    server.answers = [(200, answer)]
    with pytest.raises(ValueError, match=r'must answer \{"scores": \[\.\.\.\]\} with 2 numbers that are'):
        RemoteReward(server.url)(random_images(2, 3, 4, 4), PROMPTS, [{}, {}])


def test_answers_that_are_no_json(server):
    server.answers = [(200, b"<html>")]
    with pytest.raises(ValueError, match="answers no JSON"):
        RemoteReward(server.url)(random_images(1, 3, 4, 4), ["a"], [{}])
    server.answers = [(200, b'{"scores": [NaN]}')]
    with pytest.raises(ValueError, match="with 1 numbers that are"):
        RemoteReward(server.url)(random_images(1, 3, 4, 4), ["a"], [{}])


def test_settings_and_images_are_checked(server):
    with pytest.raises(ValueError, match=r"url='localhost://...' must be an address"):
        RemoteReward("localhost:80")
    with pytest.raises(ValueError, match="timeout=0 must be"):
        RemoteReward("http://a", timeout=0)
    with pytest.raises(ValueError, match="retries=-1 must be"):
        RemoteReward("http://a", retries=-1)
    with pytest.raises(ValueError, match="RemoteReward takes images in"):
        RemoteReward(server.url)(random_images(1, 3, 4, 4) * 255, ["a"], [{}])
    with pytest.raises(TypeError, match="not JSON serializable"):
        RemoteReward(server.url)(random_images(1, 3, 4, 4), ["a"], [{"x": object()}])


def test_a_busy_server_is_asked_again_when_it_says(server, pauses):
    server.answers = [(429, {}, ("Retry-After", "7")), (429, {}), (200, {"scores": [1]})]
    assert RemoteReward(server.url)(random_images(1, 3, 4, 4), ["a"], [{}]).tolist() == [1]
    assert pauses == [7.0, 2.0]
    server.answers = [(429, {}, ("Retry-After", "3600"))]
    with pytest.raises(ConnectionError, match="in 1 attempts within 60 s: HTTP Error 429"):
        RemoteReward(server.url)(random_images(1, 3, 4, 4), ["a"], [{}])


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_not_followed(server, status):
    server.answers = [(status, {}, ("Location", f"{server.url}/elsewhere?token=secret")), (200, {"scores": [1]})]
    with pytest.raises(ConnectionError, match=rf"redirects to another address \({status}\)") as caught:
        RemoteReward(server.url)(random_images(1, 3, 4, 4), ["a"], [{}])
    assert len(server.requests) == 1 and "secret" not in str(caught.value)


@pytest.mark.parametrize("head", [b"", b"HTTP/1.0 200 OK\r\n\r\n"])
def test_one_deadline_for_a_server_that_answers_byte_by_byte(head):
    ended = threading.Event()

    def drip():
        connection, _ = listening.accept()
        with connection:
            connection.sendall(head)
            while not ended.wait(0.02):
                try:
                    connection.sendall(b" ")
                except OSError:
                    return

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=drip, daemon=True)
        thread.start()
        reward = RemoteReward(f"http://127.0.0.1:{listening.getsockname()[1]}", timeout=0.3)
        with pytest.raises(ConnectionError, match=r"gives no answer in 1 attempts within 0.3 s: timed out"):
            reward(random_images(1, 3, 4, 4), ["a"], [{}])
        ended.set()
        thread.join()


def test_an_answer_without_end_is_cut_off(server, monkeypatch):
    monkeypatch.setattr(remote, "MOST_BYTES", 1000)
    server.answers = [(200, b"[" + b"1," * 1000)]
    with pytest.raises(ValueError, match="answers no JSON: it is longer than 1000 bytes"):
        RemoteReward(server.url)(random_images(1, 3, 4, 4), ["a"], [{}])
    monkeypatch.undo()
    server.answers = [(200, b"[" * 100_000)]
    with pytest.raises(ValueError, match="answers no JSON"):
        RemoteReward(server.url)(random_images(1, 3, 4, 4), ["a"], [{}])


def test_credentials_are_sent_and_never_told(server):
    address = server.url.replace("http://", "http://me:p%40ss-word@") + "?key=query-secret"
    reward = RemoteReward(address, retries=0)
    server.answers = [
        (200, {"scores": [1]}),
        (403, {}),
        (500, {}),
        (200, {}),
        (200, b"no"),
        (302, {}, ("Location", "/")),
    ]
    images = random_images(1, 3, 4, 4)
    assert reward(images, ["a"], [{}]).tolist() == [1]
    assert base64.b64decode(server.authorization.removeprefix("Basic ")) == b"me:p@ss-word"
    for _ in range(5):
        with pytest.raises((ConnectionError, ValueError)) as caught:
            reward(images, ["a"], [{}])
        told = "".join(traceback.format_exception(caught.value))
        assert server.url in told and "ss-word" not in told and "query-secret" not in told
    for broken in ("ftp://me:p@ss-word@host", "http://me:p/ss-word@host", "http://:ss-word@", "me:ss-word@host"):
        with pytest.raises(ValueError, match="must be an address that starts with") as caught:
            RemoteReward(broken)
        assert "ss-word" not in "".join(traceback.format_exception(caught.value)).replace(repr(broken), "")
