"""The application: rows that refer to files, which come, change and go all the while."""

import hashlib
import os
import uuid
from pathlib import Path
from typing import Any, Final, LiteralString

import psycopg
from psycopg.conninfo import make_conninfo

from devtools.load import Client
from devtools.pgserver import Server
from devtools.rights import create_application_database

DATABASE: Final = "shop"
SIZES: Final = (500, 20_000)
DOCUMENTS: Final = 400

_CREATE: Final[LiteralString] = """
    CREATE TABLE documents (
        id     bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        name   text NOT NULL UNIQUE,
        size   integer NOT NULL,
        sha256 text NOT NULL
    )"""
_INSERT: Final[LiteralString] = "INSERT INTO documents (name, size, sha256) VALUES (%s, %s, %s)"
# Somebody's document, but none that another client is about to change.
_PICK: Final[LiteralString] = """
    SELECT id, name FROM documents WHERE id >= (SELECT min(id) + random() * (max(id) - min(id)) FROM documents)
     ORDER BY id LIMIT 1 FOR UPDATE SKIP LOCKED"""


def create(server: Server, files: Path) -> str:
    """Create the database with some documents, and return the connection string of the application."""
    create_application_database(server, DATABASE)
    dsn = make_conninfo(server.dsn(DATABASE, "app"), application_name="shop")
    client = Client(0, settings=files)
    with psycopg.connect(dsn, autocommit=True) as conn:
        conn.execute(_CREATE)
        for _ in range(DOCUMENTS):
            _create(conn, client)
    return dsn


def write(conn: psycopg.Connection[Any], client: Client) -> None:
    """Create, replace or delete a document; as many are created as deleted."""
    _tidy(conn, client)
    client.random.choice((_create, _replace, _delete))(conn, client)
    _tidy(conn, client)


def read(conn: psycopg.Connection[Any], client: Client) -> None:
    """Look a document up."""
    conn.execute(
        "SELECT name, size FROM documents WHERE id >= %s ORDER BY id LIMIT 1", [client.random.randrange(DOCUMENTS)]
    )


# The row comes first in each transaction: where the database is read-only, no file is touched.


def _create(conn: psycopg.Connection[Any], client: Client) -> None:
    name, body, digest = _new_document(client)
    with conn.transaction():
        conn.execute(_INSERT, [name, len(body), digest])
        _store(client, name, body)


def _replace(conn: psycopg.Connection[Any], client: Client) -> None:
    name, body, digest = _new_document(client)
    with conn.transaction():
        row = conn.execute(_PICK).fetchone()
        if row is None:
            return
        client.notes.add(row[1])
        conn.execute(
            "UPDATE documents SET name = %s, size = %s, sha256 = %s WHERE id = %s", [name, len(body), digest, row[0]]
        )
        _store(client, name, body)


def _delete(conn: psycopg.Connection[Any], client: Client) -> None:
    with conn.transaction():
        row = conn.execute(_PICK).fetchone()
        if row is None:
            return
        client.notes.add(row[1])
        conn.execute("DELETE FROM documents WHERE id = %s", [row[0]])


def _tidy(conn: psycopg.Connection[Any], client: Client) -> None:
    """Remove the files that no row refers to, after a change of which it may be unknown whether it was committed."""
    for name in sorted(client.notes):
        if conn.execute("SELECT FROM documents WHERE name = %s", [name]).fetchone() is None:
            Path(client.settings, name).unlink(missing_ok=True)
        client.notes.discard(name)


def _new_document(client: Client) -> tuple[str, bytes, str]:
    name = uuid.uuid4().hex
    body = client.random.randbytes(client.random.randrange(*SIZES))
    client.notes.add(name)
    return name, body, hashlib.sha256(body).hexdigest()


def _store(client: Client, name: str, body: bytes) -> None:
    with Path(client.settings, name).open("wb") as file:
        file.write(body)
        file.flush()
        os.fsync(file.fileno())
