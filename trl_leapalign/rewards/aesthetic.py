"""LAION's aesthetic predictor v2."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub import constants
from torch import Tensor, nn
from transformers import CLIPModel

from .clip import check_clip, image_features
from .preprocessing import normalize, resize_and_crop
from .reward_model import RewardModel, apply_head, linear_head
from .weights import check_sha256, load_model, load_module, read_weights

HEAD_FILE = "sac+logos+ava1-l14-linearMSE.pth"
HEAD_URL = (
    "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/sac%2Blogos%2Bava1-l14-linearMSE.pth"
)
HEAD_SHA256 = "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0"


class AestheticScore(RewardModel):
    """LAION's aesthetic predictor v2: how much people like a picture, whatever the prompt says.

    A head without activations on normalised features of CLIP ViT-L/14, so in fact score = w e + b with |e| = 1.
    Pictures get about 4.5 to 6.5; above 8 the reward is mostly being exploited. There is no recommended threshold.

    Args:
        model (CLIPModel): CLIP ViT-L/14, frozen here; it may be shared with CLIPScore.
        head (nn.Module): maps normalised features (B, D) to (B, 1), such as `linear_head(D)`; frozen here.
        batch_size (int | None): images scored at a time. None is all of a batch.
        activation_checkpointing (bool): compute activations again in the backward pass rather than keep them.

    Raises:
        TypeError: if the model is no CLIPModel.
        ValueError: if a setting is out of range.
    """

    reads_prompts = False

    def __init__(
        self,
        model: CLIPModel,
        head: nn.Module,
        *,
        batch_size: int | None = None,
        activation_checkpointing: bool = False,
    ):
        super().__init__(batch_size=batch_size, activation_checkpointing=activation_checkpointing)
        check_clip(model)
        self.model = model
        self.head = head
        self.eval().requires_grad_(False)

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | Path = "openai/clip-vit-large-patch14",
        *,
        revision: str | None = None,
        head: str | Path | None = None,
        sha256: str | None = HEAD_SHA256,
        **settings: Any,
    ) -> "AestheticScore":
        """Load CLIP from the Hub or a folder, and the head from a file or its author's repository on GitHub.

        Args:
            path_or_id (str | Path): repository of the Hub or folder of CLIP ViT-L/14.
            revision (str | None): branch, tag or commit of the repository. None is its main branch: no commit has been
                compared with the original code yet, so none is pinned.
            head (str | Path | None): file of the head's weights. None fetches it once.
            sha256 (str | None): digest that the head's file must have. None accepts any.
            **settings: of the constructor.

        Returns:
            AestheticScore: the reward, in float32 on the CPU.

        Raises:
            FileNotFoundError: if something is neither on disk nor to be had from the network.
            ValueError: if the weights are cut off or others.
        """
        path = _fetch_head() if head is None else Path(head)
        if not path.is_file():
            raise FileNotFoundError(f"There is no file {path}. Fetch {HEAD_URL} and pass its path as head.")
        if sha256 is not None:
            check_sha256(path, sha256)
        weights = {key.removeprefix("layers."): value for key, value in read_weights(path).items()}
        model = load_model(CLIPModel, path_or_id, revision=revision)
        layers = linear_head(model.config.projection_dim)
        load_module(layers, weights, path)
        return cls(model, layers, **settings)

    def score(self, images: Tensor, texts: Sequence[None]) -> Tensor:
        """Score images of one micro-batch.

        Args:
            images (Tensor): shape (B, 3, H, W) in [0, 1].
            texts (Sequence[None]): unused.

        Returns:
            Tensor: shape (B,).
        """
        return apply_head(self.head, F.normalize(self.image_features(images), dim=-1))[:, 0]

    def image_features(self, images: Tensor) -> Tensor:
        """Compute what CLIP sees in images, not normalised.

        Args:
            images (Tensor): shape (B, 3, H, W) in [0, 1].

        Returns:
            Tensor: shape (B, D).
        """
        size = self.model.config.vision_config.image_size
        return image_features(self.model, normalize(resize_and_crop(images, size, round_margins=True)))


def _fetch_head() -> Path:
    path = Path(torch.hub.get_dir()) / "checkpoints" / HEAD_FILE
    if path.is_file():
        return path
    advice = f"Fetch {HEAD_URL} on a machine with a network, and pass its path: head='FOLDER/{HEAD_FILE}'."
    if constants.HF_HUB_OFFLINE:
        raise FileNotFoundError(f"The aesthetic head is not on disk, and HF_HUB_OFFLINE is set. {advice}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(HEAD_URL, str(path), hash_prefix=HEAD_SHA256, progress=False)
    except (OSError, RuntimeError) as error:
        raise FileNotFoundError(f"The aesthetic head is not on disk, and GitHub does not give it. {advice}") from error
    return path
