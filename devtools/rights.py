"""The least rights that a freeze needs: what the documentation tells people to grant, and what every test runs with."""

from typing import Final

from devtools.pgserver import Server

FREEZER: Final = "freezer"
OWNER: Final = "app_owner"
APP: Final = "app"


def checkpointer(version: int) -> str:
    """Return a role that may freeze and CHECKPOINT: before PostgreSQL 15 no role but a superuser may."""
    return FREEZER if version >= 15 else "super_freezer"


def create_roles(server: Server) -> None:
    """Create the three roles that a site has: who freezes, who owns the application's databases, who uses them.

    ``freezer`` is no superuser and has no CREATEROLE. It may alter the databases because it is a member of their owner.
    """
    server.create_role(FREEZER)
    server.create_role(OWNER, "NOLOGIN")
    server.create_role(APP)
    server.execute("GRANT pg_read_all_stats, pg_signal_backend TO freezer")
    if server.version >= 15:
        server.execute("GRANT pg_checkpoint TO freezer")
    else:
        server.create_role(checkpointer(server.version), "LOGIN SUPERUSER")
        # What the one has installed the other may use: the attribute SUPERUSER is not inherited.
        server.execute("GRANT super_freezer TO freezer")
    # For a journal of its own. Where superusers use it as well, one of them installs it, and grants it.
    server.execute("GRANT CREATE ON DATABASE postgres TO freezer")
    server.execute("GRANT app_owner TO freezer")
    # Every database is a copy of this one: so none has to be entered for it, which costs as much as creating it.
    server.execute("GRANT CREATE ON SCHEMA public TO app", "template1")


def create_application_database(server: Server, name: str) -> None:
    """Create database *name* of the owner's, in which the application's role may create tables."""
    server.create_database(name, OWNER)


def keep_private(server: Server, database: str) -> None:
    """Let nobody but the application create in the schema public, and its owner own it, as is so from 15 on."""
    if server.version < 15:
        server.execute("REVOKE CREATE ON SCHEMA public FROM PUBLIC; ALTER SCHEMA public OWNER TO app_owner", database)
