"""The Python on docs/taskflow.md, docs/operators/attest.md and docs/operators/frozen_ebs.md, as it stands there."""

import re

import pytest
from airflow.providers.common.compat.sdk import task

from devtools.asking import pause
from devtools.binaries import CHECKOUT
from pg_freeze import history, resume
from tests.airflow.cloud import snapshots_of, volumes_of

#: On the pages.
DATABASE, INSTANCE = "gitlabhq", "i-0abc"


def block(page, number=0, **names):
    """Run one of the page's blocks of Python, with a database and an instance that there are; return its names."""
    found = re.findall(r"^```python\n(.*?)^```$", (CHECKOUT / "docs" / page).read_text(), re.MULTILINE | re.DOTALL)
    text = found[number].replace(DATABASE, names.pop("database")).replace(INSTANCE, names.pop("instance", INSTANCE))
    exec(compile(text, page, "exec"), names)
    return names


@pytest.fixture
def database(connection, server, app_database, app_connect):
    app_connect(app_database).execute("CREATE TABLE things (name text)")
    server.execute("GRANT app TO freezer")
    connection(app_database, conn_id="gitlab")
    return app_database


def freezes_of(connect, database):
    return [freeze for freeze in history(connect) if database in freeze.databases]


def test_the_dag_of_the_page_freezes_for_its_function(database, run, connect, capfd):
    finished = run(block("taskflow.md", database=database)["nightly"]())

    assert finished.states == {"snapshot": "success", "note": "success"}
    (freeze,) = freezes_of(connect, database)
    assert freeze.thawed_by == "end of the block"
    assert str(freeze.token) in finished.xcoms["snapshot"]
    assert f"name it after {freeze.token} quiesced" in "".join(capfd.readouterr())


def test_a_function_of_ones_own_freezes(database, metadata_database, connect):
    assert block("taskflow.md", 1, database=database)["snapshot"]() == "quiesced"
    (freeze,) = freezes_of(connect, database)
    assert (freeze.holder, freeze.thawed_by) == ("nightly", "end of the block")


def test_the_attesting_tasks_of_the_page_attest_the_snapshot_between_them(database, new_dag, run, connect, can_write):
    with new_dag() as dag:

        @task
        def snapshot():
            return can_write()

        names = block("operators/attest.md", database=database, snapshot=snapshot())
    # The page leaves pause and resume, and so the holder, to the reader.
    for name in ("before", "after"):
        names[name].holder = "reader"
    pause(connect, databases=[database], holder="reader")

    finished = run(dag)

    assert finished.states == {"attest_before": "success", "snapshot": "success", "attest_after": "success"}
    assert finished.xcoms["snapshot"] is False
    assert finished.xcoms["attest_after"]["level"] == "quiesced"
    resume(connect, databases=[database], holder="reader")


def test_the_task_of_the_page_snapshots_an_instances_volumes(
    database, new_dag, run, connect, proxy, instance, moto_port
):
    with new_dag() as dag:
        block("operators/frozen_ebs.md", database=database, instance=instance)

    finished = run(dag)

    assert finished.states == {"snapshot": "success"}
    (freeze,) = freezes_of(connect, database)
    assert finished.xcoms["snapshot"]["token"] == str(freeze.token)
    assert finished.xcoms["snapshot"]["certified"]
    assert len(snapshots_of(moto_port, volumes_of(moto_port, instance))) == len(volumes_of(moto_port, instance)) > 0
