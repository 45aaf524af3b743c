"""`trl-leapalign evaluate`: images with fixed noise, evaluators one after another, tables and paired differences."""

import json
import math
import multiprocessing
import os
import socket
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from diffusers import FlowMatchEulerDiscreteScheduler
from peft import LoraConfig
from PIL import Image
from pyarrow import parquet
from safetensors.torch import load_file, save_file
from scipy import stats

from examples.tiny import tiny_flux, tiny_tokenizer
from tests.reward_cases import clip_model
from tests.training_cases import blueness
from trl_leapalign.adapters.saving import save_trained
from trl_leapalign.cli.main import main
from trl_leapalign.evaluation import (
    Evaluator,
    compare_evaluations,
    evaluate,
    named_evaluator,
    read_geneval,
    summarize_geneval,
)
from trl_leapalign.evaluation.geneval.metadata import TAGS
from trl_leapalign.evaluation.rows import load_rows
from trl_leapalign.evaluation.statistics import Estimate, clustered_mean, mean_of
from trl_leapalign.evaluation.tables import details_of, group_means, summarize
from trl_leapalign.prompts.seeds import Purpose, make_generator
from trl_leapalign.rewards import PickScore

ROWS = [
    {"prompt": "a red circle", "kind": "one"},
    {"prompt": "two blue squares", "kind": "many"},
    {"prompt": "the green dog", "kind": "one"},
]
CALL = {"num_inference_steps": 2, "height": 16, "width": 16}
PER_PROMPT, SEED = 2, 5
COUNT = len(ROWS) * PER_PROMPT
PROMPTS = [row["prompt"] for row in ROWS for _ in range(PER_PROMPT)]
ADAPTER = "pytorch_lora_weights.safetensors"


class Counter:
    """Counts the calls of a function, and keeps what it was called with."""

    def __init__(self, function):
        self.function = function
        self.calls = []

    def __call__(self, *arguments):
        self.calls.append(arguments)
        return self.function(*arguments)


def unsure(images, prompts, metadata):
    """Blueness of all but dogs."""
    scores = blueness(images, prompts, metadata)
    dogs = torch.tensor(["dog" in prompt for prompt in prompts])
    return scores.masked_fill(dogs, math.nan), {
        "kind": [row["kind"] for row in metadata],
        "whole": 3,
        "twice": 2 * scores,
    }


def pickscore():
    return PickScore(clip_model("gelu"), tiny_tokenizer())


def run(directory, pipeline=tiny_flux, evaluators=(blueness,), rows=ROWS, **options):
    defaults = {"images_per_prompt": PER_PROMPT, "seed": SEED, "call_kwargs": CALL, "group_by": "kind"}
    return evaluate(pipeline, rows, list(evaluators), directory, **{**defaults, **options})


def pictures(directory):
    """The images as bytes, in order."""
    return np.stack([np.array(Image.open(path)) for path in sorted((directory / "images").iterdir())])


def scores_of(directory, name="blueness"):
    return parquet.read_table(directory / "scores" / f"{name}.parquet").to_pydict()


def by_hand(pipeline):
    """The images by plain calls of a pipeline, as bytes."""
    images = []
    for number, prompt in enumerate(PROMPTS):
        generator = make_generator(SEED, Purpose.EVALUATION, number)
        images.append(np.array(pipeline(prompt, generator=generator, **CALL).images[0]))
    return np.stack(images)


def save_adapter(directory):
    pipeline = tiny_flux()
    torch.manual_seed(1)
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v", "to_out.0"], init_lora_weights=False)
    pipeline.transformer.add_adapter(config)
    for name, parameter in pipeline.transformer.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(20)
    save_trained(pipeline, {"transformer": pipeline.transformer}, directory, False)
    return directory


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory):
    directory = tmp_path_factory.mktemp("evaluation")
    return run(directory, evaluators=[blueness, unsure, Evaluator("pick", pickscore)])


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return save_adapter(tmp_path_factory.mktemp("adapter"))


