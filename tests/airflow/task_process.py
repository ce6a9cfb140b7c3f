"""Run by TaskProcess: reads one task a line, runs it, prints how it ended."""

import json
import os
import sys
import time
from datetime import timedelta

from airflow.providers.common.compat.sdk import DAG

from airflow_pg_freeze import operators
from tests.airflow.running import run_dag

for line in sys.stdin:
    command = json.loads(line)
    os.environ.update(command["environment"])
    arguments = command["arguments"]
    if "execution_timeout" in arguments:
        arguments["execution_timeout"] = timedelta(seconds=arguments["execution_timeout"])
    for hook in ("pre_execute", "post_execute"):
        if hook in arguments:
            pause = arguments[hook]
            arguments[hook] = lambda *_, pause=pause: (print("HOOK", flush=True), time.sleep(pause))
    with DAG(command["dag_id"], schedule=None) as dag:
        getattr(operators, command["operator"])(task_id="task", **arguments)
    print("STATE", run_dag(dag).states["task"], flush=True)
