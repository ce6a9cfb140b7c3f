"""What a journal consists of, and the order of its versions."""

import shutil
from pathlib import Path

import pytest

import pg_freeze
from pg_freeze.journal.definition import Definition, Version, ours

PACKAGE = Path(pg_freeze.__file__).parent


def test_no_file_of_the_journal_was_changed_without_its_number():
    recorded = (PACKAGE / "journal/digests.txt").read_text(encoding="utf-8").splitlines()
    wanted = ours().digests()
    numbers = [int(line.split()[1]) for line in recorded if line.startswith("routines ")]
    assert [line for line in wanted if line not in recorded] == [], (
        "a file of the journal is not what journal/digests.txt says. Was its number released? Then it needs a new one: "
        "a migration more, or a new last line. If not, put this line in the place of the old one"
    )
    assert numbers == list(range(1, len(numbers) + 1))
    assert recorded[-1] == wanted[-1]


def test_a_table_is_made_by_a_migration_and_by_nothing_else():
    assert "CREATE TABLE" not in ours().routines
    for migration in ours().migrations:
        assert "IF NOT EXISTS" not in migration


@pytest.mark.parametrize(
    ("one", "other", "newer"),
    [("1.1", "1.1", False), ("2.1", "1.1", True), ("1.2", "1.1", True), ("1.1", "2.2", False), ("1.10", "1.9", True)],
)
def test_versions_have_an_order(one, other, newer):
    first, second = (Version(*map(int, text.split(".")), "0" * 16, "0.1.0") for text in (one, other))
    assert first.is_newer_than(second) is newer
    assert not (first.is_newer_than(second) and second.is_newer_than(first))
    assert first.is_same_as(second) is (one == other)


def test_a_version_is_read_as_it_was_written_and_nothing_else_is_one():
    version = ours().version
    assert Version.read(version.comment()) == version
    for text in (
        "",
        "pg-freeze 0.1.0 journal 1",
        version.comment() + "\n",
        "airflow-pg-freeze journal 0123456789abcdef",
    ):
        assert Version.read(text) is None


def test_migrations_have_no_gap(tmp_path):
    for name in ("sql", "journal"):
        shutil.copytree(PACKAGE / name, tmp_path / name)
    (tmp_path / "journal/migrations/0003.sql").write_text("SELECT 1;")
    with pytest.raises(ValueError, match="without a gap"):
        Definition.read(tmp_path)