@pytest.fixture(scope="module")
def adapted(adapter, tmp_path_factory):
    return run(tmp_path_factory.mktemp("adapted"), evaluators=[blueness, unsure], adapter=adapter)


def test_images_are_those_of_plain_calls(evaluation):
    names = [path.name for path in sorted((evaluation.output_dir / "images").iterdir())]
    assert names == [f"{number:05d}.png" for number in range(COUNT)]
    images = pictures(evaluation.output_dir)
    assert np.array_equal(images, by_hand(tiny_flux()))
    assert not np.array_equal(images[0], images[1])


def test_scores_are_those_of_the_images_in_the_files(evaluation):
    images = pictures(evaluation.output_dir)
    blue = images[:, :, :, 2].astype(np.float64).mean((1, 2)) / 255
    found = scores_of(evaluation.output_dir)
    assert found["number"] == list(range(COUNT)) and found["prompt"] == PROMPTS
    assert found["group"] == ["one", "one", "many", "many", "one", "one"]
    assert found["score"] == pytest.approx(blue.tolist(), rel=1e-6)
    with torch.no_grad():
        expected = pickscore()(torch.from_numpy(images).permute(0, 3, 1, 2) / 255, PROMPTS, [{}] * COUNT)
    assert scores_of(evaluation.output_dir, "pick")["score"] == pytest.approx(expected.tolist(), rel=1e-5)
    unsure = scores_of(evaluation.output_dir, "unsure")
    assert unsure["kind"] == found["group"] and "whole" not in unsure
    assert unsure["twice"] == pytest.approx((2 * blue).tolist(), rel=1e-6)
    together = parquet.read_table(evaluation.output_dir / "scores.parquet").to_pydict()
    assert list(together) == ["number", "prompt", "group", "blueness", "unsure", "unsure/kind", "unsure/twice", "pick"]
    assert together["blueness"] == found["score"]


def test_the_report_has_means_and_errors_of_prompts(evaluation):
    values = np.array(scores_of(evaluation.output_dir)["score"])
    means = values.reshape(len(ROWS), PER_PROMPT).mean(1)
    summary = evaluation.summaries["blueness"]
    assert summary.overall.mean == pytest.approx(values.mean())
    assert summary.overall.standard_error == pytest.approx(means.std(ddof=1) / math.sqrt(len(ROWS)))
    assert (summary.overall.num_images, summary.overall.num_prompts, summary.num_unscored) == (6, 3, 0)
    one = summary.by_group["one"]
    assert one.mean == pytest.approx(means[[0, 2]].mean())
    assert one.standard_error == pytest.approx(abs(means[0] - means[2]) / 2)
    assert math.isnan(summary.by_group["many"].standard_error)
    report = json.loads((evaluation.output_dir / "report.json").read_text())
    assert report["blueness"]["overall"]["mean"] == summary.overall.mean
    assert report["blueness"]["by_group"]["many"]["standard_error"] is None
    line = f"| blueness | one | {one.mean:.4g} ± {one.standard_error:.2g} | 4 | 2 |"
    assert line in evaluation.report.read_text()


def test_images_without_a_score_are_left_out_and_counted(evaluation):
    values = np.array(scores_of(evaluation.output_dir)["score"])
    summary = evaluation.summaries["unsure"]
    assert summary.num_unscored == 2
    assert summary.overall.mean == pytest.approx(values[:4].mean())
    assert (summary.overall.num_images, summary.overall.num_prompts) == (4, 2)
    assert summary.by_group["one"].mean == pytest.approx(values[:2].mean())


