"""Small image sets in the published layouts."""

from __future__ import annotations

import gzip
import pickle

import numpy as np
from PIL import Image


def idx(array, kind=8):
    array = np.asarray(array, dtype=np.uint8)
    header = bytes((0, 0, kind, array.ndim)) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return header + array.tobytes()


def write_mnist(folder, train=40, test=20):
    folder.mkdir(parents=True, exist_ok=True)
    for part, count in (("train", train), ("t10k", test)):
        numbers = np.arange(count)
        images = np.broadcast_to(numbers[:, None, None], (count, 28, 28))
        for name, content in (("images-idx3", images), ("labels-idx1", numbers % 10)):
            (folder / f"{part}-{name}-ubyte.gz").write_bytes(gzip.compress(idx(content)))
    return folder


def cifar_batch(start=0, count=20):
    data = np.broadcast_to((start + np.arange(count))[:, None], (count, 3072)).astype(np.uint8)
    data[:, :1024] = 255  # red
    return {b"batch_label": b"made up", b"labels": [i % 10 for i in range(count)], b"data": data}


def write_cifar(folder, protocol=2):
    folder.mkdir(parents=True)
    for number in range(1, 6):
        (folder / f"data_batch_{number}").write_bytes(pickle.dumps(cifar_batch(20 * number), protocol))
    (folder / "test_batch").write_bytes(pickle.dumps(cifar_batch(200), protocol))
    return folder


def write_imagenet(folder, classes=("n01", "n02"), train=4, val=2):
    for part, count in (("train", train), ("val", val)):
        for label, name in enumerate(classes):
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.full((50 + i, 70, 3), 40 * label + i, dtype=np.uint8)
                Image.fromarray(pixels).save(folder / part / name / f"{i}.JPEG", quality=95)
    return folder
