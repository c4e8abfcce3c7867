"""A few rounds of tests/races: nothing is found in the CUDA kernels, and missing barriers are."""

import runpy
from pathlib import Path

import pytest

races = runpy.run_path(str(Path(__file__).parents[1] / "races" / "__main__.py"), run_name="races")
pytestmark = pytest.mark.skipif(bool(races["missing"]()), reason=races["missing"]() or "nothing")


@pytest.mark.parametrize("file", races["DRIVERS"])
def test_the_kernels_have_no_race(file):
    assert races["share_found"](file, "", "", range(4)) == 0


@pytest.mark.parametrize("which", ["slots are written before", "no fence before the counter"])
def test_a_missing_barrier_or_fence_is_found(which):
    (fault,) = (f for f in races["FAULTS"] if which in f.name)
    assert races["share_found"](*fault[1:], range(2)) == 1