def test_what_is_there_is_not_made_again(tmp_path):
    pipeline, first, second = Counter(tiny_flux), Counter(blueness), Counter(blueness)
    judges = [Evaluator("first", lambda: first), Evaluator("second", lambda: second)]
    before = run(tmp_path, pipeline, judges)
    files = sorted(tmp_path.glob("images/*.png"))
    contents = [path.read_bytes() for path in files]
    for number in (1, 4):
        files[number].unlink()
    (tmp_path / "scores" / "second.parquet").unlink()
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*.*")}
    assert len(times) == 5
    for judge in (first, second):
        judge.calls.clear()
    after = run(tmp_path, pipeline, judges)
    assert after == before
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert [path.read_bytes() for path in files] == contents
    assert (len(pipeline.calls), len(first.calls), len(second.calls)) == (2, 0, COUNT)
    again = run(tmp_path, pipeline, judges[:1], group_by=None)
    assert len(pipeline.calls) == 3 and not first.calls  # made once more, to see that it is still the same
    assert list(again.summaries) == ["first", "second"] and not again.summaries["first"].by_group
    assert set(scores_of(tmp_path, "second")["group"]) == {"all"}


def test_images_follow_from_their_numbers_alone(evaluation, tmp_path):
    batched = run(tmp_path, batch_size=4)
    difference = pictures(tmp_path).astype(int) - pictures(evaluation.output_dir)
    assert abs(difference).max() <= 1  # sums in batches round differently
    expected = scores_of(evaluation.output_dir)["score"]
    assert scores_of(batched.output_dir)["score"] == pytest.approx(expected, abs=2e-3)


def test_the_adapter_is_the_one_that_a_user_loads(adapter, adapted, evaluation):
    pipeline = tiny_flux()
    pipeline.load_lora_weights(adapter)
    images = pictures(adapted.output_dir)
    assert np.array_equal(images, by_hand(pipeline))
    assert abs(images.astype(int) - pictures(evaluation.output_dir)).max() > 3


def test_paired_differences_are_those_of_a_paired_test(adapted, evaluation):
    comparison = compare_evaluations([evaluation.output_dir, adapted.output_dir])
    base, other = comparison.runs
    ours, theirs = (
        np.array(scores_of(folder)["score"]).reshape(len(ROWS), PER_PROMPT).mean(1)
        for folder in (adapted.output_dir, evaluation.output_dir)
    )
    expected = stats.ttest_rel(ours, theirs)
    score = comparison.find("blueness", other)
    assert score.estimate.mean == pytest.approx(ours.mean())
    assert score.difference.mean == pytest.approx((ours - theirs).mean())
    assert score.difference.standard_error == pytest.approx(stats.sem(ours - theirs))
    assert score.p_value == pytest.approx(expected.pvalue)
    assert comparison.find("blueness", base).difference is None
    one = comparison.find("blueness", other, "one")
    assert one.p_value == pytest.approx(stats.ttest_rel(ours[[0, 2]], theirs[[0, 2]]).pvalue)
    assert comparison.find("unsure", other).difference.num_images == 4
    with pytest.raises(KeyError):
        comparison.find("pick", other)  # judged one run alone
    assert f"| {score.difference}, p = {score.p_value:.2g} |" in comparison.markdown()


def test_runs_that_cannot_be_compared(evaluation, tmp_path):
    first = evaluation.output_dir
    with pytest.raises(ValueError, match="at least two different folders"):
        compare_evaluations([first, first])
    with pytest.raises(ValueError, match="holds no finished evaluation"):
        compare_evaluations([first, tmp_path])
    for key, value in (("seed", 6), ("prompts_sha256", "0"), ("images_per_prompt", 1)):
        settings = json.loads((first / "settings.json").read_text())
        settings["images"][key] = value
        (tmp_path / "settings.json").write_text(json.dumps(settings))
        with pytest.raises(ValueError, match=f"{key} is {value!r}, not "):
            compare_evaluations([first, tmp_path])


