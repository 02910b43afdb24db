"""`pytorch_lightning` and `lightning.pytorch`: each alone, and both; LightningCLI of each; one name for the state."""

import ast
import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import namespace_cases as cases
import pytest
from namespace_cases import PACKAGES, STEPS, checkpoints, columns, fit, quiet

import lightning_speedlimit
from lightning_speedlimit import SpeedLimit
from lightning_speedlimit.callback import lightning

ROOT = Path(lightning_speedlimit.__file__).parent
THERE = [p for p in PACKAGES if importlib.util.find_spec(p.split(".")[0]) is not None]
# A dozen float64 additions, each of relative error 1e-16; the network's own arithmetic is the same in both loops.
EXACT = 1e-12

both = pytest.mark.skipif(len(THERE) < 2, reason="only one of Lightning's packages is installed")
each = pytest.mark.parametrize("package", THERE)


def assert_as_plain(found: dict[str, list[float]]) -> None:
    wanted = cases.plain()
    assert found["step"][-1] == STEPS
    for name, value in wanted.items():
        assert found[name][-1] == pytest.approx(value, rel=EXACT), name


def at_the_end(found: dict[str, list[float]]) -> dict[str, str]:
    """To the last bit, and NaN is like NaN. (Lightning 2.4 logs at other steps after a resume.)"""
    return {name: repr(column[-1]) for name, column in found.items()}


# --- only one is there


@pytest.mark.mode("pytorch_lightning, or lightning.pytorch, alone", "measured", "Trainer, checkpoints, LightningCLI")
@each
def test_one_alone(tmp_path: Path, package: str) -> None:
    """In a process that can't import the other one; the environments of `make test-matrix` really lack it."""
    paths = os.pathsep.join([str(ROOT.parent), *sys.path])
    command = [sys.executable, cases.__file__, package, str(tmp_path)]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seen = json.loads((tmp_path / "seen.json").read_text(encoding="utf-8"))
    assert seen["loaded"] == []
    assert seen["said"] == []
    for name in ("in a list", "alone", "whole", "resumed"):
        assert_as_plain(seen[name])
    assert at_the_end(seen["resumed"]) == at_the_end(seen["whole"])
    assert seen["keys"] == ["SpeedLimit"]
    assert package in seen["in a list, versions"]
    assert seen["command line"] == ["lr", 2]
    assert "'clokc'" in seen["wrong argument"] or "clokc" in seen["wrong argument"].splitlines()[-1]
    assert "clock" in seen["wrong value"]
    assert "'hours'" in seen["wrong value"]


def test_neither_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in PACKAGES:
        monkeypatch.setitem(sys.modules, package.split(".")[0], None)  # type: ignore[arg-type]
    with pytest.raises(ImportError, match=r"^SpeedLimit needs Lightning, found none: pip install pytorch-lightning$"):
        lightning._installed()


@pytest.mark.parametrize("folder", ["lightning", "pytorch_lightning"])
def test_a_folder_of_that_name_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str) -> None:
    """Python takes any folder on its path for a package."""
    (tmp_path / folder).mkdir()
    for module in [m for m in sys.modules if m.split(".")[0] == folder]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *(p for p in sys.path if "site-packages" not in p)])
    importlib.invalidate_caches()
    other = next(p for p in PACKAGES if p.split(".")[0] != folder)
    if other in THERE:
        assert lightning._installed() == [sys.modules[other]]
    monkeypatch.setitem(sys.modules, other.split(".")[0], None)  # type: ignore[arg-type]
    with pytest.raises(ImportError, match=f"SpeedLimit needs Lightning, {folder}.*: pip install pytorch-lightning"):
        lightning._installed()


# --- both are there


@pytest.mark.mode(
    "pytorch_lightning and lightning.pytorch, both installed", "measured", "one callback for either Trainer"
)
@both
@each
@pytest.mark.parametrize("in_a_list", [True, False])
def test_both_there(tmp_path: Path, package: str, in_a_list: bool) -> None:
    callback = quiet(probe_batches=1)
    fit(package, tmp_path, [callback] if in_a_list else callback)
    assert_as_plain(columns(callback))
    assert package in callback.record.run["versions"]


@both
@each
def test_a_callback_of_the_other_package_is_refused_alone(tmp_path: Path, package: str) -> None:
    """Why the class has both bases: with one of them, the other Trainer raises."""
    (other,) = [p for p in PACKAGES if p != package]
    with pytest.raises(TypeError):
        fit(package, tmp_path, importlib.import_module(other).Callback())


