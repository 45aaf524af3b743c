"""Turn the mmdet checkpoint of GenEval's detector into a folder that transformers loads.

Usage: python -m trl_leapalign.evaluation.geneval.convert_mask2former in.pth out_dir
"""

import argparse
from collections.abc import Sequence

from .mmdet_checkpoint import CHECKPOINT_URL, load_mmdet_checkpoint


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command.

    Args:
        arguments (Sequence[str] | None): of the command line; None takes the process's own.
    """
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkpoint", help=f"mmdet's .pth file, from {CHECKPOINT_URL}")
    parser.add_argument("output", help="folder to write config.json and model.safetensors to")
    options = parser.parse_args(arguments)
    load_mmdet_checkpoint(options.checkpoint).save_pretrained(options.output)


if __name__ == "__main__":
    main()
