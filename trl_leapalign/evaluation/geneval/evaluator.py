"""GenEval as an evaluator: a detector, a colour classifier and the rules."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...media import to_pil
from ...rewards.callables import check_inputs
from .colors import ColorClassifier
from .mask2former import Mask2FormerDetector
from .metadata import parse_task
from .rules import GenEvalRules


class GenEval(nn.Module):
    """Says of each image whether it shows what its prompt asks for. It gives no gradient.

    Args:
        detector (Mask2FormerDetector): finds the things; `detector(images, min_score)` returns a list of detections
            for each image.
        color_classifier (ColorClassifier): names colours.
        rules (GenEvalRules | None): the settings; None is the published ones.

    Example:
        ```python
        evaluator = GenEval.from_pretrained("facebook/mask2former-swin-small-coco-instance")
        rows = read_geneval("evaluation_metadata.jsonl")
        correct, details = evaluator(images, [row["prompt"] for row in rows], rows)
        print(summarize_geneval(correct, details["tag"]).score)
        ```
    """

    differentiable = False

    def __init__(
        self, detector: Mask2FormerDetector, color_classifier: ColorClassifier, rules: GenEvalRules | None = None
    ):
        super().__init__()
        self.detector = detector
        self.color_classifier = color_classifier
        self.rules = rules or GenEvalRules()

    @classmethod
    def from_pretrained(
        cls,
        detector: str | Path,
        color_classifier: str | Path = "openai/clip-vit-large-patch14",
        rules: GenEvalRules | None = None,
        device: str | torch.device | None = None,
    ) -> "GenEval":
        """Load the two models.

        Args:
            detector (str | Path): there is no default, since scores depend on it. The published evaluator's is mmdet's
                .pth file, or what `convert_mask2former` makes of it.
                "facebook/mask2former-swin-small-coco-instance" is of the same architecture, but trained otherwise.
            color_classifier (str | Path): Hub id or folder.
            rules (GenEvalRules | None): the settings; None is the published ones.
            device (str | torch.device | None): where the models go; None is the CPU.

        Returns:
            GenEval: frozen, in eval mode.

        Raises:
            FileNotFoundError: if weights are missing; the message says which, and how to pass a local path.
            ValueError: if weights are cut off or those of another model.
        """
        models = Mask2FormerDetector.from_pretrained(detector), ColorClassifier.from_pretrained(color_classifier)
        return cls(*models, rules).to(device or "cpu").eval()

    @torch.no_grad()
    def forward(
        self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]
    ) -> tuple[Tensor, dict[str, list]]:
        """Judge images.

        Args:
            images (Tensor): shape (B, 3, H, W) in [0, 1]; they are rounded to 8 bits, as in a file.
            prompts (list[str]): length B, unused: the metadata says what they ask for.
            metadata (list[dict]): length B, with tag, include and, where there is one, exclude.

        Returns:
            tuple[Tensor, dict[str, list]]: 1 for a right image and 0 for a wrong one, shape (B,), float32, and for each
                image its "tag", the "reason" why it is wrong (empty if it is right), and "objects": the boxes that
                counted, by class, as [left, top, right, bottom, score].

        Raises:
            TypeError: if images, prompts or metadata are of the wrong kind.
            ValueError: if the metadata are not GenEval's, or lengths, shapes or the range of the images are wrong.
        """
        check_inputs(images, prompts, metadata, type(self).__name__, reads_prompts=False)
        tasks = [parse_task(row, f"Metadata row {index}") for index, row in enumerate(metadata)]
        found = self.detector(images, min_score=min(self.rules.threshold, self.rules.counting_threshold))
        verdicts, objects = [], []
        for picture, task, detections in zip(to_pil(images), tasks, found, strict=True):
            selected = self.rules.select(detections, task.tag)
            colors_of = partial(self.color_classifier, picture)
            verdicts.append(self.rules.judge(task, selected, colors_of))
            objects.append({name: [[*d.box, d.score] for d in group] for name, group in selected.items()})
        correct = torch.tensor([float(verdict.correct) for verdict in verdicts], device=images.device)
        reasons = ["; ".join(verdict.reasons) for verdict in verdicts]
        return correct, {"tag": [task.tag for task in tasks], "reason": reasons, "objects": objects}
