"""What is damaged or hostile is refused in one clear line at the door; what comes through is shown, compared, drawn."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from damaged_records import (
    Trial,
    arrays_of,
    damaged,
    nested,
    run_description,
    save_whole,
    sign,
    whole_record,
    with_arrays,
)

from lightning_speedlimit.cli.showing import show_runs
from lightning_speedlimit.record import RecordError, RunRecord, reading
from lightning_speedlimit.record.schema import RUN
from lightning_speedlimit.report import compare, compare_models, figures, page, runs
from lightning_speedlimit.report.settings import settings_of
from lightning_speedlimit.words import one_line, plain_text

STEERING = "\x1b]0;owned\x07\x9b2J\u202e\u2066\u200f\r\x08\x00\x85\u2028\ud800"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("whole")
    whole_record(clouds=True, layers=True).save(home)
    return home


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "record"))


def data_file(folder: Path) -> Path:
    return next(folder.glob("data-*.npz"))


def edit(folder: Path, **changes: Any) -> None:
    """Entries of record.json; those of `run` by run={…}."""
    document = json.loads((folder / "record.json").read_text())
    for name, value in changes.items():
        document[name] = document[name] | value if isinstance(value, dict) else value
    (folder / "record.json").write_text(json.dumps(document))


def refuses(folder: Path, message: str) -> None:
    with pytest.raises(RecordError, match=message) as caught:
        RunRecord.load(folder)
    assert str(caught.value).startswith(f"{folder}: ")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000


def texts(value: Any) -> Iterator[str]:
    """All keys and values within that are text."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from texts([*value.keys(), *value.values()])
    elif isinstance(value, list):
        for item in value:
            yield from texts(item)


def nothing_steers(text: str) -> None:
    assert {c for c in text if plain_text(c) != c} == set()


# --- text


def test_plain_text() -> None:
    assert plain_text("déjà vu, 二, 😀, a b\n\tc") == "déjà vu, 二, 😀, a b\n\tc"
    assert plain_text("\x1b[31m\x9b1A\u202egpj\ud800\r") == r"\x1b[31m\x9b1A\u202egpj\ud800\r"
    assert plain_text(plain_text(STEERING)) == plain_text(STEERING)
    assert all(plain_text(chr(c)).isprintable() or chr(c).isspace() for c in range(0x11000))
    assert one_line("two\nlines  \t here", 100) == "two lines here"
    assert one_line("x" * 11, 10) == "x" * 9 + "…"
    assert one_line("\x1b" * 9, 10) == r"\x1b\x1b\…"


