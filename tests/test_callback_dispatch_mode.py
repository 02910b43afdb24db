"""A training that is watched by a TorchDispatchMode: foreach operations then leave a tensor's version as it was."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from callback_cases import EXACT, Regressor, batches, last_row, loader, plain, quiet, trainer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


MODES = {"none": nullcontext, "a mode of one's own": Watching, "flops": lambda: FlopCounterMode(display=False)}
CLIP = 0.3  # the gradients' norms begin at 4


def test_clipping_leaves_no_mark_under_a_mode() -> None:
    """Why versions are not asked there. Where this fails torch has learnt it, and they may be asked."""
    gradient = torch.ones(3)
    with torch.no_grad(), Watching():
        torch._foreach_mul_([gradient], torch.tensor(0.5))
    assert gradient.tolist() == [0.5, 0.5, 0.5]
    assert gradient._version == 0


@pytest.mark.mode("FlopCounterMode, or another TorchDispatchMode, around the training", "measured")
@pytest.mark.parametrize("options", [{}, {"gradient_clip_val": CLIP}, {"accumulate_grad_batches": 2}], ids=str)
@pytest.mark.parametrize("name", MODES)
def test_a_training_under_a_mode(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    model, callback = Regressor(), quiet()
    mode: AbstractContextManager[Any] = MODES[name]()
    with mode:
        trainer(tmp_path, callback, **options).fit(model, loader(batches(8)))
    got, wanted = last_row(callback), plain(model.tape.steps, model.tape.losses)
    unequal = {"loss_drop", "entropy_production", "conversion", "efficiency"} if len(model.tape.steps) < 8 else set()
    for key in wanted.keys() - unequal:  # the tape has a loss of each batch, not of each step
        assert got[key] == pytest.approx(wanted[key], rel=EXACT, nan_ok=True), key
    if "gradient_clip_val" in options:
        assert got["grad_norm_clipped"] == pytest.approx(CLIP, rel=1e-6)  # torch adds 1e-6 to the norm
        assert got["grad_norm"] > 2 * CLIP
