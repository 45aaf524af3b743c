"""Columns of the prompts that go into the pipeline's call: images, texts and numbers."""

import datasets
import pytest
import torch
from diffusers import FluxImg2ImgPipeline
from PIL import Image
from training_cases import make_trainer, same, sample, trained_weights

from examples.tiny import tiny_flux
from examples.tiny_edit import tiny_qwen_image_edit
from trl_leapalign.evaluation import evaluate
from trl_leapalign.media import as_text, column_images, open_image
from trl_leapalign.prompts.columns import CallColumns, read_columns
from trl_leapalign.prompts.seeds import Purpose, make_generator
from trl_leapalign.rollout.calls import sample_images

COLORS = [(200, 40, 40), (20, 160, 220), (90, 230, 10), (250, 250, 0)]
IMAGES = [Image.new("RGB", (16, 16), color) for color in COLORS]
WORDS = ["red", "blue", "green", "yellow"]
ROWS = [{"prompt": f"a {word} circle", "image": picture} for word, picture in zip(WORDS, IMAGES, strict=True)]
CALL = {"height": 16, "width": 16, "num_inference_steps": 3, "strength": 0.9, "max_sequence_length": 16}
SETTINGS = {"sample_num_steps": 4, "sample_kwargs": {"strength": 0.9, "max_sequence_length": 16}}


def image_to_image():
    return FluxImg2ImgPipeline(**{k: part for k, part in tiny_flux().components.items() if part is not None})


def columns(wanted=None, rows=ROWS, pipeline=None, call=CALL):
    return CallColumns.of(pipeline or image_to_image(), wanted, rows, call, "prompt")


def nearness(images, prompts, metadata):
    """Compares with the source, which a reward of edits needs."""
    return -(images - column_images(metadata, "image", like=images)).square().mean((1, 2, 3))


# Which columns are taken


def test_columns_of_images_and_texts_are_taken_by_name(caplog):
    rows = [{**row, "negative_prompt": "a dog", "style": "x"} for row in ROWS]
    assert columns(rows=rows).columns == {"image": "image", "negative_prompt": "negative_prompt"}
    assert "pipeline_columns=['image', 'negative_prompt'] says the same" in caplog.text
    assert columns({}, rows).columns == {}
    assert columns({"image": "image"}, rows).columns == {"image": "image"}


def test_other_columns_of_an_arguments_name_are_asked_for():
    rows = [{**row, "strength": 0.5, "latents": 1, "num_inference_steps": 9} for row in ROWS]
    assert columns(rows=rows).columns == {"image": "image"}, "what the settings give stays theirs"
    call = {key: value for key, value in CALL.items() if key != "strength"}
    with pytest.raises(ValueError, match=r"strength. Say whether .*=\['image', 'strength'\], or \['image'\] to keep"):
        columns(rows=rows, call=call)
    assert columns({"strength": "strength", "image": "image"}, rows, call=call).columns.keys() == {"image", "strength"}


@pytest.mark.parametrize(
    ("wanted", "error", "message"),
    [
        ({"imag": "image"}, TypeError, r"gives imag, .* Did you mean image\? It takes: .*prompt_2"),
        ({"image": "picture"}, ValueError, r"the column 'picture', which the prompts do not have. They have \['image'"),
        ({"strength": "image"}, ValueError, r"strength comes from pipeline_columns and is set .* to 0.9. Drop one"),
        ({"generator": "image"}, ValueError, "cannot give generator: noise follows from the seed"),
        ({"latents": "image"}, ValueError, "cannot give latents"),
    ],
)
def test_wrong_columns(wanted, error, message):
    with pytest.raises(error, match=message):
        columns(wanted)


def test_required_arguments_are_named():
    class Needing(FluxImg2ImgPipeline):
        def __call__(self, prompt, image, hint, generator=None, output_type="pt", return_dict=True):
            pass

    parts = {key: part for key, part in tiny_flux().components.items() if part is not None}
    with pytest.raises(TypeError, match=r"Needing cannot be called without image, hint\. Give the prompts a column"):
        CallColumns.of(Needing(**parts), {}, ROWS, {}, "prompt")