@pytest.mark.parametrize("where", ["class", "model", "version", "reason", "reason's name", "layer", "column", "key"])
def test_no_text_of_a_record_steers_a_terminal(
    where: str, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As it was made, as it was written by who knows what, in a comparison, in the command."""
    run, reasons, column, layer, text = run_description(), {"conversion": "noisy"}, "my own", "first", STEERING
    changes: dict[str, Callable[[], Any]] = {
        "class": lambda: run["optimizers"][0].update({"class": text}),
        "model": lambda: run.update(model=text),
        "version": lambda: run["versions"].update({text: text}),
        "reason": lambda: reasons.update(conversion=text),
        "reason's name": lambda: reasons.update({text: "noisy"}),
        "key": lambda: run.update({text: [text, {text: text}]}),
    }
    changes.get(where, lambda: None)()
    record = RunRecord(run)
    values = {name: float(values[-1]) for name, values in RunRecord.load(whole).columns.items() if name != "step"}
    record.append(100, values | {text if where == "column" else column: 1.0}, reasons)
    record.add_clouds(100, {text if where == "layer" else layer: {"particles": 3, "wasserstein2": 1.0}})
    record.add_layers(100, {text if where == "layer" else layer: {"action": 1.0}, "second": {"action": 1.0}})
    names = [record.clouds["layers"], record.layers["layers"]]
    nothing_steers("".join(texts([record.run, record.reasons, list(record.columns), *names])))
    record.save(tmp_path / "a")
    escaped, raw = json.dumps(plain_text(text))[1:-1], json.dumps(text)[1:-1]
    path = tmp_path / "a" / "record.json"
    assert escaped in path.read_text()
    path.write_text(path.read_text().replace(escaped, raw))
    assert raw in path.read_text()
    loaded = RunRecord.load(tmp_path / "a")
    assert (loaded.run, loaded.reasons, list(loaded.columns)) == (record.run, record.reasons, list(record.columns))
    assert [loaded.clouds["layers"], loaded.layers["layers"]] == names
    show_runs(tmp_path / "a", json=False, layers=True)
    print(loaded.summary(), compare(loaded))
    nothing_steers(capsys.readouterr().out)


def test_names_that_differ_in_what_is_escaped_stay_apart(tmp_path: Path) -> None:
    record = RunRecord()
    record.append(1, {"a\x1b": 1.0, "a\x07": 2.0})
    record.amend({"a\x1b": 3.0})
    assert {name: float(column[0]) for name, column in record.columns.items()} == {"step": 1, r"a\x1b": 3, r"a\x07": 2}


def test_folders_are_named_as_a_terminal_can_take_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["a\x1b]0;x\x07", "b\u202egpj", os.fsdecode(b"no utf-8 \xff"), "run 4²"]
    for name in names:
        record = RunRecord(run_description())
        record.append(1, {"loss": 1.0, "loss_drop": 1.0, "elapsed": 1.0, "action": 1.0})
        record.save(tmp_path / name)
    (tmp_path / names[1] / "record.json").write_text("{")
    comparison = compare(tmp_path)
    text = page.page([comparison], command=f"speedlimit compare {tmp_path / names[0]}")
    assert "eft out: " in text
    show_runs(tmp_path, json=False)
    nothing_steers(str(comparison) + text + capsys.readouterr().out)
    text.encode()  # halves of pairs can't be
    assert {group.name for group in comparison.groups} == set(map(plain_text, names)) - {plain_text(names[1])}
    nothing_steers(str(compare({STEERING: tmp_path / names[0]})))
    with pytest.raises(RecordError) as caught:
        RunRecord.load(tmp_path / names[1])
    nothing_steers(str(caught.value))


def test_a_long_text_is_cut_where_it_is_shown(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Most of a megabyte that is one word, or as many words as it has room for."""
    record_json = (folder / "record.json").read_bytes()
    for text in ("x" * 400_000, "many words " * 40_000):
        (folder / "record.json").write_bytes(record_json)
        edit(folder, reasons={"conversion": text})
        assert len(RunRecord.load(folder).reasons["conversion"]) == 1000
        edit(folder, reasons={"conversion": "noisy"}, run={"model": text, "optimizers": [{"class": text}]})
        show_runs(folder, json=False)
        print(compare(folder))
        assert len(capsys.readouterr().out) < 20_000
    (folder / "record.json").write_bytes(record_json)
    edit(folder, reasons={f"reason {k}": "of many" for k in range(30_000)})
    show_runs(folder, json=False)
    out = capsys.readouterr().out
    assert len(out) < 20_000
    assert "more reasons are in the record" in out


# --- files


def no_file(path: Path, kind: str) -> None:
    path.unlink()
    {
        "pipe": lambda: os.mkfifo(path),
        "folder": path.mkdir,
        "device": lambda: path.symlink_to("/dev/zero"),
        "loop": lambda: path.symlink_to(path.name),
    }[kind]()


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "loop"])
@pytest.mark.parametrize("which", ["record.json", "data"])
def test_what_is_no_regular_file_is_not_waited_for(folder: Path, which: str, kind: str) -> None:
    no_file(data_file(folder) if which == "data" else folder / which, kind)
    refuses(folder, "is no regular file|can't be read: (Is a directory|Too many levels)")


