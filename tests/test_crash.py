"""A few rounds of what crash.py does at length: nothing that is read is a mixture or damaged."""

import random

import crash
import pytest


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", crash.PARTS)
def test_nothing_wrong_is_read_and_nothing_is_left_over(part):
    found = crash.PARTS[part](4, random.Random(1))
    assert sum(found.values())
    assert not [k for k, n in found.items() if n and k.startswith(("wrong", "left"))], found
