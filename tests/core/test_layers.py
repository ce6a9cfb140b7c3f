"""Who may import whom."""

import subprocess
import sys

import pytest

from devtools.binaries import CHECKOUT

WITHOUT_AIRFLOW = ["airflow_pg_freeze", "airflow_pg_freeze.core", "airflow_pg_freeze.cli"]


@pytest.mark.parametrize("module", WITHOUT_AIRFLOW)
def test_airflow_is_not_loaded_along_with(module):
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import sys, {module}; print(*(m for m in sys.modules if m.split('.')[0] == 'airflow'))",
        ],
        capture_output=True,
        text=True,
        check=True,
        cwd=CHECKOUT,
    )
    assert done.stdout.split() == []


def test_the_lint_refuses_airflow_in_the_core_and_at_the_top_of_the_command_line(tmp_path):
    package = tmp_path / "airflow_pg_freeze"
    (package / "core").mkdir(parents=True)
    (tmp_path / "pyproject.toml").write_text((CHECKOUT / "pyproject.toml").read_text())
    late = "def late():\n    import airflow.sdk\n"
    for name, text in {
        "core/a.py": "import airflow.sdk",
        "core/b.py": late,
        "cli.py": "from airflow import sdk",
    }.items():
        (package / name).write_text(text)
    for name, text in {"hooks.py": "import airflow.sdk", "operators.py": late}.items():
        (package / name).write_text(text)

    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--no-cache", "--select", "TID", "--output-format", "concise", "."],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )

    assert {line.split(":")[0] for line in done.stdout.splitlines() if "TID" in line} == {
        "airflow_pg_freeze/core/a.py",
        "airflow_pg_freeze/core/b.py",
        "airflow_pg_freeze/cli.py",
    }
