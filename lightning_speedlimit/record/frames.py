"""Tables for pandas, where it is installed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pandas import DataFrame


def data_frame(columns: Mapping[str, Any], index: Mapping[str, Any]) -> DataFrame:
    """A frame of these columns; its index has a level for each entry of `index`.

    Raises:
        ImportError: pandas is not installed.
    """
    try:
        import pandas
    except ImportError as error:
        raise ImportError(
            f'to_dataframe needs pandas, got {error}; pip install "lightning-speedlimit[pandas]"'
        ) from error
    levels = [pandas.Index(values, name=name) for name, values in index.items()]
    found = levels[0] if len(levels) == 1 else pandas.MultiIndex.from_arrays(levels)
    return pandas.DataFrame(dict(columns), index=found)
