"""Random lives of two databases and several holders, beside a small model of what should be frozen, and by whom."""

import time
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from devtools.asking import pause
from devtools.pgserver import Server
from devtools.rights import keep_private
from pg_freeze import Connect, DrainTimeout, FreezeRefused, LeaseLost, checkpoint, install, lingering_of, resume, status
from pg_freeze.strategies import OURS, named
from pg_freeze.strategies.base import SETTINGS, Strategy
from tests.server.clients import is_read_only, ms, settings_of, wait_until

HOLDERS = st.sampled_from(["ann", "bob"])
#: Strategy and admit, of every strategy that a pause can leave behind.
HOWS = st.sampled_from(
    [
        (name, admit)
        for name in OURS
        if named(name).outlives
        for admit in (("readers", "readers-once-drained", "nobody") if "admit" in named(name).options else ("readers",))
    ]
)


@dataclass
class Held:
    """What the model knows of one freeze."""

    holder: str
    databases: frozenset[str]
    how: tuple[str, str]
    token: Any

    @property
    def strategy(self) -> Strategy:
        return named(self.how[0])


REFUSED = (psycopg.errors.ReadOnlySqlTransaction, psycopg.errors.InsufficientPrivilege)


class Lives(RuleBasedStateMachine):
    server: Server
    names: tuple[str, str]

    @initialize()
    def begin(self) -> None:
        self.connect = self.connect_to("postgres")
        for name in ("postgres", *self.names):
            install(self.connect_to(name))
        self.held: list[Held] = []
        self.readers: list[tuple[str, psycopg.Connection[Any]]] = []
        self.before = settings_of(self.server)

    def teardown(self) -> None:
        for _, conn in self.readers:
            conn.close()
        for name in ("postgres", *self.names):
            self.server.execute("CALL pgfreeze.thaw_all()", name)
        assert settings_of(self.server) == self.before

    def connect_to(self, name: str) -> Connect:
        return self.server.connect_factory(dbname=name)

    def enter(self, name: str) -> psycopg.Connection[Any]:
        return self.connect_to(name)()

    def chosen(self, which: str) -> list[str]:
        return {"one": [self.names[0]], "other": [self.names[1]], "both": list(self.names)}[which]

    def holding(self, databases: list[str]) -> list[Held]:
        return [held for held in self.held if held.databases & set(databases)]

    def expected(self, databases: list[str], holder: str, how: tuple[str, str]) -> str:
        """Return what a pause should come to: begin, adopt or refuse."""
        there = self.holding(databases)
        if named(how[0]).own_journal and len(databases) > 1:
            return "refuse"
        if not there:
            return "begin"
        (first, *more) = there
        mine = (first.holder, first.databases, first.how) == (holder, frozenset(databases), how)
        return "adopt" if mine and not more else "refuse"

    @rule(
        holder=HOLDERS,
        which=st.sampled_from(["one", "other", "both"]),
        how=HOWS,
    )
    def pause(self, holder: str, which: str, how: tuple[str, str]) -> None:
        databases = self.chosen(which)
        expected = self.expected(databases, holder, how)
        wanted: dict[str, Any] = {"databases": databases, "holder": holder, "strategy": how[0], "admit": how[1]}
        try:
            frozen = pause(self.connect, connect_to=self.enter, **wanted)
        except FreezeRefused:
            assert expected == "refuse"
            return
        assert expected in ("begin", "adopt")
        if expected == "adopt":
            (held,) = self.holding(databases)
            assert held.token == frozen.token
        else:
            self.held.append(Held(holder, frozenset(databases), how, frozen.token))
            if named(how[0]).ends_idle:
                self.drop_readers(databases)

    @rule(holder=HOLDERS, which=st.sampled_from(["one", "other"]))
    def pause_that_is_aborted(self, holder: str, which: str) -> None:
        databases = self.chosen(which)
        if self.holding(databases):
            return
        with psycopg.connect(self.server.dsn(databases[0], "app"), autocommit=True) as writer:
            writer.execute("BEGIN")
            with pytest.raises(DrainTimeout):
                pause(self.connect, databases=databases, holder=holder, drain_timeout=ms(60), on_drain_timeout="abort")
            writer.execute("COMMIT")
        self.drop_readers(databases)

    @rule(holder=HOLDERS, which=st.sampled_from(["one", "other", "both"]))
    def checkpoint(self, holder: str, which: str) -> None:
        databases = self.chosen(which)
        mine = [held for held in self.holding(databases) if held.holder == holder and held.databases >= set(databases)]
        try:
            checkpointed = checkpoint(
                self.connect, databases=databases, holder=holder, required=False, connect_to=self.enter
            )
        except LeaseLost:
            assert mine == []
        else:
            assert [held.token for held in mine] == [checkpointed.token]

    @rule(holder=HOLDERS, which=st.sampled_from(["one", "other", "both"]), force=st.booleans())
    def resume(self, holder: str, which: str, force: bool) -> None:
        databases = self.chosen(which)
        there = self.holding(databases)
        thawed = [held for held in there if force or held.holder == holder]

        resumed = resume(self.connect, databases=databases, holder=holder, force=force, connect_to=self.enter)

        assert {freeze.token for freeze in resumed.thawed} == {held.token for held in thawed}
        assert {freeze.token for freeze in resumed.others} == {held.token for held in there if held not in thawed}
        self.forget(thawed)

    @rule(which=st.sampled_from(["one", "other"]))
    def thaw(self, which: str) -> None:
        (database,) = self.chosen(which)
        for place in ("postgres", database):
            with self.enter(place) as conn:
                conn.execute("CALL pgfreeze.thaw(%s)", [database])
        self.forget(self.holding([database]))

    @rule()
    def thaw_all(self) -> None:
        with self.connect() as conn:
            conn.execute("CALL pgfreeze.thaw_all()")
        self.forget([held for held in self.held if not held.strategy.own_journal])

    @rule()
    def thaw_expired(self) -> None:
        with self.connect() as conn:
            conn.execute("CALL pgfreeze.thaw_expired()")

    @rule(holder=HOLDERS, which=st.sampled_from(["one", "other", "both"]))
    def lease_that_lapses(self, holder: str, which: str) -> None:
        databases = self.chosen(which)
        if self.holding(databases):
            return
        with suppress(LeaseLost):  # already, on a slow machine
            assert pause(self.connect, databases=databases, holder=holder, lease=ms(300), drain_timeout=ms(200)).holds
        self.drop_readers(databases)
        wait_until(lambda: not status(self.connect, databases=databases).freezes)

    @rule(which=st.sampled_from(["one", "other"]))
    def reader_arrives(self, which: str) -> None:
        (database,) = self.chosen(which)
        there = self.holding([database])
        try:
            conn = psycopg.connect(self.server.dsn(database, "app"), autocommit=True)
        except psycopg.OperationalError:
            assert [held.how[1] for held in there] == ["nobody"]
            return
        assert not there or there[0].how[1] != "nobody"
        assert is_read_only(conn) is self.read_only(database)
        self.readers.append((database, conn))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def nobody_lingers(self, data: st.DataObject) -> None:
        held = data.draw(st.sampled_from(self.held))
        (journal,) = held.databases if held.strategy.own_journal else ("postgres",)
        assert lingering_of(self.connect_to(journal), databases=sorted(held.databases), holder=held.holder) == ()

    def read_only(self, database: str) -> bool:
        return any(SETTINGS in held.strategy.proof for held in self.holding([database]))

    def forget(self, thawed: list[Held]) -> None:
        for held in thawed:
            if held.strategy.ends_idle:
                self.drop_readers(list(held.databases))
        self.held = [held for held in self.held if held not in thawed]

    def drop_readers(self, databases: list[str]) -> None:
        """All sessions that were there are ended by a freeze, and the read-only ones by its thaw."""
        for database, conn in self.readers:
            if database in databases:
                wait_until(partial(self.is_gone, conn))
                conn.close()
        self.readers = [(database, conn) for database, conn in self.readers if database not in databases]

    @staticmethod
    def is_gone(conn: psycopg.Connection[Any]) -> bool:
        with suppress(psycopg.OperationalError):
            conn.execute("SELECT 1")
            return False
        return True

    @invariant()
    def the_journal_says_what_the_model_says(self) -> None:
        if not hasattr(self, "held"):
            return
        seen = status(self.connect, connect_to=self.enter)
        assert {freeze.token: (freeze.holder, frozenset(freeze.databases)) for freeze in seen.freezes} == {
            held.token: (held.holder, held.databases) for held in self.held
        }
        assert all(freeze.dead_man_pid for freeze in seen.freezes)
        assert seen.unexplained == ()
        assert seen.backends == ()

    @invariant()
    def the_catalogs_say_what_the_model_says(self) -> None:
        if not hasattr(self, "held"):
            return
        if not self.held:
            assert settings_of(self.server) == self.before
        for database in self.names:
            there = self.holding([database])
            try:
                with psycopg.connect(self.server.dsn(database, "app")) as conn:
                    assert is_read_only(conn) is self.read_only(database)
                    assert not there or there[0].how[1] != "nobody"
                    if there:
                        with pytest.raises(REFUSED):
                            conn.execute("INSERT INTO things DEFAULT VALUES")
            except psycopg.OperationalError:
                assert [held.how[1] for held in there] == ["nobody"]


@pytest.mark.timeout(300)
def test_random_lives_of_two_databases_agree_with_the_model(own_server, new_database):
    Lives.server = own_server
    Lives.names = (new_database(own_server), new_database(own_server))
    own_server.execute("GRANT app TO freezer")
    for name in Lives.names:
        keep_private(own_server, name)
        with own_server.connect_factory("app", name)() as app:
            app.execute("CREATE TABLE things ()")
    # Derandomized: the same lives at every run. Long ones only if there is time left.
    began = time.monotonic()
    for steps in (10, 40):
        if time.monotonic() - began < 20:
            run_state_machine_as_test(
                Lives,
                settings=settings(
                    max_examples=8,
                    stateful_step_count=steps,
                    deadline=None,
                    derandomize=True,
                    database=None,
                    phases=[Phase.explicit, Phase.generate],
                    suppress_health_check=list(HealthCheck),
                ),
            )
