"""Votes in a folder, and the reward that waits for them."""

import json
import multiprocessing
import threading
import time
from itertools import combinations

import pytest
import torch
from reward_cases import random_images

from trl_leapalign.media import read_samples, to_bytes
from trl_leapalign.rewards import HumanReward
from trl_leapalign.rewards.votes import Pair, VoteFolder


def voter(folder, better, stop):
    """Votes for whatever `better(first, second)` says, as long as there are pairs."""
    while not stop.is_set():
        for name in folder.pairs().keys() - folder.votes().keys():
            pair = folder.pairs()[name]
            folder.vote(pair, better(pair.first, pair.second))
        time.sleep(0.01)


@pytest.fixture
def voting():
    """Start voters, who go home afterwards."""
    stop, threads = threading.Event(), []

    def start(folder, better):
        threads.append(threading.Thread(target=voter, args=(folder, better, stop)))
        threads[-1].start()

    yield start
    stop.set()
    for thread in threads:
        thread.join()


def brightness(folder, name):
    return read_samples([folder.picture(name)]).mean().item()


def brighter(folder):
    return lambda first, second: max(first, second, key=lambda name: brightness(folder, name))


def images_of(*levels):
    return random_images(len(levels), 3, 4, 6) * 0.1 + torch.tensor(levels).view(-1, 1, 1, 1)


def test_shares_of_wins(tmp_path, voting):
    reward = HumanReward(tmp_path / "votes", poll_seconds=0.01)
    assert reward.differentiable is False
    voting(reward.folder, brighter(reward.folder))
    images = images_of(0.1, 0.7, 0.3, 0.5, 0.2, 0.6).requires_grad_()
    rewards, details = reward(images, ["a", "b", "a", "a", "b", "a"], [{}] * 6)
    assert rewards.tolist() == pytest.approx([0, 1, 1 / 3, 2 / 3, 0, 1]) and not rewards.requires_grad
    assert details["comparisons"].tolist() == [3, 1, 3, 3, 1, 3]
    assert len(reward.folder.votes()) == 7 and rewards.dtype == torch.float32
    line = json.loads((tmp_path / "votes" / "votes.jsonl").read_text().splitlines()[0])
    assert line.keys() == {"id", "prompt", "first", "second", "winner", "time"}
    assert torch.equal(
        to_bytes(read_samples([reward.folder.picture(line["winner"])])).float().mean(),
        max(
            to_bytes(read_samples([reward.folder.picture(line[which])])).float().mean() for which in ("first", "second")
        ),
    )


def test_ties_rings_and_equal_pictures(tmp_path, voting):
    folder = VoteFolder(tmp_path)
    voting(folder, lambda first, second: None)
    images = images_of(0.1, 0.2, 0.3, 0.4, 0.5)
    ring = HumanReward(tmp_path, neighbours=1, poll_seconds=0.01)
    rewards, details = ring(images, ["a"] * 5, [{}] * 5)
    assert rewards.tolist() == [0.5] * 5 and details["comparisons"].tolist() == [2] * 5 and len(folder.pairs()) == 5
    assert (
        HumanReward(tmp_path, neighbours=9, poll_seconds=0.01)(images, ["a"] * 5, [{}] * 5)[1]["comparisons"].tolist()
        == [4] * 5
    )
    assert len(folder.pairs()) == 10  # the others were known
    pair = HumanReward(tmp_path, neighbours=1, poll_seconds=0.01)
    assert pair(images[:2], ["b"] * 2, [{}] * 2)[1]["comparisons"].tolist() == [1, 1]
    same = pair(images[[0, 0]], ["c"] * 2, [{}] * 2)
    assert same[0].tolist() == [0.5, 0.5] and len(folder.pairs()) == 11


def test_votes_are_found_again(tmp_path, voting):
    """Stopped in the middle of a batch, and started again on the same pictures, in another order."""
    folder, images = VoteFolder(tmp_path), images_of(0.1, 0.2, 0.3)
    impatient = HumanReward(tmp_path, timeout=0.05, poll_seconds=0.01)
    with pytest.raises(
        TimeoutError, match=r"3 of 3 votes are missing after 0.05 seconds. Vote with `trl-leapalign vote"
    ):
        impatient(images, ["a"] * 3, [{}] * 3)
    first, *rest = folder.pairs().values()
    folder.vote(first, brighter(folder)(first.first, first.second))
    with pytest.raises(TimeoutError, match="2 of 3 votes"):
        impatient(images, ["a"] * 3, [{}] * 3)
    for pair in rest:
        folder.vote(pair, brighter(folder)(pair.first, pair.second))
    assert impatient(images.flip(0), ["a"] * 3, [{}] * 3)[0].tolist() == [1, 0.5, 0]
    assert len(folder.pairs()) == len(folder.votes()) == 3
    with pytest.raises(ValueError, match="Votes stay as they are"):
        folder.vote(first, None)


def test_groups_follow_from_prompts_and_metadata(tmp_path):
    reward = HumanReward(tmp_path)
    assert reward._meetings([("a", ""), ("b", ""), ("a", ""), ("b", "")]) == [(0, 2), (1, 3)]
    assert reward._meetings([("a", "1"), ("a", "2")] * 2) == [(0, 2), (1, 3)]
    assert reward._meetings([("a", "")] * 4) == list(combinations(range(4), 2))
    with pytest.raises(ValueError, match="the batch has a single one of 'b'"):
        reward(images_of(0.1, 0.2, 0.3), ["a", "a", "b"], [{}] * 3)
    assert not reward.folder.pairs()


def one_of_two(rank, path, results):
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=2)
    reward = HumanReward(path / "votes", poll_seconds=0.01, timeout=60)
    images = images_of(0.1, 0.7, 0.3, 0.5)[2 * rank : 2 * rank + 2]
    results.put((rank, reward(images, ["a", "b"], [{}, {}])[0].tolist()))
    torch.distributed.destroy_process_group()


def test_groups_across_processes(tmp_path, voting):
    folder = VoteFolder(tmp_path / "votes")
    context = multiprocessing.get_context("fork")  # what is imported need not be imported again
    results = context.SimpleQueue()
    processes = [context.Process(target=one_of_two, args=(rank, tmp_path, results)) for rank in (0, 1)]
    for process in processes:
        process.start()
    voting(folder, brighter(folder))
    found = dict(results.get() for _ in processes)
    for process in processes:
        process.join()
    assert found == {0: [0, 1], 1: [1, 0]} and len(folder.pairs()) == 2


def test_lines_that_are_not_whole_do_not_count(tmp_path):
    folder, pairs = VoteFolder(tmp_path), [Pair("a", "1" * 16, digit * 16) for digit in "234"]
    folder.ask(pairs[:2])
    with (tmp_path / "pairs.jsonl").open("a") as file:
        file.write('{"id": "torn", "pro')
    assert list(folder.pairs().values()) == pairs[:2]
    folder.ask(pairs)
    assert list(folder.pairs().values()) == pairs
    folder.vote(pairs[0], pairs[0].second)
    with (tmp_path / "votes.jsonl").open("a") as file:
        file.write('{"id": "')
    folder.vote(pairs[1], None)
    assert folder.votes() == {pairs[0].id: "2" * 16, pairs[1].id: None}
    with pytest.raises(ValueError, match="none of the pictures"):
        folder.vote(pairs[2], "2" * 16)


def test_bad_settings(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        HumanReward(tmp_path / "file")
    for name, value in (("neighbours", 0), ("timeout", 0), ("poll_seconds", -1)):
        with pytest.raises(ValueError, match=name):
            HumanReward(tmp_path, **{name: value})
