import itertools
import json
import random
import threading
from functools import partial

import datasets
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from training_cases import make_trainer

from trl_leapalign.prompts.seeds import Purpose, derive_seed, make_generator
from trl_leapalign.prompts.sources import (
    PromptStream,
    call_prompt_function,
    check_picklable,
    check_stateless,
    choose_prompts,
    collate,
    load_prompts,
    split_row,
)

ROWS = [{"prompt": "a cat", "number": 1}, {"prompt": "ein Tür", "number": 2}, {"prompt": "a, dog", "number": 3}]


def write(path, kind):
    if kind == "txt":
        path.write_text("a cat\n\n  ein Tür \r\na, dog", encoding="utf-8")
    elif kind == "jsonl":
        path.write_text("\n".join(json.dumps(row) for row in ROWS), encoding="utf-8")
    elif kind == "json":
        path.write_text(json.dumps(ROWS), encoding="utf-8")
    elif kind == "csv":
        path.write_text('prompt,number\na cat,1\nein Tür,2\n"a, dog",3\n', encoding="utf-8")
    else:
        datasets.Dataset.from_list(ROWS).to_parquet(path)


@pytest.mark.parametrize("kind", ["txt", "jsonl", "json", "csv", "parquet"])
@pytest.mark.parametrize("as_path", [False, True])
def test_files(kind, as_path, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path = tmp_path / f"prompts.{kind}"
    write(path, kind)
    rows = list(load_prompts(path if as_path else str(path)))
    assert rows == ([{"prompt": row["prompt"]} for row in ROWS] if kind == "txt" else ROWS)


@pytest.mark.parametrize(
    "source",
    [
        ["a cat", "a dog"],
        ("a cat", "a dog"),
        [{"prompt": "a cat"}, {"prompt": "a dog"}],
        datasets.Dataset.from_list([{"prompt": "a cat"}, {"prompt": "a dog"}]),
    ],
)
def test_lists_and_datasets(source):
    assert list(load_prompts(source)) == [{"prompt": "a cat"}, {"prompt": "a dog"}]


def test_text_files_are_split_at_newlines_alone(tmp_path):
    (tmp_path / "prompts").write_bytes("\ufeffa cat\u2028on a mat\r\na dog\x0cbarks\n".encode())
    assert load_prompts(tmp_path / "prompts") == [{"prompt": "a cat\u2028on a mat"}, {"prompt": "a dog\x0cbarks"}]
    (tmp_path / "PROMPTS.TXT").write_text("a cat\n")
    assert load_prompts(tmp_path / "PROMPTS.TXT") == [{"prompt": "a cat"}]


def test_the_kind_of_a_file_does_not_depend_on_capitals(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write(tmp_path / "prompts.JSONL", "jsonl")
    assert list(load_prompts(tmp_path / "prompts.JSONL")) == ROWS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("prompts.yaml", b"- a cat", "'.*prompts.yaml' is of no known kind. Give text .*.jsonl"),
        ("empty.json", b"", "empty.json' is empty, broken or not in UTF-8"),
        ("broken.json", b"{", "broken.json' is empty, broken"),
        ("empty.csv", b"", "empty.csv' is empty, broken"),
        ("broken.parquet", b"x", "broken.parquet' is empty, broken"),
        ("latin.txt", b"T\xfcr", "latin.txt' is empty, broken or not in UTF-8: 'utf-8' codec"),
        ("empty.txt", b" \n", "There are no prompts"),
    ],
)
def test_files_that_cannot_be_read_are_named(name, content, message, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_prompts(tmp_path / name)


@pytest.mark.parametrize("source", ["a red circle", ""])
def test_a_single_prompt_must_be_a_list(source):
    with pytest.raises(ValueError, match=r"neither a file nor the id of a dataset. A single prompt must be a list"):
        load_prompts(source)


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"is a folder. Give a file in it"):
        load_prompts(tmp_path)


@pytest.mark.parametrize("source", [(row for row in ROWS), {"prompt": ["a cat"]}])
def test_other_kinds_are_told_how_to_convert(source):
    with pytest.raises(TypeError, match=r"from_pandas.*from_dict.*list"):
        load_prompts(source)


def test_another_column_and_its_metadata():
    rows = load_prompts([{"caption": "a cat", "prompt": 3, "tags": ["x"]}], "caption")
    assert split_row(rows[0], "caption") == ("a cat", {"prompt": 3, "tags": ["x"]})
    assert load_prompts(["a cat"], "caption") == [{"caption": "a cat"}]


