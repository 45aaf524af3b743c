"""Images and videos: tensors, files and what datasets hold, turned into each other."""

import hashlib
import io
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

BROKEN_IMAGE = (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError)
"""What PIL raises for files that are empty, cut off, too large or no images."""
RANGE_TOLERANCE = 1e-3
FRAME_MILLISECONDS = 60
"""How long a frame of a video's file is shown."""
FRAMES = "Frames"
"""Text in the file of a video: how many frames it has."""


def check_images(images: Any, name: str, video: bool = False) -> None:
    """Check images or videos.

    Args:
        images (Any): should be a floating tensor of shape (B, 3, H, W), or (B, F, 3, H, W) for video, in [0, 1].
        name (str): of what takes them, for the message.
        video (bool): whether it takes videos.

    Raises:
        TypeError: if they are no floating tensor.
        ValueError: if the shape or the range is wrong.
    """
    if not isinstance(images, Tensor):
        raise TypeError(
            f"{name} takes a tensor of images, through which gradients flow, but got {type(images).__name__}. Pass a "
            f"floating tensor of shape {'(B, F, 3, H, W)' if video else '(B, 3, H, W)'} in [0, 1]."
        )
    if not images.is_floating_point():
        raise TypeError(f"{name} takes floating images in [0, 1], but got {images.dtype}. Pass images.float() / 255.")
    shape = tuple(images.shape)
    if video and (images.ndim != 5 or shape[2] != 3):
        hint = " These are images: pass the reward itself, without VideoReward." if images.ndim == 4 else ""
        raise ValueError(f"{name} takes videos of shape (B, F, 3, H, W), but got {shape}.{hint}")
    if images.ndim == 5 and not video:
        raise ValueError(
            f"{name} scores images, but got shape {shape}, which is a video's. Wrap it: VideoReward(reward) of "
            "trl_leapalign.rewards scores the frames and takes their mean."
        )
    if not video and (images.ndim != 4 or shape[1] != 3):
        hint = " If the fourth channel is opacity, leave it out: pass images[:, :3]." if shape[1:2] == (4,) else ""
        hint = " The channels come second: pass images.permute(0, 3, 1, 2)." if shape[3:] == (3,) else hint
        raise ValueError(f"{name} takes images of shape (B, 3, H, W), but got {shape}.{hint}")
    if 0 in shape:
        raise ValueError(f"{name} got no pixels: the shape of the images is {shape}.")
    low, high = torch.stack(images.detach().aminmax()).tolist()
    if not (low >= -RANGE_TOLERANCE and high <= 1 + RANGE_TOLERANCE):
        raise ValueError(
            f"{name} takes images in [0, 1], but got values from {low:g} to {high:g}. Images in [-1, 1] become "
            "images / 2 + 0.5, those in [0, 255] images / 255; NaN comes from a decoder in float16."
        )


def to_bytes(images: Tensor, name: str = "An evaluation") -> Tensor:
    """Round images to 8 bits a channel.

    Args:
        images (Tensor): shape (B, 3, H, W) in [0, 1].
        name (str): of what takes them, for the message.

    Returns:
        Tensor: shape (B, 3, H, W), uint8.

    Raises:
        TypeError: if they are no floating tensor.
        ValueError: if the shape or the range is wrong.
    """
    check_images(images, name)
    return images.detach().float().clamp(0, 1).mul(255).round().to(torch.uint8)


def to_pil(images: Tensor, name: str = "An evaluation") -> list[Image.Image]:
    """Turn images into PIL's.

    Args:
        images (Tensor): shape (B, 3, H, W) in [0, 1].
        name (str): of what takes them, for the message.

    Returns:
        list[Image.Image]: B images in RGB.

    Raises:
        TypeError: if they are no floating tensor.
        ValueError: if the shape or the range is wrong.
    """
    return [Image.fromarray(image) for image in to_bytes(images, name).permute(0, 2, 3, 1).contiguous().cpu().numpy()]


