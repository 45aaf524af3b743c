"""Record what a built-in reward gives for one image and prompt, for those who have the real weights.

    python -m tests.golden.fill --reward hpsv2.1 --image cat.png --prompt "a cat" --expected 0.2712

`--expected` is the score of the original package for the same file; without it, the score of this library is recorded,
which only shows later changes. The image is copied beside the record, so take one that may be published.
`tests/rewards/test_golden.py` scores it again wherever the weights are in the Hub's cache.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor

from trl_leapalign.rewards import REWARDS, RewardModel, load_reward

FOLDER = Path(__file__).parent


def read_image(path: Path) -> Tensor:
    """Read an image as (1, 3, H, W) in [0, 1]."""
    pixels = np.array(Image.open(path).convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255


def score(reward: RewardModel, image: Path, prompt: str) -> float:
    """Score one image."""
    with torch.no_grad():
        return reward(read_image(image), [prompt], [{}]).item()


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reward", required=True, choices=sorted(REWARDS))
    parser.add_argument("--image", required=True, type=Path)
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--expected", type=float, help="the original package's score")
    parser.add_argument("--source", default="the original package", help="what computed it, with its version")
    parser.add_argument("--tolerance", type=float, default=2e-3, help="allowed difference, relative and absolute")
    parser.add_argument("--settings", type=json.loads, default={}, help='of the loader: \'{"path_or_id": "..."}\'')
    parser.add_argument("--folder", type=Path, default=FOLDER)
    options = parser.parse_args(arguments)
    actual = score(load_reward(options.reward, **options.settings), options.image, options.prompt)
    original = options.expected is not None
    image = options.folder / f"{options.reward}{options.image.suffix}"
    record = {
        "reward": options.reward,
        "image": image.name,
        "prompt": options.prompt,
        "score": options.expected if original else actual,
        "source": options.source if original else f"this library with transformers {transformers.__version__}",
        "tolerance": options.tolerance,
    }
    shutil.copyfile(options.image, image)
    text = json.dumps(record, indent=2, ensure_ascii=False)
    (options.folder / f"{options.reward}.json").write_text(text + "\n", encoding="utf-8")
    sys.stdout.write(
        f"{options.reward}: this library gives {actual}; recorded {record['score']} ({record['source']}).\n"
    )
    return record


if __name__ == "__main__":
    main()
