"""No number of the configuration goes unchecked."""

import dataclasses
import math

import pytest

from jaxrl.config import Config
from jaxrl.errors import UserError
from jaxrl.ranges import RANGES, Range, check_ranges

CHECK_THEMSELVES = ("grpo", "curriculum", "preference")
RANGED = [(section, name) for section, ranges in RANGES.items() for name in ranges]


def with_value(section: str, name: str, value: float) -> Config:
    values = dataclasses.replace(getattr(Config(), section), **{name: value})
    return dataclasses.replace(Config(), **{section: values})


def test_every_number_has_a_range() -> None:
    numbers = {
        (section.name, item.name)
        for section in dataclasses.fields(Config)
        if section.name not in CHECK_THEMSELVES
        for item in dataclasses.fields(getattr(Config(), section.name))
        if type(getattr(getattr(Config(), section.name), item.name)) in (int, float)
    }
    assert numbers == set(RANGED)


@pytest.mark.parametrize(("section", "name"), RANGED)
@pytest.mark.parametrize("value", [-1, math.nan, math.inf])
def test_a_number_outside_its_range_is_named_with_what_is_allowed(
    section: str, name: str, value: float
) -> None:
    with pytest.raises(UserError, match=name):
        with_value(section, name, value)


def test_a_range_says_what_it_allows() -> None:
    assert str(Range(1)) == "at least 1"
    assert str(Range(0, open_low=True)) == "greater than 0"
    assert str(Range(0, 1, open_high=True)) == "in [0, 1)"
    assert Range(0, 1).holds(1)
    assert not Range(0, 1, open_high=True).holds(1)
    check_ranges(Config())
