"""Writes docs/modes.md from what the tests showed: `make modes`, or `python docs/make_modes.py`."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent

HEAD = """\
# Ways of training

Each line was shown by a test that passed. *Measured, with a caveat*: but for what the remark says. *Refused*: not
measured, with the message that you get, a warning that is said once; the training goes on, unless the line says which
error it raises. What is not on this page was not tried.

This page is written by `make modes`; a test compares it with what the tests declare.
"""

VERSIONS = """\
## Versions

The fast tests of the callback, the trajectory, the record and the closed forms, on a CPU, in environments of their own
(`make test-matrix`, lists in tests/matrix). The default tests run with the versions in constraints.txt. What the oldest
cannot do: Lightning 2.4, resumed within an epoch, itself logs and validates one step late, so that rows lie at other
steps (those at the same steps are the same, but for `noise_share`, `critical_batch_size` and `step_headroom`, whose
errors are told from all rows); its `LearningRateFinder` at the start of a fit takes the batches of its trials from the
first epoch; torch 2.4 has no mean squared error in half precision on a CPU.

"""

LIBRARIES = """
The other libraries, with torch and Lightning as in constraints.txt (`make test-ecosystem`, lists in tests/ecosystem).
Fabric's rows above are of the default tests.
"""

# A test's file → the group that its modes are listed in; the first match counts.
GROUPS = {
    "Strategies and plain loops": r"ranks|strateg|ddp|fsdp|shard|parallel|deepspeed|fabric",
    "Precision": r"precision",
    "Optimizers and steps": (
        r"trajectory|style|steps|gradient_changes|midway|neutrality|dispatch|input|monitor\.py|probe|clouds"
    ),
    "Life cycle": r"lifecycle|failures|guards|resume|rollback|shared|state",
    "Loggers and monitors": r"logger|figures|monitor",
    "Namespaces and command line": r"namespace|cli",
}
ECOSYSTEM = "Other libraries"  # tests/ecosystem
WORDS = {"measured": "measured", "caveat": "measured, with a caveat", "refused": "refused"}


@dataclass
class Line:
    """One mode, of all tests that show it."""

    name: str
    outcomes: set[str] = field(default_factory=set)
    remarks: list[str] = field(default_factory=list)

    @property
    def outcome(self) -> str:
        """A caveat that one test shows is one, whatever the others show.

        Raises:
            ValueError: measured by one test and refused by another.
        """
        if "refused" in self.outcomes and len(self.outcomes) > 1:
            raise ValueError(
                f"mode {self.name!r} got {sorted(self.outcomes)}, wanted one: give one of them another name"
            )
        return min(self.outcomes)  # caveat < measured


def group_of(file: str) -> str:
    if file.startswith("tests/ecosystem/"):
        return ECOSYSTEM
    for group, pattern in GROUPS.items():
        if re.search(pattern, file):
            return group
    raise ValueError(f"{file} shows modes but belongs to no group of the page; add it to GROUPS in docs/make_modes.py")


def lines(modes: Iterable[dict[str, str]]) -> dict[str, list[Line]]:
    """The page's tables, in its order; a mode that tests of several groups show is in the first of these."""
    named: dict[str, Line] = {}
    groups: dict[str, set[str]] = {}
    for mode in modes:
        line = named.setdefault(mode["name"], Line(mode["name"]))
        groups.setdefault(mode["name"], set()).add(group_of(mode["file"]))
        line.outcomes.add(mode["outcome"])
        if mode["remark"] and mode["remark"] not in line.remarks:
            line.remarks.append(mode["remark"])
    found: dict[str, list[Line]] = {group: [] for group in (*GROUPS, ECOSYSTEM)}
    order = list(WORDS)
    for line in sorted(named.values(), key=lambda line: (order.index(line.outcome), line.name.lower())):
        found[next(group for group in found if group in groups[line.name])].append(line)
    return {group: listed for group, listed in found.items() if listed}


def cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|").strip()


def page(modes: Iterable[dict[str, str]], versions: dict[str, dict[str, Any]]) -> str:
    parts = [HEAD]
    for group, found in lines(modes).items():
        rows = [f"| {cell(x.name)} | {WORDS[x.outcome]} | {cell('; '.join(x.remarks))} |" for x in found]
        parts.append(
            "\n".join([f"## {group}\n", "| mode | outcome | remark, or message |", "|---|---|---|", *rows]) + "\n"
        )
    if versions:
        parts.append(version_table(versions))
    return "\n".join(parts)


def contents() -> str:
    """The page, of what the tests have left in files: those of `make modes` and of `make test-ecosystem`."""
    modes = [mode for name in ("modes.json", "modes_ecosystem.json") for mode in read(DOCS / name, [])]
    matrix, ecosystem = (read(ROOT / "tests" / name / "results.json", {}) for name in ("matrix", "ecosystem"))
    return page(modes, matrix) + ecosystem_versions(ecosystem)


def read(file: Path, otherwise: Any) -> Any:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else otherwise


def ecosystem_versions(results: dict[str, dict[str, Any]]) -> str:
    """What `make test-ecosystem` found: tests/ecosystem/results.json."""
    rows = [
        f"| {name} | {', '.join(f'{library} {version}' for library, version in found['versions'].items())} "
        f"| {found['passed']} | {found['skipped']} |"
        for name, found in sorted(results.items())
    ]
    head = ["| environment | libraries | passed | skipped |", "|---|---|---|---|"]
    return "\n".join([LIBRARIES, *head, *rows]) + "\n" if rows else ""


def version_table(versions: dict[str, dict[str, Any]]) -> str:
    """What `make test-matrix` found: tests/matrix/results.json."""
    columns = ["python", "torch", "pytorch-lightning", "lightning", "torchmetrics", "numpy", "passed", "skipped"]
    rows = [["environment", *columns], ["---"] * (len(columns) + 1)]
    for name in sorted(versions, key=lambda n: versions[n]["python"]):
        rows.append([name, *(str(versions[name].get(c, "none")) for c in columns)])
    return VERSIONS + "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def main() -> None:
    (DOCS / "modes.md").write_text(contents(), encoding="utf-8")


if __name__ == "__main__":
    main()
