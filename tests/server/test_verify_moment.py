"""A copy in which what was frozen is not there at all, or of which it cannot be known when it was taken."""

from __future__ import annotations

import os

import pytest

from pg_freeze import resume
from tests.server.copies import copied, frozen_copies, verify


@pytest.fixture
def database(own_server, new_database):
    name = new_database(own_server)
    own_server.execute("CREATE TABLE things AS SELECT i AS id FROM generate_series(1, 1000) i", dbname=name)
    return name


@pytest.mark.every_version
def test_a_copy_without_a_database_that_was_frozen_is_not_good(own_server, database):
    def drop():
        own_server.execute(f"DROP DATABASE {database} WITH (FORCE)")

    with frozen_copies(own_server, [database], meanwhile=drop) as copies:
        found = verify(copies.clone(), own_server)
    said = " ".join(found.problems)
    assert f"'{database}' was frozen, and of these 1 databases the copy has 0: OID" in said
    if own_server.version == 18:
        assert "a row changed while" in said  # the record of DROP DATABASE
        assert "Database/DROP" in said


LOOKS_LIKE_A_RECORD = (
    "x\\nrmgr: Heap        len (rec/tot):     59/    59, tx:        735, lsn: 0/0{lsn}, prev 0/0{lsn}, "
    "desc: INSERT off: 1, blkref #0: rel 1663/{oid}/16500 blk 0\\n"
)


# Where pg_waldump comes with the server.
@pytest.mark.pg("==18.*")
def test_a_reader_s_text_in_the_wal_is_no_error_and_no_record(own_server, database):
    oid = own_server.execute(f"SELECT oid FROM pg_database WHERE datname = '{database}'")[0][0]

    def say(*texts):
        for text in texts:
            own_server.execute(f"SELECT pg_logical_emit_message(false, E'{text}', '')")
        own_server.execute("SELECT pg_switch_wal()")  # written out, so that a copy has it

    with frozen_copies(own_server, [database], meanwhile=lambda: say("x\\nerror\\n")) as copies:
        assert verify(copies.clone(), own_server).problems == ()
        resume(own_server.connect_factory(), databases=[database], holder="copier")
    line = LOOKS_LIKE_A_RECORD.format(lsn="1549510", oid=oid)
    with frozen_copies(own_server, [database], meanwhile=lambda: say(line)) as copies:
        alone, told = verify(copies.clone(), own_server), copies.verify(copies.clone())
    assert len(alone.problems) == 1
    assert "is not known: give the closed attestation" in alone.problems[0]
    assert told.problems == ()
    assert "the copy's own WAL, for changes of rows: it has a text that looks like a record" in told.unseen


# Where pg_waldump comes with the server.
@pytest.mark.pg("==18.*")
def test_the_wal_of_a_server_that_was_promoted_is_read(own_server, database):
    own_server.stop()
    signal = own_server.data / "standby.signal"
    signal.write_text("")
    os.chown(signal, own_server.data.stat().st_uid, own_server.data.stat().st_gid)
    own_server.start()
    own_server.execute("SELECT pg_promote()")
    own_server.execute("CHECKPOINT")

    with frozen_copies(own_server, [database]) as copies:
        good = verify(copies.clone(), own_server)
        with own_server.control(database) as session:
            session.execute("SET default_transaction_read_only = off")
            session.execute("DELETE FROM things WHERE id = 1")
        spoilt = verify(copied(own_server.data, copies.place / "late"), own_server)
    assert good.problems == ()
    assert "the copy's own WAL, from the first look at the freeze on" in good.looked_at
    assert any("a row changed while" in one and "Heap/DELETE" in one for one in spoilt.problems)


def wal_file(server, lsn):
    query = f"SELECT file_name, file_offset FROM pg_walfile_name_offset('{lsn}')"
    return server.execute(query)[0]


def cut(copy, name, at):
    file = copy / "pg_wal" / name
    with file.open("r+b") as out:
        out.seek(at)
        out.write(bytes(file.stat().st_size - at))


# Where pg_waldump comes with the server.
@pytest.mark.pg("==18.*")
def test_wal_that_ends_inside_a_record_is_recovered_without_a_row_having_changed(own_server, database):
    places = []

    def long_message():
        places.extend(own_server.execute("SELECT pg_current_wal_insert_lsn()::text")[0])
        own_server.execute("SELECT pg_logical_emit_message(true, 'pad', repeat('x', 20000))")

    with frozen_copies(own_server, [database], meanwhile=long_message) as copies:
        name, offset = wal_file(own_server, places[0])
        cut(copies.taken, name, (offset // 8192 + 1) * 8192)
        assert verify(copies.taken, own_server).problems == ()


@pytest.mark.every_version
def test_a_copy_that_has_lost_the_wal_of_its_first_look_is_not_good_and_says_why(own_server, database):
    # Else the checkpoint may recycle what is to be lost.
    own_server.execute("ALTER SYSTEM SET wal_keep_size = '1GB'")
    own_server.execute("SELECT pg_reload_conf()")
    control, places = own_server.data / "global" / "pg_control", []

    def write_out():
        places.extend(own_server.execute("SELECT checkpoint_lsn::text FROM pg_control_checkpoint()")[0])
        places.append(control.read_bytes())
        own_server.execute("CHECKPOINT")

    with frozen_copies(own_server, [database], meanwhile=write_out) as copies:
        name, offset = wal_file(own_server, places[0])
        (copies.taken / "global" / "pg_control").write_bytes(places[1])
        cut(copies.taken, name, offset + 200)
        found = " ".join(copies.verify(copies.taken).problems)
        assert "the copy was taken before the first look of attestation" in found
        assert "cannot be undone: attempted to update invisible tuple" in found