def test_clustered_error_of_clusters_of_any_size():
    generator = np.random.default_rng(0)
    clusters = ["a"] * 5 + ["b"] + ["c"] * 3 + ["d"] * 2
    values = generator.normal(size=11) + [ord(cluster) for cluster in clusters]
    residuals = values - values.mean()
    variance = sum(residuals[i] * residuals[j] for i in range(11) for j in range(11) if clusters[i] == clusters[j])
    estimate = clustered_mean([*values, math.nan], [*clusters, "e"])
    assert estimate.standard_error == pytest.approx(math.sqrt(variance * 4 / 3) / 11)
    assert (estimate.degrees, estimate.num_images, estimate.num_prompts) == (3, 11, 4)
    alone = clustered_mean(values, list(map(str, range(11))))
    assert alone.standard_error == pytest.approx(stats.sem(values))
    assert alone.p_value == pytest.approx(stats.ttest_1samp(values, 0).pvalue)
    assert math.isnan(clustered_mean(values, ["a"] * 11).standard_error)
    assert clustered_mean([math.nan], ["a"]).num_images == 0
    assert Estimate(0.0, 0.0, 3, 4, 4).p_value == 1 and Estimate(0.1, 0.0, 3, 4, 4).p_value == 0


def test_means_of_groups_are_tested_as_welch_does():
    generator = np.random.default_rng(1)
    x, y = generator.normal(size=5), generator.normal(1.0, 3.0, size=9)
    parts = [clustered_mean(values, list(map(str, range(len(values))))) for values in (x, -y)]
    expected = stats.ttest_ind(x, y, equal_var=False)
    mean = mean_of(parts)
    assert mean.mean == pytest.approx((x.mean() - y.mean()) / 2)
    assert mean.p_value == pytest.approx(expected.pvalue)


def test_geneval_is_the_mean_of_its_tags():
    generator = np.random.default_rng(2)
    tags = [tag for index, tag in enumerate(reversed(TAGS)) for _ in range(4 * (index + 2))]
    prompts = [f"{tag} {index // 4}" for index, tag in enumerate(tags)]
    columns = {"score": generator.integers(0, 2, len(tags)).astype(float).tolist(), "tag": tags, "prompt": prompts}
    columns["group"] = ["all"] * len(tags)
    summary, expected = summarize(columns, is_geneval=True), summarize_geneval(columns["score"], tags)
    assert summary.overall.mean == expected.score
    assert list(summary.by_group) == list(TAGS)
    errors = []
    for tag in TAGS:
        values = np.array([score for score, each in zip(columns["score"], tags, strict=True) if each == tag])
        assert summary.by_group[tag].mean == pytest.approx(expected.by_tag[tag].mean)
        errors.append(stats.sem(values.reshape(-1, 4).mean(1)))
        assert summary.by_group[tag].standard_error == pytest.approx(errors[-1])
    assert summary.overall.standard_error == pytest.approx(np.sqrt(np.square(errors).sum()) / 6)
    without = {key: values[8:] for key, values in columns.items()}
    assert math.isnan(summarize(without, is_geneval=True).overall.mean)
    assert math.isnan(group_means(without, is_geneval=True)["all"].mean)
    with pytest.raises(ValueError, match="verdict"):
        summarize({**columns, "score": [0.5] * len(tags)}, is_geneval=True)


def test_a_group_may_be_called_all():
    columns = {"score": [1.0, 2.0, 6.0], "prompt": ["a", "b", "c"], "group": ["all", "all", "x"]}
    means = group_means(columns)
    assert {name: mean.mean for name, mean in means.items()} == {"all": 3.0, "all (group)": 1.5, "x": 6.0}


def test_details_that_a_table_can_hold():
    details = {"score": torch.tensor([1, 2]), "boxes": [{}, {}], "some": ["a", None], "batch": 3, "three": [1, 2, 3]}
    assert details_of(details, 2) == [{"score_detail": 1.0, "some": "a"}, {"score_detail": 2.0}]


