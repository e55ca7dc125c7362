"""Numbers that the authors' planner printed (GraphPipe artifact): in-flight samples, step times."""

from __future__ import annotations

import pytest

from weft.plan.estimate import estimate_step_time_s, pipeline_s
from weft.plan.in_flight import in_flight_samples


@pytest.mark.parametrize(
    ("successors", "micro_batch", "expected"),
    [
        # CANDLE, sequential: six stages in a row.
        ([[1], [2], [3], [4], [5], []], 64, (384, 320, 256, 192, 128, 64)),
        # CANDLE: stage 0 holds one branch and the concat, 1-4 the other branches, 5 the rest.
        ([[5], [0], [0], [0], [0], []], 64, (128, 192, 192, 192, 192, 64)),
        # CLIP partition1: seven stages in a row, and a branch that joins before the last.
        (
            [[1], [2], [3], [4], [5], [7], [7], []],
            8,
            (56, 48, 40, 32, 24, 16, 16, 8),
        ),
        # CLIP partition3.
        ([[1], [2], [4], [4], []], 128, (512, 384, 256, 256, 128)),
    ],
)
def test_in_flight_samples_of_the_artifact(
    successors: list[list[int]], micro_batch: int, expected: tuple[int, ...]
) -> None:
    count = len(successors)
    found = in_flight_samples(successors, [micro_batch] * count, [1] * count, 1 << 20)
    assert found == expected


def test_the_two_known_points_of_the_general_rule() -> None:
    chain = [[1], [2], []]
    assert in_flight_samples(chain, [1, 2, 4], [1] * 3, 1000) == (10, 8, 4)
    assert in_flight_samples(chain, [4, 4, 4], [1] * 3, 1000) == (12, 8, 4)
    assert in_flight_samples([[1], []], [1, 2], [2, 1], 1000)[1] == 2


def test_in_flight_never_exceeds_the_batch() -> None:
    assert in_flight_samples([[1], [2], []], [4] * 3, [1] * 3, 8) == (8, 8, 4)


@pytest.mark.parametrize(
    ("batch_size", "bound", "micro_batch", "times", "successors", "printed"),
    [
        (
            1024,
            3.70979,
            8,
            [3.3873, 3.70934, 3.38062, 3.70895, 3.38075, 3.70786, 3.49199],
            [[1], [2], [3], [4], [5], [6], []],
            "3996.96",
        ),
        (
            32768,
            2.66969,
            128,
            [1.19433, 2.06478, 2.32473, 2.66956],
            [[1], [2], [3], []],
            "88536.9",
        ),
        (
            32768,
            2.62976,
            128,
            [1.1707, 2.26306, 2.18379, 2.62927, 1.32397],
            [[1], [2], [3], [], [3]],
            "87227.5",
        ),
    ],
)
def test_step_times_of_the_three_logs(
    batch_size: int,
    bound: float,
    micro_batch: int,
    times: list[float],
    successors: list[list[int]],
    printed: str,
) -> None:
    found = estimate_step_time_s(
        batch_size=batch_size,
        bottleneck_s=bound,
        micro_batch=micro_batch,
        time_per_sample_s=times,
        successors=successors,
    )
    # The logs print six digits of each input; the sum can be no more exact than they allow.
    rounding = 5e-6 * (batch_size + micro_batch * len(times)) + 0.5 * 10.0 ** -_decimals(printed)
    assert abs(found - float(printed)) <= rounding
    assert abs(found - float(printed)) / float(printed) < 2e-6


def _decimals(text: str) -> int:
    return len(text.partition(".")[2])


def test_pipeline_time_of_equal_stages_is_megatrons() -> None:
    found = pipeline_s(
        batch_size=32,
        micro_batch=4,
        time_per_sample_s=[0.25] * 4,
        successors=[[1], [2], [3], []],
    )
    assert found == (32 / 4 + 4 - 1) * 1.0
