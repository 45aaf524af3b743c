"""`trl-leapalign evaluate` from folders of weights, with GenEval, UnifiedReward and a reward: run through by one
process, stopped and resumed by two, and compared with an adapter."""

import contextlib
import json
import math
import multiprocessing
import os
import signal
import socket
import time

import numpy as np
import pytest
from accelerate import PartialState
from geneval_cases import busy_detector, color_tokenizer, tiny_color_clip
from pyarrow import parquet
from reward_cases import clip_model
from scipy import stats
from test_evaluate import save_adapter
from test_unified_reward import tiny_reward, trained_qwen

from examples.tiny import tiny_flux, tiny_tokenizer
from trl_leapalign.cli.main import main
from trl_leapalign.evaluation.geneval.metadata import TAGS

EVALUATORS = ("geneval", "unifiedreward-alignment", "clipscore")
PER_PROMPT = 1
KINDS = ("cat", "bottle", "motorcycle")
"""What the detector sees in most, some and few of the images."""


def task(tag, number):
    """A row of GenEval's metadata, two of each tag."""
    first, second = KINDS[number % 3], KINDS[(number + 1) % 3]
    include = [{"class": first, "count": 1}]
    if tag in ("two_object", "position"):
        include.append({"class": second, "count": 1})
    if tag == "position":
        include[1]["position"] = ["above", 0]
    if tag in ("colors", "color_attr"):
        include[0]["color"] = "red"
    row = {"tag": tag, "include": include, "prompt": f"a red circle and the {'dog' if number % 2 else 'cat'} {number}"}
    return row | ({"exclude": [{"class": first, "count": 4}]} if tag == "counting" else {})