def one_of_two(rank, port, directory):
    """What one of two processes does: all, then again what has gone missing."""
    distributed = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in distributed.items()})
    PartialState._reset_state()
    state = PartialState(cpu=True)
    first = run(directory, evaluators=[blueness, unsure])
    if state.is_main_process:
        (directory / "images" / "00002.png").unlink()
        (directory / "scores" / "unsure.parquet").unlink()
    state.wait_for_everyone()
    again = run(directory, evaluators=[blueness, unsure])
    same = [repr(each) for each in gather_object([first.summaries, again.summaries])]
    assert state.num_processes == 2 and len(set(same)) == 1
    state.destroy_process_group()


def test_two_processes_write_what_one_writes(evaluation, tmp_path):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    context = multiprocessing.get_context("fork")  # what is imported need not be imported again
    processes = [context.Process(target=one_of_two, args=(rank, port, tmp_path)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    assert np.array_equal(pictures(tmp_path), pictures(evaluation.output_dir))
    for name in ("blueness", "unsure"):
        assert repr(scores_of(tmp_path, name)) == repr(scores_of(evaluation.output_dir, name))


GENEVAL = [
    {"tag": "position", "prompt": "a dog left of a cat",
     "include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["left of", 0]}]},
    {"tag": "counting", "include": [{"class": "cat", "count": 2}], "exclude": [{"class": "cat", "count": 3}],
     "prompt": "two cats"},
]  # fmt: skip


def test_geneval_files_are_read_as_such(tmp_path):
    path = tmp_path / "metadata.jsonl"
    path.write_text("\n" + "\n".join(map(json.dumps, GENEVAL)) + "\n")
    assert load_rows(path) == load_rows(str(path)) == read_geneval(path) == GENEVAL
    others = tmp_path / "others.jsonl"
    others.write_text('{"prompt": "a dog", "tag": "mine", "include": "x"}\n')
    assert load_rows(others) == [{"prompt": "a dog", "tag": "mine", "include": "x"}]
    assert load_rows(["a dog"]) == [{"prompt": "a dog"}]


def test_geneval_needs_its_rows_and_groups_by_tag(tmp_path):
    def verdicts(images, prompts, metadata):
        return torch.ones(len(images)), {"tag": [row["tag"] for row in metadata], "objects": [{}] * len(images)}

    judge = Evaluator("verdicts", lambda: verdicts, is_geneval=True)
    with pytest.raises(ValueError, match="verdicts cannot judge these prompts: row 0 has no 'tag'"):
        run(tmp_path, refuse, [judge])
    summary = run(tmp_path, evaluators=[judge], rows=GENEVAL, group_by=None, images_per_prompt=1).summaries["verdicts"]
    assert {name: estimate.mean for name, estimate in summary.by_group.items()} == {"counting": 1.0, "position": 1.0}
    assert math.isnan(summary.overall.mean)


def refuse(*arguments):
    raise AssertionError("was called")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"evaluators": ["hpsv2"]}, "no evaluator 'hpsv2'.*hpsv2.1"),
        ({"evaluators": ["geneval"]}, "geneval_detector"),
        ({"evaluators": []}, "no evaluators"),
        ({"evaluators": [blueness, blueness]}, "Two evaluators are called 'blueness'"),
        ({"evaluators": [Evaluator("a", refuse), Evaluator("A", refuse)]}, "Two evaluators"),
        ({"group_by": "style"}, "group_by='style'"),
        ({"rows": "nowhere.txt"}, "nowhere.txt"),
        ({"images_per_prompt": 0}, "images_per_prompt=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"seed": -1}, "seed=-1"),
        ({"call_kwargs": {"num_images_per_prompt": 2}}, "Set images_per_prompt instead"),
        ({"call_kwargs": {"output_type": "latent"}}, "Leave it out"),
    ],
)
def test_bad_input_is_found_before_anything_is_loaded(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "out", refuse, **options)
    assert not (tmp_path / "out").exists()