def test_a_link_to_a_file_is_one(folder: Path, tmp_path: Path) -> None:
    for path in list(folder.iterdir()):
        path.rename(tmp_path / path.name)
        path.symlink_to(tmp_path / path.name)
    assert len(RunRecord.load(folder)) == 20


def test_a_path_that_the_system_refuses(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 300)
    with pytest.raises(RecordError, match="can't be looked into: File name too long"):
        RunRecord.load(path)
    with pytest.raises(RecordError, match="can't be looked into: File name too long"):
        compare(path)
    with pytest.raises(RecordError, match=r"path got .*, wanted a folder of this machine"):
        RunRecord.load(tmp_path / "\0")
    with pytest.raises(ValueError, match=r"runs got .*, wanted a folder of runs of this machine"):
        compare(tmp_path / "\0")


# --- record.json


def test_a_megabyte_is_the_limit(folder: Path) -> None:
    text = (folder / "record.json").read_bytes()
    (folder / "record.json").write_bytes(text + b" " * (2**20 - len(text)))
    assert len(RunRecord.load(folder)) == 20
    (folder / "record.json").write_bytes(text + b" " * (2**20 - len(text) + 1))
    refuses(folder, "record.json has more than 1048576 bytes")


@pytest.mark.parametrize("kind", ["list", "dict"])
@pytest.mark.parametrize("depth", [29, 30, 31, 32, 450, 900, 30_000])
def test_nesting_has_an_end(folder: Path, depth: int, kind: str) -> None:
    begin, end = {"list": ("[", "]"), "dict": ('{"a": ', "}")}[kind]
    text = (folder / "record.json").read_text()
    deep = begin * depth + "0" + end * depth
    (folder / "record.json").write_text(text.replace('"run": {', f'"run": {{"deep": {deep}, ', 1))
    if depth == 29:  # as deep as can be written
        assert RunRecord.load(folder).run["deep"] == nested(29, kind)
    else:
        refuses(folder, "nested more than|maximum recursion depth")


def test_nesting_that_is_written_can_be_read(folder: Path) -> None:
    """Up to the limit; what would be beyond it is refused before it is written."""
    deepest = 0
    for depth in range(1, 60):
        try:
            record = RunRecord({"deep": nested(depth, innermost=math.nan)})
        except (TypeError, ValueError):
            break
        deepest = depth
        record.save(folder)
        assert RunRecord.load(folder).run["deep"] is not None
    assert 20 <= deepest < 59
    with pytest.raises((TypeError, ValueError), match="nested more than"):
        RunRecord({"deep": nested(deepest + 1)})
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises((TypeError, ValueError), match="nested more than"):
        RunRecord({"endless": endless})


NOT_AS_IT_SHOULD_BE: dict[str, list[Any]] = {
    "object": [None, [], "text", 3, True],
    "array": [None, {}, "text", 3, [None], [3], ["text"]],
    "string": [3, [], {}, True, 0.5],
    "integer": [True, "3", 0.5, [], {}, 2**63, -(2**63)],
    "number": [True, "3", [], {}],
}


@pytest.mark.parametrize("name", list(RUN["properties"]))
def test_every_field_of_a_run_that_is_read_has_its_type(folder: Path, name: str) -> None:
    schema = RUN["properties"][name]
    wrong = ["minutes", 3, None] if "enum" in schema else NOT_AS_IT_SHOULD_BE[schema["type"]]
    texts = schema.get("items") == {"type": "string"}
    for value in (value for value in wrong if not (texts and value == ["text"])):
        edit(folder, run={name: value})
        refuses(folder, rf"run\.{name}(\[0\])? must be .*got ")
        with pytest.raises(RecordError, match=rf"^run\.{name}(\[0\])? must be"):
            RunRecord({name: value})
    edit(folder, run={name: run_description()[name]})
    assert len(RunRecord.load(folder)) == 20
    if schema.get("nullable"):
        edit(folder, run={name: None})
        show_runs(folder, json=False)
        assert str(compare([folder, whole_record()]))


