"""What docker-compose.yaml prepares in its database server, run by a real one."""

import subprocess

import psycopg
import pytest

from devtools.binaries import CHECKOUT
from devtools.pgserver import Server, client

pytestmark = pytest.mark.pg(">=18")


def test_the_composed_database_can_be_frozen_by_the_role_of_airflows_connection(pg_version):
    with Server(pg_version) as server:
        script = CHECKOUT / "devtools/compose/app-db.sql"
        # As the image's entry point runs it.
        command = [str(client("psql", pg_version)), "-v", "ON_ERROR_STOP=1", "--no-psqlrc", "-f", str(script)]
        subprocess.run([*command, server.dsn()], check=True, stdin=subprocess.DEVNULL)

        with server.connect_factory("freezer", password="freezer")() as conn:
            conn.execute("ALTER DATABASE app SET default_transaction_read_only = on")
            conn.execute("CHECKPOINT")
            conn.execute("CREATE SCHEMA journal")
        with (
            pytest.raises(psycopg.errors.ReadOnlySqlTransaction),
            server.connect_factory("app", "app", password="app")() as conn,
        ):
            conn.execute("CREATE TABLE t ()")
