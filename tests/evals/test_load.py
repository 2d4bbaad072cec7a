"""A ragged load is decoded whole in each way, and the ways take turns."""

import pytest
from oracles import tiny

from hybrid.evals.timing.load import ragged_load


@pytest.mark.parametrize("mode", ["ar", "speculative"])
def test_each_way_decodes_all_of_it(mode: str) -> None:
    found = ragged_load(tiny(), count=7, slots=3, rounds=1, shortest=2, longest=9, mode=mode)
    assert list(found) == ["as they come", "as a batch ends", "generate"] and all(speed > 0 for speed in found.values())


def test_texts_must_fit_the_context() -> None:
    with pytest.raises(ValueError, match="longest"):
        ragged_load(tiny(), count=1, slots=1, rounds=1, longest=200)
