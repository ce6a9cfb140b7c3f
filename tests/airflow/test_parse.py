"""What is refused when a DAG is parsed, and what only its run can tell."""

import re
from datetime import timedelta
from inspect import signature

import pytest
from airflow.providers.common.compat.sdk import task, task_group
from airflow.providers.standard.operators.empty import EmptyOperator

from airflow_pg_freeze.operators import PgCheckpointOperator, PgPauseOperator, PgResumeOperator
from airflow_pg_freeze.operators.attest import PgAttestOperator
from airflow_pg_freeze.operators.ebs import EbsCertifySnapshotsOperator, EbsCreateSnapshotsOperator
from airflow_pg_freeze.operators.frozen_ebs import PgFrozenEbsSnapshotOperator
from airflow_pg_freeze.operators.rds import RdsSnapshotOperator
from airflow_pg_freeze.operators.volume import VolumeSnapshotOperator
from airflow_pg_freeze.sensors import PgLingeringBackendsSensor
from airflow_pg_freeze.sensors.ebs import EbsSnapshotCompletedSensor
from airflow_pg_freeze.task_group import pg_frozen
from pg_freeze import InvalidRequest
from pg_freeze.durations import duration
from tests.airflow.running import dagbag


def work(n=0):
    return n


def group(**arguments):
    with pg_frozen(**arguments):
        EmptyOperator(task_id="snapshot")


def function(**arguments):
    task.pg_frozen(**arguments)(work)()


def mapped_function(**arguments):
    task.pg_frozen(max_active_tis_per_dagrun=1, **arguments)(work).expand(n=[1, 2])


def pause(**arguments):
    PgPauseOperator(task_id="pause", **arguments)


def ebs(**arguments):
    PgFrozenEbsSnapshotOperator(task_id="snapshot", volume_ids=["vol-1"], **arguments)


FREEZES = pytest.mark.parametrize("freeze", [group, function, mapped_function, pause, ebs])


@FREEZES
@pytest.mark.parametrize(
    ("constants", "says"),
    [
        ({"admit": "writers"}, "admit is 'writers'"),
        ({"lease": "5x"}, "lease is '5x'"),
        ({"lease": True}, "lease is True"),
        ({"lease": float("nan")}, "lease is nan"),
        ({"lease": 0}, "lease is 0 s"),
        ({"lease": "10s", "drain_timeout": "1m"}, "must be longer than the drain timeout"),
        ({"lease": "{{ params.lease }}", "drain_timeout": -1}, "drain_timeout is -1 s"),
        ({"on_drain_timeout": "kill"}, "on_drain_timeout is 'kill'"),
        ({"database": []}, "no database"),
        ({"holder": " "}, "is not a name"),
    ],
)
def test_a_constant_that_makes_no_sense_is_refused(new_dag, freeze, constants, says):
    with new_dag(), pytest.raises(InvalidRequest, match=says):
        freeze(**constants)


@FREEZES
@pytest.mark.parametrize(
    "given",
    [
        {"lease": "5m", "drain_timeout": "10"},
        {"lease": timedelta(minutes=5), "drain_timeout": 1.5},
        {"lease": "{{ params.lease }}", "drain_timeout": "5m", "admit": "{% if 1 %}readers{% endif %}"},
        {"database": "{{ params.database }}", "holder": "{{ run_id }}"},
        {"database": ["one", "{{ params.two }}"]},
    ],
)
def test_what_makes_sense_or_is_not_known_yet_is_taken(new_dag, freeze, given):
    with new_dag():
        freeze(**given)


def test_a_pause_takes_every_strategy_that_outlives_its_process_and_says_what_to_use_for_others(new_dag):
    with new_dag():
        pause(strategy="privileges", roles=["app"])
    with new_dag(), pytest.raises(InvalidRequest, match=r"ends with the process .*pg-freeze run"):
        pause(strategy="lock")
    with new_dag(), pytest.raises(InvalidRequest, match="roles can only be chosen"):
        pause(roles=["app"])


