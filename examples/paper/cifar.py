"""CIFAR-10 from a folder in one of its two published formats; nothing is downloaded, and nothing is executed.

binary    data_batch_1.bin … data_batch_5.bin: 3,073 bytes an image, its label and 3 × 32 × 32 pixels
python    data_batch_1 … data_batch_5: pickled dicts, b"data" (N, 3072) uint8 and b"labels", a list of N

A pixel is a byte; the planes are red, green and blue, each 32 rows of 32. Both are on the data set's own page,
https://www.cs.toronto.edu/~kriz/cifar.html (Krizhevsky 2009).
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

SHAPE = (3, 32, 32)
CLASSES = 10
PIXELS = 3 * 32 * 32
Bytes = npt.NDArray[np.uint8]

_SUBFOLDERS = (".", "cifar-10-batches-bin", "cifar-10-batches-py")
_NAMES = [f"data_batch_{k}" for k in range(1, 6)]


class CifarError(ValueError):
    """The folder does not hold CIFAR-10 as it was published."""


def load(folder: Path, examples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Some of the training images, drawn at random: (N, 3, 32, 32) float32, 0 to 1, and labels (N,) int64.

    Raises:
        CifarError: a wrong folder, a truncated or foreign file, fewer images than asked for.
    """
    pixels, labels = read(folder)
    if not 0 < examples <= len(labels):
        raise CifarError(f"{folder} holds {len(labels)} images, got a wish for {examples}; ask for 1 to {len(labels)}")
    chosen = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))[:examples].numpy()
    images = torch.from_numpy(pixels[chosen].reshape(-1, *SHAPE)).float() / 255
    return images, torch.from_numpy(labels[chosen].astype(np.int64))


def read(folder: Path) -> tuple[Bytes, Bytes]:
    """All training images as they are in the files: pixels (N, 3072) and labels (N,), uint8."""
    paths, reader = _find(folder)
    parts = [reader(path) for path in paths]
    counts = {path.name: len(labels) for path, (_, labels) in zip(paths, parts, strict=True)}
    if len(set(counts.values())) > 1:
        raise CifarError(f"the five files must hold equally many images, got {counts}; unpack the archive again")
    for path, (_, labels) in zip(paths, parts, strict=True):
        if labels.max() >= CLASSES:
            raise CifarError(
                f"{path}: labels must be 0 to {CLASSES - 1}, got {labels.max()}; "
                "is it CIFAR-100? Take the archive of CIFAR-10"
            )
    return np.concatenate([pixels for pixels, _ in parts]), np.concatenate([labels for _, labels in parts])


def _find(folder: Path) -> tuple[list[Path], Any]:
    """The five files, in the folder itself or under the archive's own name in it, and what reads them."""
    for place in (folder / name for name in _SUBFOLDERS):
        for suffix, reader in ((".bin", _read_binary), ("", _read_python)):
            paths = [place / (name + suffix) for name in _NAMES]
            found = [path for path in paths if path.is_file()]
            if len(found) == len(paths):
                return paths, reader
            if found:
                missing = ", ".join(path.name for path in paths if path not in found)
                raise CifarError(f"{place} must hold data_batch_1 to 5, got no {missing}; unpack the archive again")
    raise CifarError(
        f"{folder} must hold CIFAR-10, data_batch_1.bin … or data_batch_1 …, got "
        f"{'neither' if folder.is_dir() else 'no such folder'}; pass the folder that the archive was unpacked into"
    )


def _read_binary(path: Path) -> tuple[Bytes, Bytes]:
    content = np.fromfile(path, dtype=np.uint8)
    if not len(content) or len(content) % (1 + PIXELS):
        raise CifarError(
            f"{path} must have a multiple of {1 + PIXELS} bytes, got {len(content)}; it is truncated: "
            "unpack the archive again"
        )
    records = content.reshape(-1, 1 + PIXELS)
    return records[:, 1:], records[:, 0]


def _read_python(path: Path) -> tuple[Bytes, Bytes]:
    try:
        with path.open("rb") as file:
            content = _ArraysOnly(file, encoding="bytes").load()
    except CifarError as error:
        raise CifarError(f"{path}: {error}") from None
    except Exception as error:  # whatever a damaged pickle makes of itself
        raise CifarError(f"{path} must be a pickle, got {error!r}; unpack the archive again") from error
    if not isinstance(content, dict) or not {b"data", b"labels"} <= set(content):
        raise CifarError(
            f'{path} must hold a dict with b"data" and b"labels", got '
            f"{sorted(map(repr, content)) if isinstance(content, dict) else type(content).__name__}; "
            "take the archive of CIFAR-10 for Python"
        )
    pixels, labels = content[b"data"], content[b"labels"]
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape[1:] != (PIXELS,):
        got = f"{pixels.dtype} {pixels.shape}" if isinstance(pixels, np.ndarray) else type(pixels).__name__
        raise CifarError(f'{path}: b"data" must be uint8 (N, {PIXELS}), got {got}; unpack the archive again')
    if not isinstance(labels, list) or not all(isinstance(label, int) and 0 <= label < 256 for label in labels):
        raise CifarError(
            f'{path}: b"labels" must be a list of 0 to {CLASSES - 1}, got others; unpack the archive again'
        )
    if not labels or len(labels) != len(pixels):
        raise CifarError(f"{path} must hold one label per image, got {len(labels)} of {len(pixels)}; unpack it again")
    return pixels, np.array(labels, dtype=np.uint8)


def _latin1(text: str, encoding: str | bytes) -> bytes:
    """`_codecs.encode` as pickles of protocol 2 need it: bytes that were written as text."""
    if encoding not in ("latin1", b"latin1"):
        raise CifarError(f"a batch needs the encoding latin1 alone, got {encoding!r}; do not trust this file")
    return text.encode("latin1")


class _ArraysOnly(pickle.Unpickler):
    """Unpickles numbers, containers and numpy arrays; whatever else a pickle names is refused, not imported."""

    _RECONSTRUCT = np.empty(0).__reduce__()[0]
    _ALLOWED = {  # noqa: RUF012
        ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,  # numpy 1
        ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("_codecs", "encode"): _latin1,
    }

    def __init__(self, file: BinaryIO, *, encoding: str) -> None:
        super().__init__(file, encoding=encoding)

    def find_class(self, module: str, name: str) -> Any:
        """What the pickle may call."""
        try:
            return self._ALLOWED[module, name]
        except KeyError:
            raise CifarError(
                f"a batch needs numpy arrays alone, got {module}.{name}, which was not executed; do not trust this file"
            ) from None
