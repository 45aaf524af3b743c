import json
import math
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import pytest
import torch
from peft import LoraConfig
from scipy import stats
from training_cases import blueness, make_config, make_trainer, redness

from examples.tiny import tiny_flux
from trl_leapalign.cli.main import main
from trl_leapalign.comparison.compare import Comparison, Job, TimeLimit
from trl_leapalign.comparison.report import Result, write_report
from trl_leapalign.evaluation.statistics import difference, mean_over_seeds
from trl_leapalign.methods import DRaFT
from trl_leapalign.prompts.seeds import Purpose, make_generator

TRAIN = [{"prompt": prompt} for prompt in ("a red circle", "two blue squares", "the green dog")]
EVAL = [
    {"prompt": "a red cat", "kind": "red"},
    {"prompt": "two circles", "kind": "other"},
    {"prompt": "a red dog", "kind": "red"},
]
RUNS = {
    "leapalign": {"method": "leapalign"},
    "half": {"learning_rate": 5e-3, "method_kwargs": {"step_range": [0, 0.9]}},
}


def comparison(directory, **options):
    defaults = {
        "make_pipeline": tiny_flux,
        "reward": redness,
        "config": make_config(directory, max_steps=2, eval_num_steps=4),
        "runs": RUNS,
        "train_rows": TRAIN,
        "eval_rows": EVAL,
        "evaluators": [blueness, redness],
        "seeds": [0, 1],
        "num_images": 5,
        "group_by": "kind",
    }
    return Comparison(**{**defaults, **options})


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    directory = tmp_path_factory.mktemp("comparison")
    return comparison(directory).run()


def test_a_run_is_what_its_settings_say(report, tmp_path):
    """Trained and scored once more, by the trainer and plain calls of the pipeline."""
    found = json.loads((report.parent / "runs" / "half" / "seed_1" / "result.json").read_text())
    trainer = make_trainer(tmp_path, prompts=TRAIN, seed=1, eval_num_steps=4, **RUNS["half"])
    trainer.train()
    scores = []
    for index in range(5):
        image = trainer.pipeline(
            EVAL[index % 3]["prompt"],
            generator=make_generator(0, Purpose.EVALUATION, index),
            num_inference_steps=4,
            height=16,
            width=16,
            output_type="pt",
        ).images
        scores.append(image[0, 2].mean().item())
    assert found["scores"]["blueness"] == pytest.approx(scores, rel=1e-6)
    assert found["groups"] == ["red", "other", "red", "red", "other"]
    assert [entry["step"] for entry in found["history"]] == [1, 2]


def test_the_report_has_the_means_of_the_results(report):
    table = json.loads((report.parent / "report.json").read_text())
    overall = {}
    for name in RUNS:
        seeds = [json.loads(path.read_text()) for path in sorted((report.parent / "runs" / name).glob("*/result.json"))]
        values = [result["scores"]["blueness"] for result in seeds]
        red = [fmean(each[index] for index in (0, 2, 3)) for each in values]
        other = [fmean(each[index] for index in (1, 4)) for each in values]
        overall[name] = [(a + b) / 2 for a, b in zip(red, other, strict=True)]
        assert table[name]["red"]["mean"] == pytest.approx(fmean(red))
        assert table[name]["mean"]["mean"] == pytest.approx(fmean(overall[name]))
        assert table[name]["mean"]["standard_error"] == pytest.approx(abs(overall[name][0] - overall[name][1]) / 2)
        assert table[name]["updates"]["mean"] == 2
    expected = stats.ttest_ind(overall["half"], overall["leapalign"], equal_var=False).pvalue
    assert table["half"]["p_value"] == pytest.approx(expected)
    text = report.read_text()
    assert "| base |" in text and "| leapalign |" in text and "not significant" in text
    assert (report.parent / "curves.png").stat().st_size > 10_000
    assert (report.parent / "images.png").stat().st_size > 1_000


def test_runs_of_one_seed_share_prompts_and_noise(report):
    """At update 1 no weight has changed: a method that rewards the sampler's image sees the same images."""
    first = [
        json.loads((report.parent / "runs" / name / "seed_0" / "result.json").read_text())["history"][0]["reward"]
        for name in RUNS
    ]
    assert first[0] == first[1]