def test_a_name_that_is_no_file_is_looked_for_on_the_hub():
    with pytest.raises(ConnectionError, match="owner/dataset"):
        load_prompts("owner/dataset")


def test_one_source_is_chosen():
    assert choose_prompts("prompt", None, a=None, b=["a cat"]) == [{"prompt": "a cat"}]
    function = lambda: ("a cat", {})  # noqa: E731
    assert choose_prompts("prompt", function, a=None) is function
    with pytest.raises(TypeError, match="prompt_function must be callable, got str"):
        choose_prompts("prompt", "a cat", a=None)
    with pytest.raises(ValueError, match="exactly one of prompt_function, a, b; got a, b"):
        choose_prompts("prompt", None, a=["a cat"], b=["a dog"])


# The stream


def numbered(count):
    return [{"prompt": f"prompt {index}", "number": index} for index in range(count)]


def read(stream):
    return [stream[index]["metadata"]["number"] for index in range(len(stream))]


def test_each_epoch_is_another_permutation():
    stream = PromptStream(numbered(7), 7 * 20 + 3, seed=3)
    order = read(stream)
    epochs = [tuple(order[start : start + 7]) for start in range(0, 140, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len(set(epochs)) == 20
    assert len(stream) == 143 and len(set(order[140:])) == 3
    expected = [np.random.default_rng([3, epoch]).permutation(7).tolist() for epoch in range(3)]
    assert order[:21] == [row for epoch in expected for row in epoch]


def test_the_order_depends_on_the_seed_alone():
    rows = numbered(9)
    order = read(PromptStream(rows, 30, seed=1))
    np.random.seed(5)
    assert read(PromptStream(rows, 30, seed=1)) == order
    assert read(PromptStream(datasets.Dataset.from_list(rows), 30, seed=1)) == order
    assert read(PromptStream(rows, 12, seed=1)) == order[:12]
    assert read(PromptStream(rows, 30, seed=2)) != order
    stream = PromptStream(rows, 30, seed=1)
    assert [stream[index]["metadata"]["number"] for index in (29, 3, 17)] == [order[29], order[3], order[17]]


def test_without_shuffling_rows_keep_their_order():
    stream = PromptStream(numbered(3), 7, seed=1, shuffle=False)
    assert read(stream) == [0, 1, 2, 0, 1, 2, 0]
    assert stream[4] == {"prompt": "prompt 1", "metadata": {"number": 1}, "index": 4}


def test_positions_are_even():
    """No row is more often first than others: chi-square of 6 rows over 3000 epochs, 5 degrees of freedom."""
    stream = PromptStream(numbered(6), 18000, seed=0)
    counts = np.bincount([stream[6 * epoch]["metadata"]["number"] for epoch in range(3000)], minlength=6)
    assert ((counts - 500) ** 2 / 500).sum() < 20.5  # the 99.9 % quantile


def test_collate():
    stream = PromptStream(numbered(3), 3, seed=1, shuffle=False)
    assert collate([stream[2], stream[0]]) == {
        "prompts": ["prompt 2", "prompt 0"],
        "metadata": [{"number": 2}, {"number": 0}],
        "indices": [2, 0],
    }


# Functions


def draw():
    return f"prompt {random.random()}", {"numpy": np.random.rand(), "torch": torch.rand(()).item()}


def states():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def test_a_function_draws_from_states_of_its_own():
    stream = PromptStream(draw, 5, seed=7)
    before = states()
    samples = [stream[index] for index in range(5)]
    assert states() == before
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    again = PromptStream(draw, 100, seed=7)
    assert [again[index] for index in (4, 2)] == [samples[4], samples[2]]
    for key in ("numpy", "torch"):
        assert len({sample["metadata"][key] for sample in samples}) == 5
    assert PromptStream(draw, 5, seed=8)[0] != samples[0]


def test_states_are_put_back_when_a_function_raises():
    def broken():
        draw()
        raise KeyError("no prompt")

    before = states()
    with pytest.raises(KeyError):
        call_prompt_function(broken, 1)
    assert states() == before


def test_a_function_that_ends_is_an_error_and_not_the_end_of_training():
    prompts = iter([("a cat", {})])
    stream = PromptStream(lambda: next(prompts), 2, seed=1)
    assert stream[0]["prompt"] == "a cat"
    before = states()
    with pytest.raises(RuntimeError, match=r"ran out of prompts.*random\.choice.*train_dataset"):
        stream[1]
    assert states() == before


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ("a cat", r"must return \(prompt, metadata\)"),
        (("a cat",), "must return"),
        (("", {}), "is not empty"),
        ((None, {}), "must return"),
        (["a cat", {}], "must return"),
        (("a cat", None), "metadata as a dict"),
    ],
)
def test_what_a_function_must_return(result, message):
    with pytest.raises(TypeError, match=message):
        call_prompt_function(lambda: result, 1)


