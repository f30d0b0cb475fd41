"""Texts for single sections: which section takes which, and what is no such text."""

import pytest

from musubi_tuner.config.errors import UserError
from musubi_tuner.config.section_text import Sectioned


@pytest.mark.parametrize(
    ("text", "count", "places"),
    [
        ("one for all", 3, [0, 0, 0]),
        ("0:a;;;1:b", 3, [0, 1, 0]),
        ("0:a;;;-1:b;;;-2:c", 4, [0, 0, 2, 1]),
        ("0-1:a;;;2-4:b", 5, [0, 0, 1, 1, 1]),
        ("0--2:a;;;-1:b", 3, [0, 0, 1]),
        ("2:a;;;1:b", 3, [0, 1, 0]),
        ("0-3:a;;;2:b", 4, [0, 0, 1, 0]),
    ],
)
def test_each_section_takes_the_last_value_that_covers_it_or_that_of_the_first(text, count, places):
    found = Sectioned.parse(text)
    assert [found.place(section, count) for section in range(count)] == places


def test_values_are_stripped_and_may_hold_colons_and_lines():
    found = Sectioned.parse(" 0 : a: b ;;; 1:C:/x\ny.png")
    assert found.values == ("a: b", "C:/x\ny.png")
    assert Sectioned.parse("3: not a section").values == ("3: not a section",)


def test_values_that_no_section_takes_are_known():
    assert Sectioned.parse("0:a;;;3:b;;;-5:c").unused(2) == ("b", "c")
    assert Sectioned.parse("0:a;;;0:b").unused(1) == ("a",)


@pytest.mark.parametrize("text", ["a;;;1:b", "0:a;;;", "0:a;;;x:b", "0:a;;;1-:b"])
def test_a_part_without_a_section_is_refused(text):
    with pytest.raises(UserError, match="each part begins with its section, like 0: or -1: or 1-2:"):
        Sectioned.parse(text)