def test_what_is_done_is_not_done_again(report):
    before = {path: path.stat().st_mtime_ns for path in report.parent.rglob("result.json")}
    assert len(before) == 5

    def refuse():
        raise AssertionError("trained again")

    assert comparison(report.parent, make_pipeline=refuse).run() == report
    assert {path: path.stat().st_mtime_ns for path in report.parent.rglob("result.json")} == before


def test_a_method_of_ones_own_and_another_folder_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = {"own": {"method": DRaFT(num_last_steps=1)}}
    comparison(Path("out"), runs=runs, seeds=[0]).run()
    again = comparison(tmp_path / "out", runs=runs, seeds=[0], make_pipeline=None).run()
    assert "| own |" in again.read_text()
    (tmp_path / "out/runs/own/seed_0/result.json").write_text('{"name": "o')
    with pytest.raises(ValueError, match=r"seed_0/result.json cannot be read"):
        comparison(tmp_path / "out", runs=runs, seeds=[0]).run()
    with pytest.raises(ValueError, match="pipeline changed"):
        comparison(tmp_path / "out", runs=runs, seeds=[0], pipeline_name="another").run()


def test_results_of_other_weights_are_refused(report):
    def other_pipeline():
        pipeline = tiny_flux()
        pipeline.transformer.x_embedder.weight.data[0, 0] += 1
        return pipeline

    runs = RUNS | {"one more": {}}
    with pytest.raises(ValueError, match="the pipeline's transformer changed"):
        comparison(report.parent, make_pipeline=other_pipeline, runs=runs).run()

    def shifted_pipeline():
        pipeline = tiny_flux()
        pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, shift=9.0)
        return pipeline

    with pytest.raises(ValueError, match="the pipeline's scheduler changed"):
        comparison(report.parent, make_pipeline=shifted_pipeline, runs=runs).run()


def test_results_of_other_settings_are_refused(report):
    with pytest.raises(ValueError, match="num_images changed"):
        comparison(report.parent, num_images=4).run()
    with pytest.raises(ValueError, match="max_steps changed"):
        comparison(report.parent, config=make_config(report.parent, max_steps=3, eval_num_steps=4)).run()


@pytest.mark.parametrize(
    ("options", "changed"),
    [
        ({"reward": blueness}, "reward"),
        ({"train_rows": TRAIN[:2]}, "train_rows"),
        ({"eval_rows": EVAL[::-1]}, "judged_rows"),
        ({"group_by": None}, "group_by"),
        ({"evaluators": [redness]}, "judges"),
        ({"train_seconds": 100.0}, "train_seconds"),
        ({"peft_config": LoraConfig(r=2, target_modules=["to_q"])}, "peft_config"),
    ],
)
def test_results_of_another_experiment_are_refused(report, options, changed):
    with pytest.raises(ValueError, match=rf"{changed}\b.* changed\."):
        comparison(report.parent, **options).run()


def test_steps_of_the_evaluation_belong_to_all_results(report):
    with pytest.raises(ValueError, match="runs/base holds the result of other settings: call changed"):
        comparison(report.parent, config=make_config(report.parent, max_steps=2, eval_num_steps=5)).run()


def test_a_learning_rate_that_fails_is_not_chosen(tmp_path):
    options = {"learning_rates": [1e30, 1e-3], "tuning_rows": EVAL[:1], "seeds": [0], "num_images": None}
    options |= {"runs": {"leapalign": {}}, "group_by": None}
    comparison(tmp_path, **options).run()
    chosen = json.loads((tmp_path / "runs/leapalign/seed_0/result.json").read_text())["settings"]
    assert chosen == {"learning_rate": 1e-3}
    with pytest.raises(ValueError, match="fails with each of learning_rates"):
        comparison(tmp_path / "all", **{**options, "learning_rates": [1e30]}).run()