def test_evaluators_of_the_wrong_kind(tmp_path):
    with pytest.raises(TypeError, match="is a class"):
        run(tmp_path, refuse, [PickScore])
    with pytest.raises(TypeError, match="called as reward"):
        run(tmp_path, refuse, [lambda images: images])
    with pytest.raises(TypeError, match=r"'hpsv2.1' has no settings verion\. It takes: .*version.*batch_size"):
        named_evaluator("hpsv2.1", verion=3)
    for name, settings in {
        "unifiedreward-iq": {"source": "folder", "score": "style", "image_size": [512, 512]},
        "geneval": {"detector": "folder", "color_classifier": "folder"},
        "hpsv3": {"path_or_id": "folder", "instruction": "?", "batch_size": 1},
        "pickscore": {"scale": "reference"},
    }.items():
        assert named_evaluator(name, **settings).settings == {"evaluator": name, **settings}
    with pytest.raises(ValueError, match="name 'a/b'"):
        Evaluator("a/b", refuse)


def test_pipelines_that_cannot_be_used(tmp_path, adapter):
    with pytest.raises(TypeError, match="returned a int"):
        run(tmp_path, lambda: 3)
    with pytest.raises(TypeError, match="cannot be called with num_steps"):
        run(tmp_path, call_kwargs={"num_steps": 3})
    with pytest.raises(ValueError, match="Load it yourself"):
        run(tmp_path, tiny_flux(), adapter=adapter)
    assert not list(tmp_path.iterdir())


def test_adapters_that_do_not_fit(tmp_path, adapter):
    weights = load_file(adapter / ADAPTER)
    block = "transformer.transformer_blocks.0."
    moved = {key.replace(block, block.replace("0", "7")): value for key, value in weights.items()}
    changed = {
        "partly": {**weights, **{key: value.clone() for key, value in moved.items()}},
        "elsewhere": {key.replace("transformer.", "unet.", 1): value for key, value in weights.items()},
        "wider": {key: value.repeat(1, 2) if "lora_A" in key else value for key, value in weights.items()},
        "garbage": {"a": torch.ones(2)},
    }
    for name, tensors in changed.items():
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / ADAPTER, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=f"adapter '.*{name}' (does not fit|cannot be loaded into) FluxPipeline"):
            run(tmp_path / "out", adapter=tmp_path / name)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / ADAPTER).write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="cannot be loaded into FluxPipeline"):
        run(tmp_path / "out", adapter=tmp_path / "broken")
    with pytest.raises(ValueError, match="There is no adapter"):
        run(tmp_path / "out", adapter=tmp_path / "nowhere")
    assert not (tmp_path / "out").exists()


def test_results_of_other_settings_are_refused(evaluation, adapter, tmp_path):
    changes = {
        "seed": {"seed": SEED + 1},
        "images_per_prompt": {"images_per_prompt": 1},
        "call_kwargs": {"call_kwargs": {**CALL, "num_inference_steps": 3}},
        "num_prompts, prompts_sha256": {"rows": ROWS[:2]},
        "adapter, adapter_sha256": {"adapter": adapter},
        "pipeline": {"pipeline": lambda: tiny_flux()},
    }
    for names, options in changes.items():
        with pytest.raises(ValueError, match=f"{names} changed.*Choose another output_dir"):
            run(evaluation.output_dir, **options)
    with pytest.raises(ValueError, match=r"blueness.parquet .*code, settings and weights, evaluator changed"):
        run(evaluation.output_dir, evaluators=[Evaluator("blueness", refuse)])
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "00000.png").touch()
    with pytest.raises(ValueError, match=r"no settings.json"):
        run(tmp_path)


