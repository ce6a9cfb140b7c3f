"""Tags survive AWS's limits, and give back what went in."""

from datetime import UTC, datetime
from uuid import uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from airflow_pg_freeze.snapshots import SnapshotRefused
from airflow_pg_freeze.snapshots import tags as tagging
from pg_freeze import Admit, Freeze, State

SAFE = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789 +-=._:/@")
#: What PostgreSQL takes for a name: up to 63 bytes, any character but NUL.
NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=63).filter(
    lambda name: len(name.encode()) <= 63
)


@given(NAMES)
def test_any_name_comes_back(name):
    assert tagging.decode(tagging.encode(name)) == name


@given(st.lists(NAMES, min_size=1, max_size=90, unique=True))
def test_databases_come_back_until_there_is_no_room_and_then_are_counted(names):
    tags = tagging.database_tags(names)

    found = tagging.databases_of(tags)
    assert list(found) == names[: len(found)]
    assert len(names) - len(found) == int(tags.get("pg-freeze:databases-left-out", 0))


@given(st.lists(NAMES, min_size=2, max_size=90, unique=True), st.randoms())
def test_the_tags_fit_the_same_databases_in_any_order_and_no_fewer_or_other_ones(names, random):
    *told, other = names
    tags = tagging.database_tags(told)

    assert tagging.name_all(tags, random.sample(told, len(told)))
    assert not tagging.name_all(tags, names)
    assert not tagging.name_all(tags, told[1:])
    assert not tagging.name_all(tags, [other, *told[1:]])
    assert not tagging.name_all({}, told)


@given(st.lists(NAMES, min_size=1, max_size=90, unique=True), st.text(max_size=600), st.text(max_size=600))
def test_no_limit_of_aws_is_broken(names, holder, run):
    now = datetime.now(UTC)
    freeze = Freeze(uuid4(), 1, holder, tuple(names), Admit.READERS, State.FROZEN, now, now, checkpoint_lsn="0/1")

    tags = tagging.freeze_tags(
        freeze, task=run, level="strict", origin={"dag": holder, "run": run}, own={}, asked_at=now
    )

    assert len(tags) <= 50
    for key, value in tags.items():
        assert len(key) <= 128
        assert len(value) <= 256
        assert set(key + value) <= SAFE
        assert not key.startswith("aws:")


@given(st.text(min_size=200, max_size=600), st.text(min_size=200, max_size=600))
def test_what_is_too_long_stays_distinct(one, other):
    assert (tagging.bounded(one) == tagging.bounded(other)) == (one == other)


@pytest.mark.parametrize(
    ("own", "says"),
    [
        ({"k" * 129: "v"}, "longer than 128"),
        ({"k": "v" * 257}, "longer than 256"),
        ({"aws:name": "v"}, "Amazon's"),
        ({"pg-freeze:token": "v"}, "written by this operator"),
        ({"certified": "true"}, "written by this operator"),
        ({"": "v"}, "empty"),
        ({f"k{number}": "v" for number in range(51)}, "more than 50"),
    ],
)
def test_own_tags_that_aws_would_refuse_are_refused_first(own, says):
    with pytest.raises(SnapshotRefused, match=says):
        tagging.checked(own)