def test_a_run_that_fails_leaves_the_others_their_report(tmp_path, monkeypatch):
    runs = {"leapalign": {}, "too fast": {"learning_rate": 1e30}}
    path = comparison(tmp_path, runs=runs, group_by=None).run()
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["leapalign"]["blueness"]["mean"] > 0 and report["leapalign"]["p_value"] is None
    assert report["too fast"]["images without score"]["mean"] == 5 and report["too fast"]["p_value"] is None
    assert "| too fast | - |" in path.read_text()


def test_p_values_are_corrected_for_their_number(tmp_path):
    """Holm: the smallest times 2, then the larger of that and the largest."""
    overall = {"base": [0.0], "a": [1.0, 2.0, 3.0], "b": [5.0, 6.0, 6.5], "c": [1.5, 2.0, 3.1]}
    results = [
        Result(name, seed, {"learning_rate": 1e-3}, [], {"r": [value]}, ["all"])
        for name, values in overall.items()
        for seed, value in enumerate(values)
    ]
    write_report(tmp_path, results)
    report = json.loads((tmp_path / "report.json").read_text())
    b, c = (stats.ttest_ind(overall[name], overall["a"], equal_var=False).pvalue for name in "bc")
    assert report["b"]["p_value"] == pytest.approx(2 * b) and b < c
    assert report["c"]["p_value"] == pytest.approx(c)


def test_images_without_a_score_are_left_out():
    result = Result("a", 0, {}, [], {"r": [1.0, float("nan"), 3.0, float("nan")]}, ["x", "x", "x", "y"])
    assert result.by_group()["x"] == 2.0
    assert result.by_group()["y"] != result.by_group()["y"]


def test_the_best_learning_rate_on_the_tuning_prompts_is_used(tmp_path):
    rates = [1e-3, 3e-2, 1e-2]
    options = {"learning_rates": rates, "tuning_rows": EVAL[:1], "seeds": [0], "num_images": None, "group_by": None}
    comparison(tmp_path, runs={"leapalign": {"method": "leapalign"}, "own": {"learning_rate": 0.02}}, **options).run()
    trials = [json.loads((tmp_path / f"tuning/leapalign/lr_{rate:g}/result.json").read_text()) for rate in rates]
    scores = [trial["scores"]["blueness"][0] for trial in trials]
    assert len(set(scores)) == 3
    assert {trial["seed"] for trial in trials} == {1000}
    chosen = json.loads((tmp_path / "runs/leapalign/seed_0/result.json").read_text())["settings"]
    assert chosen["learning_rate"] == rates[scores.index(max(scores))]
    assert not (tmp_path / "tuning" / "own").exists()


def test_equal_time(tmp_path):
    config = make_config(tmp_path, max_steps=50, eval_num_steps=4)
    options = {"runs": {"refl": {"method": "refl"}}, "seeds": [0], "group_by": None, "evaluators": None}
    comparison(tmp_path, config=config, train_seconds=1e-3, **options).run()
    result = json.loads((tmp_path / "runs/refl/seed_0/result.json").read_text())
    assert len(result["history"]) == 1
    assert list(result["scores"]) == ["redness"]


