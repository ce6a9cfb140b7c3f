"""The benchmark runs and leaves out nothing; what it measures here, with other tests beside it, means nothing."""

import re

import pytest

from devtools.binaries import CHECKOUT


@pytest.mark.needs("pgbouncer")
@pytest.mark.pg("==18")
@pytest.mark.timeout(300)
def test_the_benchmark_measures_every_procedure_and_says_of_every_target_whether_it_was_met(measured, tmp_path):
    (tmp_path / "strategies.md").write_text((CHECKOUT / "docs/strategies.md").read_text())
    said = measured("benchmarks", "--quick")

    written = (tmp_path / "benchmarks.md").read_text()
    for procedure in (
        "published script",
        "admit=readers |",
        "admit=readers-once-drained |",
        "admit=nobody |",
        "strategy=lock |",
        "strategy=privileges |",
        "PgBouncer PAUSE |",
    ):
        assert procedure in written
    # By what writes nothing but checkpoints, no row of a catalog or of the journal.
    assert re.search(r"^\| PgBouncer PAUSE \| [\d.]+ kB.* \| 0 \| 0 \|$", written, re.MULTILINE)
    assert re.search(r"^\| 50 \| pg-freeze, strategy=lock \|", written, re.MULTILINE)
    assert sum(said.count(verdict) for verdict in ("PASS", "FAIL")) == 14
    assert (tmp_path / "img/benchmarks.svg").read_text().startswith("<?xml")
    strategies = (tmp_path / "strategies.md").read_text()
    assert re.search(r"^\| PgBouncer PAUSE \| [\d.]+ s \|", strategies, re.MULTILINE)
    assert "## What `lock` does not cover" in strategies