def test_nothing_is_read_of_a_run_that_is_not_checked() -> None:
    """By the names that the sources look up in a run; those within lists and loops as well."""
    package = Path(reading.__file__).parents[1]
    sources = [*package.glob("report/*.py"), *package.glob("cli/*.py"), package / "record/summary_text.py"]
    read = {n for file in sources for n in re.findall(r"(?:\.run\[|\brun\.get\()\"(\w+)\"", file.read_text("utf-8"))}
    assert {"clock", "batch_size", "loss_window", "optimizers", "versions", "measured_coordinates"} <= read
    looped = {"entropy_production", "monitor", "parameters", "optimized_coordinates", "trainable_parameters"}
    assert read | looped <= RUN["properties"].keys()


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ({"optimizers": [{"class": 3}]}, r"run\.optimizers\[0\]\.class must be text, got 3"),
        ({"optimizers": [{"groups": {"lr": 1}}]}, r"run\.optimizers\[0\]\.groups must be a list"),
        ({"optimizers": [{}, {"groups": [3]}]}, r"run\.optimizers\[1\]\.groups\[0\] must be an object"),
        ({"versions": {"__float__": "nan"}}, r"run\.versions must be an object, got nan"),
        ({"versions": {"torch": 2.9}}, r"run\.versions\.torch must be text, got 2\.9"),
        ({"versions": {"\x1b]0;x\x07": 2}}, r"run\.versions\['.*x1b.0;x.*x07'\] must be text"),
        ({"versions": {"two\nlines": 2}}, r"run\.versions\['two\\nlines'\] must be text"),
        ({"loss_window": 0}, r"run\.loss_window must be an integer from 1 to \d+ or null, got 0"),
        ({"parameters": -1}, r"run\.parameters must be an integer from 0"),
        ({"anything": 10**400}, "a number of 401 digits"),
    ],
)
def test_what_is_within_a_run(folder: Path, run: dict[str, Any], message: str) -> None:
    edit(folder, run=run)
    refuses(folder, message)


def test_a_run_that_is_a_number(folder: Path) -> None:
    document = json.loads((folder / "record.json").read_text()) | {"run": {"__float__": "nan"}}
    (folder / "record.json").write_text(json.dumps(document))
    refuses(folder, "run must be an object, got nan")


@pytest.mark.parametrize("missing", ["format_version", "run", "reasons", "columns", "rows", "sketches", "data"])
def test_no_field_may_be_missing(folder: Path, missing: str) -> None:
    document = json.loads((folder / "record.json").read_text())
    del document[missing]
    (folder / "record.json").write_text(json.dumps(document))
    refuses(folder, rf"record\.json must have '{missing}', got \['format'")


def test_a_page_shows_some_of_very_many_settings() -> None:
    record = RunRecord(run_description() | {f"my {k}": k for k in range(1000)})
    record.append(1, {"loss": 1.0, "elapsed": 1.0})
    same = settings_of(compare(record)).same
    assert len(same) == 301
    entries = len(record.run) - 1 + len(record.run["hparams"]) - 3  # "ended", "written" and "pause" are none
    assert same[-1] == ("more", f"{entries - 300} settings, in the records")


def test_settings_that_no_one_foresaw_are_kept(folder: Path) -> None:
    """An optimizer's settings are its own, and so is what a user says of a run."""
    odd = {"lr": [0.1, "and so on"], "momentum": {"of": None}, "maximize": "no", "": 10**200}
    edit(folder, run={"optimizers": [{"class": "Odd", "groups": [odd]}], "note": "two\nlines", "batch_size": -1})
    record = RunRecord.load(folder)
    assert record.run["optimizers"][0]["groups"][0] == odd
    assert record.run["note"] == "two\nlines"
    show_runs(folder, json=False)
    assert "Odd" in str(compare(folder))
    assert "two\nlines" in page.page([compare(folder)])