def test_folders_that_are_none_of_an_evaluation(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"output_dir='.*file' is a file"):
        run(tmp_path / "file", refuse)
    for text, message, compared in (
        ("{", r"settings\.json cannot be read", "cannot be read"),
        ("[]", "holds no settings", "holds no settings"),
        ('{"seed": 1}', "is none of an evaluation", "holds no finished evaluation"),
    ):
        (tmp_path / "settings.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            run(tmp_path, refuse)
        with pytest.raises(ValueError, match=compared):
            compare_evaluations([tmp_path, tmp_path / "other"])


def test_an_evaluator_that_was_stopped_goes_on(tmp_path):
    """After it has failed, only what is missing is judged; with other settings it is refused."""
    seen = []

    def failing(images, prompts, metadata):
        if len(seen) == 3:
            raise ConnectionError("no more")
        seen.extend(prompts)
        return blueness(images, prompts, metadata), {"word": list(prompts)}

    def working(images, prompts, metadata):
        seen.extend(prompts)
        return blueness(images, prompts, metadata), {"word": list(prompts)}

    with pytest.raises(ConnectionError):
        run(tmp_path, evaluators=[Evaluator("judge", lambda: failing)])
    assert not (tmp_path / "scores" / "judge.parquet").exists()
    with pytest.raises(ValueError, match=r"judge\.partial .*scale changed.*delete that folder"):
        run(tmp_path, evaluators=[Evaluator("judge", refuse, {"scale": 2})])
    run(tmp_path, evaluators=[Evaluator("judge", lambda: working), blueness])
    assert seen == PROMPTS
    found = scores_of(tmp_path, "judge")
    assert found["score"] == scores_of(tmp_path)["score"] and found["word"] == PROMPTS
    assert not list(tmp_path.glob("scores/*.partial"))


def test_images_that_are_cut_off_are_named(tmp_path):
    run(tmp_path, images_per_prompt=1)
    path = tmp_path / "images" / "00001.png"
    content = path.read_bytes()
    for share in (0, 0.5):
        path.write_bytes(content[: int(len(content) * share)])
        with pytest.raises(ValueError, match=r"00001\.png cannot be read as an image: .*delete it: it is made again"):
            run(tmp_path, images_per_prompt=1, evaluators=[unsure])
    path.unlink()
    run(tmp_path, images_per_prompt=1, evaluators=[unsure])
    assert path.read_bytes() == content


def test_changed_weights_are_refused(tmp_path, adapter):
    changed = save_adapter(tmp_path / "changed")
    run(tmp_path / "out", adapter=changed, images_per_prompt=1)
    weights = load_file(changed / ADAPTER)
    save_file({key: -value for key, value in weights.items()}, changed / ADAPTER, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="adapter_sha256 changed"):
        run(tmp_path / "out", adapter=changed, images_per_prompt=1)
    pipeline = tiny_flux()
    run(tmp_path / "given", pipeline, images_per_prompt=1)
    run(tmp_path / "given", pipeline, images_per_prompt=1)
    next(pipeline.transformer.parameters()).data[0] += 1e-3
    with pytest.raises(ValueError, match="the pipeline's transformer changed"):
        run(tmp_path / "given", pipeline, images_per_prompt=1)


def test_solvers_that_draw_noise_sample_images_one_by_one(tmp_path):
    def stochastic():
        pipeline = tiny_flux()
        config = pipeline.scheduler.config
        pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_config(config, stochastic_sampling=True)
        return pipeline

    with pytest.raises(ValueError, match=r"draws noise of its own.*Set batch_size=1"):
        run(tmp_path / "many", stochastic, batch_size=2)
    run(tmp_path / "one", stochastic)
    before = pictures(tmp_path / "one")
    (tmp_path / "one" / "images" / "00003.png").unlink()
    run(tmp_path / "one", stochastic)
    assert np.array_equal(pictures(tmp_path / "one"), before)


MODULE = """
import torch
from examples.tiny import tiny_flux, tiny_tokenizer
from tests.reward_cases import clip_model
from trl_leapalign.evaluation import Evaluator
from trl_leapalign.rewards import PickScore

def pipeline():
    return tiny_flux()

def prompts():
    return [{"prompt": "a red circle", "kind": "a"}, {"prompt": "a dog", "kind": "b"}, {"prompt": "a cat", "kind": "b"}]

def redness(images, prompts, metadata):
    return images[:, 0].mean((1, 2))

pick = PickScore(clip_model("gelu"), tiny_tokenizer())
lazy = Evaluator("laziness", lambda: redness)
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "judges.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    sys.modules.pop("judges", None)


def test_the_command_line(module, adapter, capsys):
    Path("settings.yaml").write_text(
        "pipeline: judges:pipeline\nprompts: judges:prompts\n"
        "evaluators: ['judges:redness', 'judges:pick', 'judges:lazy']\n"
        "images_per_prompt: 2\nnum_inference_steps: 2\nheight: 16\ncall_kwargs: {width: 16}\ngroup_by: kind\n"
    )
    main(["evaluate", "--config", "settings.yaml", "--output_dir", "base"])
    shown = capsys.readouterr().out
    assert Path("base/report.md").read_text() in shown
    assert sorted(path.name for path in Path("base/scores").iterdir()) == [
        "laziness.parquet", "pick.parquet", "redness.parquet"
    ]  # fmt: skip
    assert "| redness | b |" in shown and shown.count("\n| ") == 9
    main(
        [
            "evaluate",
            "--config",
            "settings.yaml",
            "--output_dir",
            "tuned",
            "--adapter",
            str(adapter),
            "--batch_size",
            "3",
        ]
    )
    capsys.readouterr()
    main(["evaluate", "--compare", "base", "tuned", "--output_dir", "both"])
    shown = capsys.readouterr().out
    assert "| evaluator | group | base | tuned | tuned - base |" in shown
    rows = json.loads(Path("both/comparison.json").read_text())
    assert len(rows) == 3 * 3 * 2
    expected = compare_evaluations(["base", "tuned"]).find("redness", "tuned", "b")
    assert [row for row in rows if (row["evaluator"], row["run"], row["group"]) == ("redness", "tuned", "b")] == [
        json.loads(json.dumps(replace(expected).__dict__, default=vars))
    ]
    assert Path("both/comparison.md").read_text() in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--evaluators", "hpsv2"], "no evaluator 'hpsv2'"),
        (["--evaluators", "judges:nothing"], "judges:nothing"),
        (["--evaluators", "geneval"], "geneval_detector"),
        (["--evaluators", "judges:redness", "--geneval_detector", "folder"], "geneval have no effect"),
        (["--evaluators", "judges:pick", "--evaluator_kwargs", '{"judges:pick": {"scale": "reference"}}'], "no effect"),
        (["--evaluators", "judges:pick", "--height", "16", "--call_kwargs", '{"height": 16}'], "sets height"),
    ],
)
def test_bad_options(arguments, message, module):
    common = ["--pipeline", "judges:pipeline", "--prompts", "judges:prompts", "--output_dir", "out"]
    with pytest.raises(ValueError, match=message):
        main(["evaluate", *common, *arguments])
    assert not Path("out").exists()


def test_options_that_are_missing(module):
    with pytest.raises(SystemExit, match="pass --prompts, --evaluators, --output_dir, or --compare"):
        main(["evaluate", "--pipeline", "judges:pipeline"])


def test_infinite_scores_count_as_none(tmp_path, caplog):
    def broken(images, prompts, metadata):
        return blueness(images, prompts, metadata).where(torch.tensor(["dog" not in p for p in prompts]), torch.inf)

    summary = run(tmp_path, evaluators=[broken]).summaries["broken"]
    assert summary.num_unscored == 2 and math.isfinite(summary.overall.mean)
    assert "gives image 4 an infinite score, which counts as none" in caplog.text
