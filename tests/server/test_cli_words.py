"""Times and command lines, as people type and paste them."""

import argparse
import subprocess
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pg_freeze.cli.words import age, command, duration, moment, process_age, spoken
from pg_freeze.names import identifier, literal, visible

# What PostgreSQL and a command line can hold.
NAMES = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=20)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 90),
        ("90s", 90),
        ("15m", 900),
        ("1h30m", 5400),
        ("1h30", 3630),
        ("0.5", 0.5),
        (".5s", 0.5),
        ("1.5m", 90),
        ("2d", 172800),
        ("0", 0),
        (" 20S ", 20),
    ],
)
def test_a_time_may_be_given_in_several_ways(text, seconds):
    assert duration(text) == timedelta(seconds=seconds)


@pytest.mark.parametrize("text", ["", "s", "abc", "-5", "1e9", "nan", "inf", "5 m", "1m1h", "\uff19", "400d", "9" * 99])
def test_what_is_no_time_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError):
        duration(text)


@pytest.mark.parametrize(
    ("text", "days"), [("90d", 90), (" 1D ", 1), ("1d12h", 1.5), ("0.5d", 0.5), ("86400s", 1), ("36525d", 36525)]
)
def test_an_age_has_a_unit(text, days):
    assert age(text) == timedelta(days=days)


@pytest.mark.parametrize(
    ("text", "advice"), [("90", "90d"), (" 90 ", "90d"), ("0", "0d"), ("1.5", "90d"), ("1d12", "90d")]
)
def test_an_age_without_a_unit_is_refused_and_says_what_to_type(text, advice):
    with pytest.raises(argparse.ArgumentTypeError, match=f"such as {advice} for days"):
        age(text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (0.34, "0.3 s"),
        (9.96, "10 s"),
        (59.7, "1 min"),
        (200, "3 min 20 s"),
        (7500, "2 h 5 min"),
        (90000, "1 d 1 h"),
        (-3, "3.0 s"),
    ],
)
def test_a_time_is_told_in_its_two_largest_units(seconds, text):
    assert spoken(timedelta(seconds=seconds)) == text


def test_a_moment_is_told_with_its_distance_from_now():
    when = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    assert moment(when, when - timedelta(minutes=2)) == "2026-01-02 03:04:05 UTC (in 2 min)"
    assert moment(when, when + timedelta(seconds=61)) == "2026-01-02 03:04:05 UTC (1 min 1 s ago)"
    assert moment(None) == "-"


def test_this_process_has_lived_for_a_while():
    assert timedelta(0) < process_age() < timedelta(hours=1)


@settings(max_examples=60, deadline=None)
@given(name=NAMES, holder=NAMES)
def test_any_shell_reads_a_printed_command_as_it_was_meant(name, holder):
    line = command("resume", ("--conn-id=x",), (name,), holder)
    assert line.isprintable()
    # The program's own words give way to one that tells what it was given.
    words = line[line.index(" resume ") :]
    telling = "eval \"$(printf 'printf \\047%%s\\1340\\047" if line.startswith("eval ") else "printf '%s\\0'"
    told = subprocess.run(["sh", "-c", telling + words], capture_output=True, check=True).stdout
    given_words = told.decode().split("\0")[:-1]
    values = " ".join(given_words[2:])
    assert values in {
        f"{database} {owner}"
        for database in (f"--database {name}", f"--database={name}")
        for owner in (f"--holder {holder}", f"--holder={holder}")
    }


@given(NAMES)
def test_nothing_that_a_terminal_acts_upon_is_shown(name):
    assert visible(name + "\x1b[2J").isprintable()


@pytest.mark.parametrize(
    "name", ["plain", "it's", 'a"b', "back\\slash", "\x1b[31mred's\\", "new\nline", "ünï\u202ecode"]
)
def test_a_server_reads_a_printed_name_as_it_was_meant(connect, name):
    assert literal(name).isprintable()
    assert identifier(name).isprintable()
    with connect() as conn:
        statement = f"SELECT {literal(name)}, {literal(name)} AS {identifier(name)}"
        row = conn.execute(statement.encode())
        assert row.fetchone() == (name, name)
        assert row.description is not None
        assert row.description[1].name == name
