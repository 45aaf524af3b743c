"""Options mean the same on the command line and in YAML."""

import re

import datasets
import pytest
import torch

from trl_leapalign.cli.arguments import CompareArguments, EvaluateArguments, TrainArguments
from trl_leapalign.cli.parsing import OptionParser, read_yaml
from trl_leapalign.leapalign_config import LeapAlignConfig
from trl_leapalign.rollout.pipelines import read_dtype


@pytest.fixture
def parse(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def parse(kind, *options, yaml=None):
        if yaml is not None:
            (tmp_path / "c.yaml").write_text(yaml)
            options = [f"--config={tmp_path}/c.yaml", *options]
        kinds = (kind,) if kind is EvaluateArguments else (kind, LeapAlignConfig)
        return OptionParser(kinds).parse_args_and_config([*options])

    return parse


COMMON = ["--pipeline", "x", "--reward", "pickscore", "--output_dir", "out"]


def test_one_value_is_a_list_of_one(parse):
    text = "pipeline: x\nreward: pickscore\nseeds: 0\nlearning_rates: 1e-3\nevaluator: a:b\noutput_dir: out\n"
    text += "reward_weights: 2\nreward_threshold: 0.5\npipeline_columns: image\ndenoisers: transformer\n"
    arguments, config = parse(CompareArguments, yaml=text)
    assert (arguments.reward, arguments.seeds, arguments.learning_rates) == (["pickscore"], [0], [1e-3])
    assert arguments.evaluator == ["a:b"] and config.denoisers == ["transformer"]
    assert (config.reward_weights, config.reward_threshold, config.pipeline_columns) == (
        [2.0],
        [0.5],
        {"image": "image"},
    )
    [arguments] = parse(EvaluateArguments, yaml="evaluators: geneval\ncompare: a\n")
    assert arguments.evaluators == ["geneval"] and arguments.compare == ["a"]


@pytest.mark.parametrize("number", ["1e-4", "1E-4", "1.e-4", "1.0e-04", "+1e-4", "0.0001", ".1e-3", "1e-4 # small"])
def test_numbers_are_numbers_wherever_they_stand(parse, number):
    text = f"pipeline: x\nreward: [a]\noutput_dir: out\nlearning_rate: {number}\nlearning_rates: [{number}]\n"
    text += f"runs:\n  a: {{learning_rate: {number}}}\n  b:\n    method_kwargs: {{deep: [{number}]}}\n".replace(
        " # small", ""
    )
    arguments, config = parse(CompareArguments, yaml=text.replace(" # small]", "]"))
    runs = {"a": {"learning_rate": 1e-4}, "b": {"method_kwargs": {"deep": [1e-4]}}}
    assert (config.learning_rate, arguments.learning_rates, arguments.runs) == (1e-4, [1e-4], runs)


def test_words_that_are_no_numbers_stay_words(parse, tmp_path):
    (tmp_path / "words.yaml").write_text("a: e5\nb: 1e\nc: '1e-4'\nd: 1e-4x\ne: v1e5\n")
    assert read_yaml(tmp_path / "words.yaml") == {"a": "e5", "b": "1e", "c": "1e-4", "d": "1e-4x", "e": "v1e5"}


def test_none_and_empty_lists_can_be_said(parse):
    for value in ("None", "null"):
        assert parse(TrainArguments, *COMMON, "--reward_threshold", value)[1].reward_threshold == [None]
    config = parse(TrainArguments, *COMMON, "--reward_threshold", "1e-1", "none", "-2")[1]
    assert config.reward_threshold == [0.1, None, -2.0]
    assert parse(TrainArguments, *COMMON, "--pipeline_columns")[1].pipeline_columns == {}
    assert parse(TrainArguments, *COMMON)[1].pipeline_columns is None
    text = "pipeline: x\nreward: a\noutput_dir: out\nreward_threshold: [null]\npipeline_columns: []\n"
    config = parse(TrainArguments, yaml=text)[1]
    assert config.reward_threshold == [None] and config.pipeline_columns == {}
    assert parse(TrainArguments, "--reward", "b", yaml=text)[0].reward == ["b"], "the command line decides"


def test_yes_and_no_are_words_of_options_that_take_words(parse):
    config = parse(
        TrainArguments, *COMMON, yaml="eval_strategy: no\nsave_strategy: no\nuse_cpu: yes\nfull_finetuning: off\n"
    )[1]
    assert (config.eval_strategy, config.save_strategy, config.use_cpu, config.full_finetuning) == (
        "no",
        "no",
        True,
        False,
    )


def test_dtypes_by_component(parse):
    names = '{"torch_dtype": {"transformer": "float32", "default": "bfloat16"}}'
    for config in (
        parse(TrainArguments, *COMMON, "--model_init_kwargs", names)[1],
        parse(TrainArguments, *COMMON, yaml=f"model_init_kwargs: {names}\n")[1],
    ):
        expected = {"transformer": torch.float32, "default": torch.bfloat16}
        assert read_dtype(config.model_init_kwargs["torch_dtype"]) == expected
    assert read_dtype("torch.float16") is torch.float16 and read_dtype(torch.float64) is torch.float64
    for value in ("float99", "nn", "zeros", {"default": "x"}):
        with pytest.raises(ValueError, match="is no dtype of torch"):
            read_dtype(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nseed: 2\n", "'seed' is set twice: drop one .* line 2"),
        ("runs: {a: {seed: 1, seed: 2}}\n", "'seed' is set twice"),
        ("rewrad: x\n", "sets 'rewrad', which is no option. Did you mean reward"),
        ("zzzz: x\n", "sets 'zzzz', which is no option. See --help"),
        ("- a\n", "must hold settings as NAME: VALUE, but holds a list"),
        ("", "holds a NoneType"),
        ("reward: [\n", "cannot be read as YAML: .* line 2"),
        ("env: [a]\n", "env in .* must hold environment variables"),
        ("a: !!python/object/apply:os.system ['echo']\n", "cannot be read as YAML: could not determine a constructor"),
    ],
)
def test_broken_yaml(parse, text, message):
    with pytest.raises(ValueError, match=message):
        parse(CompareArguments, *COMMON, yaml=text)


def test_files_that_are_not_there(parse):
    with pytest.raises(ValueError, match=r"There is no file 'nowhere\.yaml', which --config"):
        parse(TrainArguments, "--config", "nowhere.yaml")
    with pytest.raises(ValueError, match="--config needs the name"):
        parse(TrainArguments, "--config")
    with pytest.raises(ValueError, match=re.escape("--config is given 2 times")):
        parse(TrainArguments, "--config", "a", "--config=b")
