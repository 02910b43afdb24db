"""Other libraries, as they are: `make test-ecosystem`. What needs a library that is not installed is skipped."""

import importlib.util
import sys
from pathlib import Path

import torch

# The plain copies that the meter's own tests hold it to.
sys.path.insert(0, str(Path(__file__).parents[1] / "trajectory"))

# timm imports torchvision, whose own operators do not load where it was built for GPUs and torch for CPUs: its import
# ends at the first that it looks up. Nothing here calls them, and it is enough that they are known by name.
if importlib.util.find_spec("torchvision") is not None:
    for operator in ("torchvision::nms", "torchvision::qnms"):
        torch.library.define(operator, "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
