"""The command `speedlimit`, as a user runs it: in a process of its own where that makes a difference (pipes, terminals,
signals, missing libraries), and else within that of the tests, for torch is slow to import.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from damaged_records import whole_record
from in_this_process import run_here

from lightning_speedlimit.cli import main
from lightning_speedlimit.record import RunRecord

ROOT = Path(__file__).parents[1]
COMMAND = [sys.executable, "-m", "lightning_speedlimit"]
ESCAPE = "\x1b"

# The steps at which the runs below have rows.
STEPS = np.arange(5, 205, 5)


def environment(**changes: str) -> dict[str, str]:
    # What a developer's shell or a CI sets may force colours, say how wide a terminal is, or leave out the buffers.
    others = {"FORCE_COLOR", "NO_COLOR", "COLUMNS", "TERM", "PYTHONUNBUFFERED"}
    kept = {k: v for k, v in os.environ.items() if k not in others}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return kept | {"PYTHONPATH": path, "PYTHONIOENCODING": "utf-8", "TERM": "xterm-256color"} | changes


def alone(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A process of its own."""
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], cwd=cwd, env=environment(), capture_output=True, encoding="utf-8", timeout=120
    )


def speedlimit(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return run_here(main, ["speedlimit", *map(str, arguments)], cwd, environment())


def printed(*arguments: str | Path, cwd: Path) -> str:
    done = speedlimit(*arguments, cwd=cwd)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def complaint(*arguments: str | Path, cwd: Path) -> str:
    """What it says on stderr: one line, no traceback; nothing on stdout."""
    done = speedlimit(*arguments, cwd=cwd)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("speedlimit: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


def make_run(
    folder: Path, *, rate: float, action: float, parameters: int = 1000, optimizer: str = "SGD", **run: Any
) -> RunRecord:
    """A run whose loss falls as e^(−rate·k), on a straight path at a constant speed: all its numbers are known."""
    record = RunRecord(
        {
            "clock": "steps",
            "entropy_production": "loss_drop",
            "model": "MLP",
            "parameters": parameters,
            "optimizers": [{"class": optimizer, "groups": [{"lr": 0.1}]}],
            "batch_size": 32,
            **run,
        }
    )
    drift = np.random.default_rng(0).standard_normal(4093).astype(np.float32)
    for step in STEPS.tolist():
        loss = 2.0 * math.exp(-rate * step)
        speed = math.sqrt(action)  # action is per step: A = k·speed²
        drop = 2.0 - loss
        record.append(
            step,
            {
                "loss": loss,
                "loss_se": 0.0,
                "loss_drop": drop,
                "loss_drop_se": 0.0,
                "entropy_production": drop,
                "elapsed": step,
                "samples": 32.0 * step,
                "displacement": speed * step,
                "path_length": speed * step,
                "action": action * step,
                "work_ito": 1.25 * drop,
                "work_anti_ito": drop,
                "work_stratonovich": 1.125 * drop,
                "work_action": 1.25 * drop,
                "efficiency": 0.5,
                "efficiency_action": 0.4,
                "straightness": 1.0,
                "steadiness": 1.0,
                "kinematic_efficiency": 1.0,
                "conversion": 0.8,
                "signal_fraction": 0.8,
                "seconds": 0.01 * step,
            },
        )
        record.add_sketch(step, drift * speed * step / np.linalg.norm(drift))
    record.save(folder)
    return record


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the help's examples are true."""
    home = tmp_path_factory.mktemp("home")
    make_run(home / "runs" / "sgd" / "seed_0", rate=0.010, action=0.01)
    make_run(home / "runs" / "sgd" / "seed_1", rate=0.011, action=0.012)
    make_run(home / "runs" / "adamw" / "seed_0", rate=0.020, action=0.05, optimizer="AdamW", ended="finished")
    make_run(home / "models" / "large", rate=0.020, action=0.07, parameters=5000)
    make_run(home / "models" / "larger", rate=0.015, action=0.06, parameters=5000)
    return home


# --- what the user can fix


def test_a_path_that_is_not_there(home: Path) -> None:
    assert "no such folder: nowhere" in complaint("compare", "nowhere", cwd=home)
    done = alone("compare", "nowhere", cwd=home)  # the same of a process
    assert (done.returncode, done.stdout, done.stderr) == (2, "", complaint("compare", "nowhere", cwd=home))


def test_a_file_in_place_of_a_folder(home: Path) -> None:
    path = Path("runs/sgd/seed_0/record.json")
    assert f"{path} is a file, wanted a folder" in complaint("show", path, cwd=home)


def test_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    text = complaint("compare", "empty", cwd=tmp_path)
    assert "empty holds no record" in text
    assert "pass the folder that SpeedLimit wrote" in text


def test_a_truncated_record(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "runs" / "sgd", tmp_path / "sgd")
    (data,) = (tmp_path / "sgd" / "seed_1").glob("data-*.npz")
    data.write_bytes(data.read_bytes()[:-100])
    assert "seed_1: data-" in complaint("show", "sgd/seed_1", cwd=tmp_path)
    shown = speedlimit("show", "sgd", cwd=tmp_path)
    assert shown.returncode == 0
    assert "1 run." in shown.stdout, "the other is whole"
    assert shown.stderr.startswith("left out: sgd/seed_1: data-")
    assert "left out: sgd/seed_1: data-" in printed("compare", "sgd", cwd=tmp_path).replace("\n  ", " ")


def test_no_name_of_a_folder_steers_the_terminal(tmp_path: Path) -> None:
    assert ESCAPE not in complaint("show", f"{ESCAPE}]0;title\x07{ESCAPE}[31m", cwd=tmp_path)
    make_run(tmp_path / f"a{ESCAPE}[31m", rate=0.01, action=0.01)
    for command in (["show", "."], ["compare", "."], ["compare", "--group", f"{ESCAPE}c=."]):
        assert ESCAPE not in printed(*command, cwd=tmp_path)


def test_a_record_of_a_newer_version(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "runs" / "sgd" / "seed_0", tmp_path / "new")
    path = tmp_path / "new" / "record.json"
    document = json.loads(path.read_text("ascii"))
    path.write_text(json.dumps(document | {"format_version": 99}), "ascii")
    text = complaint("show", "new", cwd=tmp_path)
    assert "99" in text
    assert re.search("upgrade|update|newer", text)


def test_mixed_models_are_sent_to_split(home: Path) -> None:
    text = complaint("compare", "runs", "models", cwd=home)
    assert "1,000 parameters" in text
    assert "5,000 parameters" in text
    assert "--split" in text


@pytest.mark.parametrize(
    ("page", "cure"),
    [("nowhere/report.html", "there is no folder nowhere"), ("runs", "it is a folder"), ("r" * 300, "name a place")],
)
def test_a_page_that_can_not_be_written(home: Path, page: str, cure: str) -> None:
    text = complaint("compare", "runs", "--html", page, cwd=home)  # before any work
    assert text.startswith(f"speedlimit: can't write {page}: ")
    assert cure in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "got neither"),
        (["runs", "--group", "a=runs/sgd"], "got both"),
        (["--group", "runs/sgd"], "--group wants NAME=PATH, got 'runs/sgd'"),
        (["runs", "--by", "step", "--at", "-3"], "at must be a step that runs can reach, got -3"),
    ],
)
def test_arguments_that_do_not_fit(home: Path, arguments: list[str], said: str) -> None:
    assert said in complaint("compare", *arguments, cwd=home)


