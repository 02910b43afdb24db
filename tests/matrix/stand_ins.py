"""Lets a CUDA build of torch load where CUDA's libraries are not: `python stand_ins.py …/torch/lib`.

torch's own libraries are linked against libcudart, libcublas, … and ask for them though no CUDA device is there. For
the tests on a CPU a stand-in is enough: the same file name, the same symbols, each a function that returns an error
(100: no CUDA device). Needs cc, readelf and nm.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

LIBRARY = re.compile(r"lib(cu|nv|nccl)")
SYMBOL = re.compile(r"cu|nccl|nv|__cuda")


def output(*command: object) -> str:
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, check=True).stdout


def main(folder: Path) -> None:
    files = sorted(folder.glob("lib*.so*"))
    needed: set[str] = set()
    versions: dict[str, str] = {}  # of symbols → the library that has them
    asked: dict[str, str] = {}  # symbol → its version, or ""
    defined: set[str] = set()
    for file in files:
        needed |= set(re.findall(r"NEEDED.*\[(.+)\]", output("readelf", "-d", "-W", file)))
        for library, names in re.findall(
            r"File: (\S+)(.*?)(?=File:|\Z)", output("readelf", "-V", "-W", file), re.DOTALL
        ):
            versions |= dict.fromkeys(re.findall(r"Name: (\S+)", names), library)
        for line in output("nm", "-D", file).splitlines():
            *_, kind, symbol = line.split()
            name, _, version = symbol.partition("@")
            if kind in "Uwv":
                asked.setdefault(name, version)
            else:
                defined.add(name)
    missing = sorted(n for n in needed - {f.name for f in files} if LIBRARY.match(n))
    by_version: dict[str, list[str]] = {}
    for name, version in asked.items():
        if name not in defined and (version or SYMBOL.match(name)):
            by_version.setdefault(version, []).append(name)
    for library in missing:
        own = {v: names for v, names in by_version.items() if versions.get(v) == library}
        build(folder / library, own if library != missing[0] else own | {"": by_version.get("", [])})


def build(target: Path, symbols: dict[str, list[str]]) -> None:
    """A library of functions that return an error, by the version of their names ("": none)."""
    with tempfile.TemporaryDirectory() as folder:
        code, script = Path(folder) / "code.c", Path(folder) / "script.map"
        functions = [f"int {name}(void) {{ return 100; }}" for names in symbols.values() for name in names]
        code.write_text("\n".join(["static int unused;", *functions]))
        nodes = [f"{version} {{ global: {'; '.join(names)}; }};" for version, names in symbols.items() if version]
        script.write_text("\n".join(nodes))
        options = ["-shared", "-fPIC", "-w", f"-Wl,-soname,{target.name}"]
        options += [f"-Wl,--version-script={script}"] if nodes else []
        output("cc", *options, "-o", target, code)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
