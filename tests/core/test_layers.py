"""Who may import whom."""

import subprocess
import sys
from pathlib import Path

import pytest

import pg_freeze
from devtools.binaries import CHECKOUT

WITHOUT_AIRFLOW = ["airflow_pg_freeze", "pg_freeze", "pg_freeze.cli"]


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


def test_help_is_printed_without_loading_the_engine():
    code = (
        "import sys; from pg_freeze.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: print(*(m for m in ('psycopg', 'rich') if m in sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=CHECKOUT)
    assert "verify-copy" in done.stdout
    assert done.stderr.split() == []


def test_what_the_engine_exports_is_there_and_no_module_has_its_name():
    modules = {path.stem for path in Path(pg_freeze.__file__).parent.iterdir()}
    for name in pg_freeze.__all__:
        assert getattr(pg_freeze, name) is not None
        assert name not in modules
    with pytest.raises(AttributeError, match="no attribute 'thaw_it'"):
        getattr(pg_freeze, "thaw_it")  # noqa: B009


def test_the_lint_refuses_airflow_and_the_provider_in_the_engine(tmp_path):
    (tmp_path / "engine/pg_freeze").mkdir(parents=True)
    (tmp_path / "airflow_pg_freeze").mkdir()
    (tmp_path / "pyproject.toml").write_text((CHECKOUT / "pyproject.toml").read_text())
    late = "def late():\n    import airflow.sdk\n"
    for name, text in {
        "engine/pg_freeze/a.py": "import airflow.sdk",
        "engine/pg_freeze/b.py": late,
        "engine/pg_freeze/c.py": "from airflow_pg_freeze import hooks",
        "airflow_pg_freeze/hooks.py": "import airflow.sdk",
        "airflow_pg_freeze/operators.py": late,
    }.items():
        (tmp_path / name).write_text(text)

    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--no-cache", "--select", "TID", "--output-format", "concise", "."],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )

    assert {line.split(":")[0] for line in done.stdout.splitlines() if "TID" in line} == {
        "engine/pg_freeze/a.py",
        "engine/pg_freeze/b.py",
        "engine/pg_freeze/c.py",
    }
