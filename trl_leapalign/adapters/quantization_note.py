"""What the card of an adapter says of the quantized base that it was trained on."""

from torch import nn

from ..rollout.quantization import quantization_of


def quantization_note(denoisers: dict[str, nn.Module]) -> str:
    """Say what the base was quantized by, and that the adapter fits the full-precision one.

    Args:
        denoisers (dict[str, nn.Module]): the trained components, by name.

    Returns:
        str: a sentence; empty if nothing is quantized.
    """
    found = {name: quantization_of(denoiser) for name, denoiser in denoisers.items()}
    quantized = [f"`{name}` by {how}" for name, how in found.items() if how is not None]
    if not quantized:
        return ""
    return (
        f"The base was quantized while the adapter was trained ({', '.join(quantized)}). The adapter is in full "
        "precision and loads on the full-precision base as below, or on a quantized one."
    )
