"""Pushing to the Hub: weights and their card, never a pickle or a secret."""

import inspect
import logging
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, get_token
from huggingface_hub.utils import filter_repo_objects
from safetensors import safe_open
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy
from transformers.utils.hub import PushInProgress

from ..adapters.model_card import write_model_card
from ..redaction import SHORTEST_SECRET, secrets_of

logger = logging.getLogger(__name__)

WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*config.json")
CARD = ("README.md", "*.png", "*.jpg", "*.jpeg", "*.webp", "*.gif", "*.mp4")
RECORDS = ("*.tfevents.*", "trainer_state.json", "run.json")
PUBLISHED = (*WEIGHTS, *CARD, *(pattern for name in RECORDS for pattern in (name, f"*/{name}")))
"""Files that go to the Hub. All others stay: training_args.bin, optimizer and random states are pickles."""
IGNORED = ("_*", f"{PREFIX_CHECKPOINT_DIR}-*", ".*", "*/.*")


class HubPushes:
    """What a Trainer does to push, with a choice of files: to be inherited from before Trainer."""

    _may_make_repository = False

    def init_hf_repo(self: Trainer, token: str | None = None, private: bool | None = None) -> None:
        """Make the repository, but not before the trainer is made and its dry run went well.

        Args:
            token (str | None): of the Hub, with the right to write; None is `hub_token`.
            private (bool | None): whether a new repository is private; None is `hub_private_repo`.
        """
        if self._may_make_repository:
            super().init_hf_repo(token, private)

    def _make_repository(self: Trainer) -> None:
        """To be called when nothing can go wrong with the trainer any more."""
        self._may_make_repository = True
        if self.args.push_to_hub:
            self.init_hf_repo()

    def push_to_hub(
        self: Trainer,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **card: Any,
    ) -> CommitInfo | Future | None:
        """Save the weights and push them with their card: no pickle goes up, and no file that holds a secret.

        Args:
            commit_message (str | None): of the commit.
            blocking (bool): wait until all is uploaded.
            token (str | None): of the Hub, with the right to write; None is `hub_token`, or that of `hf auth login`.
            revision (str | None): branch to push to; None is `hub_revision`, or the main one.
            private (bool | None): whether a new repository is private; None is `hub_private_repo`.
            **card: arguments of `create_model_card`.

        Returns:
            CommitInfo | Future | None: the commit, or what becomes it unless `blocking`; None on other processes.

        Raises:
            TypeError: if an argument of the card is unknown, before anything is saved.
            ValueError: if the Hub refuses the card.
        """
        inspect.signature(write_model_card).bind(None, None, **card)
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = token if token is not None else self.args.hub_token
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**card)
        self._finish_current_push()
        return upload(
            self, self.args.output_dir, commit_message, token=token, revision=revision, run_as_future=not blocking
        )

    def _push_from_checkpoint(self: Trainer, checkpoint_folder: str) -> None:
        pushing = getattr(self, "push_in_progress", None)
        waits = pushing is not None and not pushing.is_done() and not self.args.hub_always_push
        if self.args.world_size > 1:  # only the first process knows; saving may need all of them
            [waits] = broadcast_object_list([waits])
        if self.args.hub_strategy == HubStrategy.END or waits:
            return
        self._save(self.args.output_dir)
        self.create_model_card()
        if not self.is_world_process_zero():
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        message = f"Training in progress, step {self.state.global_step}"
        options = {"token": self.args.hub_token, "run_as_future": True}
        jobs = [upload(self, self.args.output_dir, message, **options)]
        if self.args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            last = self.args.hub_strategy == HubStrategy.CHECKPOINT
            name = "last-checkpoint" if last else Path(checkpoint_folder).name
            logger.warning(
                "%s is pushed without the states of optimizer and random numbers, which are pickles: a training is "
                "resumed from the folder on this machine.",
                name,
            )
            jobs.append(upload(self, checkpoint_folder, f"{message}, checkpoint", path_in_repo=name, **options))
        if pushing is None or pushing.is_done():
            self._say_failures()
            self.push_in_progress = PushInProgress(jobs)
        else:
            pushing.jobs.extend(jobs)

    def _finish_current_push(self: Trainer) -> None:
        super()._finish_current_push()
        self._say_failures()

    def _say_failures(self: Trainer) -> None:
        """Warn of pushes that failed, each once."""
        pushing = getattr(self, "push_in_progress", None)
        for job in pushing.jobs if pushing is not None else []:
            if job.exception() is not None:
                logger.warning("A push during the training failed: %s", job.exception())
        self.push_in_progress = None


def upload(
    trainer: Trainer,
    folder: str | Path,
    message: str | None,
    *,
    path_in_repo: str | None = None,
    revision: str | None = None,
    **options: Any,
) -> CommitInfo | Future:
    """Upload what may be published of a folder, in one commit; none is made if the repository holds it all already.

    The Hub checks the card's metadata before any weights are sent.

    Args:
        trainer (LeapAlignTrainer): whose repository it goes to.
        folder (str | Path): output folder or checkpoint of the training.
        message (str | None): of the commit.
        path_in_repo (str | None): the folder in the repository; None is its top.
        revision (str | None): branch; None is `hub_revision`, or the main one.
        **options: of `huggingface_hub.HfApi.create_commit`.

    Returns:
        CommitInfo | Future: the commit, or what becomes it.

    Raises:
        ValueError: if the Hub refuses the card's metadata.
    """
    secrets = secrets_of(vars(trainer.args)) | {options.get("token"), get_token()}
    files = published_files(folder, {each for each in secrets if isinstance(each, str)})
    prefix = f"{path_in_repo}/" if path_in_repo else ""
    return HfApi(library_name="trl_leapalign").create_commit(
        repo_id=trainer.hub_model_id,
        operations=[CommitOperationAdd(f"{prefix}{name}", Path(folder) / name) for name in files],
        commit_message=message or "Upload",
        revision=revision or trainer.args.hub_revision,
        **options,
    )


def published_files(folder: str | Path, secrets: set[str]) -> list[str]:
    """Choose the files of a folder that may be published.

    Args:
        folder (str | Path): output folder or checkpoint of a training.
        secrets (set[str]): texts that must not be in them.

    Returns:
        list[str]: their paths in the folder. A file that holds a secret is left out with a warning.
    """
    folder = Path(folder)
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    chosen = list(filter_repo_objects(names, allow_patterns=list(PUBLISHED), ignore_patterns=list(IGNORED)))
    patterns = [secret.encode() for secret in secrets if len(secret) >= SHORTEST_SECRET]
    leaking = [name for name in chosen if any(pattern in _text(folder / name) for pattern in patterns)]
    if leaking:
        logger.warning("Not pushed, since they hold a token, password or key in plain text: %s.", ", ".join(leaking))
    return [name for name in chosen if name not in leaking]


def _text(path: Path) -> bytes:
    """What may hold text in a file: all of it, or the header of weights."""
    if path.suffix != ".safetensors":
        return path.read_bytes()
    with safe_open(path, framework="pt") as file:
        return repr((file.metadata(), list(file.keys()))).encode()
