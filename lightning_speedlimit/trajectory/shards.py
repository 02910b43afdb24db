"""Parameters of which each process holds a part: DTensors (FSDP2, tensor parallel) and FSDP's flat parameters.

Squares and products of a shard's coordinates are summed where they are; over the processes they add up to the
whole, with each divided by the number of processes that hold the same shard.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def is_distributed(tensor: Tensor) -> bool:
    """A DTensor."""
    return hasattr(type(tensor), "to_local")


def is_flat(tensor: Tensor) -> bool:
    """A parameter of FullyShardedDataParallel: a 1-D shard, possibly of no element."""
    return bool(getattr(tensor, "_fsdp_flattened", False))


def local(tensor: Tensor) -> Tensor:
    """The part that this process holds: no copy, and no autograd."""
    if not is_distributed(tensor):
        return tensor
    with torch.no_grad():
        found: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return found


def gradient_of(parameter: Tensor) -> Tensor | None:
    """Its gradient; a flat shard of no element, which FSDP gives none, is its own.

    Raises:
        NotImplementedError: the gradient is laid out otherwise than the parameter: what each process holds are
            summands, and their squares do not add.
    """
    found = parameter.grad
    if found is None:
        return parameter if is_flat(parameter) and parameter.numel() == 0 else None
    if is_distributed(found) and found.placements != parameter.placements:  # type: ignore[attr-defined]
        raise NotImplementedError(
            f"a gradient is laid out as {found.placements} and its parameter as "  # type: ignore[attr-defined]
            f"{parameter.placements}; wanted the same layout: redistribute it before the step"  # type: ignore[attr-defined]
        )
    return found


def replication(parameter: Tensor, processes: int) -> int:
    """How many of the processes hold the same shard: all of them, where it is not sharded."""
    if is_flat(parameter):
        return 1
    if not is_distributed(parameter):
        return processes
    mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
    copies = 1
    for size, placement in zip(mesh.shape, placements, strict=True):
        copies *= int(size) if placement.is_replicate() else 1
    return copies


def first_coordinate(parameter: Tensor) -> int | None:
    """Where in the whole parameter this process's coordinates begin, if they lie there in one piece; else None."""
    if is_flat(parameter):
        return None
    if not is_distributed(parameter):
        return 0
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
    if any(type(p).__name__ not in ("Replicate", "Shard") for p in placements):
        return None
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, mesh, placements)
    part = local(parameter)
    if tuple(shape[1:]) != tuple(parameter.shape[1:]) or tuple(part.shape) != tuple(shape):
        return None
    if not (part.is_contiguous() or part.is_contiguous(memory_format=torch.channels_last)):
        return None
    row = part.shape[1:].numel() * (2 if part.is_complex() else 1)
    return int(offset[0]) * row if len(offset) else 0


def group_of(parameters: list[Tensor], given: Any | None) -> Any | None:
    """The processes over which shards add: the given group, else that of the parameters' mesh.

    Raises:
        ValueError: shards whose processes are unknown, or not those of the given group.
    """
    meshes = [p.device_mesh for p in parameters if is_distributed(p)]  # type: ignore[attr-defined]
    if given is None and not meshes:
        if any(map(is_flat, parameters)):
            raise ValueError(
                "process_group got None with parameters that FullyShardedDataParallel has flattened, which do not "
                "tell their processes: pass process_group=model.process_group"
            )
        return None
    if given is None:
        mesh = max(meshes, key=lambda m: m.size())
        given = mesh.get_group() if mesh.ndim == 1 else dist.group.WORLD
    wanted = dist.get_world_size(given) if isinstance(given, dist.ProcessGroup) else None
    for mesh in meshes:
        if wanted is not None and mesh.size() != wanted:
            raise ValueError(
                f"optimizers got parameters on a mesh of {mesh.size()} processes, wanted {wanted}, as many as "
                "process_group has: measure each mesh with a meter of its own, over the group of its processes"
            )
    return given


def are_sharded(parameters: list[Tensor]) -> bool:
    return any(is_distributed(p) or is_flat(p) for p in parameters)
