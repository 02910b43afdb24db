"""docs/modes.md lists what the tests declare: neither more, nor less, nor something else."""

import ast
import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from modes_plugin import DECLARED, Mode, read

TESTS = Path(__file__).resolve().parent
DOCS = TESTS.parent / "docs"
MAKE = runpy.run_path(str(DOCS / "make_modes.py"))

Declared = list[tuple[Mode, bool]]  # and whether the test needs what not every machine has


@pytest.fixture(scope="module")
def declared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Declared:
    """Of all tests: those of this run where it collects all, else collected by a process of its own."""
    if [Path(a).resolve() for a in request.config.args] == [TESTS]:
        return request.config.stash[DECLARED]
    here = (f for f in TESTS.rglob("test_*.py") if f.parent.name != "ecosystem")
    files = [str(f) for f in here if "mark.mode(" in f.read_text(encoding="utf-8")]
    out = tmp_path_factory.mktemp("modes") / "declared.json"
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-n", "0", "--declared-modes", str(out)]
    subprocess.run([*command, *files], cwd=TESTS.parent, check=True, capture_output=True)
    return [(Mode(*mode), elsewhere) for mode, elsewhere in json.loads(out.read_text(encoding="utf-8"))]


def differences(listed: set[Mode], declared: Declared) -> list[str]:
    """What keeps the list from being that of the declared modes."""
    everything, here = {mode for mode, _ in declared}, {mode for mode, elsewhere in declared if not elsewhere}
    found = [f"not listed: {mode}" for mode in sorted(here - listed)]
    return found + [f"listed, but no test declares it: {mode}" for mode in sorted(listed - everything)]


def test_the_list_is_that_of_the_tests(declared: Declared) -> None:
    assert not differences(read(DOCS / "modes.json"), declared), "run `make modes`"


def test_the_page_is_made_of_the_list() -> None:
    assert (DOCS / "modes.md").read_text(encoding="utf-8") == MAKE["contents"](), "run `make modes`"


def test_modes_of_other_libraries_are_those_of_their_tests() -> None:
    """By what the files say: what their tests need is installed in environments of their own."""
    files = sorted((TESTS / "ecosystem").glob("test_*.py"))
    assert read(DOCS / "modes_ecosystem.json") == {mode for file in files for mode in written(file)}


def written(file: Path) -> set[Mode]:
    """The modes of the markers in a file that is not run."""
    calls = (node for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, ast.Call))
    words = ([ast.literal_eval(a) for a in c.args] for c in calls if ast.unparse(c.func) == "pytest.mark.mode")
    return {
        Mode(name, outcome, "".join(remark), str(file.relative_to(TESTS.parent))) for name, outcome, *remark in words
    }


DDP = Mode("DDP", "measured", "", "test_ddp.py")
GPU = Mode("CUDA graphs", "caveat", "slow", "test_graph_optim.py")


@pytest.mark.parametrize(
    ("listed", "wanted"),
    [
        ({DDP}, []),
        ({DDP, GPU}, []),  # what needs another machine may be there or not
        ({GPU}, ["not listed: "]),
        ({DDP, Mode("DDP", "refused", "no", "test_ddp.py")}, ["listed, but no test declares it: "]),
        ({DDP, Mode("Rings", "measured", "", "test_ddp.py")}, ["listed, but no test declares it: "]),
    ],
)
def test_another_list_would_be_noticed(listed: set[Mode], wanted: list[str]) -> None:
    found = differences(listed, [(DDP, False), (GPU, True)])
    assert len(found) == len(wanted)
    assert all(f.startswith(w) for f, w in zip(found, wanted, strict=True))


def test_a_page_of_other_modes_would_be_noticed() -> None:
    one, other = ({"name": n, "outcome": "measured", "remark": "", "file": "test_ddp.py"} for n in ("DDP", "Rings"))
    assert MAKE["page"]([one], {}) != MAKE["page"]([one, other], {})
    assert "| Rings | measured |  |" in MAKE["page"]([other], {})


def test_a_mode_is_in_one_group() -> None:
    mode = {"name": "clamped", "outcome": "measured", "remark": ""}
    found = MAKE["lines"]([mode | {"file": "test_resume.py"}, mode | {"file": "test_steps.py"}])
    assert {group: [line.name for line in lines] for group, lines in found.items()} == {
        "Optimizers and steps": ["clamped"]
    }


def test_a_caveat_counts_and_refused_and_measured_is_a_contradiction() -> None:
    mode: dict[str, Any] = {"name": "DDP", "remark": "", "file": "test_ddp.py"}
    (line,) = MAKE["lines"]([mode | {"outcome": "measured"}, mode | {"outcome": "caveat", "remark": "a"}])[
        "Strategies and plain loops"
    ]
    assert (line.outcome, line.remarks) == ("caveat", ["a"])
    with pytest.raises(ValueError, match=r"'DDP' got .*'measured', 'refused'.* another name"):
        MAKE["page"]([mode | {"outcome": "measured"}, mode | {"outcome": "refused", "remark": "b"}], {})
    with pytest.raises(ValueError, match=r"test_else\.py shows modes but belongs to no group"):
        MAKE["page"]([mode | {"outcome": "measured", "file": "test_else.py"}], {})


RUN = """
import pytest

@pytest.mark.mode("good", "measured")
@pytest.mark.parametrize("x", [1, 2])
def test_good(x): pass

@pytest.mark.mode("bad", "refused", "no: | never")
@pytest.mark.parametrize("x", [1, 2])
def test_bad(x): assert x == 1

@pytest.mark.mode("skipped", "caveat", "slow")
def test_skipped(): pytest.skip("not here")

@pytest.mark.mode("named", outcome="caveat", remark="why")
def test_named(): pass
"""


@pytest.mark.parametrize("workers", ["0", "2"])
def test_only_what_passed_is_listed(tmp_path: Path, workers: str) -> None:
    file, out = tmp_path / "test_ddp.py", tmp_path / "modes.json"
    file.write_text(RUN)
    kept = {"name": "skipped", "outcome": "caveat", "remark": "slow", "file": "test_ddp.py"}
    gone = {"name": "bad", "outcome": "refused", "remark": "no: | never", "file": "test_ddp.py"}
    out.write_text(json.dumps([kept, gone]))
    assert "2 failed" not in run_pytest(tmp_path, "--modes", str(out), "-n", workers)
    assert sorted(m.name for m in read(out)) == ["good", "named", "skipped"]


@pytest.mark.parametrize(
    ("marker", "message"),
    [
        ('mode("x", "fine")', "got the outcome 'fine', wanted one of measured, caveat, refused"),
        ('mode("x", "refused")', "mode 'x', refused, got no remark"),
        ('mode("x")', "missing 1 required positional argument: 'outcome'"),
    ],
)
def test_markers_that_say_too_little(tmp_path: Path, marker: str, message: str) -> None:
    (tmp_path / "test_ddp.py").write_text(f"import pytest\n\n@pytest.mark.{marker}\ndef test(): pass\n")
    assert message in run_pytest(tmp_path, "-n", "0")


def run_pytest(folder: Path, *arguments: str) -> str:
    """Without the package's conftest: the plugin needs pytest alone, so this takes half a second."""
    command = [sys.executable, "-m", "pytest", "-p", "xdist.plugin", "-p", "modes_plugin", *arguments, str(folder)]
    result = subprocess.run(
        command,
        cwd=folder,
        env={"PYTHONPATH": str(TESTS), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
    )
    return result.stdout + result.stderr
