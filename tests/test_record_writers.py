"""Several who write in one folder, and what lies there already: links, modes, locks."""

import errno
import fcntl
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lightning_speedlimit import RunRecord
from lightning_speedlimit.record import SKETCH_SIZE, RecordError, lock, writing


def record_of(writer: int, rows: int) -> RunRecord:
    """Tells who wrote it, and how often before."""
    record = RunRecord({"writer": writer})
    for step in range(1, rows + 1):
        record.append(step, {"loss": 1000.0 * writer + step})
        record.add_sketch(step, np.full(SKETCH_SIZE, writer, dtype=np.float32))
    return record


def data_file(folder: Path) -> Path:
    (found,) = folder.glob("data-*.npz")
    return found


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# --- at once


def test_threads_that_save_into_one_folder(tmp_path: Path) -> None:
    """Each write is whole: what is read at any time is one writer's, and none of them fails."""
    failures: list[BaseException] = []
    begun = threading.Barrier(5)

    def write(writer: int) -> None:
        begun.wait()
        try:
            for rows in range(1, 16):
                record_of(writer, rows).save(tmp_path)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(writer,)) for writer in range(4)]
    for thread in threads:
        thread.start()
    record_of(9, 1).save(tmp_path)
    begun.wait()
    while any(thread.is_alive() for thread in threads):
        found = patient(lambda: RunRecord.load(tmp_path))
        assert found.columns["loss"].tolist() == [1000.0 * found.run["writer"] + n for n in range(1, len(found) + 1)]
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(RunRecord.load(tmp_path)) == 15
    assert names(tmp_path) == {"record.json", data_file(tmp_path).name}


def patient(load: Callable[[], RunRecord]) -> RunRecord:
    """A reader that meets three writes in a row says so, and may try again."""
    for _ in range(50):
        try:
            return load()
        except RecordError as error:
            if "rewritten faster" not in str(error):
                raise
    raise AssertionError("no record could be read")


def between(monkeypatch: pytest.MonkeyPatch, name: str, act: Callable[[], None]) -> None:
    """`act` comes, once, right before the write's step of this name."""
    real = getattr(writing, name)
    left = [act]

    def then(*args: object, **kwargs: object) -> object:
        if left:
            left.pop()()
        return real(*args, **kwargs)

    monkeypatch.setattr(writing, name, then)


@pytest.mark.parametrize("step", ["_write_arrays", "replace_file", "_flush_folder", "_unlink"])
def test_where_there_are_no_locks_another_write_may_come_between_any_two_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """What record.json names is there all the same, even if both write the same numbers."""
    monkeypatch.setattr(lock, "fcntl", None)
    record_of(1, 1).save(tmp_path)
    between(monkeypatch, step, lambda: record_of(2, 2).save(tmp_path))
    record_of(2, 2).save(tmp_path)
    assert len(RunRecord.load(tmp_path)) == 2
    monkeypatch.undo()
    record_of(2, 3).save(tmp_path)
    assert names(tmp_path) == {"record.json", data_file(tmp_path).name}  # what was left over is gone


def test_one_writer_waits_for_the_other(tmp_path: Path) -> None:
    record_of(1, 1).save(tmp_path)
    held = lock.take(tmp_path / writing.LOCK_NAME)
    assert held is not None
    thread = threading.Thread(target=lambda: record_of(2, 2).save(tmp_path))
    thread.start()
    assert len(RunRecord.load(tmp_path)) == 1  # reading waits for nobody
    held.release()
    thread.join()
    assert len(RunRecord.load(tmp_path)) == 2


def test_one_that_never_ends_is_not_waited_for_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record_of(1, 1).save(tmp_path)
    monkeypatch.setattr(lock, "PATIENCE", 0.02)
    with lock.alone(tmp_path / writing.LOCK_NAME) as locked:
        assert locked
        with pytest.raises(OSError, match=r"written by somebody else for 0.02 s: end what holds \.writing\.lock"):
            record_of(2, 2).save(tmp_path)
    assert len(RunRecord.load(tmp_path)) == 1
    record_of(2, 2).save(tmp_path)


