"""Runs a part of the tests in an environment of its own: `python run.py oldest --python python3.10`.

An environment is a list of requirements, `<name>.txt`, whose first line says the Python: `# python 3.10`. It is made
in .matrix/<name> when the list changes. Lines `# not tests/test_x.py::test_y` leave out tests of what those versions
cannot do; why stands above. The outcome is kept in results.json, for docs/modes.md.

What needs torch is installed without its dependencies (they are on the list): `lightning` would bring
`pytorch_lightning`, and torch gigabytes of CUDA's libraries. Where torch does not load without these it gets
stand-ins (see stand_ins.py); with PIP_EXTRA_INDEX_URL naming an index of builds for the CPU none are needed.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
NEED_TORCH = ("torch", "lightning", "pytorch-lightning", "torchmetrics", "geomloss")
SHOWN = ("torch", "pytorch-lightning", "lightning", "torchmetrics", "numpy")
# Callback, trajectory, record and theory, without what takes long.
TESTS = (
    *("test_callback_*.py", "test_namespaces.py", "test_record.py", "test_summary.py", "test_plain_records.py"),
    *("trajectory", "theory", "report/test_[acfpr]*.py"),
)
NAMESPACES = {"lightning": "lightning.pytorch", "pytorch-lightning": "pytorch_lightning"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted(f.stem for f in HERE.glob("*.txt")))
    parser.add_argument("--python", required=True, help="the interpreter to make the environment with")
    parser.add_argument("--tests", nargs="+", help="for pytest, instead of the chosen ones; below tests/")
    options = parser.parse_args()
    requirements = (HERE / f"{options.name}.txt").read_text()
    folder = (ROOT / ".matrix" / options.name).resolve()  # as pytest names the tests in it
    python = environment(options.name, options.python, requirements, folder)
    tests = copied_tests(requirements, folder)
    chosen = options.tests or [str(p.relative_to(tests)) for pattern in TESTS for p in sorted(tests.glob(pattern))]
    began = time.monotonic()
    code, counts = run_tests(python, tests, chosen, left_out(requirements))
    result = {**versions(python), **counts, "seconds": round(time.monotonic() - began)}
    print(f"\n{options.name}: " + ", ".join(f"{key} {value}" for key, value in result.items()))
    if not options.tests and code == 0:
        keep(options.name, result)
    return code


def pinned(requirements: str) -> list[str]:
    return [line for line in requirements.splitlines() if line and not line.startswith("#")]


def left_out(requirements: str) -> list[str]:
    return re.findall(r"^# not (.+)", requirements, re.MULTILINE)


def package(requirement: str) -> str:
    return re.split(r"[\[=<>]", requirement)[0]


def environment(name: str, interpreter: str, requirements: str, folder: Path) -> Path:
    """The environment's own Python; made anew where the list or the interpreter is another one."""
    found = python_version(name, interpreter, requirements)
    stamp, python = folder / "stamp", folder / "venv" / "bin" / "python"
    made_of = "\n".join([found, *pinned(requirements)])
    if stamp.is_file() and stamp.read_text() == made_of:
        return python
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    subprocess.run([interpreter, "-m", "venv", folder / "venv"], check=True)
    bare = [r for r in pinned(requirements) if package(r) in NEED_TORCH]
    rest = [r for r in pinned(requirements) if package(r) not in NEED_TORCH]
    pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    subprocess.run([*pip, *rest], check=True)
    subprocess.run([*pip, "--no-deps", *bare], check=True)
    if subprocess.run([python, "-c", "import torch"], capture_output=True).returncode:
        subprocess.run([sys.executable, HERE / "stand_ins.py", *folder.glob("venv/lib/*/site-packages/torch/lib")])
        subprocess.run([python, "-c", "import torch"], check=True)
    stamp.write_text(made_of)
    return python


def python_version(name: str, interpreter: str, requirements: str) -> str:
    """'3.10.13'; ends the run where the interpreter is missing, does not start, or is another one."""
    wanted = requirements.splitlines()[0].removeprefix("# python ")
    command = [interpreter, "-c", "import platform; print(platform.python_version())"]
    cure = f"make test-matrix PYTHON_{name.upper()}=/path/to/python{wanted}"
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        sys.exit(f"test-matrix, {name}: no '{interpreter}' that starts; wanted Python {wanted}: {cure}")
    if not f"{found}.".startswith(f"{wanted}."):
        sys.exit(f"test-matrix, {name}: '{interpreter}' is Python {found}; wanted {wanted}: {cure}")
    return found


def copied_tests(requirements: str, folder: Path) -> Path:
    """The tests name Lightning's two packages; where only one of them is there, a copy names that."""
    there = {NAMESPACES[package(r)] for r in pinned(requirements) if package(r) in NAMESPACES}
    if len(there) == 2:
        return ROOT / "tests"
    (name,) = there
    (other,) = set(NAMESPACES.values()) - there
    tests = folder / "tests"
    shutil.rmtree(tests, ignore_errors=True)
    shutil.copytree(ROOT / "tests", tests, ignore=shutil.ignore_patterns("__pycache__", "matrix"))
    shutil.copy(ROOT / "README.md", folder)  # a test compares it with what happens
    for file in tests.rglob("*.py"):
        if "namespace" not in file.name:  # these are about the names
            file.write_text(re.sub(rf"\b{re.escape(other)}\b", name, file.read_text()))
    return tests


def run_tests(python: Path, tests: Path, chosen: list[str], but: list[str]) -> tuple[int, dict[str, int]]:
    """Pytest's exit code and how many passed, …"""
    one_thread = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    fast = "not slow and not gpu and not browser and not package"
    command = [python, "-m", "pytest", "-q", "-n", "2", "-m", fast, "-p", "no:cacheprovider"]
    command += ["-c", ROOT / "pyproject.toml", "--rootdir", tests.parent, *chosen]
    command += [f"--deselect={test}" for test in but]
    process = subprocess.Popen(
        command, cwd=tests, env=os.environ | one_thread | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True
    )
    last = ""
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", flush=True)
        last = line if line.strip() else last
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", last)}
    return process.wait(), counts


def versions(python: Path) -> dict[str, str]:
    code = """
import importlib.metadata as m, json, platform, sys
there = {d.metadata["Name"]: d.version for d in m.distributions()}
print(json.dumps({"python": platform.python_version()} | {n: there[n] for n in sys.argv[1:] if n in there}))
"""
    found = subprocess.run([python, "-c", code, *SHOWN], capture_output=True, text=True, check=True).stdout
    return dict(json.loads(found))


def keep(name: str, result: dict[str, object]) -> None:
    file = HERE / "results.json"
    results = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(results | {name: result}, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    sys.exit(main())
