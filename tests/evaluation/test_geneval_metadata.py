"""Reading GenEval's metadata: what comes out, and that every broken row is named."""

import hashlib
import json
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

from trl_leapalign.evaluation import parse_task, read_geneval
from trl_leapalign.evaluation.geneval import metadata as geneval_metadata
from trl_leapalign.evaluation.geneval.metadata import CLASS_NAMES, COLORS, Clause, GenEvalTask
from trl_leapalign.evaluation.rows import load_rows

ROWS = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {
        "tag": "counting",
        "include": [{"class": "tv remote", "count": 2}],
        "exclude": [{"class": "tv remote", "count": 3}],
        "prompt": "a photo of two tv remotes",
    },
    {
        "tag": "position",
        "include": [{"class": "sink", "count": 1}, {"class": "tie", "count": 1, "position": ["above", 0]}],
        "prompt": "a photo of a tie above a sink",
    },
    {
        "tag": "color_attr",
        "include": [
            {"class": "cup", "count": 1, "color": "green"},
            {"class": "pizza", "count": 1, "color": "red"},
        ],
        "prompt": "a photo of a green cup and a red pizza",
    },
]
SINK = {"class": "sink", "count": 1}


def write(path, rows=ROWS, end="\n"):
    path.write_text("\n".join(json.dumps(row) for row in rows) + end, encoding="utf-8")
    return path


@pytest.mark.parametrize("end", ["\n", "", "\n\n \n"])
def test_a_file_gives_its_rows(end, tmp_path):
    path = write(tmp_path / "metadata.jsonl", end=end)
    assert read_geneval(path) == ROWS == read_geneval(str(path)) == read_geneval(ROWS)
    path.write_bytes("\ufeff".encode() + path.read_bytes().replace(b"\n", b"\r\n"))
    assert read_geneval(path) == ROWS


def test_tasks_of_rows():
    assert [parse_task(row) for row in ROWS] == [
        GenEvalTask("single_object", (Clause("bench", 1),)),
        GenEvalTask("counting", (Clause("tv remote", 2),), (Clause("tv remote", 3),)),
        GenEvalTask("position", (Clause("sink", 1), Clause("tie", 1, relation="above", target=0))),
        GenEvalTask("color_attr", (Clause("cup", 1, color="green"), Clause("pizza", 1, color="red"))),
    ]


def test_none_means_absent():
    filled = {
        "tag": "counting",
        "include": [{"class": "sink", "count": 2, "color": None, "position": None}],
        "exclude": None,
    }
    assert parse_task(filled) == GenEvalTask("counting", (Clause("sink", 2),))


def test_class_names_are_cocos_with_genevals_names():
    assert len(CLASS_NAMES) == len(set(CLASS_NAMES)) == 80 and len(COLORS) == 10
    # Its digest stands for the order of COCO: a detector's class i is the name at position i.
    digest = hashlib.sha256("\n".join(CLASS_NAMES).encode()).hexdigest()
    assert digest.startswith("8aad18a0fdff92ac")
    renamed = {4: "airplane", 57: "couch", 62: "tv", 64: "computer mouse", 65: "tv remote", 66: "computer keyboard"}
    assert {index: CLASS_NAMES[index] for index in renamed} == renamed


def include(*clauses, tag="position"):
    return {"tag": tag, "include": list(clauses), "prompt": "a photo"}


BROKEN = [
    ({"tag": "colors", "prompt": "a"}, "no 'include'"),
    ({"include": [SINK], "prompt": "a"}, "no 'tag'"),
    (include(SINK, tag="colour"), "unknown tag 'colour'"),
    (include(), "empty include"),
    ({"tag": "colors", "include": SINK, "prompt": "a"}, "include is .* must be a list"),
    ({"tag": "colors", "include": [SINK]}, "prompt None"),
    ({"tag": "colors", "include": [SINK], "prompt": " "}, "prompt ' '"),
    (["tag", "include"], "must be an object"),
    (include("sink"), r"include\[0\] is 'sink'"),
    (include({"count": 1}), r"include\[0\] has no 'class'"),
    (include({"class": "sink"}), "no 'count'"),
    (include({"class": "sofa", "count": 1}), "unknown class 'sofa'"),
    (include({"class": "mouse", "count": 1}), "unknown class 'mouse'.*computer mouse"),
    (include(SINK | {"count": 0}), "count 0"),
    (include(SINK | {"count": True}), "count True"),
    (include(SINK | {"count": 1.0}), "count 1.0"),
    (include(SINK | {"color": "grey"}), "unknown color 'grey'"),
    (include(SINK | {"colour": "red"}), "'colour'; only class, count, color, position"),
    (include(SINK, SINK | {"position": ["beside", 0]}), r"include\[1\] has the unknown relation 'beside'"),
    (include(SINK, SINK | {"position": ["above", 1]}), r"entry 1, .* \(0 to 0\)"),
    (include(SINK, SINK | {"position": ["above", -1]}), "entry -1"),
    (include(SINK, SINK | {"position": ["above", "0"]}), "entry '0'"),
    (include(SINK | {"position": ["above", 0]}), "it is the first"),
    (include(SINK, SINK | {"position": ["above"]}), r"position \['above'\]"),
    (include(SINK, SINK | {"position": "above"}), "position 'above'"),
    (include(SINK) | {"exclude": [{"class": "sink", "count": 2, "color": "red"}]}, r"exclude\[0\] has 'color'"),
    (include(SINK) | {"exclude": {"class": "sink"}}, "exclude is .* must be a list"),
]


@pytest.mark.parametrize("row, message", BROKEN, ids=[message for _, message in BROKEN])
def test_a_broken_row_is_named(row, message, tmp_path):
    path = write(tmp_path / "metadata.jsonl", [ROWS[0], row])
    with pytest.raises(ValueError, match=f"^Line 2 of .*metadata.jsonl.*{message}"):
        read_geneval(path)
    with pytest.raises(ValueError, match=f"^Row 1.*{message}"):
        read_geneval([ROWS[0], row])


def test_bad_files(tmp_path):
    path = tmp_path / "metadata.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n\n{'tag': 1}\n")
    with pytest.raises(ValueError, match=r"Line 3 of .* is no JSON"):
        read_geneval(path)
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(ValueError, match="UTF-8"):
        read_geneval(path)
    path.write_text("\n")
    with pytest.raises(ValueError, match="no GenEval prompts"):
        read_geneval(path)
    with pytest.raises(FileNotFoundError, match="no GenEval metadata file"):
        read_geneval(tmp_path / "nothing.jsonl")


@pytest.fixture
def server(tmp_path):
    handler = type("Quiet", (SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    http = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(tmp_path)))
    threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{http.server_port}/metadata.jsonl"
    http.shutdown()
    http.server_close()


def test_a_url_is_read(server, tmp_path):
    with pytest.raises(OSError, match=r"404.*evaluation_metadata.jsonl"):
        read_geneval(server)
    write(tmp_path / "metadata.jsonl")
    assert read_geneval(server) == load_rows(server) == ROWS


def test_the_published_url_must_give_the_published_file(server, tmp_path, monkeypatch):
    write(tmp_path / "metadata.jsonl")
    monkeypatch.setattr(geneval_metadata, "METADATA_URL", server)
    with pytest.raises(ValueError, match="not the published GenEval file"):
        read_geneval(server)


def test_without_a_network_the_error_says_what_to_do():
    with pytest.raises(OSError, match=r"could not be read from http://127.0.0.1:1.*pass its path"):
        read_geneval("http://127.0.0.1:1/metadata.jsonl")
