"""Which strategy is advised, from what is seen."""

from dataclasses import replace
from datetime import timedelta

import pytest

from pg_freeze.advise import Seen, choose

FINE = Seen(role="freezer", tables=200, locks_left=5000, locks_setting=64, sessions=40)


def test_locks_are_advised_where_nothing_keeps_them_from_working():
    advice = choose(FINE)

    assert advice.strategy == "lock"
    assert "none of 40 session(s) is ended" in advice.reasons[0]
    assert advice.as_dict()["strategy"] == "lock"


@pytest.mark.parametrize(
    ("seen", "says"),
    [
        ({"closed_to_us": ("Odd db",)}, 'GRANT CONNECT ON DATABASE "Odd db" TO freezer;'),
        ({"not_lockable": ("public.a", "public.b")}, "may not lock 2 table(s), such as public.a: GRANT pg_maintain,"),
        ({"tables": 5001, "locks_setting": 640}, "max_locks_per_transaction = 640; and restart"),
        ({"unreachable": ("no pg_hba.conf entry",)}, "no connection could be had: no pg_hba.conf entry"),
    ],
)
def test_what_keeps_locks_from_working_is_told_with_its_remedy(seen, says):
    advice = choose(replace(FINE, **seen))

    assert advice.strategy == "read-only"
    assert says in advice.reasons[0]
    assert "40 session(s) would be ended" in advice.notes[-1]


def test_a_transaction_that_outlasts_the_drain_timeout_is_noted_whichever_the_strategy():
    seen = replace(FINE, longest_transaction=timedelta(minutes=40))

    assert any("open for 2400 s" in note for note in choose(seen).notes)
    assert any("open for 2400 s" in note for note in choose(replace(seen, tables=9999)).notes)
    assert not any("open for" in note for note in choose(seen, timedelta(hours=1)).notes)


def test_a_pooler_and_the_limits_of_an_ordinary_role_are_noted():
    notes = choose(replace(FINE, pooler="pgbouncer")).notes

    assert any("pgbouncer is in front" in note for note in notes)
    assert any("new tables and large objects" in note for note in notes)
    assert choose(replace(FINE, superuser=True)).notes == ()
