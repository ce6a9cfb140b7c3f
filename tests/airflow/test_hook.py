import json
import shutil
import socket
import struct
import subprocess
import sys
import threading
from contextlib import closing, suppress
from urllib.parse import parse_qs, urlsplit

import psycopg
import pytest
from moto.server import ThreadedMotoServer
from psycopg import sql

from airflow_pg_freeze.hooks import PgFreezeHook
from devtools.pgserver import password
from pg_freeze import FreezeRefused, InvalidRequest, ServerLost


def test_it_connects_to_the_maintenance_database_in_autocommit(connection, app_database):
    hook = PgFreezeHook(connection(app_database, user="freezer"))

    with closing(hook.connect()) as conn:
        assert isinstance(conn, psycopg.Connection)
        assert conn.autocommit
        assert (conn.info.dbname, conn.info.user) == ("postgres", "freezer")
    assert hook.databases() == (app_database,)


def test_another_maintenance_database_can_be_chosen(connection, app_database, new_database):
    other = new_database()
    with closing(PgFreezeHook(connection(app_database), maintenance_database=other).connect()) as conn:
        assert conn.info.dbname == other


def test_what_postgres_hook_inherits_uses_the_same_connection(connection, app_database):
    assert PgFreezeHook(connection(app_database)).get_first("SELECT current_database()") == ("postgres",)


def test_each_call_opens_another_connection(connection, app_database):
    hook = PgFreezeHook(connection(app_database))

    with closing(hook.connect()) as one, closing(hook.connect()) as two:
        assert one.info.backend_pid != two.info.backend_pid


def test_the_airflow_connection_is_looked_up_once(connection, app_database, monkeypatch):
    hook = PgFreezeHook(connection(app_database))
    hook.connect().close()
    monkeypatch.delenv("AIRFLOW_CONN_PG")

    hook.connect().close()


def test_it_uses_psycopg_3_where_airflow_would_use_psycopg_2(connection, app_database):
    # PostgresHook chooses by SQLAlchemy's version when it is imported; an older Airflow comes with 1.4.
    told = """
import airflow.providers.common.compat.sdk, sqlalchemy
sqlalchemy.__version__ = "1.4.54"
from airflow.providers.postgres.hooks import postgres
from airflow_pg_freeze.hooks import PgFreezeHook
print(postgres.USE_PSYCOPG3, type(postgres.PostgresHook("pg").get_conn()).__module__)
print(type(PgFreezeHook("pg").get_conn()).__module__)
"""
    connection(app_database)
    said = subprocess.run([sys.executable, "-W", "ignore", "-c", told], check=True, capture_output=True, text=True)

    assert said.stdout.split() == ["False", "psycopg2.extensions", "psycopg"]


def test_options_of_libpq_in_the_extras_are_used_and_airflows_own_are_not(connection, app_database):
    hook = PgFreezeHook(
        connection(
            app_database,
            cursor="realdictcursor",
            sqlalchemy_scheme="postgresql+psycopg2",
            iam=False,
            aws_conn_id="aws_default",
            autocommit=False,
            connect_timeout=3,
            options="-c search_path=elsewhere -c work_mem=77kB",
        )
    )
    with closing(hook.connect()) as conn:
        used = conn.info.get_parameters()
        assert conn.autocommit
        assert conn.execute("SHOW work_mem").fetchone() == ("77kB",)
        assert conn.execute("SHOW search_path").fetchone() == ("pg_catalog,pg_temp",)  # what our safety rests on
    assert used["connect_timeout"] == "3"
    assert used["keepalives_idle"] == "10"


def test_an_extra_that_libpq_does_not_know_is_refused_without_showing_it(connection, app_database):
    hook = PgFreezeHook(connection(app_database, sslmod="require"))

    with pytest.raises(InvalidRequest, match="sslmod") as refused:
        hook.connect()
    assert "require" not in str(refused.value)


def test_a_connection_without_a_database_asks_for_one(connection):
    hook = PgFreezeHook(connection(None))

    assert hook.databases("one") == ("one",)
    assert hook.databases(["one", "two"]) == ("one", "two")
    with pytest.raises(FreezeRefused, match="'pg' has no schema"):
        hook.databases()