def save_sample(sample: Tensor, path: Path) -> None:
    """Write an image or a video to a file, 8 bits a channel and without loss. A video is an animated PNG.

    Args:
        sample (Tensor): shape (3, H, W), or (F, 3, H, W) for video, in [0, 1].
        path (Path): the file; it is there whole or not at all.

    Raises:
        ValueError: if the shape or the values are wrong.
    """
    if sample.ndim not in (3, 4):
        raise ValueError(
            f"Only images (3, H, W) and videos (F, 3, H, W) can be written to files, not shape {tuple(sample.shape)}."
        )
    options: dict[str, Any] = {}
    frames = to_pil(sample if sample.ndim == 4 else sample[None])
    if sample.ndim == 4:
        text = PngInfo()
        text.add_text(FRAMES, str(len(frames)))
        # Pillow joins equal frames unless they are blended differently, which is the same for opaque ones.
        blend = [index % 2 for index in range(len(frames))]
        options = {"save_all": True, "append_images": frames[1:], "duration": FRAME_MILLISECONDS, "loop": 0}
        options |= {"blend": blend, "pnginfo": text}
    part = path.with_suffix(".part")
    frames[0].save(part, format="PNG", **options)
    part.replace(path)


def read_samples(paths: Sequence[Path]) -> Tensor:
    """Read what `save_sample` wrote.

    Args:
        paths (Sequence[Path]): B files of images, or of videos, of the same size.

    Returns:
        Tensor: shape (B, 3, H, W), or (B, F, 3, H, W) for video, in [0, 1], float32.

    Raises:
        ValueError: if the sizes differ, or a file is no image, or cut off.
    """
    samples = [_read(path) for path in paths]
    check_shapes(samples)
    return torch.from_numpy(np.stack(samples)).movedim(-1, -3).float() / 255