# --- the arrays


def flip(path: Path, mark: bytes, offset: int, value: int) -> None:
    content = bytearray(path.read_bytes())
    content[content.index(mark) + offset] = value
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("mark", "offset", "value", "message"),
    [
        (b"PK\x01\x02", 8, 1, "compressed or encrypted"),
        (b"PK\x01\x02", 8, 0x21, "compressed or encrypted"),
        (b"PK\x01\x02", 10, 8, "compressed or encrypted"),
        (b"PK\x01\x02", 10, 99, "compressed or encrypted"),
        (b"PK\x01\x02", 6, 99, "no archive: zip file version 9.9"),
        (b"PK\x01\x02", 46, ord("t"), "holds .*ttep.npy"),
        (b"PK\x01\x02", 42, 1, "no archive"),
        (b"PK\x03\x04", 0, 0, "no archive: Bad magic number"),
        (b"PK\x03\x04", 30, ord("t"), "no archive: File name in directory"),
        (b"PK\x05\x06", 12, 255, "no archive"),
        (b"PK\x05\x06", 0, 0, "no archive: File is not a zip file"),
        (b"\x93NUMPY", 60, 0, "no archive: Bad CRC"),
    ],
)
def test_an_archive_that_lies(folder: Path, mark: bytes, offset: int, value: int, message: str) -> None:
    flip(data_file(folder), mark, offset, value)
    sign(folder)
    refuses(folder, message)


@pytest.mark.parametrize(
    ("mark", "offset", "value"),
    [
        (b"NUMPY", 0, 0),
        (b"NUMPY", 5, 9),  # version
        (b"NUMPY", 7, 255),  # length
        (b"NUMPY", 8, 255),
        (b", }   ", 2, ord(" ")),  # no end
        (b"'shape'", 0, ord("(")),
        (b"'shape'", 0, ord("\n")),
        (b"\n", 0, ord("\\")),
        (b"False", 0, ord("T")),
    ],
)
def test_a_header_that_lies(folder: Path, mark: bytes, offset: int, value: int) -> None:
    """With a checksum that is its own; other texts than numpy's are compared with it, and never parsed."""
    path = data_file(folder)
    with zipfile.ZipFile(path) as archive:
        members = {name: bytearray(archive.read(name)) for name in archive.namelist()}
    content = members["step.npy"]
    content[content.index(mark) + offset] = value
    with zipfile.ZipFile(path, "w") as archive:
        for name, each in members.items():
            archive.writestr(name, bytes(each))
    sign(folder)
    refuses(folder, "step (declares .*, wanted the header|holds 0 bytes)")


def test_a_name_in_the_archive_that_is_no_text(folder: Path) -> None:
    path = data_file(folder)
    content = bytearray(path.read_bytes())
    at = content.index(b"PK\x01\x02")
    content[at + 8 : at + 10] = struct.pack("<H", 0x800)  # names are UTF-8
    content[at + 46] = 0xFF
    path.write_bytes(bytes(content))
    sign(folder)
    refuses(folder, "no archive")


@pytest.mark.parametrize("name", ["step", "sketch_steps", "sketch_ticks", "cloud_step", "cloud_particles"])
@pytest.mark.parametrize("value", [-(2**63), 2**63 - 1, -1, 2**53 + 1])
def test_steps_and_counts_are_of_a_size(folder: Path, name: str, value: int) -> None:
    """−2⁶³ less a step wraps round to a large positive one."""
    arrays = arrays_of(folder)
    arrays[name][-1] = value
    with_arrays(folder, arrays)
    refuses(folder, "must increase" if name != "cloud_particles" else "at least one particle")


# --- numbers


