"""Videos into files: GIF by Pillow, and MP4 where PyAV is there."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor
from torch.nn import functional

from torchimplicit.recipes.runtime.files import replacing

SHORTEST = 20
"""Milliseconds of a GIF's frame: browsers show shorter ones slowly."""


def can_write_mp4() -> bool:
    """Whether PyAV is installed."""
    return find_spec("av") is not None


def save(frames: Iterator[Tensor], rate: float, path: Path) -> None:
    """Write frames, uint8 ``[height, width, channels]`` each, in one move; a frame at a time is held in memory.

    Args:
        frames: one at least, all of one size.
        rate: frames a second.
        path: ``.gif``, which has 256 colours a frame, or ``.mp4``, whose sides are even: a last row or column is
            repeated where that is needed.
    """
    with replacing(path) as draft:
        if path.suffix == ".gif":
            images = (Image.fromarray(_three_channels(frame).numpy()) for frame in frames)
            next(images).save(
                draft,
                format="GIF",
                save_all=True,
                append_images=images,
                duration=max(SHORTEST, round(1000 / rate)),
                loop=0,
            )
        else:
            _encode(frames, rate, draft)


def _encode(frames: Iterator[Tensor], rate: float, path: Path) -> None:
    import av

    with av.open(str(path), "w") as container:
        stream = None
        for frame in frames:
            image = _even(_three_channels(frame))
            if stream is None:
                stream = container.add_stream("libx264", rate=Fraction(rate).limit_denominator(1001))
                stream.height, stream.width = image.shape[:2]
                stream.pix_fmt = "yuv420p"
                stream.options = {"crf": "14"}
            array = np.ascontiguousarray(image.numpy())
            container.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
        assert stream is not None
        container.mux(stream.encode())


def _three_channels(frame: Tensor) -> Tensor:
    return frame.expand(-1, -1, 3).contiguous()


def _even(image: Tensor) -> Tensor:
    height, width = image.shape[:2]
    if height % 2 == width % 2 == 0:
        return image
    planes = image.permute(2, 0, 1)[None].float()
    padded = functional.pad(planes, (0, width % 2, 0, height % 2), mode="replicate")
    return padded[0].permute(1, 2, 0).to(image.dtype)
