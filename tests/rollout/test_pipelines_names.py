"""The library names no pipeline, no denoiser and no argument that only a few pipelines take."""

import ast
import re
from collections import Counter
from pathlib import Path

import diffusers
import pytest

import trl_leapalign

DIFFUSERS = Path(diffusers.__file__).parent
PACKAGE = Path(trl_leapalign.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
GENERAL_CLASSES = {"DiffusionPipeline", "ModelMixin"}
# An argument that fewer pipelines take is particular to them.
FEW = 10


def sources(folder: str) -> list[str]:
    return [path.read_text(encoding="utf-8") for path in sorted((DIFFUSERS / folder).rglob("*.py"))]


def classes(folders: list[str]) -> set[str]:
    text = "\n".join(source for folder in folders for source in sources(folder))
    return set(re.findall(r"^class (\w+)", text, re.MULTILINE)) - GENERAL_CLASSES


def call_arguments() -> Counter:
    """In how many pipelines' calls each argument is."""
    signature = re.compile(r"def __call__\(\n\s+self,\n(.*?)^    \)", re.MULTILINE | re.DOTALL)
    calls = [found.group(1) for source in sources("pipelines") for found in signature.finditer(source)]
    return Counter(name for call in calls for name in set(re.findall(r"^ {8}(\w+)\b", call, re.MULTILINE)))


def code(path: Path) -> ast.Module:
    """A file without its docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if (
            isinstance(body, list)
            and body
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
        ):
            body[0] = ast.Pass()
    return tree


def names_in(tree: ast.Module) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        for field in ("id", "attr", "name", "arg", "asname"):
            found.add(getattr(node, field, None))
    return {name for name in found if isinstance(name, str)}


def strings_in(tree: ast.Module) -> set[str]:
    return {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}


@pytest.fixture(scope="module")
def concrete_classes() -> set[str]:
    found = classes(["pipelines", "models/transformers", "models/unets", "models/autoencoders"])
    assert {"FluxPipeline", "WanTransformer3DModel", "AutoencoderKL"} <= found and len(found) > 500
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_pipeline_or_model_is_named(path, concrete_classes):
    tree = code(path)
    words = {word for string in strings_in(tree) for word in string.split()}
    assert not concrete_classes & (names_in(tree) | words)


def test_no_argument_of_a_few_pipelines_is_named():
    counts = call_arguments()
    assert counts["prompt"] > 100 and counts["true_cfg_scale"] > FEW and counts["cfg_normalization"] < FEW
    particular = {name for name, count in counts.items() if count < FEW and "_" in name}
    assert len(particular) > 100
    # Rewards and evaluation name arguments of the models that score.
    running = [path for path in FILES if path.parent not in (PACKAGE / "rewards", PACKAGE / "evaluation")]
    assert not {(path.name, name) for path in running for name in particular & strings_in(code(path))}
