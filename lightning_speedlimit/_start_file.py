"""θ_0 on disk: once, in a file beside the record, found again by its fingerprint."""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def fingerprint(start: list[Tensor]) -> str:
    """sha256 over the bytes of all tensors, 32 hexadecimal digits."""
    digest = hashlib.sha256()
    for tensor in start:
        digest.update(str((tensor.dtype, tuple(tensor.shape))).encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def write(folder: Path, start: list[Tensor]) -> dict[str, Any]:
    """Write θ_0 atomically; returns what a checkpoint has to keep to find it again.

    Raises:
        OSError: the folder cannot be written.
    """
    name = f"start-{fingerprint(start)}.pt"
    path = folder / name
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.tmp")
        try:
            with open(part, "wb") as file:
                torch.save(start, file)
            os.replace(part, path)
        except RuntimeError as error:  # torch's word for a disk that is full
            raise OSError(str(error)) from error
        finally:
            part.unlink(missing_ok=True)
    return {"file": name, "folder": str(folder.absolute())}


def read(entry: Any, folders: list[Path]) -> list[Tensor] | None:
    """θ_0 from the checkpoint itself, or from its file where one of the folders holds it whole; else None."""
    if isinstance(entry, list):
        return entry
    if not isinstance(entry, dict):
        return None
    for folder in [Path(entry["folder"]), *folders]:
        path = folder / Path(entry["file"]).name
        if path.is_file():
            with contextlib.suppress(Exception):  # torch.load raises whatever a damaged file makes it raise
                start: list[Tensor] = torch.load(path, weights_only=True, map_location="cpu")
                if f"start-{fingerprint(start)}.pt" == path.name:
                    return start
    return None