def test_time_limit_counts_updates_alone(monkeypatch):
    clock = iter([0.0, 3.0, 100.0, 104.0])
    monkeypatch.setattr("trl_leapalign.comparison.compare.time.perf_counter", lambda: next(clock))
    limit, control = TimeLimit(7.0), type("Control", (), {"should_training_stop": False})()
    limit.on_step_begin(None, None, control)
    limit.on_step_end(None, None, control)
    assert not control.should_training_stop
    limit.on_step_begin(None, None, control)
    limit.on_step_end(None, None, control)
    assert control.should_training_stop


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"runs": {}}, "at least one run"),
        ({"runs": {"refl": "refl"}}, "at least one run"),
        ({"runs": {"base": {}}}, "cannot be compared"),
        ({"runs": {"a/b": {}}}, "cannot be compared"),
        ({"runs": {"a": {"seed": 3}}}, "cannot be compared"),
        ({"runs": {"a": {"method": "leapallign"}}}, "leapallign"),
        ({"runs": {"a": {"method_kwargs": {"gradient_discount": 2.0}}}}, "gradient_discount"),
        ({"seeds": []}, "seeds="),
        ({"seeds": [0, 0]}, "seeds="),
        ({"seeds": [1000]}, "tuning seed"),
        ({"train_seconds": 0}, "train_seconds=0"),
        ({"train_seconds": 9, "runs": {"a": {"ema_decay": 0.9}}}, "Leave ema_decay out"),
        ({"learning_rates": [1e-3]}, "tuning_rows"),
        ({"tuning_rows": EVAL}, "set both or neither"),
        ({"learning_rates": [-1.0], "tuning_rows": EVAL}, "learning_rates=-1.0"),
        ({"seeds": [0, -1]}, "seed=-1"),
        ({"num_images": 0}, "num_images=0"),
        ({"eval_rows": []}, "eval_rows is empty"),
        ({"runs": {"..": {}}}, "no name of a folder"),
        ({"runs": {0.1: {}}}, "by a text"),
        ({"eval_rows": [{"prompt": "a", "kind": "mean"}]}, r"called like columns of the report: \['mean'\]"),
        (
            {
                "peft_config": LoraConfig(r=2, target_modules=["to_q"]),
                "runs": {"a": {"full_finetuning": True, "learning_rate": 1e-5}},
            },
            "the LoRA of all runs has no effect",
        ),
        ({"group_by": "tag"}, "group_by='tag'"),
        ({"evaluators": []}, "no reward"),
        ({"runs": {"a": {"eval_num_steps": 3}}}, "cannot be compared"),
        ({"runs": {"a": {"full_finetuning": True}}}, "set its learning_rate"),
    ],
)
def test_bad_input(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        comparison(tmp_path, **options)


def test_an_unknown_setting_of_a_run(tmp_path):
    with pytest.raises(TypeError, match="learning_rat"):
        comparison(tmp_path, runs={"a": {"learning_rat": 1e-3}})


def test_summary():
    assert str(mean_over_seeds([0.5])) == "0.5"
    assert str(mean_over_seeds([0.5, math.nan])) == "-"
    values, others = [1.0, 2.0, 6.0], [0.5, 0.75]
    summary = mean_over_seeds(values)
    assert summary.mean == 3.0
    assert summary.standard_error == pytest.approx((((4 + 1 + 9) / 2) / 3) ** 0.5)
    welch = difference(summary, mean_over_seeds(others))
    assert welch.mean == pytest.approx(fmean(values) - fmean(others))
    assert welch.p_value == pytest.approx(stats.ttest_ind(values, others, equal_var=False).pvalue)


def test_seconds_add_up_over_logs_of_several_updates(tmp_path):
    history = [
        {"step": 2, "seconds_per_step": 3.0, "reward": 0.1, "grad_norm": 1.0},
        {"step": 5, "seconds_per_step": 1.0, "reward": 0.2, "grad_norm": 1.0},
    ]
    result = Result("a", 0, {}, history, {"r": [0.0]}, ["all"])
    assert result.seconds == [6.0, 9.0]
    report = write_report(tmp_path, [Result("base", None, {}, [], {"r": [0.0]}, ["all"]), result])
    assert "| a | 0 | 5 | 9 |" in report.read_text()


MODULE = """
from examples.tiny import tiny_flux

def pipeline():
    return tiny_flux()

def redness(images, prompts, metadata):
    return images[:, 0].mean((1, 2))

def prompts():
    return [{"prompt": "a red circle"}, {"prompt": "a dog"}]
"""
COMMON = ["--pipeline", "mine:pipeline", "--reward", "mine:redness", "--train_prompts", "mine:prompts"]
COMMON += ["--max_steps", "1", "--per_device_train_batch_size", "1", "--sample_num_steps", "2", "--report_to", "none"]
COMMON += ["--sample_height", "16", "--sample_width", "16"]


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    sys.modules.pop("mine", None)


def test_compare_on_the_command_line(module, capsys):
    Path("settings.yaml").write_text(
        "runs:\n  a: {method: draft}\n  b: {method: refl, learning_rate: 0.01}\nseeds: [3]\n"
    )
    main(["compare", "--config", "settings.yaml", *COMMON, "--eval_prompts", "mine:prompts", "--output_dir", "out"])
    assert "| a |" in capsys.readouterr().out
    assert Path("out/runs/b/seed_3/result.json").exists()


def test_train_on_the_command_line(module):
    prompts = Path("prompts.txt")
    prompts.write_text("a red circle\n")
    arguments = [
        *COMMON,
        "--train_prompts",
        str(prompts),
        "--method",
        "drtune",
        "--method_kwargs",
        '{"num_train_steps": 1}',
    ]
    arguments += ["--lora", '{"r": 2, "target_modules": ["to_q"]}', "--output_dir", "out"]
    main(["train", *arguments, "--save_strategy", "steps", "--save_steps", "1"])
    main(["train", *arguments, "--max_steps", "3", "--resume_from_checkpoint", "True"])
    assert json.loads(Path("out/checkpoint-3/trainer_state.json").read_text())["global_step"] == 3
    pipeline = tiny_flux()
    pipeline.load_lora_weights("out")
    names = [name for name, _ in pipeline.transformer.named_parameters() if "lora_A" in name]
    assert names and all("to_q" in name for name in names)
    assert Path("out/README.md").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare"], "there is no examples/shapes/compare.yaml here"),
        (["tran"], "unknown command 'tran'"),
        (["compare", *COMMON, "--output_dir", "out", "--seed", "3"], "Set --seeds"),
        (["compare", *COMMON, "--output_dir", "out", "--push_to_hub", "True"], "does not take --push_to_hub"),
    ],
)
def test_commands_that_cannot_run(arguments, message, module):
    with pytest.raises(SystemExit, match=message):
        main(arguments)


