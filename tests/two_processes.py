"""Work that two processes do together, and what each of them found."""

import multiprocessing
from collections.abc import Callable
from typing import Any

from torch.multiprocessing.spawn import start_processes

# Imported once, in the process that the others are forked from: that takes longer than what most of them do.
multiprocessing.set_forkserver_preload(
    ["pytorch_lightning", "lightning_speedlimit.callback", "lightning_speedlimit.transport"]
)


def in_two_processes(work: Callable[..., None], *given: Any) -> None:
    """Calls work(rank, *given) in each; it is found by its name, so it stands in a module that imports little.

    Raises:
        ProcessRaisedException: one of them failed.
    """
    start_processes(work, args=given, nprocs=2, start_method="forkserver")  # type: ignore[no-untyped-call]
