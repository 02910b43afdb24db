"""Two processes of a Trainer: `torchrun trainer_ranks.py FOLDER`."""

import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "trajectory")]

from trainer_cases import model, trained  # noqa: E402

if __name__ == "__main__":
    network = model(dropout=0.0)  # each process would draw its own
    trained(Path(sys.argv[1]), network=network, ddp_backend="gloo", per_device_train_batch_size=2)
    torch.distributed.destroy_process_group()
