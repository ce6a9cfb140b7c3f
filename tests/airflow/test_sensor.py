import json
import threading
from datetime import timedelta

import pytest
from airflow.providers.common.compat.sdk import AirflowSensorTimeout

from airflow_pg_freeze.sensors import PgLingeringBackendsSensor
from airflow_pg_freeze.triggers import PgLingeringBackendsTrigger
from devtools.asking import pause
from devtools.pgserver import password
from devtools.rights import keep_private
from pg_freeze import resume


@pytest.fixture
def connect(server):
    """As a role that is no superuser on any version: a superuser could end every session."""
    return server.connect_factory("freezer")


@pytest.fixture
def superuser(super_connect, app_database):
    """A session that the role of the connection may not end."""
    return super_connect(app_database)


@pytest.fixture
def frozen(superuser, connect, app_database):
    yield pause(connect, databases=[app_database], holder="me")
    resume(connect, databases=[app_database], holder="me")


@pytest.fixture
def sensor(connection, app_database):
    conn_id = connection(app_database, user="freezer")

    def define(**arguments):
        return PgLingeringBackendsSensor(
            **{"task_id": "wait", "postgres_conn_id": conn_id, "holder": "me", "poke_interval": 0.1, **arguments}
        )

    return define


def in_a_while(act):
    """Return a pre_execute hook that lets *act* happen two seconds after the task has begun."""
    begun = []

    def hook(_):
        if not begun:
            begun.append(True)
            threading.Timer(2, act).start()

    return hook


def test_sessions_that_cannot_be_ended_are_reported_and_not_waited_for(sensor, superuser, frozen, new_dag, run):
    with new_dag() as dag:
        sensor()
    finished = run(dag)

    assert finished.states == {"wait": "success"}
    assert [backend["pid"] for backend in finished.xcoms["wait"]["lingering"]] == [superuser.info.backend_pid]


@pytest.mark.parametrize("how", [{"mode": "poke"}, {"mode": "reschedule"}, {"deferrable": True}], ids=str)
def test_it_waits_until_they_have_gone_if_so_asked(how, sensor, superuser, frozen, new_dag, run, capfd, caplog):
    pid = superuser.info.backend_pid
    with new_dag() as dag:
        sensor(wait_for_superusers=True, pre_execute=in_a_while(superuser.close), **how)
    finished = run(dag)

    assert finished.states == {"wait": "success"}
    assert finished.xcoms["wait"] == {"lingering": []}
    said = capfd.readouterr()
    assert f"pid {pid} of" in said.out + said.err
    assert ("running trigger in line" in caplog.text) is bool(how.get("deferrable"))


@pytest.mark.parametrize("deferrable", [False, True])
def test_it_finds_the_journal_inside_a_database_that_is_frozen_by_privileges(
    deferrable, connect, sensor, server, superuser, app_database, new_dag, run, caplog
):
    def inside(name):
        return server.connect_factory("freezer", name)()

    server.execute("GRANT app TO freezer")
    keep_private(server, app_database)
    server.execute("CREATE TABLE things (name text)", app_database)
    superuser.execute("BEGIN; LOCK TABLE things IN ROW EXCLUSIVE MODE")
    pause(connect, databases=[app_database], holder="me", strategy="privileges", drain_timeout=1, connect_to=inside)
    with new_dag() as dag:
        sensor(wait_for_superusers=True, deferrable=deferrable, pre_execute=in_a_while(superuser.close))
    finished = run(dag)
    resume(connect, databases=[app_database], holder="me", connect_to=inside)

    assert finished.states == {"wait": "success"}
    assert finished.xcoms["wait"] == {"lingering": []}
    assert ("running trigger in line" in caplog.text) is deferrable


@pytest.mark.parametrize("mode", ["poke", "reschedule"])
def test_its_timeout_names_who_lingers(mode, sensor, superuser, frozen, new_dag, run, capfd):
    with new_dag() as dag:
        sensor(wait_for_superusers=True, mode=mode, timeout=0.5)
    finished = run(dag)

    assert finished.states == {"wait": "failed"}
    said = capfd.readouterr()
    assert f"1 session(s) may still write: pid {superuser.info.backend_pid} of" in said.out + said.err


def test_a_timeout_in_the_triggerer_names_who_lingers(sensor, superuser, frozen):
    # What the task runner calls after the trigger's timeout.
    with pytest.raises(AirflowSensorTimeout, match=f"pid {superuser.info.backend_pid} of"):
        sensor(wait_for_superusers=True).resume_execution("__fail__", {"error": "Trigger timeout"}, {})


def test_a_timeout_skips_with_soft_fail(sensor, superuser, frozen, new_dag, run):
    with new_dag() as dag:
        sensor(wait_for_superusers=True, timeout=0.3, soft_fail=True)

    assert run(dag).states == {"wait": "skipped"}


def test_a_database_that_is_not_frozen_fails_it_without_retries(sensor, new_dag, run):
    with new_dag() as dag:
        sensor(retries=2, retry_delay=timedelta(0))
    finished = run(dag)

    assert finished.states == {"wait": "failed"}
    assert finished.tries == {"wait": 1}


@pytest.mark.parametrize("deferrable", [False, True])
def test_a_freeze_that_is_lost_while_it_waits_fails_it_without_retries(
    deferrable, sensor, superuser, frozen, connect, app_database, new_dag, run
):
    def thaw():
        resume(connect, databases=[app_database], holder="me")

    with new_dag() as dag:
        sensor(
            wait_for_superusers=True,
            deferrable=deferrable,
            pre_execute=in_a_while(thaw),
            retries=2,
            retry_delay=timedelta(0),
        )
    finished = run(dag)

    assert finished.states == {"wait": "failed"}
    assert finished.tries == {"wait": 1}


def test_the_trigger_can_be_made_again_from_what_is_stored_and_stores_no_secret(app_database):
    trigger = PgLingeringBackendsTrigger(
        postgres_conn_id="pg",
        maintenance_database="postgres",
        databases=(app_database,),
        holder="me",
        poke_interval=0.1,
        wait_for_superusers=True,
    )
    path, arguments = trigger.serialize()
    stored = json.dumps(arguments)

    assert path == "airflow_pg_freeze.triggers.lingering_backends.PgLingeringBackendsTrigger"
    assert PgLingeringBackendsTrigger(**json.loads(stored)).serialize() == (path, arguments)
    assert password("freezer") not in stored