@pytest.mark.parametrize("freeze", [function, mapped_function, ebs])
@pytest.mark.parametrize(
    ("constants", "says"),
    [
        ({"strategy": "hope"}, "strategy is 'hope'"),
        ({"require": "certain"}, "require is 'certain'"),
        ({"require": "strict"}, "admit=nobody"),
        ({"strategy": "lock", "roles": ["app"]}, "roles can only be chosen"),
        ({"strategy": "privileges", "database": ["one", "two"]}, "freezes one database"),
    ],
)
def test_a_strategy_that_cannot_do_what_is_asked_is_refused(new_dag, freeze, constants, says):
    with new_dag(), pytest.raises(InvalidRequest, match=says):
        freeze(**constants)


@pytest.mark.parametrize("strategy", ["read-only", "privileges", "{{ params.strategy }}"])
def test_a_group_takes_every_strategy_that_outlives_its_process(new_dag, strategy):
    with new_dag():
        group(strategy=strategy)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"databaze": "shop"}, r"pg_frozen\(\) has no keyword 'databaze': did you mean 'database'\?"),
        ({"drain_time_out": 5}, "did you mean 'drain_timeout'"),
        ({"zzz": 5}, "no keyword 'zzz'; the pause has none"),
    ],
)
def test_a_mistyped_keyword_of_a_group_is_named_with_the_nearest_one(new_dag, given, says):
    with new_dag(), pytest.raises(TypeError, match=says):
        group(**given)


@pytest.mark.parametrize(
    ("strategy", "says"), [("lock", r"@task\.pg_frozen"), ("read_only", "must be one of lock, read-only, privileges")]
)
def test_a_group_takes_no_strategy_that_ends_with_its_process(new_dag, strategy, says):
    with new_dag(), pytest.raises(InvalidRequest, match=says):
        group(strategy=strategy)


@pytest.mark.parametrize("operator", [EbsCreateSnapshotsOperator, PgFrozenEbsSnapshotOperator])
@pytest.mark.parametrize(
    ("target", "says"),
    [
        ({}, "either instance_id or volume_ids"),
        ({"instance_id": "i-1", "volume_ids": ["vol-1"]}, "not both"),
        ({"volume_ids": "vol-1"}, "give a list"),
        ({"volume_ids": ["vol-1", "vol-1"]}, "named twice"),
    ],
)
def test_an_ebs_operator_without_a_sound_target_is_refused(new_dag, operator, target, says):
    with new_dag(), pytest.raises(InvalidRequest, match=says):
        operator(task_id="snapshot", **target)


def test_an_ebs_operator_may_get_its_target_from_a_template(new_dag):
    with new_dag():
        EbsCreateSnapshotsOperator(task_id="one", instance_id="{{ params.instance }}")
        EbsCreateSnapshotsOperator(task_id="two", volume_ids="{{ params.volumes }}")


TOKEN = "11111111-2222-3333-4444-555555555555"
EBS = {"volume_ids": ["vol-1"]}
RDS = {"db_identifier": "shop"}
VOLUMES = {"volumes": ["btrfs:/srv/data"]}
CERTIFY = {"snapshot_ids": ["snap-1"], "attestation": {"level": "strict", "certified": True, "token": TOKEN}}
#: Each operator and sensor with what it cannot do without.
OPERATORS = {
    PgPauseOperator: {},
    PgResumeOperator: {},
    PgCheckpointOperator: {},
    PgAttestOperator: {"moment": "after"},
    PgLingeringBackendsSensor: {},
    EbsCreateSnapshotsOperator: EBS,
    EbsCertifySnapshotsOperator: CERTIFY,
    EbsSnapshotCompletedSensor: {"snapshot_ids": ["snap-1"]},
    PgFrozenEbsSnapshotOperator: EBS,
    RdsSnapshotOperator: RDS,
    VolumeSnapshotOperator: VOLUMES,
}
# Whatever takes the keyword refuses these values of it.
WRONG = {
    "postgres_conn_id": ["", 5],
    "maintenance_database": ["", None],
    "database": [[], [""], 5],
    "holder": [" ", 5, "\0"],
    "lease": ["5x", 0, True],
    "drain_timeout": [-1, "soon"],
    "on_drain_timeout": ["kill"],
    "admit": ["writers"],
    "strategy": ["hope"],
    "roles": [[5], 5],
    "require": ["certain", "crash-only"],
    "reader_grace": [-1, "long"],
    "max_wait": [0, "1 minute", "{{ params.x }}"],
    "poke_interval": [0, -5, "often"],
    "timeout": [0, "never"],
    "moment": ["during", "{{ params.x }}"],
    "attestation_file": [5],
    "volumes": ["btrfs:/srv", [], ["ext4:/srv"], ["btrfs:srv"], ["btrfs:/srv", "btrfs:/srv"]],
    "directory": ["snapshots"],
    "prefix": ["a b", ""],
    "lvm_size": [5],
    "tags": ["a=b", {"a": 1}, {"aws:x": "y"}],
    "instance_id": [5],
    "volume_ids": ["vol-1", ["vol-1", "vol-1"], [5]],
    "exclude_volume_ids": ["vol-1"],
    "snapshot_ids": [[], "none", 5],
    "attestation": [{}, "{}", None],
    "token": ["mine"],
    "db_identifier": [""],
    "db_type": ["table"],
    "db_snapshot_identifier": [5],
}
FLAGS = {"checkpoint", "switch_wal", "strict", "dead_man", "force", "required", "deferrable", "wait_for_superusers"}
FLAGS |= {"sudo", "delete_partial", "delete_failed", "copy_volume_tags", "exclude_boot_volume"}
WRONG |= {name: ["false", 1, None, "{{ params.x }}"] for name in FLAGS}
# Airflow's own, which are checked by Airflow.
THEIRS = {"aws_conn_id", "region", "region_name", "verify", "botocore_config", "trigger_rule", "retries", "retry_delay"}
THEIRS |= {"priority_weight"}