def test_ctrl_c_right_after_the_new_record_took_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is cleared then are not the data that record.json names."""
    record_of(1, 1).save(tmp_path)
    real = os.replace

    def interrupted(*args: object) -> None:
        real(*args)  # type: ignore[call-overload]
        raise KeyboardInterrupt

    with monkeypatch.context() as inner:
        inner.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            record_of(1, 2).save(tmp_path)
    assert len(RunRecord.load(tmp_path)) == 2


# --- locks


def test_a_lock_is_there_while_it_is_held(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    held = lock.take(path)
    assert held is not None
    with pytest.raises(BlockingIOError):
        lock.take(path)
    held.release()
    held.release()
    assert names(tmp_path) == set()
    again = lock.take(path)
    assert again is not None
    del again  # forgotten without a release: free as well
    last = lock.take(path)
    assert last is not None
    last.release()


def test_a_lock_file_that_goes_while_it_is_opened_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else two would hold a lock, one on a file that nobody can find."""
    path, real, left = tmp_path / "lock", os.open, [True]

    def opened(*args: object, **options: object) -> int:
        descriptor = real(*args, **options)  # type: ignore[arg-type]
        if left and args[0] == path:
            left.pop()
            path.unlink()
        return descriptor

    monkeypatch.setattr(os, "open", opened)
    held = lock.take(path)
    assert held is not None
    assert path.exists()
    with pytest.raises(BlockingIOError):
        lock.take(path)


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    assert lock.take(tmp_path / "lock") is None
    record_of(1, 1).save(tmp_path)
    record_of(1, 2).save(tmp_path)
    assert len(RunRecord.load(tmp_path)) == 2
    assert len(list(tmp_path.glob("data-*"))) == 1


def test_a_file_system_on_which_no_file_is_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "_is_at", lambda path, descriptor: False)
    record_of(1, 1).save(tmp_path)
    record_of(1, 2).save(tmp_path)
    assert len(RunRecord.load(tmp_path)) == 2
    assert len(list(tmp_path.glob("data-*"))) == 1


HOLDER = """
import os, sys, time
from pathlib import Path
from lightning_speedlimit.record import lock
held = lock.take(Path(sys.argv[1]))
if os.fork() == 0:  # as a worker of a DataLoader, which lives on for a while
    print("held", flush=True)
    sys.stdin.read()
    os._exit(0)
time.sleep(600)
"""


