"""A record as plain values, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_speedlimit.checks import arguments, guard
from lightning_speedlimit.record.files import RecordData, expected_arrays, from_json, to_json
from lightning_speedlimit.record.schema import RecordError


def state_of(data: RecordData) -> dict[str, Any]:
    """See `RunRecord.state_dict`."""
    return {
        "run": from_json(to_json(data.run)),
        "reasons": data.reasons,
        "columns": data.columns,
        "sketch_state": data.sketch_state,
        **({"cloud_layers": data.cloud_layers} if data.cloud_layers else {}),
        **({"layer_names": data.layer_names} if data.layer_names else {}),
        "arrays": {name: getattr(data, name) for name in expected_arrays(*data.counts)},
    }


def data_of(state: Mapping[str, Any]) -> RecordData:
    """See `RunRecord.from_state_dict`; unchecked."""
    arguments.check_kind("state", state, Mapping, "a dict: what state_dict() returned")
    try:
        return RecordData(
            run=from_json(to_json(state["run"])),
            reasons=arguments.texts("reasons", state["reasons"]),
            columns=[str(name) for name in state["columns"]],
            sketch_state={str(name): int(value) for name, value in state["sketch_state"].items()},
            cloud_layers=[str(name) for name in state.get("cloud_layers", [])],
            layer_names=[str(name) for name in state.get("layer_names", [])],
            **state["arrays"],
        )
    except Exception as error:  # whatever the objects in it may raise
        told = guard.told(error)
        raise RecordError(f"not the state of a RunRecord: {told}; pass what state_dict() returned") from error