@pytest.mark.parametrize("extreme", [math.nan, -math.inf, 1e308, 1e-200], ids=str)
def test_extreme_numbers_are_shown_and_compared(folder: Path, extreme: float, tmp_path: Path) -> None:
    arrays = arrays_of(folder)
    arrays["values"][:, 10:] = extreme
    arrays["sketches"][10:] = np.float64(extreme).clip(-3e38, 3e38)
    arrays["cloud_values"][:, 10:] = extreme
    with_arrays(folder, arrays)
    outcome = Trial(tmp_path).of(folder, with_page=False)
    assert outcome.faults == []


@pytest.mark.parametrize(("columns", "extreme"), [("all", 1e305), ("all", 5e-324), ("loss", -1e308), ("action", 0.0)])
def test_figures_of_extreme_numbers(folder: Path, extreme: float, columns: str) -> None:
    """Nothing is to be seen of them, but for the others; nothing warns."""
    arrays = arrays_of(folder)
    names = json.loads((folder / "record.json").read_text())["columns"]
    arrays["values"][slice(None) if columns == "all" else names.index(columns), ::2] = extreme
    arrays["cloud_values"][:] = extreme
    with_arrays(folder, arrays)
    record = RunRecord.load(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = figures.available(record) | {"curves": figures.curves(record)}
        drawn["plane"] = figures.plane([figures.PlanePoint("a", 3.0, 2.0, extreme, (extreme, 4.0), (1.0, extreme))])
        for figure in drawn.values():
            assert figures.svg(figure).startswith("<svg")


def test_a_run_that_does_not_move_is_drawn(tmp_path: Path) -> None:
    """A logarithmic axis has no place for an action of 0."""
    record = RunRecord(run_description())
    for step in range(1, 9):
        record.append(step, {"loss": 1.0 / step, "action": 0.0, "elapsed": float(step)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert figures.svg(figures.curves(record)).startswith("<svg")


# --- one damaged among many


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Three runs, of which b is damaged."""
    for rate, name in ((0.01, "a"), (0.02, "b"), (0.03, "c")):
        whole_record(rate=rate).save(tmp_path / "sweep" / name)
    (tmp_path / "sweep" / "b" / "record.json").write_text('{"format": ')
    return tmp_path / "sweep"


def test_a_damaged_run_is_left_out_of_a_comparison_with_a_line(sweep: Path) -> None:
    found = compare(sweep)
    line = found.notes[0]
    assert line.startswith(f"left out: {sweep / 'b'}: record.json is no valid JSON")
    assert sum("left out" in note for note in found.notes) == 1
    assert line[:60] in str(found).replace("\n  ", " ")
    assert line in found.to_dict()["notes"]
    without = compare([sweep / "a", sweep / "c"])
    assert [g.name for g in found.groups] == [g.name for g in without.groups] == ["c", "a"]
    for with_it, without_it in zip(found.groups, without.groups, strict=True):
        np.testing.assert_equal(dict(with_it.values), dict(without_it.values))
    assert without.notes == found.notes[1:]


def test_a_replica_and_a_group_that_are_damaged(sweep: Path) -> None:
    found = compare({"first": [sweep / "a", sweep / "b"], "second": sweep / "c", "gone": sweep / "b"})
    assert {group.name: len(group.points) for group in found.groups} == {"first": 1, "second": 1}
    assert sum("left out" in note for note in found.notes) == 2


def test_where_all_are_damaged_there_is_an_error(sweep: Path) -> None:
    for name in "ac":
        (sweep / name / "record.json").write_bytes(b"\xff")
    for sources in (sweep, {"one": sweep / "a", "two": [sweep / "b", sweep / "c"]}):
        with pytest.raises(RecordError, match=r"a: record\.json is no valid JSON.*and 2 more that can't be read"):
            compare(sources)  # type: ignore[arg-type]
    with pytest.raises(RecordError, match=r"b: record\.json is no valid JSON[^;]*; the record is damaged$"):
        compare(sweep / "b")


@pytest.mark.parametrize("form", ["folder@", "list", "list of one and the damaged@", "mapping", "twice"])
def test_however_the_damaged_one_is_named(sweep: Path, form: str) -> None:
    """It is left out once, with a line, and the others are compared."""
    a, b, c = (sweep / name for name in "abc")
    sources: dict[str, Any] = {
        "folder@": f"{sweep}@0:100",
        "list": [a, str(b), c],
        "list of one and the damaged@": [f"{a}@0:100", f"{a}@100:200", f"{b}@0:100"],
        "mapping": {"first": [a, f"{b}@0:100"], "second": c},
        "twice": [sweep, b, c],
    }
    step = {"at": 50} if "@" in form else {}
    found = compare(sources[form], by="step", **step)
    assert len(found.groups) == 2
    assert [note for note in found.notes if "left out" in note] == [found.notes[0]]
    assert found.notes[0].startswith(f"left out: {b}: record.json is no valid JSON")
    assert compare_models(sources[form], by="step", **step)[0].notes == found.notes


def test_one_that_is_damaged_once_it_was_read(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of more runs than are held with their sketches: the page reads these again."""
    monkeypatch.setattr(runs, "KEEP_SKETCHES", 1)
    found = compare([sweep / "a", sweep / "c"])
    (sweep / "c" / "record.json").write_text("{")
    text = page.page([found])
    assert text.count("needs two steps with a sketch") == 1, "c's windows are not drawn, its other figures are"


def test_a_run_that_has_just_begun_is_left_out(sweep: Path) -> None:
    RunRecord(run_description() | {"parameters": 7}).save(sweep / "new")
    found = compare(sweep)
    assert "left out, without a step so far: new" in found.notes
    assert [g.name for g in found.groups] == ["c", "a"]
    with pytest.raises(ValueError, match="no steps in new; leave it out"):
        compare(sweep / "new")


def test_showing_many_leaves_the_damaged_out(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show_runs(sweep, json=False)
    shown = capsys.readouterr()
    assert "2 runs. One of them" in shown.out
    assert str(sweep / "b") not in shown.out
    assert shown.err.startswith(f"left out: {sweep / 'b'}: record.json is no valid JSON")
    show_runs(sweep, json=True)
    shown = capsys.readouterr()
    assert [found["path"] for found in json.loads(shown.out)] == [str(sweep / "a"), str(sweep / "c")]
    assert shown.err.count("\n") == 1


# --- by chance


def outcomes(home: Path, seeds: range, pages: int) -> dict[int, list[str]]:
    save_whole(home)
    trial = Trial(home)
    found = {}
    for seed in seeds:
        kind, done, folder = damaged(home, seed)
        outcome = trial.of(folder, with_page=seed % pages == 0)
        if outcome.faults:
            found[seed] = [kind, done, *outcome.faults]
    return found


def test_dozens_damaged_by_chance(tmp_path: Path) -> None:
    assert outcomes(tmp_path, range(100_000, 100_060), pages=60) == {}


@pytest.mark.slow
def test_hundreds_damaged_by_chance(tmp_path: Path) -> None:
    """Others than those of `damaged_records.json`."""
    assert outcomes(tmp_path, range(200_000, 200_600), pages=10) == {}


def test_the_trial_can_fail(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = Trial(tmp_path)
    assert trial.of(folder, with_page=False).faults == []
    edit(folder, run={"measure_every_n_steps": {"a": 1}})
    assert trial.of(folder, with_page=False).refused
    monkeypatch.setitem(RUN["properties"], "measure_every_n_steps", {})  # a field that nobody checks
    assert "TypeError" in trial.of(folder, with_page=False).faults[0]
    edit(folder, run={"measure_every_n_steps": 1, "optimizers": [{"class": "\x1b[31m"}]})
    monkeypatch.setattr(reading, "plain_text", lambda text: text)
    for module in ("record.files", "words"):
        monkeypatch.setattr(f"lightning_speedlimit.{module}.plain_text", lambda text: text)
    assert "steer" in trial.of(folder, with_page=False).faults[0]