def test_a_killed_process_holds_no_lock_though_its_workers_live(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    command = [sys.executable, "-c", HOLDER, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(BlockingIOError):
            lock.take(path)
        process.kill()
        process.wait()
        held = lock.take(path)
        assert held is not None
        held.release()


def test_a_forked_child_frees_nothing(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    held = lock.take(path)
    assert held is not None
    child = os.fork()
    if child == 0:
        held.release()
        os._exit(0)
    os.waitpid(child, 0)
    with pytest.raises(BlockingIOError):
        lock.take(path)
    held.release()


# --- links that somebody planted


def test_links_are_not_followed(tmp_path: Path) -> None:
    """Wherever a name could be guessed: record.json, the lock, a temporary name of earlier versions."""
    outside = tmp_path / "outside"
    outside.write_text("of the user")
    folder = tmp_path / "record"
    folder.mkdir()
    for name in (
        "record.json",
        ".writing.lock",
        f".writing-{os.getpid()}-data.tmp",
        f".writing-{os.getpid()}-json.tmp",
    ):
        (folder / name).symlink_to(outside)
    record_of(1, 1).save(folder)
    record_of(1, 2).save(folder)
    assert outside.read_text() == "of the user"
    assert len(RunRecord.load(folder)) == 2
    assert not (folder / "record.json").is_symlink()


def test_a_link_to_nowhere_makes_no_file(tmp_path: Path) -> None:
    folder = tmp_path / "record"
    folder.mkdir()
    for name in (".writing.lock", "record.json"):
        (folder / name).symlink_to(tmp_path / "made")
    record_of(1, 1).save(folder)
    assert not (tmp_path / "made").exists()
    assert len(RunRecord.load(folder)) == 1


def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(tmp_path: Path) -> None:
    for name in ("record.json", ".writing.lock"):
        os.mkfifo(tmp_path / name)
    record_of(1, 1).save(tmp_path)
    assert len(RunRecord.load(tmp_path)) == 1


def test_temporary_names_are_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a file that is there already, whose it be, nothing is overwritten."""
    monkeypatch.setattr(writing.secrets, "token_hex", lambda size: "0" * 2 * size)
    (tmp_path / f".writing-{'0' * 32}.tmp").write_text("of another")
    with pytest.raises(FileExistsError):
        record_of(1, 1).save(tmp_path)
    assert (tmp_path / f".writing-{'0' * 32}.tmp").read_text() == "of another"


# --- modes


@pytest.mark.parametrize(("json_mode", "data_mode"), [(0o600, 0o600), (0o664, 0o640), (0o444, 0o400)])
def test_modes_that_the_user_set_are_kept(tmp_path: Path, json_mode: int, data_mode: int) -> None:
    record_of(1, 1).save(tmp_path)
    (tmp_path / "record.json").chmod(json_mode)
    data_file(tmp_path).chmod(data_mode)
    for rows in (2, 3):
        record_of(1, rows).save(tmp_path)
        assert (mode(tmp_path / "record.json"), mode(data_file(tmp_path))) == (json_mode, data_mode)
    assert len(RunRecord.load(tmp_path)) == 3


def test_a_private_file_is_never_open_to_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for the moment between its making and its mode."""
    record_of(1, 1).save(tmp_path)
    for path in tmp_path.iterdir():
        path.chmod(0o600)
    made: list[int] = []
    real = os.fchmod

    def watched(descriptor: int, wanted: int) -> None:
        made.append(stat.S_IMODE(os.fstat(descriptor).st_mode))
        real(descriptor, wanted)

    monkeypatch.setattr(os, "fchmod", watched)
    record_of(1, 2).save(tmp_path)
    assert made
    assert not any(found & 0o077 for found in made)


def test_new_files_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        record_of(1, 1).save(tmp_path)
        record_of(1, 2).save(tmp_path)
    finally:
        os.umask(before)
    assert {mode(path) for path in tmp_path.iterdir()} == {0o640}


def test_the_mode_of_a_file_of_somebody_else_widens_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file open to all that another user planted: the umask still holds."""
    record_of(1, 1).save(tmp_path)
    (tmp_path / "record.json").chmod(0o666)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    before = os.umask(0o077)
    try:
        record_of(1, 2).save(tmp_path)
    finally:
        os.umask(before)
    assert mode(tmp_path / "record.json") == 0o600


# --- what could not be read is not written


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ({"notes": "x" * 2_000_000}, "record.json would have 2000.* bytes, wanted at most 1048576"),
        ({"rates": [0.5] * 150_000}, "wanted at most 1048576"),
    ],
    ids=["a text", "a list"],
)
def test_a_run_that_is_too_large_is_not_written(tmp_path: Path, run: dict[str, object], message: str) -> None:
    record_of(1, 1).save(tmp_path)
    with pytest.raises(RecordError, match=message):
        RunRecord(run).save(tmp_path)
    assert len(RunRecord.load(tmp_path)) == 1
    assert names(tmp_path) == {"record.json", data_file(tmp_path).name}


def test_a_run_that_was_changed_to_what_load_refuses_is_not_written(tmp_path: Path) -> None:
    record = record_of(1, 1)
    record.save(tmp_path)
    record.run["parameters"] = "many"
    with pytest.raises(RecordError, match="parameters must be an integer"):
        record.save(tmp_path)
    record.run["parameters"], record.run["own"] = 5, object()
    with pytest.raises(TypeError, match="must be JSON-able"):
        record.save(tmp_path)
    assert len(RunRecord.load(tmp_path)) == 1
    assert names(tmp_path) == {"record.json", data_file(tmp_path).name}


def test_what_is_large_within_the_limits_is_read(tmp_path: Path) -> None:
    run = {"seed": 2**64 - 1, "notes": "x" * 500_000, "deep": [[[[[["x"]]]]]]}
    RunRecord(run).save(tmp_path)
    assert RunRecord.load(tmp_path).run == run
