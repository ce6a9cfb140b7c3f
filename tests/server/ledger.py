"""A bank whose books must balance to the cent, whatever is done to the database and to its clients' connections."""

import random
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Final, Self

import psycopg

CLIENTS: Final = 8
ACCOUNTS: Final = 20
CENTS: Final = 100_000


class Ledger:
    """Clients that transfer money between accounts, and remember what they were told.

    They work inside of a ``with`` block. One that loses its connection opens another; none tries a transfer again.

    :param connect: opens an autocommit connection of the application's.
    """

    def __init__(self, connect: Callable[[], "psycopg.Connection[Any]"]) -> None:
        self._connect = connect
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._work, args=(random.Random(seed),)) for seed in range(CLIENTS)]
        #: The transfers of which a client saw the commit, and those whose COMMIT got no answer, or an error.
        self.committed: set[str] = set()
        self.unsure: set[str] = set()
        #: The errors that clients saw.
        self.refused: list[str] = []
        with connect() as conn:
            conn.execute("CREATE TABLE accounts (id integer PRIMARY KEY, cents bigint NOT NULL)")
            conn.execute(
                """CREATE TABLE transfers (id uuid PRIMARY KEY, giver integer NOT NULL, taker integer NOT NULL,
                                           cents bigint NOT NULL, at timestamptz DEFAULT clock_timestamp())"""
            )
            conn.execute("INSERT INTO accounts SELECT i, %s FROM generate_series(1, %s) i", (CENTS, ACCOUNTS))

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)

    def _work(self, chance: random.Random) -> None:
        conn: psycopg.Connection[Any] | None = None
        while not self._stop.is_set():
            transfer = f"{chance.getrandbits(128):032x}"
            sending = False
            try:
                conn = conn if conn is not None and not conn.closed else self._connect()
                with conn.transaction():
                    self._transfer(conn, transfer, chance)
                    sending = True
                self.committed.add(transfer)
            except psycopg.Error as error:
                if sending:
                    self.unsure.add(transfer)
                self.refused.append(type(error).__name__)
                if conn is not None:
                    conn.close()
                # The next try costs a connection.
                time.sleep(0.2)
            time.sleep(0.05)
        if conn is not None:
            conn.close()

    @staticmethod
    def _transfer(conn: "psycopg.Connection[Any]", transfer: str, chance: random.Random) -> None:
        giver, taker = chance.sample(range(1, ACCOUNTS + 1), 2)
        cents = chance.randint(1, 500)
        conn.execute(
            "INSERT INTO transfers (id, giver, taker, cents) VALUES (%s, %s, %s, %s)", (transfer, giver, taker, cents)
        )
        # In the order of the accounts, or two clients could wait for each other.
        for account, change in sorted([(giver, -cents), (taker, cents)]):
            conn.execute("UPDATE accounts SET cents = cents + %s WHERE id = %s", (change, account))

    def transfers_between(self, began: float, ended: float) -> int:
        """Return how many transfers were begun between two times, in seconds since 1970, and committed."""
        with self._connect() as conn:
            query = "SELECT count(*) FROM transfers WHERE at BETWEEN to_timestamp(%s) AND to_timestamp(%s)"
            row = conn.execute(query, (began, ended)).fetchone()
        assert row is not None
        return int(row[0])

    def audit(self) -> None:
        """Check that nothing is lost, doubled or done by half.

        A transfer of which a client saw the commit is there once; one whose answer was lost, once or not at all.
        """
        assert not any(thread.is_alive() for thread in self._threads)
        with self._connect() as conn:
            found = {row[0].hex for row in conn.execute("SELECT id FROM transfers")}
            total = conn.execute("SELECT sum(cents) FROM accounts").fetchone()
            wrong = conn.execute(
                """SELECT a.id, a.cents FROM accounts a
                    WHERE a.cents <> %s + (SELECT coalesce(sum(CASE WHEN taker = a.id THEN t.cents ELSE -t.cents END),
                                                           0)
                                             FROM transfers t WHERE a.id IN (taker, giver))""",
                [CENTS],
            ).fetchall()
        assert total == (ACCOUNTS * CENTS,)
        assert wrong == []
        assert self.committed <= found
        assert found <= self.committed | self.unsure