ROWS = [task(tag, 2 * index + more) for index, tag in enumerate(TAGS) for more in (0, 1)]
COUNT = len(ROWS) * PER_PROMPT


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Everything that the command reads, in folders."""
    folder = tmp_path_factory.mktemp("evaluation")
    tiny_flux().save_pretrained(folder / "pipeline")
    save_adapter(folder / "adapter")
    busy_detector().model.save_pretrained(folder / "detector")
    tiny_color_clip().save_pretrained(folder / "colors")
    color_tokenizer().save_pretrained(folder / "colors")
    clip_model().save_pretrained(folder / "clip")
    tiny_tokenizer().save_pretrained(folder / "clip")
    reward = tiny_reward(trained_qwen())
    for part in (reward.model, reward.tokenizer, reward.image_processor):
        part.save_pretrained(folder / "unified")
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    return folder


def arguments(folder, name, *more):
    unified = {"source": str(folder / "unified"), "prompt": "Rate {prompt}", "max_new_tokens": 8, "score": "style"}
    settings = {
        "geneval": {"color_classifier": str(folder / "colors")},
        "unifiedreward-alignment": unified,
        "clipscore": {"path_or_id": str(folder / "clip"), "tokenizer": str(folder / "clip")},
    }
    options = {
        "pipeline": folder / "pipeline",
        "prompts": folder / "metadata.jsonl",
        "geneval_detector": folder / "detector",
        "evaluator_kwargs": json.dumps(settings),
        "images_per_prompt": PER_PROMPT,
        "num_inference_steps": 1,
        "height": 56,
        "width": 56,
        "call_kwargs": '{"max_sequence_length": 16}',
        "output_dir": folder / name,
    }
    pairs = [str(part) for key, value in options.items() for part in (f"--{key}", value)]
    return ["evaluate", *pairs, "--evaluators", *EVALUATORS, *more]


def one_of_two(rank, port, options):
    distributed = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in distributed.items()})
    PartialState._reset_state()
    PartialState(cpu=True)
    main(options)
    PartialState().destroy_process_group()


def start_two(options):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    with contextlib.suppress(ImportError):
        import bitsandbytes  # noqa: F401  transformers would import it after the fork, when torch's threads are gone
    context = multiprocessing.get_context("fork")  # what is imported need not be imported again
    processes = [context.Process(target=one_of_two, args=(rank, port, options)) for rank in (0, 1)]
    for process in processes:
        process.start()
    return processes


def kill_when(processes, is_time):
    """Kill both processes at once, without warning, as soon as something is there."""
    deadline = time.monotonic() + 120
    while not is_time():
        assert all(process.is_alive() for process in processes) and time.monotonic() < deadline
        time.sleep(0.005)
    for process in processes:
        os.kill(process.pid, signal.SIGKILL)
    for process in processes:
        process.join(30)


def lines(folder, name):
    """What is kept of the scores of an evaluator that is not done."""
    return [
        line
        for path in sorted((folder / "scores" / f"{name}.partial").glob("*.jsonl"))
        for line in path.read_text().splitlines()
        if line.endswith("}")
    ]


def table(folder, name):
    return parquet.read_table(folder / "scores" / f"{name}.parquet").to_pydict()


@pytest.fixture(scope="module")
def base(folder):
    main(arguments(folder, "base"))
    return folder / "base"


@pytest.fixture(scope="module")
def tuned(folder):
    main(arguments(folder, "tuned", "--adapter", str(folder / "adapter")))
    return folder / "tuned"


def test_everything_is_written(base):
    assert [path.name for path in sorted((base / "images").iterdir())] == [f"{n:05d}.png" for n in range(COUNT)]
    assert sorted(path.name for path in (base / "scores").iterdir()) == sorted(f"{name}.parquet" for name in EVALUATORS)
    together = parquet.read_table(base / "scores.parquet").to_pydict()
    assert {*EVALUATORS, "geneval/tag", "geneval/reason", "unifiedreward-alignment/answer"} <= set(together)
    assert together["prompt"] == [row["prompt"] for row in ROWS for _ in range(PER_PROMPT)]
    assert together["geneval/tag"] == [row["tag"] for row in ROWS for _ in range(PER_PROMPT)]
    verdicts = together["geneval"]
    assert set(verdicts) == {0, 1}, "All verdicts are the same, so little is tested."
    assert all(bool(reason) != bool(one) for reason, one in zip(together["geneval/reason"], verdicts, strict=True))
    answers = list(zip(together["unifiedreward-alignment"], together["unifiedreward-alignment/answer"], strict=True))
    assert all(answer == f"Style Score : {score:g}" for score, answer in answers)


def test_the_table_has_means_and_errors(base):
    report = json.loads((base / "report.json").read_text())
    assert list(report) == list(EVALUATORS)
    verdicts = np.array(table(base, "geneval")["score"]).reshape(len(TAGS), 2, PER_PROMPT).mean(2)
    overall = report["geneval"]["overall"]
    assert overall["mean"] == pytest.approx(verdicts.mean())
    assert overall["standard_error"] == pytest.approx(math.sqrt((stats.sem(verdicts, axis=1) ** 2).sum()) / 6)
    assert list(report["geneval"]["by_group"]) == list(TAGS)
    cosines = np.array(table(base, "clipscore")["score"]).reshape(len(ROWS), PER_PROMPT).mean(1)
    assert report["clipscore"]["overall"]["standard_error"] == pytest.approx(stats.sem(cosines))
    text = (base / "report.md").read_text()
    assert all(f"| {name} | all | {report[name]['overall']['mean']:.4g}" in text for name in EVALUATORS)


def test_stopped_twice_and_on_two_processes_it_comes_to_the_same(base, folder):
    options = arguments(folder, "stopped")
    stopped = folder / "stopped"
    kill_when(start_two(options), lambda: len(list(stopped.glob("images/*.png"))) >= 3)
    sampled = {path: path.stat().st_mtime_ns for path in stopped.glob("images/*.png")}
    assert 3 <= len(sampled) < COUNT and not (stopped / "scores").exists()
    kill_when(start_two(options), lambda: len(lines(stopped, "geneval")) >= 3)
    kept = lines(stopped, "geneval")
    assert 3 <= len(kept) < COUNT and not list(stopped.glob("scores/*.parquet"))
    marked = json.loads(kept[0])
    for path in (stopped / "scores" / "geneval.partial").iterdir():
        changed = path.read_text().replace(kept[0], json.dumps({**marked, "reason": "kept"}))
        path.write_text(changed + '\n{"number": 7, "scor')  # as if cut off while it was written
    processes = start_two(options)
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [0, 0]
    assert {path: path.stat().st_mtime_ns for path in sampled} == sampled
    assert not list(stopped.glob("scores/*.partial"))
    for path in (base / "images").iterdir():
        assert path.read_bytes() == (stopped / "images" / path.name).read_bytes()
    for name in EVALUATORS:
        found, expected = table(stopped, name), table(base, name)
        if name == "geneval":
            assert found["reason"][marked["number"]] == "kept"  # it was not judged again
            found["reason"][marked["number"]] = expected["reason"][marked["number"]]
        assert repr(found) == repr(expected)
    assert (stopped / "report.json").read_text() == (base / "report.json").read_text()


def test_runs_are_compared(base, tuned, folder, capsys):
    main(["evaluate", "--compare", str(base), str(tuned), "--output_dir", str(folder / "both")])
    shown = capsys.readouterr().out
    assert f"| run | {' | '.join(EVALUATORS)} |" in shown
    rows = {
        (row["evaluator"], row["run"], row["group"]): row
        for row in json.loads((folder / "both" / "comparison.json").read_text())
    }
    for name in EVALUATORS:
        mean = json.loads((tuned / "report.json").read_text())[name]["overall"]["mean"]
        assert rows[name, "tuned", "all"]["estimate"]["mean"] == pytest.approx(mean)
    cosines = [np.array(table(run, "clipscore")["score"]).reshape(-1, PER_PROMPT).mean(1) for run in (tuned, base)]
    expected = stats.ttest_rel(*cosines)
    assert rows["clipscore", "tuned", "all"]["p_value"] == pytest.approx(expected.pvalue)
    assert 0 < expected.pvalue < 1
    verdicts = [np.array(table(run, "geneval")["score"]).reshape(6, 2, PER_PROMPT).mean(2) for run in (tuned, base)]
    difference = rows["geneval", "tuned", "all"]["difference"]["mean"]
    assert difference == pytest.approx((verdicts[0] - verdicts[1]).mean())
    assert f"p = {rows['clipscore', 'tuned', 'all']['p_value']:.2g}" in shown
