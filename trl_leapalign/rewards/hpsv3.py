"""HPSv3: a Qwen2-VL that reads the prompt and the picture, with a head that scores them."""

import ast
import logging
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from .preprocessing import normalize, resize, smart_resize, to_patches
from .reward_model import RewardModel, apply_head
from .weights import find_file, load_model, load_module, load_tokenizer, read_weights

if TYPE_CHECKING:
    from transformers import Qwen2VLConfig, Qwen2VLModel

logger = logging.getLogger(__name__)

FILE = "HPSv3.safetensors"
REWARD_TOKEN = "<|Reward|>"
IMAGE_TOKEN = "<|image_pad|>"
CONVERSATION = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    f"<|im_start|>user\n<|vision_start|>{IMAGE_TOKEN}<|vision_end|>{{instruction}}"
)
"""Qwen2-VL's chat template with its default system prompt. What follows the reward token changes nothing."""
INSTRUCTION_FILE = "hpsv3/dataset/data_collator_qwen.py"
INSTRUCTION_LENGTHS = {"INSTRUCTION": 2523, "prompt_with_special_token": 67}
EMBEDDINGS = "language_model.embed_tokens.weight"


class HPSv3(RewardModel):
    """Human preference score v3 (https://huggingface.co/papers/2508.03789): its mean mu, about 10 for FLUX.1-dev.

    The LeapAlign paper trains on mu with a threshold of 13.5, a gradient discount of 0.1 and a learning rate of 8e-6.
    Gradients are about 30 times those of a cosine.

    A forward pass in bfloat16 needs 17 GB for the weights. Set `batch_size=1` and `activation_checkpointing=True` to
    keep the activations of one image at the most.

    Args:
        model (Qwen2VLModel): the model without its language head, frozen here.
        head (nn.Module): maps hidden states (B, D) to mu and log sigma (B, 2), such as `preference_head(D)`; frozen
            here. Keep it in float32.
        tokenizer (PreTrainedTokenizerBase): Qwen2-VL's with the token <|Reward|>.
        instruction (str | None): what the model is asked, with {text_prompt} and <|Reward|> once each. None reads it
            from the `hpsv3` distribution, which has the one that the weights were trained with.
        image_pixels (int): area that images are resized to, about. Other areas than the default are untrained.
        batch_size (int | None): images scored at a time. None is all of a batch.
        activation_checkpointing (bool): compute activations again in the backward pass rather than keep them.

    Raises:
        FileNotFoundError: if no instruction is given and `hpsv3` is not installed.
        ValueError: if the instruction, the tokenizer or a setting does not fit.
    """

    threshold = 13.5

    def __init__(
        self,
        model: "Qwen2VLModel",
        head: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        instruction: str | None = None,
        image_pixels: int = 256 * 28 * 28,
        batch_size: int | None = None,
        activation_checkpointing: bool = False,
    ):
        super().__init__(batch_size=batch_size, activation_checkpointing=activation_checkpointing)
        self.instruction = read_instruction() if instruction is None else instruction
        for part in ("{text_prompt}", REWARD_TOKEN):
            if self.instruction.count(part) != 1:
                raise ValueError(f"The instruction has {self.instruction.count(part)} times {part}; it must be once.")
        self.special_ids = {token: _token_id(tokenizer, token) for token in (IMAGE_TOKEN, REWARD_TOKEN)}
        self.model = model
        self.head = head
        self.tokenizer = tokenizer
        self.image_pixels = image_pixels
        self.eval().requires_grad_(False)

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | Path = "MizzenAI/HPSv3",
        *,
        revision: str | None = None,
        tokenizer: str | Path | PreTrainedTokenizerBase = "Qwen/Qwen2-VL-7B-Instruct",
        dtype: torch.dtype = torch.bfloat16,
        **settings: Any,
    ) -> "HPSv3":
        """Load the published checkpoint; Qwen2-VL's own weights are not needed.

        Args:
            path_or_id (str | Path): the .safetensors file, its folder, or the repository of the Hub.
            revision (str | None): branch, tag or commit of the repository. None is its main branch: no commit has been
                compared with the original code yet, so none is pinned.
            tokenizer (str | Path | PreTrainedTokenizerBase): Qwen2-VL's tokenizer, or where it is; <|Reward|> is added.
            dtype (torch.dtype): of the model; the head is in float32.
            **settings: of the constructor.

        Returns:
            HPSv3: the reward, on the CPU.

        Raises:
            FileNotFoundError: if something is neither on disk nor to be had from the Hub.
            ValueError: if the file is cut off or holds another model, or the tokenizer does not fit it.
        """
        if settings.get("instruction") is None:
            settings["instruction"] = read_instruction()
        path = find_file(path_or_id, FILE, revision)
        weights, head_weights = split_weights(read_weights(path))
        tokenizer = load_tokenizer(tokenizer)
        tokenizer.add_tokens([REWARD_TOKEN], special_tokens=True)
        rows = weights[EMBEDDINGS].shape[0] if EMBEDDINGS in weights else len(tokenizer)
        if len(tokenizer) != rows:
            raise ValueError(
                f"The tokenizer has {len(tokenizer)} tokens, but {path} has embeddings for {rows}, so their "
                "numbers differ. Use the tokenizer of Qwen/Qwen2-VL-7B-Instruct."
            )
        model = load_model(transformers.Qwen2VLModel, path, config=qwen2_vl_7b(rows), weights=weights, dtype=dtype)
        head = preference_head(model.config.text_config.hidden_size)
        load_module(head, head_weights, path)
        return cls(model, head, tokenizer, **settings)

    def preprocess(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Turn images into the model's patches, with gradients.

        Args:
            images (Tensor): shape (B, 3, H, W) in [0, 1], float32 or float64.

        Returns:
            tuple[Tensor, tuple[int, int]]: normalised patches, shape (B * rows * columns, D); rows and columns.
        """
        vision = self.model.config.vision_config
        factor = vision.patch_size * vision.spatial_merge_size
        height, width = smart_resize(*images.shape[-2:], factor, self.image_pixels)
        pixels = normalize(resize(images, height, width))
        patches = to_patches(pixels, vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size)
        return patches, (height // vision.patch_size, width // vision.patch_size)

    def score(self, images: Tensor, texts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Score images of one micro-batch.

        Args:
            images (Tensor): shape (B, 3, H, W) in [0, 1].
            texts (Sequence[tuple[Tensor, Tensor]]): token ids before the image, and after it up to the reward token.

        Returns:
            Tensor: mu, shape (B,).
        """
        patches, grid = self.preprocess(images)
        grids = torch.tensor([[1, *grid]] * len(images), device=images.device)
        tokens = self.model.visual(patches.to(self.model.dtype), grid_thw=grids).pooler_output
        embed = self.model.language_model.embed_tokens
        rows = [
            torch.cat([embed(before), image.to(self.model.dtype), embed(after)])
            for (before, after), image in zip(texts, tokens.chunk(len(images)), strict=True)
        ]
        # HPSv3 was trained on plain positions 0, 1, 2, ... for all three axes of M-RoPE, which is what the language
        # model takes by itself. It is causal, so that padding on the right changes nothing and needs no mask.
        states = self.model.language_model(inputs_embeds=pad_sequence(rows, batch_first=True), use_cache=False)
        last = torch.tensor([len(row) - 1 for row in rows], device=images.device)
        hidden = states.last_hidden_state[torch.arange(len(rows), device=images.device), last]
        return apply_head(self.head, hidden)[:, 0]

    def encode_prompt(self, prompt: str) -> tuple[Tensor, Tensor]:
        """Tokenise the conversation about a prompt.

        Args:
            prompt (str): the prompt.

        Returns:
            tuple[Tensor, Tensor]: token ids before the image, and after it up to the reward token.

        Raises:
            ValueError: if the prompt itself holds a special token.
        """
        text = CONVERSATION.replace("{instruction}", self.instruction).replace("{text_prompt}", prompt)
        ids = self.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0].to(self.model.device)
        found = {token: (ids == number).nonzero().flatten().tolist() for token, number in self.special_ids.items()}
        for token, places in found.items():
            if len(places) != 1:
                raise ValueError(f"The prompt {prompt!r} holds {token}, which HPSv3 keeps for itself. Take it out.")
        [image], [reward] = found[IMAGE_TOKEN], found[REWARD_TOKEN]
        return ids[:image], ids[image + 1 : reward + 1]