def test_an_unknown_word_gets_the_usage_and_where_help_is(home: Path) -> None:
    for arguments in (["compare", "runs", "--by", "epoch"], ["compre", "runs"]):
        done = speedlimit(*arguments, cwd=home)
        assert (done.returncode, done.stdout) == (2, "")
        assert "Usage: speedlimit" in done.stderr
        assert re.search(r"Try 'speedlimit( compare)? (-h|--help)' for help\.", done.stderr)


def test_a_library_that_is_missing_is_named_with_the_cure(home: Path, tmp_path: Path) -> None:
    # A module that says it is missing, found before the real one.
    (tmp_path / "typer.py").write_text("raise ModuleNotFoundError('No module named typer', name='typer')")
    done = subprocess.run(
        [*COMMAND, "--version"],
        cwd=home,
        env=environment(PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT)])),
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 2
    assert done.stderr == (
        "speedlimit: needs typer, which is not installed; pip install 'lightning-speedlimit[report]'\n"
    )


# --- comparing


def crossing(record: RunRecord, level: float) -> float:
    """The step at which the loss comes down to the level, linear between rows; from the columns alone."""
    steps = np.concatenate([[0], record.columns["step"]])
    losses = np.concatenate([[record.columns["loss"][-1] + record.columns["loss_drop"][-1]], record.columns["loss"]])
    return float(np.interp(-level, -losses, steps))


