"""Texts of others stay texts: in the card's program, in headings, in tables and in figures."""

import ast
import html
import subprocess
import sys
from pathlib import Path

import pytest
from training_cases import make_trainer

from trl_leapalign.cli.main import _object
from trl_leapalign.comparison.report import BASE, Result, write_report
from trl_leapalign.evaluation.statistics import Estimate
from trl_leapalign.evaluation.tables import EvaluatorSummary, write_summaries
from trl_leapalign.markdown import code, escape, literal

TEXTS = [
    "two cats\non a mat \\ sofa",
    'say "hi" and \'bye\'").images[0]\nimport os; os.system("touch owned")\n("',
    "```\n<script>alert(1)</script>\n```python\nimport os",
    "a | b [x](http://a) {{ 7 * 7 }} {% raw %} \u2028 \u202e \x00 \\",
    "漢字 😀 'one' \"two\" `three`",
    "\\`\\\\`'\"",
]


@pytest.mark.parametrize("text", TEXTS)
def test_a_literal_is_one_line_whose_value_is_the_text(text):
    written = literal(text)
    assert ast.literal_eval(written) == text
    assert written.isprintable() and "`" not in written and written.startswith('"')


@pytest.mark.parametrize("text", TEXTS)
def test_headings_and_cells_show_the_text_on_one_line(text):
    written = escape(text)
    assert html.unescape(written) == " ".join(text.split())
    assert not set("<>|`[]\n") & set(written)
    assert code(text).count("`") == 2 and "\n" not in code(text)


@pytest.mark.parametrize("text", TEXTS)
def test_the_cards_program_calls_the_pipeline_with_the_prompt_and_does_nothing_else(tmp_path, text):
    trainer = make_trainer(tmp_path / 'a "folder"', prompts=[text])
    trainer.create_model_card(model_name="<b>mine</b>\n# x")
    card = Path(trainer.args.output_dir, "README.md").read_text(encoding="utf-8")
    [program] = [part.split("```")[0] for part in card.split("```python")[1:]]
    tree = ast.parse(program)
    kinds = ["Import", "ImportFrom", "Assign", "Assign", "Expr", "Assign", "Expr"]
    assert [type(node).__name__ for node in tree.body] == kinds
    assert tree.body[-2].value.value.value.keywords[0].value.value == text
    assert tree.body[-3].value.args[0].value == 'a "folder"'
    assert "# &lt;b&gt;mine&lt;/b&gt; # x\n" in card


def test_reports_escape_names(tmp_path):
    name = "<img src=x> | $\\frac `a`"
    history = [{"step": n, "reward": 0.1, "grad_norm": 1.0, "seconds_per_step": 1.0} for n in (1, 2)]
    results = [Result(BASE, None, {}, [], {"<s>": [1.0, 2.0]}, [name, "b"])]
    results += [
        Result(run, seed, {}, history, {"<s>": [1.0, 2.0 + seed]}, [name, "b"]) for run in "ab" for seed in (0, 1)
    ]
    results += [Result(name, 0, {}, history, {"<s>": [1.0, 2.0]}, [name, "b"])]
    tables = write_report(tmp_path, results).read_text(encoding="utf-8")
    (tmp_path / "e").mkdir()
    estimate = Estimate(1.0, 0.1, 1, 2, 2)
    summary = EvaluatorSummary(estimate, {name: estimate}, 0)
    tables += write_summaries(tmp_path / "e", {"<s>": summary}).read_text(encoding="utf-8")
    assert "<img" not in tables and "<s>" not in tables and "&lt;img src=x&gt; &#124; $\\frac &#96;a&#96;" in tables
    for line in tables.splitlines():
        if line.startswith("| "):
            assert line.count("|") in (7, 8, 9)


def test_the_current_folder_is_searched_for_named_modules_alone(tmp_path):
    for name in ("trl", "peft", "matplotlib", "scipy"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a file of this folder ran')")
    (tmp_path / "mine.py").write_text("import sys\nhere = '' in sys.path\ndef reward(images, prompts, metadata): ...\n")
    program = "from trl_leapalign.cli.main import main, _object; import sys; before = list(sys.path)\n"
    program += "try: main(['train', '--help'])\nexcept SystemExit as end: assert not end.code\n"
    program += "assert _object('mine:here') and sys.path == before\n"
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-P", "-c", program],
        cwd=tmp_path,
        env={"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_what_is_wrong_with_a_named_module(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    contents = {"boom_a": "import no_such_module", "boom_b": "1 / 0", "boom_c": "def f(:", "boom_d": "x = 1"}
    for name, text in contents.items():
        Path(f"{name}.py").write_text(text)
    messages = {
        "boom_a:f": (ImportError, "'boom_a' of 'boom_a:f' is there, but fails .* No module named 'no_such_module'"),
        "boom_b:f": (ImportError, "ZeroDivisionError: division by zero. Mend it"),
        "boom_c:f": (ImportError, "SyntaxError"),
        "boom_d:f": (ValueError, "There is no 'boom_d:f': boom_d .* has no 'f'"),
        "boom_e:f": (ValueError, "There is no 'boom_e:f': No module named 'boom_e'. Modules are looked for here"),
        "boom_d.x:f": (ValueError, "There is no 'boom_d.x:f'"),
        "boom d:f": (ValueError, "names no object. Write MODULE:NAME"),
    }
    for name, (kind, message) in messages.items():
        with pytest.raises(kind, match=message):
            _object(name)
    assert sys.path == path
    for name in contents:
        sys.modules.pop(name, None)
