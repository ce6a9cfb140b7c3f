"""Run by TaskProcess: reads one task a line, runs it, prints how it ended."""

import importlib
import json
import os
import sys
import time
from datetime import timedelta
from functools import partial

from airflow.providers.common.compat.sdk import DAG

from airflow_pg_freeze import operators
from tests.airflow.running import run_dag


def stop_for(seconds, *_):
    """Say that the hook is reached, and stay there."""
    print("HOOK", flush=True)
    time.sleep(seconds)


for line in sys.stdin:
    command = json.loads(line)
    os.environ.update(command["environment"])
    arguments = command["arguments"]
    if "execution_timeout" in arguments:
        arguments["execution_timeout"] = timedelta(seconds=arguments["execution_timeout"])
    for hook in ("pre_execute", "post_execute", "python_callable"):
        if hook in arguments:
            arguments[hook] = partial(stop_for, arguments[hook])
    with DAG(command["dag_id"], schedule=None) as dag:
        module, _, name = command["operator"].rpartition(".")
        operator = getattr(importlib.import_module(module) if module else operators, name)
        operator(task_id="task", **arguments)
    print("STATE", command["dag_id"], run_dag(dag).states["task"], flush=True)
