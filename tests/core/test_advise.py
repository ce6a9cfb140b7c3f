"""Which strategy is advised, from what is seen."""

from dataclasses import replace
from datetime import timedelta

from pg_freeze.advise import Seen, choose

FINE = Seen(role="freezer", sessions=40)
AGAINST = "role freezer may not lock 2 table(s): GRANT pg_maintain TO freezer;"


def test_locks_are_advised_where_nothing_keeps_them_from_working():
    advice = choose(FINE)

    assert advice.strategy == "lock"
    assert "none of 40 session(s) is ended" in advice.reasons[0]
    assert advice.as_dict()["strategy"] == "lock"


def test_what_keeps_locks_from_working_is_told_with_its_remedy():
    advice = choose(replace(FINE, against=(AGAINST,)))

    assert (advice.strategy, advice.reasons) == ("read-only", (AGAINST,))
    assert "40 session(s) would be ended" in advice.notes[-1]


def test_a_transaction_that_outlasts_the_drain_timeout_is_noted_whichever_the_strategy():
    seen = replace(FINE, longest_transaction=timedelta(minutes=40))

    assert any("open for 2400 s" in note for note in choose(seen).notes)
    assert any("open for 2400 s" in note for note in choose(replace(seen, against=(AGAINST,))).notes)
    assert not any("open for" in note for note in choose(seen, timedelta(hours=1)).notes)


def test_a_pooler_and_the_limits_of_an_ordinary_role_are_noted():
    notes = choose(replace(FINE, pooler="pgbouncer")).notes

    assert any("pgbouncer is in front" in note for note in notes)
    assert any("new tables and large objects" in note for note in notes)
    assert choose(replace(FINE, superuser=True)).notes == ()
