"""The voting page: what it answers, and in a real headless Chromium."""

import threading
from itertools import pairwise

import pytest
import torch
from browser import CHROMEDRIVER, CHROMIUM, Browser
from reward_cases import random_images
from vote_cases import ask, served, vote_for_red

from trl_leapalign.cli.main import main
from trl_leapalign.rewards import HumanReward
from trl_leapalign.rewards.votes import Pair, VoteFolder

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
needs_browser = pytest.mark.skipif(not (CHROMIUM and CHROMEDRIVER), reason="there is no Chromium with its driver")


@pytest.fixture
def folder(tmp_path):
    folder = VoteFolder(tmp_path / "votes")
    names = [folder.add_picture(image) for image in random_images(4, 3, 8, 8)]
    folder.ask([Pair("a red ring", *sorted(pair)) for pair in pairwise(names)])
    return folder


def test_answers(folder):
    with served(folder.path) as address:
        status, page = ask(address)
        assert status == 200 and b"<title>Vote</title>" in page
        for number in range(3):
            _, answer = ask(f"{address}/pair")
            assert (answer["done"], answer["open"], answer["prompt"]) == (number, 3 - number, "a red ring")
            pair = folder.pairs()[answer["pair"]]
            assert {answer["left"], answer["right"]} == {pair.first, pair.second}
            status, picture = ask(f"{address}/pictures/{answer['left']}.png")
            assert status == 200 and picture == folder.picture(answer["left"]).read_bytes()
            vote = {"pair": answer["pair"], "winner": [answer["left"], answer["right"], None][number]}
            assert ask(f"{address}/vote", vote)[0] == 200
            assert ask(f"{address}/vote", vote)[0] == 409
            assert folder.votes()[answer["pair"]] == vote["winner"]
        assert ask(f"{address}/pair")[1] == {"done": 3, "open": 0, "pair": None}


def test_nobody_else_votes_or_reads(folder):
    [pair, *_] = folder.pairs().values()
    vote = {"pair": pair.id, "winner": pair.first}
    with served(folder.path) as address:
        assert ask(f"{address}/vote", vote, **{"Content-Type": "text/plain"})[0] == 415  # as another site's page sends
        assert ask(f"{address}/vote", vote, Host="evil.example")[0] == 400
        for content in ({"pair": "0" * 16, "winner": None}, {"pair": pair.id}, [], "x"):
            assert ask(f"{address}/vote", content)[0] == 404
        assert ask(f"{address}/vote", {"pair": pair.id, "winner": "0" * 16})[0] == 409
        for name in ("0" * 16, "..%2Fvotes", "%2e%2e%2fpairs"):
            assert ask(f"{address}/pictures/{name}.png")[0] == 404
    assert not folder.votes()


def test_left_and_right_follow_from_the_pair(folder):
    names = [f"{number:016x}" for number in range(200)]
    folder.ask([Pair("b", *pair) for pair in zip(names[:-1:2], names[1::2], strict=True)])
    first_is_left = 0
    with served(folder.path) as address:
        for _ in range(100):
            _, answer = ask(f"{address}/pair")
            pair = folder.pairs()[answer["pair"]]
            first_is_left += answer["left"] == pair.first
            folder.vote(pair, None)
    assert 30 < first_is_left < 70


def test_the_command(tmp_path, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr("uvicorn.run", lambda application, **settings: calls.append(settings))
    main(["vote", str(tmp_path / "votes"), "--port", "7000"])
    assert calls == [{"host": "127.0.0.1", "port": 7000, "log_level": "warning"}]
    assert "Vote on http://127.0.0.1:7000" in capsys.readouterr().out
    monkeypatch.setattr("trl_leapalign.cli.vote.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"starlette and uvicorn: pip install \"trl-leapalign\[vote\]\""):
        main(["vote", str(tmp_path / "votes")])


@needs_browser
def test_keys_in_a_browser(tmp_path):
    """The page comes before the pictures, and goes on when it is started again."""
    reward, results = HumanReward(tmp_path, poll_seconds=0.01), []
    images = random_images(4, 3, 8, 8) * 0.3
    images[:, 0] += torch.tensor([0.1, 0.5, 0.3, 0.6]).view(4, 1, 1)
    thread = threading.Thread(target=lambda: results.append(reward(images, ["a ring"] * 4, [{}] * 4)[0]))
    with Browser() as browser:
        with served(tmp_path) as address:
            browser.open(address)
            thread.start()
            assert vote_for_red(browser, 2) == 2
        with served(tmp_path) as address:
            browser.open(address)
            assert vote_for_red(browser, 4) == 4
        thread.join()
        assert results[0].tolist() == pytest.approx([0, 2 / 3, 1 / 3, 1])