def test_missing_values_and_files():
    with pytest.raises(ValueError, match="as image, but row 1 has no value"):
        columns(rows=[ROWS[0], {"prompt": "a cat", "image": None}])
    with pytest.raises(ValueError, match=r"There is no image file 'nowhere.png'; paths start from"):
        columns(rows=[{"prompt": "a cat", "image": "nowhere.png"}])
    dataset = datasets.Dataset.from_dict({"prompt": ["a", "b", "c"], "image": [IMAGES[0], None, IMAGES[1]]})
    with pytest.raises(ValueError, match="row 1 has no value"):
        columns(rows=dataset)
    assert columns(rows=dataset.filter(lambda row: row["image"] is not None)).columns == {"image": "image"}
    with pytest.raises(ValueError, match="a row has no value"):
        columns().calls([{"image": IMAGES[0]}, {}])


def break_image(path, how):
    """Write a file that only fails when it is opened, or when its pixels are read."""
    IMAGES[0].resize((64, 64)).save(path)
    content = path.read_bytes()
    middle = len(content) // 2
    contents = {
        "empty": b"",
        "cut off": content[:-30],
        "other bytes": content[:middle] + b"\0" * 20 + content[middle + 20 :],
        "bomb": content,
        "text": b"<html>",
    }
    path.write_bytes(contents[how])
    return str(path)


@pytest.mark.parametrize("how", ["empty", "cut off", "other bytes", "bomb", "text"])
@pytest.mark.parametrize("kind", ["paths", "encoded", "dataset"])
def test_a_broken_image_in_a_later_row_is_found_at_once(tmp_path, how, kind, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000 if how == "bomb" else 10**6)
    path = break_image(tmp_path / "broken.png", how)
    IMAGES[1].save(tmp_path / "whole.png")
    rows = [{"prompt": "a cat", "image": str(tmp_path / "whole.png")} for _ in range(70)] + [
        {"prompt": "x", "image": path}
    ]
    if kind == "encoded":
        rows = [{**row, "image": {"bytes": open(row["image"], "rb").read(), "path": None}} for row in rows]
    if kind == "dataset":
        rows = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    with pytest.raises(
        ValueError, match=r"Row 70, column 'image': .* is no image that can be read: .*leave the row out"
    ):
        columns({"image": "image"}, rows=rows)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, None),
        ([], {}),
        ("image", {"image": "image"}),
        (["image=source", "mask_image"], {"image": "source", "mask_image": "mask_image"}),
        ({"image": "source"}, {"image": "source"}),
    ],
)
def test_how_columns_are_written(given, expected):
    assert read_columns(given) == expected
    assert read_columns(expected) == expected


@pytest.mark.parametrize("given", [3, [3], ["image", "image=x"], {"image": 3}, ["=x"]])
def test_columns_that_cannot_be_read(given):
    with pytest.raises(ValueError, match="pipeline_columns="):
        read_columns(given)


# What a call is


def test_texts_and_equal_numbers_are_one_call_and_images_one_a_sample():
    rows = [
        {"negative_prompt": word, "strength": 0.5, "image": picture}
        for word, picture in zip("abc", IMAGES[:3], strict=True)
    ]
    call = {key: value for key, value in CALL.items() if key != "strength"}
    texts = columns({"negative_prompt": "negative_prompt", "strength": "strength"}, rows, call=call)
    assert texts.calls(rows) == [(slice(0, 3), {"negative_prompt": ["a", "b", "c"], "strength": 0.5})]
    rows[2]["strength"] = 0.7
    parts = texts.calls(rows)
    assert [part for part, _ in parts] == [slice(0, 1), slice(1, 2), slice(2, 3)]
    assert parts[2][1] == {"negative_prompt": "c", "strength": 0.7}
    assert texts.calls(rows[:1])[0][1] == {"negative_prompt": "a", "strength": 0.5}, "as the prompt of one sample is"
    images = columns({"image": "image"}, rows).calls(rows)
    assert [arguments["image"].getpixel((0, 0)) for _, arguments in images] == COLORS[:3]