def loaded(home: Path) -> dict[str, RunRecord]:
    return {name: RunRecord.load(home / "runs" / name) for name in ("sgd/seed_0", "sgd/seed_1", "adamw/seed_0")}


def by_name(comparison: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {group["name"]: group for group in comparison["groups"]}


def test_json_at_the_same_loss_equals_what_the_columns_say(home: Path) -> None:
    found = json.loads(printed("compare", "runs", "--json", cwd=home))
    runs = loaded(home)
    level = max(record.columns["loss"].min() for record in runs.values())  # their errors are 0
    assert found["by"] == "loss"
    assert found["at"] == pytest.approx(level, rel=1e-12)
    wanted = {"sgd": ["sgd/seed_0", "sgd/seed_1"], "adamw": ["adamw/seed_0"]}
    assert by_name(found).keys() == wanted.keys()
    for name, group in by_name(found).items():
        steps = np.array([crossing(runs[run], level) for run in wanted[name]])
        actions = [
            float(np.interp(step, [0, *runs[run].columns["step"]], [0, *runs[run].columns["action"]]))
            for step, run in zip(steps, wanted[name], strict=True)
        ]
        assert group["values"]["elapsed"] == pytest.approx(steps.mean(), rel=1e-9)
        assert group["values"]["action"] == pytest.approx(np.mean(actions), rel=1e-9)
        assert group["values"]["kinematic_efficiency"] == pytest.approx(1.0, rel=1e-9)  # straight, and steady
        if len(steps) > 1:
            error = steps.std(ddof=1) / math.sqrt(len(steps))
            assert group["standard_errors"]["elapsed"] == pytest.approx(error, rel=1e-9)
    assert found["verdict"]


def test_json_at_the_same_step_and_time(home: Path) -> None:
    runs = loaded(home)
    at_step = by_name(json.loads(printed("compare", "runs", "--by", "step", "--at", "42", "--json", cwd=home)))
    losses = {
        name: float(np.interp(42, record.columns["step"], record.columns["loss"])) for name, record in runs.items()
    }
    assert at_step["adamw"]["values"]["loss"] == pytest.approx(losses["adamw/seed_0"], rel=1e-9)
    mean = (losses["sgd/seed_0"] + losses["sgd/seed_1"]) / 2
    assert at_step["sgd"]["values"]["loss"] == pytest.approx(mean, rel=1e-9)
    # A step takes 0.01 s in all of them.
    at_time = by_name(json.loads(printed("compare", "runs", "--by", "time", "--at", "0.42", "--json", cwd=home)))
    assert at_time["adamw"]["values"]["loss"] == pytest.approx(losses["adamw/seed_0"], rel=1e-9)


def test_split_compares_each_model_by_itself(home: Path) -> None:
    found = json.loads(printed("compare", "runs", "models", "--split", "--json", cwd=home))
    assert [sorted(by_name(comparison)) for comparison in found] == [
        ["runs/adamw", "runs/sgd"],
        ["models/large", "models/larger"],
    ]
    text = printed("compare", "runs", "models", "--split", cwd=home)
    assert text.index("MLP, 1,000 parameters") < text.index("MLP, 5,000 parameters")


def test_groups_with_names_of_their_own(home: Path) -> None:
    groups = ["--group", "plain=runs/sgd/seed_0", "--group", "plain=runs/sgd/seed_1", "--group", "a=b=runs/adamw"]
    text = complaint("compare", *groups, cwd=home)
    assert "no such folder: b=runs/adamw" in text, "the first = ends the name"
    groups[-1] = "adaptive=runs/adamw"
    found = by_name(json.loads(printed("compare", *groups, "--json", cwd=home)))
    assert {name: len(group["runs"]) for name, group in found.items()} == {"plain": 2, "adaptive": 1}


def test_a_pipe_gets_the_plain_table(home: Path) -> None:
    from lightning_speedlimit import compare

    done = alone("compare", home / "runs", cwd=home)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == printed("compare", home / "runs", cwd=home) == compare(home / "runs").table() + "\n"
    assert ESCAPE not in done.stdout


def test_a_page_is_written_and_its_place_said_aside(home: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    done = speedlimit("compare", "runs/adamw", "--json", "--html", page, cwd=home)
    assert done.returncode == 0
    assert json.loads(done.stdout)["by"] == "loss", "nothing else on stdout"
    assert done.stderr == f"The page is {page.as_uri()}\n"
    text = page.read_text("utf-8")
    assert "AdamW" in text
    assert f"speedlimit compare runs/adamw --json --html {page}" in text


# --- terminals


def on_terminal(*arguments: str, cwd: Path, columns: int = 80, **changes: str) -> str:
    """What a terminal of this width gets."""
    pty = pytest.importorskip("pty", reason="this system has no pseudo-terminals")
    import fcntl
    import struct
    import termios

    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    process = subprocess.Popen(
        [*COMMAND, *arguments], cwd=cwd, env=environment(**changes), stdin=slave, stdout=slave, stderr=slave
    )
    os.close(slave)
    parts = []
    while True:
        try:
            part = os.read(master, 65536)
        except OSError:  # Linux says so when the other end is closed
            break
        if not part:
            break
        parts.append(part)
    os.close(master)
    assert process.wait(timeout=60) == 0
    return b"".join(parts).decode("utf-8").replace("\r\n", "\n")


def without_escapes(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


@pytest.mark.parametrize("columns", [80, 200])
def test_a_terminal_gets_tables_that_fit(home: Path, columns: int) -> None:
    raw = on_terminal("compare", "runs", cwd=home, columns=columns)
    text = without_escapes(raw)
    assert raw != text, "headings in bold"
    assert ESCAPE not in text
    assert max(map(len, text.splitlines())) <= columns
    heads = [line for line in text.splitlines() if line.startswith("group ")]
    assert (len(heads) > 1) == (columns == 80)  # 13 + 9 columns of 10 characters: not in 80
    assert " ".join(heads).split().count("group") == len(heads)
    for heading in ("steps", "seconds", "loss", "action", "efficiency", "kinematic", "conversion"):
        assert sum(heading in head.split() for head in heads) == 1
    assert "\n* beaten by none in both steps and action\n" in text
    assert re.search(r"^adamw \*", text, re.MULTILINE)


def test_a_terminal_without_colour_gets_no_colour(home: Path) -> None:
    raw = on_terminal("show", "runs/sgd/seed_0", cwd=home, NO_COLOR="1")
    colours = [int(code) for codes in re.findall(r"\x1b\[([0-9;]*)m", raw) for code in filter(None, codes.split(";"))]
    assert all(code < 30 for code in colours), "30 and above are colours; bold is 1"
    assert max(map(len, without_escapes(raw).splitlines())) <= 80


def test_names_with_brackets_are_left_as_they_are(home: Path, tmp_path: Path) -> None:
    for name in ("[red]a[/red]", "[bold]:smile:"):
        shutil.copytree(home / "runs" / "sgd" / "seed_0", tmp_path / "runs" / name.replace("/", "|"))
    text = without_escapes(on_terminal("compare", "runs", cwd=tmp_path, columns=200))
    rows = [line for line in text.splitlines() if line.startswith(("[red]a[|red] ", "[bold]:smile: "))]
    assert len(rows) >= 2, "in the table, not only in the sentences"


@pytest.mark.parametrize("arguments", [["show", "runs", "--json"], ["show", "runs"]])  # more than a buffer, and less
def test_whoever_reads_may_go_away(home: Path, arguments: list[str]) -> None:
    process = subprocess.Popen(
        [*COMMAND, *arguments],
        cwd=home,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=60) == 1
    process.stderr.close()


# --- one run


def test_show_one_run(home: Path) -> None:
    record = RunRecord.load(home / "runs" / "sgd" / "seed_0")
    text = printed("show", "runs/sgd/seed_0", cwd=home)
    assert text.startswith(str(record.summary()) + "\n")
    assert "\nRegimes\n- steps 0 to 200: one, without a clear change\n" in text
    assert "\nWhat cost the most\n- " in text
    found = json.loads(printed("show", "runs/sgd/seed_0", "--json", cwd=home))
    assert found["summary"]["steps"] == 200
    assert found["summary"]["loss"] == pytest.approx(2 * math.exp(-2.0), rel=1e-12)
    assert found["summary"]["grad_norm"] is None, "undefined"
    assert found["run"]["optimizers"][0]["class"] == "SGD"
    assert [regime["last_step"] for regime in found["regimes"]] == [200]
    assert found["findings"][0]["sentence"] in text.replace("\n  ", " ")


def test_show_several_runs(home: Path) -> None:
    text = printed("show", "runs", cwd=home)
    for path in ("runs/adamw/seed_0", "runs/sgd/seed_0", "runs/sgd/seed_1"):
        assert re.search(rf"^{path} +200 ", text, re.MULTILINE)
    assert "3 runs. One of them: speedlimit show runs/adamw/seed_0" in text
    found = json.loads(printed("show", "runs", "--json", cwd=home))
    assert [entry["path"] for entry in found] == ["runs/adamw/seed_0", "runs/sgd/seed_0", "runs/sgd/seed_1"]
    assert all(entry["regimes"] for entry in found)


def test_show_tells_the_names_that_loggers_gave_the_runs(tmp_path: Path) -> None:
    """Beside the path, which is what `show` takes; runs without one, and names that steer a terminal, are there too."""
    named = {"a": "calm-owl", "b": f"{ESCAPE}[31m red\n", "c": "x" * 500, "d": None, "e": ""}
    for folder, name in named.items():
        record = whole_record(steps=40)
        record.run["logger"] = {"class": "WandbLogger"} | ({} if name is None else {"name": name})
        record.save(tmp_path / "runs" / folder)
    del record.run["logger"]
    record.save(tmp_path / "runs" / "f")
    lines = printed("show", "runs", cwd=tmp_path).splitlines()
    shown = [re.split(r"  +", line)[0] for line in lines[2:8]]
    assert shown == [
        "runs/a (calm-owl)",
        r"runs/b (\x1b[31m red)",
        f"runs/c ({'x' * 39}…)",
        *("runs/d", "runs/e", "runs/f"),
    ]
    assert lines[-1] == "6 runs. One of them: speedlimit show runs/a"


# --- help


def test_help_imports_nothing_slow(home: Path) -> None:
    modules = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "lightning_speedlimit", "compare", "--help"],
        cwd=home,
        env=environment(),
        capture_output=True,
        encoding="utf-8",
    )
    imported = {line.rpartition("|")[2].strip() for line in modules.stderr.splitlines()}
    assert "typer" in imported
    assert not imported & {"torch", "numpy", "matplotlib", "pytorch_lightning"}


def test_the_version(home: Path) -> None:
    from lightning_speedlimit import __version__

    assert printed("--version", cwd=home) == f"speedlimit {__version__}\n"


def test_completion_scripts(home: Path) -> None:
    done = subprocess.run(
        COMMAND,
        cwd=home,
        env=environment(_SPEEDLIMIT_COMPLETE="source_bash"),
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0
    assert re.search(r"complete .*-F _speedlimit_completion speedlimit", done.stdout)
    # What that script asks when TAB is pressed after "speedlimit co".
    asked = subprocess.run(
        COMMAND,
        cwd=home,
        env=environment(_SPEEDLIMIT_COMPLETE="complete_bash", COMP_WORDS="speedlimit co", COMP_CWORD="1"),
        capture_output=True,
        encoding="utf-8",
    )
    assert asked.stdout.split() == ["compare"]


def test_the_choices_are_those_of_the_comparison() -> None:
    from lightning_speedlimit.cli.app import By
    from lightning_speedlimit.report import alignment

    assert get_args(By) == get_args(alignment.By)


def run_all(lines: list[str], cwd: Path) -> dict[str, tuple[int, str, str]]:
    """Line → exit code, stdout, stderr."""
    done = {line: speedlimit(*shlex.split(line)[1:], cwd=cwd) for line in lines}
    return {line: (found.returncode, found.stdout, found.stderr) for line, found in done.items()}


COMMANDS = ("demo", "show", "watch", "advise", "compare", "theory gradient-flow", "theory langevin", "theory power-law")
CLOSED_FORMS = {
    "flow": "gradient-flow --eigenvalues 1,0.1 --residual 1,-2 --times 0.1,1,10",
    "still": "langevin --curvature 2 --mean 0 --std 0.5 --temperature 0.5 --times 0.1,1,10",
    "wide": f"langevin --curvature 2,3 --mean=-1,2 --std 0.5,{math.sqrt(0.5 / 3)!r} --temperature 0.5 --times 0.1,1,10",
    "law": "power-law --kernel-exponent 1.5 --residual-exponent 1.5 --modes 3 --times 0.1,1,10",
    "no law": "power-law --kernel-exponent 0.3 --residual-exponent 0.5 --modes 3 --times 0.1,1,10",
}
AS_TEXT = "speedlimit theory power-law --kernel-exponent 1.5 --residual-exponent 0.5 --modes 100 --times 1,10"
BAD = {
    "gradient-flow --eigenvalues 1,x --residual 1,1 --times 1": (
        "--eigenvalues must be numbers with commas between, got '1,x'; as --eigenvalues 0.1,1,10"
    ),
    "gradient-flow --eigenvalues 1,2,3 --residual 1,1 --times 1": "must have one value per mode each",
    "langevin --curvature 1 --mean 1 --std -1 --temperature 1 --times 1": "std must not be negative",
    "power-law --kernel-exponent -1 --residual-exponent 1 --modes 5 --times 1": "kernel_exponent must be above 0",
}


@pytest.fixture(scope="module")
def examples(home: Path) -> list[str]:
    """Of the help of all commands, without the demo and the page, which have tests of their own."""
    lines = []
    for line, (code, text, _) in run_all([f"speedlimit {command} --help" for command in COMMANDS], home).items():
        assert code == 0
        found = re.findall(r"^    (speedlimit .*)$", text, re.MULTILINE)
        assert found, f"{line} shows no example"
        lines += found
    return [line for line in lines if not line.startswith("speedlimit demo") and "--html" not in line]


@pytest.fixture(scope="module")
def answers(home: Path, examples: list[str]) -> dict[str, tuple[int, str, str]]:
    good = [f"speedlimit theory {line} --json" for line in CLOSED_FORMS.values()]
    return run_all([*examples, *good, AS_TEXT, *(f"speedlimit theory {line}" for line in BAD)], home)


def test_the_examples_of_the_help_work(examples: list[str], answers: dict[str, tuple[int, str, str]]) -> None:
    assert len(examples) >= 9
    for line in examples:
        code, out, err = answers[line]
        assert (code, err) == (0, ""), line
        assert out
        if "--json" in line:
            assert not re.search(r"\b(NaN|Infinity)\b", out), line
            json.loads(out)


# --- theory


def test_closed_forms(answers: dict[str, tuple[int, str, str]]) -> None:
    times = np.array([0.1, 1.0, 10.0])
    found = {name: json.loads(answers[f"speedlimit theory {line} --json"][1]) for name, line in CLOSED_FORMS.items()}
    # THEORY §6: W₂² = Σ (1 − e^{−λt})² r²/λ, Q = ½ Σ (1 − e^{−2λt}) r².
    for name, rates, squares in (
        ("flow", np.array([1.0, 0.1]), np.array([1.0, 4.0])),
        ("law", np.arange(1, 4) ** -1.5, np.arange(1, 4) ** -1.5),
    ):
        decay = np.exp(-np.outer(times, rates))
        distance = ((1 - decay) ** 2 * squares / rates).sum(1)
        produced = 0.5 * ((1 - decay**2) * squares).sum(1)
        curve = found[name]
        assert curve["time"] == times.tolist()
        np.testing.assert_allclose(curve["wasserstein2_squared"], distance, rtol=1e-12)  # float64, few terms
        np.testing.assert_allclose(curve["entropy_production"], produced, rtol=1e-12)
        np.testing.assert_allclose(curve["efficiency"], distance / (times * produced), rtol=1e-12)
    assert found["law"]["asymptotic_slope"] == pytest.approx((1 - 1.5) / 1.5)
    assert found["no law"]["asymptotic_slope"] is None, "the number of modes carries both sums"
    # One mode from s_0² = T/h = 0.25 about the minimum: nothing moves, so there is no efficiency.
    assert found["still"]["wasserstein2_squared"] == [0, 0, 0]
    assert found["still"]["efficiency"] == [None, None, None]
    # Displaced, with s_0² = T/h in both modes, the widths stay and the means decay (THEORY §5).
    decay = np.exp(-np.outer(times, [2.0, 3.0]))
    distance = ((1 - decay) ** 2 * [1.0, 4.0]).sum(1)
    produced = 0.5 * ((1 - decay**2) * [2.0 * 1.0, 3.0 * 4.0]).sum(1)
    np.testing.assert_allclose(found["wide"]["efficiency"], distance / (times * produced), rtol=1e-9)  # s_0² rounded


def test_closed_forms_as_text(answers: dict[str, tuple[int, str, str]]) -> None:
    code, text, _ = answers[AS_TEXT]
    assert code == 0
    rows = [line.split() for line in text.splitlines()[2:4]]
    assert [row[0] for row in rows] == ["1", "10"]
    for time_, squared, produced, efficiency in ([float(x) for x in row] for row in rows):
        assert efficiency == pytest.approx(squared / (time_ * produced), rel=1e-5)  # six digits each
    assert "the efficiency tends to a constant" in text


@pytest.mark.parametrize(("line", "said"), BAD.items())
def test_closed_forms_of_what_is_none(answers: dict[str, tuple[int, str, str]], line: str, said: str) -> None:
    code, out, err = answers[f"speedlimit theory {line}"]
    assert (code, out) == (2, "")
    assert err.startswith("speedlimit: ")
    assert said in err


# --- the demo


def test_the_quick_demo(tmp_path: Path) -> None:
    text = printed("demo", "--quick", "--output", "tried", cwd=tmp_path)
    page = tmp_path / "tried" / "report.html"
    assert page.resolve().as_uri() in text
    assert "sgd" in page.read_text("utf-8")
    for name in ("sgd", "adamw"):
        record = RunRecord.load(tmp_path / "tried" / name / "seed_0")
        assert record.summary().steps == 30
        assert 0 < record.summary().kinematic_efficiency <= 1
        assert len(record.sketch_steps) == 6  # every fifth step
    assert re.search(r"^adamw +\d", text, re.MULTILINE), "the comparison"
    assert "speedlimit show tried/adamw/seed_0" in text


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for one process")
def test_ctrl_c_ends_it_without_a_traceback(tmp_path: Path) -> None:
    def listens() -> None:  # a shell ignores SIGINT for what it runs behind, and children inherit that
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    process = subprocess.Popen(
        [*COMMAND, "demo"],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=listens,
    )
    assert process.stdout is not None
    assert process.stdout.readline().startswith(b"Training on ")
    for _ in range(5):  # a library that is being imported may swallow the first, as a user would see it too
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=30)  # a second one within an end that takes its time kills
            break
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in said


@pytest.mark.slow
def test_the_demo_ends_with_a_verdict_on_groups_of_seeds(tmp_path: Path) -> None:
    text = printed("demo", cwd=tmp_path)
    for name in ("sgd", "momentum", "rmsprop", "adamw"):
        assert f"{name} (3 seeds)" in text
        for seed in range(3):
            assert RunRecord.load(tmp_path / "speedlimit_demo" / name / f"seed_{seed}").summary().loss < 0.21
    found = json.loads(printed("compare", "speedlimit_demo", "--json", cwd=tmp_path))
    assert len(found["distances"]) == 6, "of four groups"


def test_an_epoch_of_the_demo_sees_no_example_twice() -> None:
    import torch

    from lightning_speedlimit import demo

    data = torch.arange(1000.0).reshape(-1, 1), torch.arange(1000)
    stream = demo.batches(data, seed=3)
    first, second = ([next(stream)[1] for _ in range(1000 // demo.BATCH_SIZE)] for _ in range(2))
    for epoch in (first, second):
        assert len(set(torch.cat(epoch).tolist())) == sum(map(len, epoch)) == 7 * demo.BATCH_SIZE
    assert not torch.equal(first[0], second[0])


def test_the_demo_learns_spirals_where_the_digits_are_not_installed() -> None:
    import torch

    from lightning_speedlimit import demo

    points, arm = demo.spirals()
    assert points.shape == (1024, 2)
    assert torch.bincount(arm).tolist() == [512, 512]
    record = demo.train(demo.OPTIMIZERS["adamw"], (points, arm), seed=0, most_steps=1500)
    assert record.summary().loss <= demo.TARGET


# --- many runs


def many(folder: Path, *, rows: int, sketches: bool, runs: int = 200) -> None:
    """Runs of 35 columns that share one data file by hard links, each with a record.json of its own."""
    record = RunRecord({"clock": "steps", "entropy_production": "loss_drop", "parameters": 1000})
    names = ["loss_drop", "entropy_production", "elapsed", "displacement", "path_length", "action"]
    names += ["work_ito", "work_stratonovich", "work_anti_ito", "work_action", "seconds"]
    draw = np.random.default_rng(0)
    for step in range(1, rows + 1):
        values = dict.fromkeys(names, float(step)) | {"loss": 2.0 * math.exp(-step / rows), "loss_se": 0.01}
        record.append(step, values | {f"more_{i}": 0.5 for i in range(35 - len(values))})
        if sketches and record.wants_sketch():
            record.add_sketch(step, draw.standard_normal(4093).astype(np.float32))
    first = folder / "run_0"
    record.save(first)
    (data,) = first.glob("data-*.npz")
    for i in range(1, runs):
        other = folder / f"run_{i}"
        other.mkdir()
        os.link(data, other / data.name)
        shutil.copy(first / "record.json", other / "record.json")


@pytest.mark.slow
def test_two_hundred_runs_of_ten_thousand_rows_in_ten_seconds(tmp_path: Path) -> None:
    many(tmp_path / "runs", rows=10_000, sketches=True)
    size = sum(file.stat().st_size for file in (tmp_path / "runs" / "run_7").iterdir())
    assert size > 6e6  # 2.8 MB of columns, 256 to 512 sketches
    began = os.times()
    found = json.loads(alone("compare", "runs", "--json", cwd=tmp_path).stdout)
    ended = os.times()
    assert len(found["groups"]) == 200
    # Of the processor: what others do on this machine is none of its business. On one core this is the time it takes.
    took = ended.children_user + ended.children_system - began.children_user - began.children_system
    assert 0.5 < took < 10


def test_two_hundred_short_runs(tmp_path: Path) -> None:
    many(tmp_path / "runs", rows=100, sketches=False)
    text = without_escapes(on_terminal("compare", "runs", cwd=tmp_path))
    assert max(map(len, text.splitlines())) <= 80
    assert len(re.findall(r"^run_\d+ ", text, re.MULTILINE)) < 20
    assert "195 more: in the page" in text
    assert len(text.splitlines()) <= 40
