"""Texts stay what they are in every kind of file, and broken lines are told with their number."""

import json

import datasets
import pytest

from trl_leapalign.prompts.sources import call_prompt_function, load_prompts

HARD = [
    "NA",
    "null",
    "None",
    "nan",
    "007",
    "7",
    "1e5",
    "2024-05-01",
    "2024-05-01T10:00:00Z",
    "true",
    "N/A",
    "-",
    "3.10",
]
HARD += [" a cat ", 'say "hi", cat', "a\u2028b", "two\nlines", "#1", "=1+1", "'", "C:\\cat", "{}", "漢字 😀"]


def csv_cell(text):
    return '"' + text.replace('"', '""') + '"'


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(path, texts):
    rows = [{"prompt": text, "note": text} for text in texts]
    if path.suffix == ".csv":
        lines = ["prompt,note", *(f"{csv_cell(text)},{csv_cell(text)}" for text in texts)]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="")
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    else:
        datasets.Dataset.from_list(rows).to_parquet(path)


@pytest.mark.parametrize("kind", ["csv", "json", "jsonl", "parquet"])
def test_texts_stay_texts(tmp_path, kind):
    path = tmp_path / f"prompts.{kind}"
    write(path, HARD)
    rows = load_prompts(path)
    assert list(rows["prompt"] if kind == "parquet" else [row["prompt"] for row in rows]) == HARD
    assert [row["note"] for row in rows] == HARD
    for text in HARD:  # alone, so that nothing beside it decides
        write(path, [text] * 2)
        assert [row["prompt"] for row in load_prompts(path)] == [text] * 2


def test_text_files_keep_words_that_look_like_something_else(tmp_path):
    (tmp_path / "p.txt").write_text("NA\nnull\n007\na, b\n2024-05-01\n")
    assert [row["prompt"] for row in load_prompts(tmp_path / "p.txt")] == ["NA", "null", "007", "a, b", "2024-05-01"]


def test_columns_of_numbers(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text("prompt,whole,real,code,mixed,gap,none\n1,1,0.5,007,1,3,\n2,-2,1e-05,12,x,,\n")
    assert load_prompts(path) == [
        {"prompt": "1", "whole": 1, "real": 0.5, "code": "007", "mixed": "1", "gap": 3, "none": ""},
        {"prompt": "2", "whole": -2, "real": 1e-5, "code": "12", "mixed": "x", "gap": None, "none": ""},
    ]


def test_shapes_of_json(tmp_path):
    expected = [{"prompt": "a", "n": 1}, {"prompt": "b", "n": None}]
    for text in (
        '[{"prompt": "a", "n": 1}, {"prompt": "b"}]',
        '{"prompt": "a", "n": 1}\r\n\n{"prompt": "b"}\n',
        '{"prompt": ["a", "b"], "n": [1, null]}',
    ):
        (tmp_path / "p.json").write_text(text)
        assert load_prompts(tmp_path / "p.json") == expected
    (tmp_path / "p.json").write_text('["a", "b"]')
    assert load_prompts(tmp_path / "p.json") == [{"prompt": "a"}, {"prompt": "b"}]
    (tmp_path / "p.json").write_text('{"prompt": "a", "boxes": [[1, 2]], "n": {"deep": "2024-01-01"}}')
    assert load_prompts(tmp_path / "p.json") == [{"prompt": "a", "boxes": [[1, 2]], "n": {"deep": "2024-01-01"}}]


BROKEN = {
    "comma.csv": ("prompt\na cat\na dog, sitting\n", "line 3 has 2 fields, .*in double quotes"),
    "short.csv": ("prompt,tag\na cat,x\na dog\n", "line 3 has 1 fields"),
    "lines.csv": ('prompt\n"a\ncat"\n"a" dog\n', "line 4: .*expected after"),
    "open.csv": ('prompt\n"a cat\n', "line 2: unexpected end of data"),
    "twice.csv": ("prompt,prompt\na,b\n", "line 1 names a column twice"),
    "blank.csv": ("\n \n", "there is nothing in it|no column 'prompt'"),
    "cut.jsonl": ('{"prompt": "a"}\n\n{"prompt": "b"\n', "line 3: .*delimiter"),
    "single.jsonl": ('{"prompt": "a"}\n{prompt: b}\n', "line 2: Expecting property name"),
    "first.jsonl": ("{'prompt': 'a'}\n", "line 1: Expecting property name"),
    "text.jsonl": ('{"prompt": "a"}\na dog\n', "line 2: Expecting value"),
    "number.jsonl": ('{"prompt": "a"}\n3\n', "line 2 is no object: '3'"),
    "twice.jsonl": ('{"prompt": "a"}\n{"prompt": "b", "prompt": "c"}\n', "line 2: an object has 'prompt' twice"),
    "cut.json": ('[\n{"prompt": "a"},\n{"prompt": "b"\n', "line 4, column 1: Expecting ',' delimiter"),
    "items.json": ('[{"prompt": "a"}, 3]', "row 1 is 3, where an object"),
    "deep.json": ("[" * 100_000, "broken"),
    "half.jsonl": ('{"prompt": "a"}\n{"prompt": "b \\ud83d"}\n', r"Prompt 1 is no whole Unicode: 'b \\ud83d' has half"),
    "null.jsonl": ('{"prompt": "a"}\n{"prompt": null}\n', "Prompt 1 is None"),
    "seven.jsonl": ('{"prompt": "a"}\n{"prompt": 7}\n', "Prompt 1 is 7"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_told_with_the_line(tmp_path, name):
    content, message = BROKEN[name]
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_prompts(tmp_path / name)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_path_is_a_path(tmp_path, kind):
    for name in ("p[1]", "p1", "z*", "zz", "q?", "qq", "{a,b}", "a"):
        write(tmp_path / f"{name}.{kind}", [name])
    for name in ("p[1]", "z*", "q?", "{a,b}"):
        assert [row["prompt"] for row in load_prompts(tmp_path / f"{name}.{kind}")] == [name]
    with pytest.raises(ValueError, match="does not exist"):
        load_prompts(tmp_path / f"*.{kind}")


@pytest.mark.parametrize("kind", ["pandas", "arrow", "numpy", "torch", None])
def test_formats_of_datasets(kind):
    rows = load_prompts(datasets.Dataset.from_dict({"prompt": ["a cat", "a dog"], "n": [1, 2]}).with_format(kind))
    assert isinstance(rows[1]["prompt"], str) and rows[1]["prompt"] == "a dog" and int(rows[1]["n"]) == 2


def test_half_of_a_surrogate_pair_is_found_in_every_source():
    prompts = ["a cat"] * 5 + ["a \udc00 dog"]
    for source in (prompts, [{"prompt": text} for text in prompts]):
        with pytest.raises(ValueError, match=r"Prompt 5 is no whole Unicode: 'a \\udc00 dog'"):
            load_prompts(source)
    with pytest.raises(ValueError, match="The prompt of prompt_function is no whole Unicode"):
        call_prompt_function(lambda: ("\ud800", {}), 0)