def test_images_come_in_every_form(tmp_path):
    IMAGES[0].save(tmp_path / "a.png")
    IMAGES[0].convert("RGBA").save(tmp_path / "b.png")
    encoded = {"bytes": (tmp_path / "a.png").read_bytes(), "path": None}
    for value in (
        IMAGES[0],
        str(tmp_path / "a.png"),
        tmp_path / "b.png",
        encoded,
        {"bytes": None, "path": tmp_path / "a.png"},
    ):
        picture = open_image(value)
        assert picture.mode == "RGB" and picture.getpixel((3, 3)) == COLORS[0]
    several = columns().calls([{"image": [IMAGES[0], str(tmp_path / "b.png")]}])[0][1]["image"]
    assert [picture.mode for picture in several] == ["RGB", "RGB"]
    with pytest.raises(TypeError, match="not by 3"):
        open_image(3)
    (tmp_path / "c.png").write_text("x")
    with pytest.raises(ValueError, match="is no image that can be read"):
        open_image(tmp_path / "c.png")


def test_sampling_equals_calls_of_the_pipeline_itself():
    pipeline = image_to_image()
    prompts = [row["prompt"] for row in ROWS[:2]]
    images = sample_images(pipeline, prompts, [4, 7], CALL, 5, columns=columns(), metadata=ROWS[:2])
    for image, row, index in zip(images, ROWS[:2], (4, 7), strict=True):
        generator = make_generator(5, Purpose.EVALUATION, index)
        call = {**CALL, "prompt": row["prompt"], "image": row["image"], "generator": generator}
        assert torch.equal(image, pipeline(output_type="pt", return_dict=False, **call)[0][0])


def test_samples_of_different_sizes_are_refused():
    rows = [{"prompt": "a cat", "height": size} for size in (16, 32)]
    call = {"width": 16, "num_inference_steps": 2, "max_sequence_length": 16}
    own = CallColumns.of(tiny_flux(), {"height": "height"}, rows, call, "prompt")
    with pytest.raises(ValueError, match=r"differ in size: \[\(3, 16, 16\), \(3, 32, 16\)\]. Set height and width"):
        sample_images(tiny_flux(), ["a cat", "a dog"], [0, 1], call, 0, columns=own, metadata=rows)


# Training


def as_dataset(directory):
    paths = [str(directory / f"{index}.png") for index in range(len(IMAGES))]
    for picture, path in zip(IMAGES, paths, strict=True):
        picture.save(path)
    rows = {"prompt": [row["prompt"] for row in ROWS], "image": paths}
    return datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())


def train(directory, rows, dtype=torch.float32, **settings):
    arguments = settings.pop("arguments", {})
    trainer = make_trainer(
        directory, image_to_image().to(dtype), nearness, prompts=rows, arguments=arguments, **{**SETTINGS, **settings}
    )
    trainer.train(resume_from_checkpoint=settings.get("resume_from_checkpoint"))
    return trainer


def test_training_sees_the_images_however_they_are_given(tmp_path):
    """A list of images, a dataset, a list of paths and a prompt_function are the same training."""
    dataset = as_dataset(tmp_path)
    paths = [{"prompt": row["prompt"], "image": str(tmp_path / f"{i}.png")} for i, row in enumerate(ROWS)]
    renamed = [{"prompt": row["prompt"], "image": row["image"], "source": row["image"]} for row in ROWS]
    runs = [train(tmp_path, rows, per_device_train_batch_size=2, max_steps=2) for rows in (ROWS, dataset, paths)]
    runs.append(train(tmp_path, renamed, per_device_train_batch_size=2, max_steps=2, pipeline_columns=["image=source"]))
    weights = [trained_weights(run) for run in runs]
    assert all(same(weights[0], other) for other in weights[1:])
    changed = [{**row, "image": IMAGES[3 - i]} for i, row in enumerate(ROWS)]
    assert not same(weights[0], trained_weights(train(tmp_path, changed, per_device_train_batch_size=2, max_steps=2)))