@pytest.fixture
def encrypted_server(server_factory, tmp_path):
    """A server that only lets encrypted connections in, and the certificate that it shows."""
    server = server_factory(version=15, hba=["hostnossl all freezer 127.0.0.1/32 reject"])
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=127.0.0.1"]
    for name in ("server", "stranger"):
        files = ["-keyout", tmp_path / f"{name}.key", "-out", tmp_path / f"{name}.crt"]
        subprocess.run([*make, "-addext", "subjectAltName=IP:127.0.0.1", *files], check=True, capture_output=True)
    owner = server.data.stat()
    for name in ("server.crt", "server.key"):
        shutil.copy(tmp_path / name, server.data)
        shutil.chown(server.data / name, owner.st_uid, owner.st_gid)
        (server.data / name).chmod(0o600)
    server.execute("ALTER SYSTEM SET ssl = on")
    server.restart()
    return server, tmp_path


# Of all the servers that tests run on, only Debian's are built with SSL.
@pytest.mark.needs("postgresql15")
def test_encryption_and_certificates_are_as_the_connection_says(encrypted_server, connection):
    server, certificates = encrypted_server

    def connect(sslmode, certificate=None):
        extra = {"sslmode": sslmode} | ({"sslrootcert": str(certificates / certificate)} if certificate else {})
        with closing(PgFreezeHook(connection("app", server=server, **extra)).connect()) as conn:
            return conn.pgconn.ssl_in_use

    assert connect("require")
    assert connect("verify-full", "server.crt")
    with pytest.raises(psycopg.OperationalError, match="certificate verify failed"):
        connect("verify-full", "stranger.crt")
    with pytest.raises(psycopg.OperationalError, match=r"pg_hba\.conf rejects"):
        connect("disable")


#: AuthenticationCleartextPassword.
ASK_FOR_PASSWORD = b"R" + struct.pack("!II", 8, 3)


class TokenChecker:
    """Stands before a server as RDS does: takes the password for a token, looks at it, and lets its bearer in."""

    def __init__(self, server):
        self.server, self.tokens = server, []
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self):
        self._socket.close()

    def _accept(self):
        with suppress(OSError):
            while True:
                client, _ = self._socket.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client):
        with suppress(OSError), client:
            startup = client.recv(1 << 16)
            client.sendall(ASK_FOR_PASSWORD)
            answer = client.recv(1 << 16)
            self._admit(answer[5:-1].decode())
            with socket.create_connection(("127.0.0.1", self.server.port)) as upstream:
                upstream.sendall(startup)
                assert upstream.recv(len(ASK_FOR_PASSWORD)) == ASK_FOR_PASSWORD
                upstream.sendall(answer)
                threading.Thread(target=self._pass_on, args=(upstream, client), daemon=True).start()
                self._pass_on(client, upstream)

    def _pass_on(self, source, target):
        with suppress(OSError):
            while received := source.recv(1 << 16):
                target.sendall(received)

    def _admit(self, token):
        self.tokens.append(token)
        asked = parse_qs(urlsplit(f"https://{token}").query)
        if asked.get("Action") == ["connect"] and asked.get("DBUser") == ["freezer"]:
            self.server.execute(sql.SQL("ALTER ROLE freezer PASSWORD {}").format(sql.Literal(token)))


@pytest.fixture
def rds(server_factory):
    server = server_factory(hba=["host all freezer 127.0.0.1/32 password"])
    with closing(TokenChecker(server)) as checker:
        yield checker


@pytest.fixture
def aws(monkeypatch):
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    moto.start()
    host, port = moto.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    extra = {"region_name": "eu-west-1", "role_arn": "arn:aws:iam::123456789012:role/freezer"}
    login = {"conn_type": "aws", "login": "AKIAIOSFODNN7EXAMPLE", "password": "a secret key", "extra": extra}
    monkeypatch.setenv("AIRFLOW_CONN_AWS_FREEZER", json.dumps(login))
    yield moto
    with suppress(RuntimeError):
        moto.stop()


def test_a_token_of_aws_is_the_password_and_an_undo_does_not_need_another(rds, aws, connection):
    options = {"sslmode": "disable", "gssencmode": "disable"}
    hook = PgFreezeHook(connection("app", user="freezer", server=rds, iam=True, aws_conn_id="aws_freezer", **options))
    with closing(hook.connect()) as conn:
        assert conn.info.user == "freezer"
    aws.stop()
    with closing(hook.connect()) as conn:
        assert conn.info.user == "freezer"

    assert len(rds.tokens) == 2
    assert len(set(rds.tokens)) == 1
    assert rds.tokens[0].startswith(f"127.0.0.1:{rds.port}/?Action=connect&DBUser=freezer&")
    assert password("freezer") not in rds.tokens[0]


def test_without_a_token_the_server_counts_as_lost(rds, connection):
    hook = PgFreezeHook(connection("app", user="freezer", server=rds, iam=True, aws_conn_id="no_such_connection"))

    with pytest.raises(ServerLost, match="no IAM token for 'pg'"):
        hook.connect()
    assert rds.tokens == []
