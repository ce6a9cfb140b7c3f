"""Torn copies can be counted; with two of each kind the figures mean nothing, but that no frozen copy is torn."""

import pytest


@pytest.mark.needs("volumes")
@pytest.mark.pg("==18")
@pytest.mark.timeout(300)
def test_copies_are_counted_in_every_way_and_none_is_torn_that_was_frozen(measured, tmp_path):
    measured("benchmarks.torn", "--copies", "2")

    assert (tmp_path / "torn.md").read_text().count("\n| ") >= 5
    assert (tmp_path / "img/torn.svg").read_text().startswith("<?xml")