@pytest.mark.parametrize("name", ["nowhere:redness", "mine:blackness", "redness", "mine:red ness"])
def test_objects_that_are_not_there(name, module):
    with pytest.raises(ValueError, match=name):
        main(["train", *COMMON, "--reward", name])


def test_help_needs_no_arguments(module):
    command = [sys.executable, "-m", "trl_leapalign"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[2])
    assert result.returncode == 0 and "compare" in result.stdout


@pytest.fixture
def shapes_comparison(monkeypatch, tmp_path):
    """Makes the comparison of the command's options; only the training is left out."""
    monkeypatch.chdir(Path(__file__).parents[2])
    monkeypatch.setattr(sys, "path", list(sys.path))
    seen = []
    monkeypatch.setattr(Comparison, "run", lambda self: seen.append(self) or Path("README.md"))

    def make(*options):
        main(["compare", "--output_dir", str(tmp_path), *options])
        return seen[-1]

    return make


def test_the_shapes_comparison_is_the_default(shapes_comparison):
    found = shapes_comparison()
    assert len(found.runs) == 8
    assert len(found.train_rows) == 360 and len(found.eval_rows) == 1000 and len(found.tuning_rows) == 360
    assert found.judges.names == ["is_right"]
    assert torch.equal(found.judges.functions[0](torch.full((1, 3, 48, 48), 0.5), [""], EVAL_ROW), torch.zeros(1))


def test_the_ablations_can_be_run(shapes_comparison):
    found = shapes_comparison("--config", "examples/shapes/ablations.yaml")
    methods = {name: found.config_of(Job(name, 0)).build_method() for name in found.runs}
    assert methods["alpha 0.1"].gradient_discount == 0.1 and methods["three leaps"].num_leaps == 3
    assert found.config_of(Job("threshold 0.8", 0)).reward_threshold == [0.8]
    changed = [name for name, method in methods.items() if method != methods["leapalign"]]
    assert len(changed) == len(methods) - 4  # the first, and the thresholds


def test_the_pairs_can_be_compared(shapes_comparison):
    found = shapes_comparison("--config", "examples/shapes/pairs.yaml")
    configs = [found.config_of(Job(name, 0)) for name in found.runs]
    assert [config.build_method().pairs_per_rollout for config in configs] == [1, 2, 4, 8]
    assert all(config.sample_num_steps == 16 for config in configs) and found.train_seconds == 60


EVAL_ROW = [
    {"tag": "single_object", "include": [{"class": "ring", "count": 1, "color": None}], "relation": None, "prompt": ""}
]