def keywords(operator):
    """Return the keywords that our classes say an operator takes."""
    ours = [one for one in operator.__mro__ if one.__module__.startswith("airflow_pg_freeze.")]
    parameters = (it for one in ours for it in signature(one.__init__).parameters.values())
    found = {it.name for it in parameters if it.kind is it.KEYWORD_ONLY}
    return sorted(found - THEIRS)


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda one: one.__name__)
def test_every_keyword_of_an_operator_refuses_a_wrong_constant_and_names_it_its_value_and_what_is_allowed(
    new_dag, operator
):
    for name in keywords(operator):
        assert name in WRONG, f"{name} of {operator.__name__} is checked by nothing"
        for number, value in enumerate(WRONG[name]):
            with new_dag(), pytest.raises(InvalidRequest) as refused:
                operator(task_id=f"one{number}", **{**OPERATORS[operator], name: value})
            said = str(refused.value)
            assert name in said or name in ("database", "holder", "volumes", "volume_ids", "tags"), (name, value, said)
    with new_dag():
        operator(task_id="right", **OPERATORS[operator])


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda one: one.__name__)
def test_so_does_every_keyword_of_a_mapped_one(new_dag, operator):
    flags = [name for name in keywords(operator) if name in FLAGS]
    other = next(name for name in ("poke_interval", "lease", "postgres_conn_id", "token") if name in keywords(operator))
    for name in (other, *flags[:1]):
        with new_dag(), pytest.raises(InvalidRequest, match=name):
            given = {"max_active_tis_per_dagrun": 1, **OPERATORS[operator], name: WRONG[name][0]}
            operator.partial(task_id="mapped", **given).expand_kwargs([{}, {}])


def test_what_is_mapped_over_is_not_known_yet(new_dag):
    with new_dag():
        PgPauseOperator.partial(task_id="one", lease="10s").expand(drain_timeout=["1s", "2s"])
        PgPauseOperator.partial(task_id="two").expand_kwargs([{"lease": "5m", "database": "app"}])
        EbsCreateSnapshotsOperator.partial(task_id="three").expand(volume_ids=[["vol-1"], ["vol-2"]])


@pytest.mark.parametrize(
    ("keyword", "says"), [({"lease_left": -1}, "lease_left is -1 s"), ({"switch_wal": "no"}, "switch_wal is 'no'")]
)
@pytest.mark.parametrize("checkpoint", ["task", "in-pause"])
def test_a_group_refuses_wrong_constants_of_its_own(new_dag, keyword, says, checkpoint):
    with new_dag(), pytest.raises(InvalidRequest, match=says):
        group(checkpoint=checkpoint, **keyword)


