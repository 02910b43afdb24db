"""Trainings in processes of their own that a signal ends: `python ended_trainings.py folder SIGNAL…`.

Each child is forked from one process that has imported everything and computed nothing. It writes its record at
every step, and gets its signal at a random moment after the first record; it is waited for. Folder n is that of the
n-th signal; where the child lived on for a while, `said.json` tells the steps that it had completed and how it ended.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

from callback_cases import Regressor, batches, loader, quiet, trainer

from lightning_speedlimit.record import keeper

MAX_STEPS = 2000


def fit(folder: Path, model: Regressor, **options: Any) -> Any:
    """One training; it never comes to its end within the moment that it is given."""
    callback = quiet()
    settings = {"max_steps": MAX_STEPS, "max_epochs": -1, **options}
    trainer(folder, callback, **settings).fit(model, loader(batches(50)))
    return callback


def _child(folder: Path) -> None:
    keeper.WRITE_EVERY = 0.0
    # Whom a shell started in the background ignores Ctrl-C, and so do its children.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    model, how = Regressor(), "to its end"
    try:
        fit(folder, model)
    except BaseException as error:
        how = type(error).__name__
    finally:
        (folder / "said.json").write_text(json.dumps({"steps": len(model.tape.steps), "ended": how}))
        os._exit(0)


def _wait_for(path: Path, process: int) -> None:
    for _ in range(6000):
        if path.exists():
            return
        time.sleep(0.01)
    os.kill(process, signal.SIGKILL)
    raise TimeoutError(f"no {path} after a minute")


def main(folder: Path, signals: list[str]) -> None:
    moments = random.Random(0)
    for number, name in enumerate(signals):
        place = folder / str(number)
        place.mkdir()
        process = os.fork()
        if process == 0:
            _child(place)
        _wait_for(place / "speed_limit" / "record.json", process)
        time.sleep(moments.uniform(0.0, 0.4))
        os.kill(process, signal.Signals[name])
        os.waitpid(process, 0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
