"""Tickets: an attempt that comes too late must not freeze, and must not undo what a newer one did."""

import time
from datetime import timedelta

import pytest

from devtools.asking import pause
from pg_freeze import FreezeError, LeaseLost, State, history, resume, status
from tests.server.clients import SECONDS, background, is_read_only, ms, settings_of, wait_until


def at_the_second_connection(connect, act):
    """Return a connect that calls *act* as the dead-man switch is started: after the ticket, before the freeze."""
    opened = []

    def connect_and_act():
        opened.append(None)
        if len(opened) == 2:
            act()
        return connect()

    return connect_and_act


def test_an_attempt_that_is_resumed_before_it_freezes_freezes_nothing(connect, server, app_database):
    before = settings_of(server)
    late = at_the_second_connection(connect, lambda: resume(connect, databases=[app_database], holder="test"))

    with pytest.raises((LeaseLost, FreezeError)) as lost:
        pause(late, databases=[app_database], holder="test")

    assert isinstance(lost.value, LeaseLost)
    assert settings_of(server) == before
    assert status(connect, databases=[app_database]).freezes == ()


def test_a_resume_by_another_holder_voids_nothing(connect, app_database):
    late = at_the_second_connection(connect, lambda: resume(connect, databases=[app_database], holder="other"))

    assert pause(late, databases=[app_database], holder="test").state is State.FROZEN


def test_a_resume_of_another_database_voids_nothing(connect, new_database):
    mine, other = new_database(), new_database()
    late = at_the_second_connection(connect, lambda: resume(connect, databases=[other], holder="test"))

    assert pause(late, databases=[mine], holder="test").state is State.FROZEN


def test_a_resume_of_one_of_its_databases_voids_the_whole_attempt(connect, new_database, app_connect):
    one, other = new_database(), new_database()
    late = at_the_second_connection(connect, lambda: resume(connect, databases=[other], holder="test"))

    with pytest.raises(LeaseLost):
        pause(late, databases=[one, other], holder="test")

    assert not is_read_only(app_connect(one))


def test_an_attempt_that_began_before_its_holder_resumed_comes_too_late(connect, server, app_database):
    pause(connect, databases=[app_database], holder="test")
    resume(connect, databases=[app_database], holder="test")
    before = settings_of(server)

    with pytest.raises(LeaseLost, match="was resumed, or made a newer attempt, after this one began"):
        pause(connect, databases=[app_database], holder="test", age=SECONDS[30])

    assert settings_of(server) == before


def test_an_attempt_that_began_after_its_holder_resumed_freezes(connect, app_database):
    pause(connect, databases=[app_database], holder="test")
    resume(connect, databases=[app_database], holder="test")
    time.sleep(0.3)

    assert pause(connect, databases=[app_database], holder="test", age=ms(100)).state is State.FROZEN


def test_a_newer_attempt_takes_over_and_the_older_one_stops_without_undoing_it(connect, app_database, app_connect):
    writer = app_connect(app_database)
    writer.execute("BEGIN; CREATE TABLE t ()")
    newer = []

    def second_attempt(progress):
        if not newer:
            newer.append(pause(connect, databases=[app_database], holder="test", drain_timeout=ms(300)))

    with pytest.raises(LeaseLost):
        pause(connect, databases=[app_database], holder="test", drain_timeout=SECONDS[20], progress=second_attempt)

    (freeze,) = status(connect, databases=[app_database]).freezes
    assert freeze == newer[0]
    assert is_read_only(app_connect(app_database))


def test_an_older_attempt_that_fails_does_not_undo_the_newer_ones_freeze(connect, app_database, app_connect):
    newer = []

    def take_over_then_fail(progress):
        newer.append(pause(connect, databases=[app_database], holder="test"))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        pause(connect, databases=[app_database], holder="test", progress=take_over_then_fail)

    assert status(connect, databases=[app_database]).freezes == tuple(newer)
    assert is_read_only(app_connect(app_database))


def test_attempts_in_quick_succession_leave_one_freeze_and_the_newest_has_it(
    connect, server, app_database, app_connect
):
    writer = app_connect(app_database)
    writer.execute("BEGIN; CREATE TABLE t ()")
    before = settings_of(server)

    def attempt():
        try:
            return pause(connect, databases=[app_database], holder="test", drain_timeout=SECONDS[2])
        except LeaseLost:
            return None

    with background(attempt) as one, background(attempt) as two, background(attempt) as three:
        results = [future.result(20) for future in (one, two, three)]

    frozen = [result for result in results if result is not None]
    assert len(frozen) == 1
    (freeze,) = status(connect, databases=[app_database]).freezes
    assert freeze == frozen[0]
    resume(connect, databases=[app_database], holder="test")
    assert settings_of(server) == before


@pytest.mark.parametrize("who", ["test", "forced by another"])
def test_a_resume_during_the_drain_stops_it(connect, server, app_database, app_connect, who):
    before = settings_of(server)
    writer = app_connect(app_database)
    writer.execute("BEGIN; CREATE TABLE t ()")
    resumed = []

    def end(progress):
        if not resumed:
            resumed.append(resume(connect, databases=[app_database], holder=who, force=who != "test"))

    with pytest.raises(LeaseLost):
        pause(connect, databases=[app_database], holder="test", progress=end)

    assert len(resumed[0].thawed) == 1
    assert settings_of(server) == before
    writer.execute("COMMIT")


def test_the_age_of_an_attempt_does_not_depend_on_the_clients_clock(connect, app_database):
    # Only how long ago it began is sent; a day of age makes no difference when nobody ever resumed.
    assert pause(connect, databases=[app_database], holder="test", age=timedelta(days=1)).state is State.FROZEN


def test_tickets_of_attempts_that_ended_badly_are_void(connect, server, app_database):
    def fail(progress):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        pause(connect, databases=[app_database], holder="test", progress=fail)

    (last,) = history(connect, limit=1)
    assert wait_until(lambda: last.state is State.THAWED)
    assert server.execute(
        "SELECT count(*) FROM pgfreeze.tickets WHERE holder = 'test' AND databases = "
        f"ARRAY['{app_database}'] AND voided_at IS NULL"
    ) == [(0,)]
