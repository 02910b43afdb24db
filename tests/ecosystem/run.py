"""The tests of this folder with other libraries: `python run.py`, or the names of environments as arguments.

An environment is a list of requirements, `<name>.txt`. It is made in .ecosystem/<name> when the list changes, and sees
what the interpreter that runs this sees: its torch is the one that is there, and none is downloaded. The package itself
is that of the checkout. What the tests showed is kept for docs/modes.md.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
MODES, RESULTS = ROOT / "docs" / "modes_ecosystem.json", HERE / "results.json"
NAMES = sorted(f.stem for f in HERE.glob("*.txt"))
VERSIONS = "import importlib.metadata as m, json, sys; print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; none: all of them")
    names = parser.parse_args().names or NAMES
    unknown = set(names) - set(NAMES)
    if unknown:
        parser.error(f"got {', '.join(sorted(unknown))}, wanted names of {', '.join(NAMES)}")
    if names == NAMES:  # what no test shows any more goes
        MODES.write_text("[]\n", encoding="utf-8")
        RESULTS.write_text("{}\n", encoding="utf-8")
    return max(run(name) for name in names)


def run(name: str) -> int:
    """Pytest's exit code."""
    requirements = [line for line in (HERE / f"{name}.txt").read_text().splitlines() if line and line[0] != "#"]
    python = environment(name, requirements)
    one_thread = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--modes", MODES, HERE]
    process = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | one_thread | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True
    )
    last = ""
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", flush=True)
        last = line if line.strip() else last
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped)", last)}
    libraries = [re.split(r"[\[=<>]", requirement)[0] for requirement in requirements]
    found = subprocess.run([python, "-c", VERSIONS, *libraries], capture_output=True, text=True, check=True).stdout
    print(f"\n{name}: {', '.join(f'{number} {word}' for word, number in counts.items())}")
    code = process.wait()
    if not code:
        results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
        results[name] = {"passed": 0, "skipped": 0, **counts, "versions": json.loads(found)}
        RESULTS.write_text(json.dumps(results, indent=2, sort_keys=True) + "\n")
    return code


def environment(name: str, requirements: list[str]) -> Path:
    """The environment's own Python; made anew where the list or the interpreter is another one."""
    folder = ROOT / ".ecosystem" / name
    stamp, python = folder / "stamp", folder / "bin" / "python"
    made_of = "\n".join([sys.version, sys.prefix, *requirements])
    if stamp.is_file() and stamp.read_text() == made_of:
        return python
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    (packages,) = folder.glob("lib/*/site-packages")
    # A path alone: what is installed there is seen, and what is installed there as a link to a checkout is not.
    (packages / "around.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    subprocess.run([*pip, "--constraint", ROOT / "constraints.txt", *requirements], check=True)
    stamp.write_text(made_of)
    return python


if __name__ == "__main__":
    sys.exit(main())