@pytest.mark.parametrize("freeze", [function, mapped_function])
@pytest.mark.parametrize("name", ["checkpoint", "postgres_conn_id", "maintenance_database", "roles", "database"])
def test_a_decorator_refuses_wrong_constants(new_dag, freeze, name):
    for value in WRONG[name]:
        with new_dag(), pytest.raises(InvalidRequest):
            freeze(**{name: value})


@pytest.mark.parametrize("operator", [RdsSnapshotOperator, PgLingeringBackendsSensor, EbsSnapshotCompletedSensor])
def test_times_are_given_alike_everywhere(new_dag, operator):
    with new_dag():
        made = operator(task_id="one", poke_interval="1m", **OPERATORS[operator])
    assert duration("poke_interval", made.poke_interval) == timedelta(minutes=1)


@pytest.mark.parametrize("given", [300, 300.0, "300", "300s", "5m", " 5M ", timedelta(minutes=5)])
def test_a_duration_means_the_same_in_each_form(given):
    assert duration("lease", given) == timedelta(minutes=5)


def test_templates_of_other_characters_are_templates(new_dag):
    with new_dag(jinja_environment_kwargs={"variable_start_string": "<<", "variable_end_string": ">>"}):
        pause(lease="<< params.lease >>")


@pytest.mark.parametrize(
    "where", [{}, {"database": "app"}, {"database": "{{ params.database }}"}, {"postgres_conn_id": "{{ var.value.x }}"}]
)
def test_indexes_that_would_freeze_the_same_database_at_once_are_refused(new_dag, where):
    with new_dag(), pytest.raises(InvalidRequest, match="each index would freeze the same database"):
        task.pg_frozen(**where)(work).expand(n=[1, 2])
    with new_dag(), pytest.raises(InvalidRequest, match="each index would freeze the same database"):
        task.pg_frozen(work, **where).partial().override(task_id="x").expand_kwargs([{"n": 1}])
    with new_dag(), pytest.raises(InvalidRequest, match="each index would freeze the same database"):
        PgFrozenEbsSnapshotOperator.partial(task_id="snapshot", **where).expand(volume_ids=[["vol-1"], ["vol-2"]])
    for freeze in (group, function):
        with new_dag(), pytest.raises(InvalidRequest, match="each index would freeze the same database"):

            @task_group
            def mapped(n, freeze=freeze):
                freeze(**where)

            mapped.expand(n=[1, 2])


def test_indexes_of_which_each_may_have_a_database_of_its_own_are_taken(new_dag):
    with new_dag():
        task.pg_frozen(database="{{ task.op_kwargs['n'] }}")(work).expand(n=["one", "two"])
        PgFrozenEbsSnapshotOperator.partial(task_id="ebs", volume_ids=["vol-1"]).expand(database=["one", "two"])
        PgFrozenEbsSnapshotOperator.partial(task_id="kwargs").expand_kwargs([{"database": "x", "volume_ids": ["v"]}])

        @task_group
        def mapped(name):
            group(database=name)

        mapped.expand(name=["one", "two"])


FILES = {
    "keyword": "pg_frozen(leese=5)",
    "value": "pg_frozen(admit='writers')",
    "resume": "pg_frozen(resume_args={'gracee': 5})",
    "checkpoint": "pg_frozen(pool=5)",
    "body": "pg_frozen()",
}


@pytest.mark.parametrize("mistake", FILES)
def test_a_file_that_cannot_be_parsed_leaves_the_next_one_its_tasks(tmp_path, mistake):
    head = (
        "from airflow.sdk import DAG\nfrom airflow_pg_freeze.task_group import pg_frozen\n"
        "from airflow.providers.standard.operators.empty import EmptyOperator\n"
    )
    bad = f"with DAG('bad', schedule=None):\n  with {FILES[mistake]}:\n    EmptyOperator(task_id='x')\n"
    (tmp_path / "a.py").write_text(head + bad + ("    1 / 0\n" if mistake == "body" else ""))
    (tmp_path / "b.py").write_text(head + "with DAG('good', schedule=None):\n  EmptyOperator(task_id='y')\n")

    broken = dagbag().DagBag(dag_folder=tmp_path / "a.py")
    good = dagbag().DagBag(dag_folder=tmp_path / "b.py")

    assert re.search("a.py", " ".join(broken.import_errors))
    assert not good.import_errors
    assert good.dags["good"].task_ids == ["y"]