def preference_head(width: int) -> nn.Sequential:
    """Build the head of HPSv3, whose parameters are called {0,3,5}.{weight,bias}.

    Args:
        width (int): of its input.

    Returns:
        nn.Sequential: maps (B, width) to mu and log sigma, shape (B, 2).
    """
    return nn.Sequential(
        nn.Linear(width, 1024), nn.ReLU(), nn.Identity(), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2)
    )


def qwen2_vl_7b(vocabulary: int) -> "Qwen2VLConfig":
    """Describe Qwen2-VL-7B.

    Args:
        vocabulary (int): rows of its embeddings.

    Returns:
        Qwen2VLConfig: the configuration.
    """
    text = {
        "vocab_size": vocabulary,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    }
    vision = {"depth": 32, "embed_dim": 1280, "num_heads": 16, "hidden_size": 3584, "patch_size": 14, "mlp_ratio": 4}
    return transformers.Qwen2VLConfig(text_config=text, vision_config=vision)


def split_weights(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split HPSv3's checkpoint into model and head, by the names of transformers.

    Args:
        weights (dict[str, Tensor]): the checkpoint, in names from before or after transformers 4.52.

    Returns:
        tuple[dict[str, Tensor], dict[str, Tensor]]: weights of the Qwen2VLModel and of the head. The language head is
            left out.
    """
    model, head = {}, {}
    for key, value in weights.items():
        if key.startswith("rm_head."):
            head[key.removeprefix("rm_head.")] = value
        elif key.startswith(("model.visual.", "model.language_model.")):
            model[key.removeprefix("model.")] = value
        elif key.startswith("model."):
            model[key.replace("model.", "language_model.", 1)] = value
        elif not key.startswith("lm_head."):
            model[key] = value
    return model, head


def read_instruction() -> str:
    """Read what HPSv3's weights were trained to be asked, from the installed `hpsv3` distribution.

    Its source is parsed, not imported: the versions it asks for are too old.

    Returns:
        str: the instruction, with {text_prompt} and <|Reward|>.

    Raises:
        FileNotFoundError: if `hpsv3` is not installed, or has no such file.
        ValueError: if the file has other constants.
    """
    advice = "Run `pip install --no-deps hpsv3==1.0.0`, or pass instruction=... with {text_prompt} and <|Reward|>."
    try:
        path = Path(str(metadata.distribution("hpsv3").locate_file(INSTRUCTION_FILE)))
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (metadata.PackageNotFoundError, FileNotFoundError) as error:
        raise FileNotFoundError(f"HPSv3's instruction comes from the hpsv3 distribution. {advice}") from error
    assignments = [node for node in tree.body if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)]
    constants = {ast.unparse(node.targets[0]): node.value.value for node in assignments}
    texts = {name: constants.get(name) for name in INSTRUCTION_LENGTHS}
    if not all(isinstance(text, str) for text in texts.values()):
        raise ValueError(f"{path} has no texts {list(texts)}, so this is another hpsv3. {advice}")
    if {name: len(text) for name, text in texts.items()} != INSTRUCTION_LENGTHS:
        logger.warning("The instruction in %s is not that of hpsv3 1.0.0, so scores may not compare. %s", path, advice)
    return "".join(texts.values())


def _token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    number = tokenizer.get_vocab().get(token)
    if number is None:
        raise ValueError(
            f"The tokenizer has no {token}. Take that of Qwen/Qwen2-VL-7B-Instruct, and add {REWARD_TOKEN} with "
            "tokenizer.add_tokens([...], special_tokens=True)."
        )
    return number