def counting():
    calls = itertools.count()
    return lambda: ("a cat", {"number": next(calls)})


STATEFUL = {
    "cycle": lambda: partial(next, itertools.cycle([("a cat", {}), ("a dog", {})])),
    "the same at first": lambda: partial(next, itertools.cycle([("a cat", {}), ("a cat", {}), ("a dog", {})])),
    "metadata": counting,
    "generator": lambda: partial(lambda rng: (f"cat {rng.random()}", {}), random.Random(1)),
    "a tensor": lambda: partial(lambda rng: ("cat", {"x": [torch.rand(2, generator=rng)]}), torch.Generator()),
}


@pytest.mark.parametrize("kind", STATEFUL)
def test_a_function_with_a_state_of_its_own_is_refused(kind):
    with pytest.raises(ValueError, match=r"keeps a state of its own.*random\.choice.*train_dataset"):
        check_stateless(STATEFUL[kind](), seed=1)


def test_a_function_that_draws_is_taken():
    check_stateless(draw, seed=1)
    check_stateless(lambda: ("a cat", {"judge": lambda image: 0.0, "image": np.random.rand(3)}), seed=1)


# Dataloader workers


@pytest.mark.parametrize("value", [lambda image: 0.0, [threading.Lock()]], ids=["function", "lock"])
def test_metadata_that_workers_cannot_send_is_refused(value, tmp_path):
    message = "metadata 'judge' is a .* that dataloader workers cannot send .* Set dataloader_num_workers=0"
    rows = [{"prompt": "a cat", "judge": "name"}, {"prompt": "a dog", "judge": value}]
    with pytest.raises(TypeError, match=message):
        make_trainer(tmp_path, prompts=rows, dataloader_num_workers=1)
    with pytest.raises(TypeError, match=message):
        make_trainer(tmp_path, prompts=lambda: ("a cat", {"judge": value}), dataloader_num_workers=1)
    make_trainer(tmp_path, prompts=rows, dataloader_num_workers=0)


def sometimes():
    """Its metadata can be sent but for some prompts."""
    return "a cat", {"judge": (lambda: 0.0) if random.random() < 0.3 else "name"}


def test_metadata_that_a_worker_meets_later_stops_the_training(tmp_path):
    seed = next(seed for seed in range(99) if call_prompt_function(sometimes, seed)[1]["judge"] == "name")
    check_picklable([call_prompt_function(sometimes, seed)[1]])
    stream = PromptStream(sometimes, 20, seed=1)
    with pytest.raises(TypeError, match="metadata 'judge' is a function"):
        list(DataLoader(stream, collate_fn=collate, num_workers=1))
    assert len(list(DataLoader(stream, collate_fn=collate))) == 20


# Seeds


def test_seeds_of_different_purposes_and_keys_are_unrelated():
    seeds = {derive_seed(seed, purpose, key) for seed in range(5) for purpose in Purpose for key in range(200)}
    assert len(seeds) == 5 * len(Purpose) * 200
    assert all(0 <= seed < 2**63 for seed in seeds)
    first = torch.randn(20000, generator=make_generator(1, Purpose.NOISE, 0))
    second = torch.randn(20000, generator=make_generator(1, Purpose.NOISE, 1))
    assert abs(torch.corrcoef(torch.stack([first, second]))[0, 1]) < 4 / 20000**0.5
    assert torch.equal(first, torch.randn(20000, generator=make_generator(1, Purpose.NOISE, 0)))


def test_seeds_stay_what_they_are():
    """Another derivation would change every run that is resumed."""
    sequence = np.random.SeedSequence([42, 1, 7]).generate_state(1, np.uint64)[0]
    assert derive_seed(42, Purpose.STEPS, 7) == int(sequence) // 2
    assert [int(purpose) for purpose in Purpose] == [0, 1, 2, 3, 4, 5]