@pytest.mark.mode("A checkpoint of one package resumed in the other", "measured")
@both
@each
def test_a_checkpoint_of_the_other_package(tmp_path: Path, package: str) -> None:
    (other,) = [p for p in PACKAGES if p != package]
    whole, resumed = quiet(), quiet()
    fit(package, tmp_path, [whole, checkpoints(package, tmp_path)], enable_checkpointing=True)
    fit(other, tmp_path, [resumed], ckpt_path=tmp_path / "step=6.ckpt")
    assert at_the_end(columns(resumed)) == at_the_end(columns(whole))
    assert_as_plain(columns(resumed))


@each
def test_a_trainer_of_ones_own(tmp_path: Path, package: str, recwarn: pytest.WarningsRecorder) -> None:
    """Its module is neither package's; the package is that of its base."""
    own = type("Own", (importlib.import_module(package).Trainer,), {"__module__": "experiment"})
    callback = quiet(probe_batches=1)
    fit(package, tmp_path, [callback], trainer=own)
    assert package in callback.record.run["versions"]
    assert not [w for w in recwarn if "SpeedLimit" in str(w.message)]


# --- LightningCLI


@pytest.mark.mode("LightningCLI, class_path and init_args in YAML", "measured")
@each
def test_the_command_line_reads_a_file(tmp_path: Path, package: str) -> None:
    pytest.importorskip("jsonargparse")
    cli = cases.command_line(package, tmp_path, "entropy_production", "ito")
    (callback,) = [c for c in cli.trainer.callbacks if isinstance(c, SpeedLimit)]
    assert (callback.entropy_production, callback.clock) == ("ito", "steps")
    assert columns(callback)["step"][-1] == 2
    assert (tmp_path / "record").is_dir()


@pytest.mark.mode(
    "LightningCLI, an argument that there is none of, or a value out of its range",
    "refused",
    "before the training: LightningCLI exits and names it (Option 'clokc' is not accepted), or SpeedLimit raises "
    "ValueError: loss_window got 1, wanted a whole number of at least 2",
)
@each
@pytest.mark.parametrize(
    ("name", "value", "named"),
    [
        ("clokc", "lr", "clokc"),
        ("clock", "hours", "hours"),
        ("loss_window", "many", "many"),
        ("loss_window", 1, "loss_window got 1, wanted a whole number of at least 2"),
        ("measure_every_n_steps", 0, "measure_every_n_steps"),
    ],
)
def test_the_command_line_names_what_is_wrong(tmp_path: Path, package: str, name: str, value: Any, named: str) -> None:
    pytest.importorskip("jsonargparse")
    try:
        said = cases.command_line_error(package, tmp_path, name, value)
    except ValueError as error:  # the callback's own
        said = str(error)
    assert named in said
    assert not (tmp_path / "record").exists()


# --- one name for the state


def test_the_states_name_holds_no_setting() -> None:
    settings: list[dict[str, Any]] = [{}, {"clock": "lr"}, {"coordinates": "all", "loss_window": 7}]
    assert {SpeedLimit(**s).state_key for s in settings} == {"SpeedLimit"}


@pytest.mark.mode(
    "Two SpeedLimit in one Trainer",
    "refused",
    "Lightning raises RuntimeError: Found more than one stateful callback of type `SpeedLimit`",
)
@each
def test_two_in_one_trainer(tmp_path: Path, package: str) -> None:
    """Lightning's own words, when the Trainer is made: both would save under one name."""
    with pytest.raises(RuntimeError, match=r"^Found more than one stateful callback of type `SpeedLimit`"):
        fit(package, tmp_path, [quiet(), quiet(clock="lr")])


# --- only one file knows Lightning


def lightning_names(source: str) -> set[str]:
    """What a source imports of either package, or names in a check of a type."""
    tops = {p.split(".")[0] for p in PACKAGES}
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names if a.name.split(".")[0] in tops}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found |= {m for m in [node.module or ""] if m.split(".")[0] in tops}
    return found


@pytest.mark.parametrize("file", sorted(ROOT.rglob("*.py")), ids=lambda f: str(f.relative_to(ROOT)))
def test_no_other_file_names_a_package(file: Path) -> None:
    """So none can ask whether a Trainer, a strategy or a logger is one of `pytorch_lightning`'s alone."""
    wanted = {"pytorch_lightning"} if file.name == "lightning.py" else set()  # there for typing
    assert lightning_names(file.read_text(encoding="utf-8")) == wanted


def test_naming_a_package_would_be_noticed() -> None:
    source = "def f():\n    from lightning.pytorch.loggers import CSVLogger\n    import pytorch_lightning as pl\n"
    assert lightning_names(source) == {"lightning.pytorch.loggers", "pytorch_lightning"}
