"""What a record may hold, in the words of JSON Schema (of which `check` knows the few that are used here)."""

from __future__ import annotations

from typing import Any

from lightning_speedlimit.record.sketches import MAX_SKETCHES, SKETCH_SIZE
from lightning_speedlimit.words import plain_text

FORMAT = "lightning-speedlimit record"
FORMAT_VERSION = 3  # 1: had no clouds, 2: no layers; a record without them is still written as such

MAX_NESTING = 32  # lists and objects within each other; what a run says of itself has 5
MAX_INTEGER = 2**53  # steps, counts: exact in float64

Schema = dict[str, Any]


class RecordError(ValueError):
    """A record that can't be read: what was found, what was wanted, and the cure."""

    def __init__(self, text: str) -> None:
        super().__init__(plain_text(text))


def _integer(minimum: int = -MAX_INTEGER, maximum: int = MAX_INTEGER) -> Schema:
    return {"type": "integer", "minimum": minimum, "maximum": maximum}


def _or_null(schema: Schema) -> Schema:
    return schema | {"nullable": True}


_TEXT: Schema = {"type": "string"}
_TEXTS: Schema = {"type": "array", "items": _TEXT}

# The integers of the shelf of sketches.
_LEAST = {"stride": 1, "ticks_seen": 0, "newest_step": -1, "last_is_provisional": 0}
SKETCH_STATE: Schema = {
    "type": "object",
    "required": list(_LEAST),
    "properties": {name: _integer(least) for name, least in _LEAST.items()},
}

# What the package reads from a run's description; anything else may stand beside it. None of it has to be there.
RUN: Schema = {
    "type": "object",
    "properties": {
        "clock": {"enum": ["steps", "lr"]},
        "entropy_production": _or_null(_TEXT),
        "monitor": _or_null(_TEXT),
        "loss_window": _or_null(_integer(1)),
        "measure_every_n_steps": _or_null(_integer(1)),
        "since_step": _or_null(_integer(0)),
        "stretch": {
            "type": "object",
            "required": ["start", "stop"],
            "properties": dict.fromkeys(("start", "stop"), _integer(0)),
        },
        "ended": _or_null(_TEXT),  # by what a fit did; None: it goes on, or was killed
        "written": _or_null({"type": "number"}),  # s since 1970
        "pause": _or_null({"type": "number"}),  # s until the next write
        "model": _or_null(_TEXT),
        **dict.fromkeys(("parameters", "trainable_parameters"), _or_null(_integer(0))),
        **dict.fromkeys(("measured_coordinates", "optimized_coordinates"), _or_null(_integer(0))),
        "batch_norm_layers": _or_null(_integer(0)),
        "lr_schedules": _TEXTS,
        "strategy": _or_null(_TEXT),
        "world_size": _or_null(_integer()),
        "samples_per_step": _or_null({"type": "number"}),
        **dict.fromkeys(("batch_size", "batches_per_epoch", "accumulate_grad_batches"), _or_null(_integer())),
        "samples_without_replacement": _or_null(_integer(1)),
        "optimizers": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"class": _TEXT, "groups": {"type": "array", "items": {"type": "object"}}},
            },
        },
        "versions": {"type": "object", "additionalProperties": _TEXT},
        "hparams": {"type": "object"},
        "logger": {
            "type": "object",
            "properties": {"tags": _TEXTS, **dict.fromkeys(("class", "name", "project", "id"), _TEXT)},
        },
    },
}

# record.json
DOCUMENT: Schema = {
    "type": "object",
    "required": ["format", "format_version", "run", "reasons", "columns", "rows", "sketches", "data"],
    "properties": {
        "format": {"enum": [FORMAT]},
        "format_version": _integer(1, FORMAT_VERSION),
        "run": {"type": "object"},  # by RUN, once its values are those that were given
        "reasons": {"type": "object", "additionalProperties": _TEXT},
        "columns": _TEXTS,
        "rows": _integer(0),
        "sketches": {
            "type": "object",
            "required": ["count", "size", *_LEAST],
            "properties": {
                "count": _integer(0, MAX_SKETCHES),
                "size": _integer(SKETCH_SIZE, SKETCH_SIZE),
                **SKETCH_STATE["properties"],
            },
        },
        "clouds": {
            "type": "object",
            "required": ["rows", "layers"],
            "properties": {"rows": _integer(0), "layers": _TEXTS},
        },
        "layers": _TEXTS,
        "data": {
            "type": "object",
            "required": ["file", "size", "sha256"],
            "properties": {"file": _TEXT, "size": _integer(1), "sha256": _TEXT},
        },
    },
}

_TYPES: dict[str, type | tuple[type, ...]] = {
    "object": dict,
    "array": list,
    "string": str,
    "integer": int,
    "number": (int, float),
}
_WORDS = {"object": "an object", "array": "a list", "string": "text", "integer": "an integer", "number": "a number"}


def check(value: Any, schema: Schema, where: str) -> None:
    """Raises RecordError where a value is not as its schema says: the place, what it must be, and what it is.

    Args:
        where: what the value is called; places within it are "where.key" and "where[0]".
    """
    if value is None and schema.get("nullable"):
        return
    if not _is_of_kind(value, schema):
        raise RecordError(f"{where} must be {_words(schema)}, got {value!r:.80}")
    if isinstance(value, list):
        for place, item in enumerate(value):
            check(item, schema.get("items", {}), f"{where}[{place}]")
    if isinstance(value, dict):
        missing = [key for key in schema.get("required", ()) if key not in value]
        if missing:
            raise RecordError(f"{where} must have {missing[0]!r}, got {list(value)!r:.80}")
        known, others = schema.get("properties", {}), schema.get("additionalProperties", {})
        for key, item in value.items():
            if of_this := known.get(key, others):
                check(item, of_this, f"{where}.{key}" if key.isidentifier() else f"{where}[{key!r:.80}]")


def _is_of_kind(value: Any, schema: Schema) -> bool:
    if "enum" in schema:
        return isinstance(value, str) and value in schema["enum"]
    if "type" not in schema:
        return True
    if not isinstance(value, _TYPES[schema["type"]]) or isinstance(value, bool):
        return False
    return schema["type"] != "integer" or bool(schema["minimum"] <= value <= schema["maximum"])


def _words(schema: Schema) -> str:
    if "enum" in schema:
        words = " or ".join(map(repr, schema["enum"]))
    else:
        words = _WORDS[schema["type"]]
        if schema["type"] == "integer":
            words += f" from {schema['minimum']} to {schema['maximum']}"
    return words + (" or null" if schema.get("nullable") else "")


def check_nesting(value: Any, where: str, most: int = MAX_NESTING) -> None:
    """Raises RecordError where lists and objects are nested too deeply for what walks through them later."""
    level = [value]
    for _ in range(most):
        level = [item for inner in level for item in _items(inner) if isinstance(item, list | dict)]
        if not level:
            return
    raise RecordError(f"{where} must not be nested more than {most} deep; the record is damaged")


def _items(value: Any) -> Any:
    return value.values() if isinstance(value, dict) else value