def test_a_batch_is_as_its_samples_one_by_one(tmp_path):
    settings = {"dtype": torch.float64, "max_steps": 1, "max_sample_grad_norm": 1e-3}
    batch = train(tmp_path, ROWS, per_device_train_batch_size=2, **settings)
    single = train(tmp_path, ROWS, gradient_accumulation_steps=2, **settings)
    own, other = trained_weights(batch), trained_weights(single)
    assert all(torch.allclose(own[name], other[name], rtol=1e-6, atol=1e-8) for name in own)
    for name in ("reward", "sample_grad_norm", "d_0"):
        values = [run.state.log_history[0][name] for run in (batch, single)]
        assert values[0] == pytest.approx(values[1], rel=1e-4)


def test_resuming_equals_never_stopping(tmp_path):
    keep = {"save_strategy": "steps", "save_steps": 1}
    whole = train(tmp_path / "a", ROWS, max_steps=3)
    train(tmp_path / "b", ROWS, max_steps=2, **keep)
    resumed = make_trainer(tmp_path / "b", image_to_image(), nearness, prompts=ROWS, max_steps=3, **SETTINGS)
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-2"))
    assert same(trained_weights(resumed), trained_weights(whole))


def test_a_prompt_function_gives_images_too(tmp_path):
    def draw():
        row = ROWS[int(torch.randint(4, ()))]
        return row["prompt"], {"image": row["image"]}

    trainer = make_trainer(tmp_path, image_to_image(), nearness, prompts=draw, dry_run=True, **SETTINGS)
    assert trainer.columns.columns == {"image": "image"}


def test_evaluation_compares_with_the_image_of_the_row(tmp_path):
    shown = []
    trainer = make_trainer(
        tmp_path,
        image_to_image(),
        nearness,
        prompts=ROWS,
        arguments={"eval_dataset": ROWS[:3], "image_samples_hook": lambda data, step, tracker: shown.extend(data)},
        **SETTINGS,
    )
    metrics = trainer.evaluate()
    for images, _, metadata, rewards, _ in shown:
        assert torch.allclose(nearness(images, [], metadata), rewards)
    assert metrics["eval_reward"] == pytest.approx(torch.cat([shown[0][3]]).mean().item())
    with pytest.raises(ValueError, match="takes image from the column 'image', which the prompts do not have"):
        trainer.evaluate(["a cat"])


def test_evaluate_takes_columns_and_goes_on(tmp_path):
    rows, options = as_dataset(tmp_path), {"images_per_prompt": 1, "call_kwargs": CALL, "batch_size": 2}
    first = evaluate(image_to_image(), rows, nearness, tmp_path / "out", **options)
    files = {path: path.read_bytes() for path in (tmp_path / "out" / "images").iterdir()}
    judges = [nearness, lambda images, prompts, metadata: images.mean((1, 2, 3))]
    again = evaluate(image_to_image(), rows, judges, tmp_path / "out", **options)
    assert files == {path: path.read_bytes() for path in (tmp_path / "out" / "images").iterdir()}
    assert again.summaries["nearness"] == first.summaries["nearness"]
    with pytest.raises(ValueError, match="prompts_sha256"):
        evaluate(image_to_image(), ROWS[:3], nearness, tmp_path / "out", **options)


def test_fingerprints_of_images_follow_from_their_pixels():
    assert as_text(IMAGES[0]) == as_text(IMAGES[0].copy()) != as_text(IMAGES[1])
    assert as_text(torch.zeros(2)) != as_text(torch.zeros(3)) and as_text(3) == "3"


def test_an_edit_pipeline_without_its_image_says_so(tmp_path):
    options = {"sample_height": 64, "sample_width": 64, "dry_run": True, "sample_num_steps": 2}
    with pytest.raises(
        ValueError, match=r"NoneType.*It was called without image, .* give the prompts a column called so"
    ):
        make_trainer(tmp_path, tiny_qwen_image_edit(), prompts=["a cat"], **options)


def test_without_columns_nothing_changes():
    call = {"height": 16, "width": 16, "num_inference_steps": 3}
    rows = [{"tags": 1}, {"tags": 2}]
    plain = sample_images(tiny_flux(), ["a cat", "a dog"], [0, 1], call, 3)
    assert torch.equal(plain, sample_images(tiny_flux(), ["a cat", "a dog"], [0, 1], call, 3, metadata=rows))
    assert sample(tiny_flux()).shape == plain[:1].shape
