import ast
import inspect
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import tomllib

import trl_leapalign
from trl_leapalign import LeapAlignConfig, LeapAlignTrainer, evaluation, methods, rewards

BASE = {"markdown", "redaction", "process_state"}  # what any part may use
PACKAGE = Path(trl_leapalign.__file__).parent
FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))
# What each part may import of the package besides itself, at the most: the arrows of docs/architecture.md.
ALLOWED = {
    "media": set(),
    "markdown": set(),
    "redaction": set(),
    "process_state": set(),
    "ranges": set(),
    "prompts": {"media", "ranges"},
    "methods": {"ranges"},
    "rewards": {"media", "ranges"},
    "rollout": {"media", "ranges", "prompts", "methods"},
    "adapters": {"prompts", "rollout"},
    "config_checks": {"ranges", "prompts"},
    "leapalign_config": {"config_checks", "ranges", "process_state", "prompts", "methods"},
    "training": {
        *("media", "ranges", "process_state", "prompts", "methods", "rewards", "rollout", "adapters"),
        "leapalign_config",
    },
    "evaluation": {"media", "ranges", "prompts", "rewards", "rollout", "adapters"},
    "leapalign_trainer": {
        *("media", "process_state", "prompts", "rewards", "rollout", "adapters", "training", "evaluation"),
        "leapalign_config",
    },
    "comparison": {
        *("media", "ranges", "prompts", "rewards", "rollout", "training", "evaluation", "leapalign_config"),
        "leapalign_trainer",
    },
    "cli": {
        *("prompts", "methods", "rewards", "rollout", "adapters", "training", "evaluation", "comparison"),
        *("config_checks", "leapalign_config", "leapalign_trainer"),
    },
    "__init__": {"methods", "rollout", "leapalign_config", "leapalign_trainer"},
    "__main__": {"cli"},
}


def part_of(path):
    return path.parts[0].removesuffix(".py")


def imports(path):
    """Parts of the package that a file imports when it runs, and those for type checking alone."""
    tree = ast.parse((PACKAGE / path).read_text(encoding="utf-8"))
    typing_only = [
        node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
    ]
    hidden = {id(child) for node in typing_only for child in ast.walk(node)}
    found, checked = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = list(path.parts[:-1])[: len(path.parts) - node.level]
            names = [node.module] if node.module else [alias.name for alias in node.names]
            targets = {".".join([*base, name]).partition(".")[0] for name in names}
        elif isinstance(node, ast.ImportFrom):
            targets = (
                {node.module.removeprefix("trl_leapalign.").partition(".")[0]} if "trl_leapalign" in node.module else {}
            )
        elif isinstance(node, ast.Import):
            targets = {alias.name for alias in node.names if alias.name.startswith("trl_leapalign")}
        else:
            continue
        (checked if id(node) in hidden else found).update(targets)
    return found, checked


def test_imports_are_found():
    assert imports(Path("leapalign_trainer.py"))[0] >= {"rollout", "rewards", "prompts", "adapters", "training"}
    assert imports(Path("methods/leapalign.py"))[0] == {"methods", "ranges"}
    assert imports(Path("rollout/streams.py"))[0] >= {"methods"}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_follow_the_arrows(path):
    found, checked = imports(path)
    assert found - {part_of(path)} - BASE <= ALLOWED[part_of(path)]
    assert checked <= ALLOWED[part_of(path)] | {part_of(path)}


def test_the_arrows_make_no_cycle():
    order = TopologicalSorter({part: above - {part} for part, above in ALLOWED.items()}).static_order()
    assert list(order)[-1] in ("__main__", "__init__")


@pytest.mark.parametrize("path", FILES, ids=str)
def test_the_core_is_pure_torch(path):
    """The mathematics needs neither diffusers nor transformers."""
    if part_of(path) == "methods" or path in (Path("training/losses.py"), Path("rollout/recompute.py")):
        tree = ast.parse((PACKAGE / path).read_text(encoding="utf-8"))
        modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level}
        modules |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        outside = {module.partition(".")[0] for module in modules} - sys.stdlib_module_names
        assert outside <= {"torch"}


def test_what_is_imported_is_declared():
    """Each distribution that a file of the package imports, wherever in it, is a dependency or an extra."""
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    declared = {
        re.match(r"[\w-]+", requirement)[0].replace("-", "_").lower() for group in groups for requirement in group
    }
    found = set()
    for path in FILES:
        for node in ast.walk(ast.parse((PACKAGE / path).read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(node.module.partition(".")[0])
    distributions = {"PIL": "pillow", "yaml": "pyyaml"}
    others = {"ftfy", "trl_leapalign"}  # ftfy is used if it is there
    assert {"PIL", "torch", "scipy"} <= found
    undeclared = {distributions.get(name, name) for name in found - sys.stdlib_module_names} - declared - others
    assert not undeclared


IMPORT = """
import socket, sys

def refuse(*arguments):
    raise AssertionError(f"connected to {arguments[1:]}")

socket.socket.connect = refuse
socket.getaddrinfo = refuse
import trl_leapalign
trl_leapalign.LeapAlignConfig(output_dir="run", use_cpu=True, method="drtune")
assert "trl" not in sys.modules, "trl was imported"
assert "wandb" not in sys.modules
models = [name for name in sys.modules if "modeling_blip" in name or "modeling_qwen2_vl" in name]
assert not models, f"{models} were imported"
print(sorted(trl_leapalign.__all__))
"""


def test_importing_and_a_config_need_neither_trl_nor_a_network(tmp_path):
    environment = {"PATH": "", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PACKAGE.parent)}
    result = subprocess.run(
        [sys.executable, "-c", IMPORT], capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=300
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(sorted(trl_leapalign.__all__))
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("module", [trl_leapalign, evaluation, methods, rewards], ids=lambda module: module.__name__)
def test_public_names_exist_and_are_documented(module):
    assert module.__doc__ or module is not trl_leapalign
    for name in module.__all__:
        value = getattr(module, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert inspect.getdoc(value), name
            if inspect.isclass(value) and value.__module__.startswith("trl_leapalign"):
                members = [key for key, member in vars(value).items() if inspect.isfunction(member) and key[0] != "_"]
                missing = [key for key in members if not inspect.getdoc(getattr(value, key))]
                assert not missing, f"{name}: {missing}"


def test_arguments_of_the_trainer():
    """They are those of DDPOTrainer, and positions are a promise."""
    parameters = inspect.signature(LeapAlignTrainer).parameters
    positional = [name for name, p in parameters.items() if p.kind is not p.KEYWORD_ONLY]
    assert positional == ["pipeline", "reward_function", "config", "prompt_function", "image_samples_hook"]
    assert set(parameters) - set(positional) == {
        *("train_dataset", "eval_dataset", "peft_config", "callbacks", "optimizers"),
    }
    documented = inspect.getdoc(LeapAlignTrainer)
    assert all(f"    {name} (" in documented for name in parameters)
    assert LeapAlignConfig.__doc__
