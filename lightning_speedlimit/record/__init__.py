"""What a run leaves behind, and what it says: a table over the log steps with sketches and clouds, a summary."""

from lightning_speedlimit.record.regimes import Regime
from lightning_speedlimit.record.run import RunRecord
from lightning_speedlimit.record.schema import RecordError
from lightning_speedlimit.record.sketches import MAX_SKETCHES, SKETCH_SIZE
from lightning_speedlimit.record.summary import Summary
from lightning_speedlimit.record.tuning import Tuned
from lightning_speedlimit.record.windows import Windows

__all__ = ["MAX_SKETCHES", "SKETCH_SIZE", "RecordError", "Regime", "RunRecord", "Summary", "Tuned", "Windows"]