def read_preview(path: Path) -> np.ndarray:
    """Read an image, or the first, middle and last frame of a video side by side.

    Args:
        path (Path): what `save_sample` wrote.

    Returns:
        np.ndarray: shape (H, W, 3), or (H, 3 W, 3) of a video, uint8.
    """
    pixels = _read(path)
    if pixels.ndim == 3:
        return pixels
    return np.concatenate([pixels[0], pixels[len(pixels) // 2], pixels[-1]], axis=1)


def _read(path: Path) -> np.ndarray:
    try:
        with Image.open(path) as picture:
            if FRAMES not in picture.text:
                return np.array(picture.convert("RGB"))
            frames = []
            for index in range(int(picture.text[FRAMES])):
                picture.seek(index)
                frames.append(np.array(picture.convert("RGB")))
            return np.stack(frames)
    except (OSError, SyntaxError) as error:
        raise ValueError(
            f"{path} cannot be read as an image: {error}. If an evaluation made it, delete it: it is made again."
        ) from error


def check_shapes(samples: Sequence[Any]) -> None:
    """Raise ValueError unless all samples of a batch have the same shape."""
    shapes = sorted({tuple(sample.shape) for sample in samples})
    if len(shapes) > 1:
        raise ValueError(
            f"The samples of a batch differ in size: {shapes}. Set height and width if they follow from the inputs, "
            "give samples the same number of frames, or take a batch size of 1."
        )


def by_sample(output: Any, num_samples: int, name: str) -> Any:
    """Give what a pipeline returned the batch axis that some leave out.

    Args:
        output (Any): a tensor of shape (B, ...); of a single video (F, 3, H, W); or a list with a tensor for each
            sample, such as the layers of an image.
        num_samples (int): samples B that there should be.
        name (str): of the pipeline, for the message.

    Returns:
        Any: a tensor of shape (B, ...); what is neither a tensor nor a list of tensors as it is.

    Raises:
        ValueError: if there are not as many samples, or they differ in size.
    """
    listed = isinstance(output, list) and all(isinstance(sample, Tensor) for sample in output)
    if not listed and not isinstance(output, Tensor):
        return output
    if not listed and num_samples == 1 and output.ndim == 4 and len(output) > 1:
        return output[None]
    if len(output) != num_samples:
        what = f"a list of {len(output)}" if listed else f"shape {tuple(output.shape)}"
        raise ValueError(
            f"{name} returned {what} for {num_samples} samples. Set a batch size of 1 if it takes one prompt at a "
            "time, and leave out arguments that make several samples of a prompt."
        )
    if listed:
        check_shapes(output)
        return torch.stack(output)
    return output


def open_image(value: Any) -> Image.Image:
    """Turn what a column holds into an image.

    Args:
        value (Any): an image, the path of one, or what an undecoded `datasets.Image` column holds.

    Returns:
        Image.Image: in RGB, turned as its EXIF data says.

    Raises:
        ValueError: if there is no such file, or no image in it.
        TypeError: if it is something else.
    """
    encoded = value.get("bytes") if isinstance(value, dict) else None
    source = value.get("path") if isinstance(value, dict) else value
    name = "its content" if source is None else f"{source!r:.200}"
    try:
        if encoded is not None:
            source = Image.open(io.BytesIO(encoded))
        elif isinstance(source, (str, Path)):
            source = Image.open(source)
        if isinstance(source, Image.Image):
            return ImageOps.exif_transpose(source).convert("RGB")
    except FileNotFoundError as error:
        raise ValueError(
            f"There is no image file {str(source)!r}; paths start from {str(Path.cwd())!r}. Give whole paths, images, "
            "or a column that was cast to datasets.Image()."
        ) from error
    except BROKEN_IMAGE as error:
        raise ValueError(f"{name} is no image that can be read: {error}. Mend it, or leave the row out.") from error
    raise TypeError(f"An image is given by a PIL image or the path of a file, not by {value!r:.200}.")


def column_images(metadata: Sequence[dict[str, Any]], column: str, like: Tensor) -> Tensor:
    """Read the images of a column for a reward that compares with them.

    Args:
        metadata (Sequence[dict]): rows, length B.
        column (str): the column that holds an image, or the path of one.
        like (Tensor): the images that are rewarded, shape (B, ..., H, W), for size, device and dtype.

    Returns:
        Tensor: shape (B, 3, H, W) in [0, 1], without graph; resized with antialiasing.

    Raises:
        KeyError: if a row does not have the column.
        ValueError: if a file cannot be read.
    """
    size = tuple(like.shape[-2:])
    pictures = []
    for row in metadata:
        if column not in row:
            raise KeyError(f"There is no column {column!r} in the metadata, which has {sorted(row)}.")
        picture = torch.from_numpy(np.array(open_image(row[column]))).movedim(-1, 0)[None].float() / 255
        if picture.shape[-2:] != size:
            picture = F.interpolate(picture, size, mode="bilinear", align_corners=False, antialias=True)
        pictures.append(picture)
    return torch.cat(pictures).to(like.device, like.dtype)


def as_text(value: Any) -> str:
    """Return a text that follows from a value's content alone: `default` of `json.dumps` for fingerprints of rows."""
    if isinstance(value, Image.Image):
        digest = hashlib.sha256(value.tobytes()).hexdigest()
        return f"image {value.mode} {value.size} {digest}"
    if isinstance(value, (np.ndarray, Tensor)):
        array = np.ascontiguousarray(value.detach().cpu().numpy() if isinstance(value, Tensor) else value)
        return f"array {array.dtype} {array.shape} {hashlib.sha256(array.tobytes()).hexdigest()}"
    return str(value)


def on_cpu(value: Any) -> Any:
    """Copy the tensors in nested tuples, lists and dicts to the CPU, without their graph; all else is as it was."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {key: on_cpu(each) for key, each in value.items()}
    return type(value)(map(on_cpu, value)) if type(value) in (tuple, list) else value
