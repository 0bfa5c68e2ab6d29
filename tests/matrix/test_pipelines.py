"""Every schedule with 2, 4 and 8 stages and S, 2 S and 4 S micro-batches, and what each holds. `make matrix`."""

from collections.abc import Callable

import numpy as np
import pytest
from parallel import pipelined

SCHEDULES = ("gpipe", "1f1b", "interleaved", "zb_h1")


@pytest.mark.parametrize("times", [1, 2, 4])
@pytest.mark.parametrize("stages", [2, 4, 8])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_pipeline_computes_what_one_device_does(
    schedule: str, stages: int, times: int, record_property: Callable[[str, object], None]
) -> None:
    found = pipelined.deviations(schedule, stages, times * stages)
    loss = found.pop("loss")
    record_property("pipeline", [schedule, stages, times, float(loss), max(found.values())])
    assert loss <= 1e-6 and max(found.values()) <= 1e-6, found


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_inputs_held(schedule: str, record_property: Callable[[str, object], None]) -> None:
    """GPipe holds one stage input more a micro-batch and chunk, the others none. What else grows is the batch and the table."""
    stages, counts = 2, (2, 4, 8, 16)
    held, temps = zip(*(pipelined.temp_bytes(schedule, stages, count) for count in counts), strict=True)
    slope, _ = np.polyfit(counts[1:], temps[1:], 1) / held[0]
    record_property("held", [schedule, held[0], *temps, float(slope)])
    assert slope == pytest.approx(1 if schedule == "gpipe" else 0, abs=0.1), temps
