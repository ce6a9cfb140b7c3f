"""docs/security.md claims nothing without a test that is there."""

import re

from devtools.binaries import CHECKOUT

PAGE = (CHECKOUT / "docs" / "security.md").read_text()
NAMED = re.compile(r"`(?:tests/)?((?:airflow/)?test_\w+\.py)::(test_\w+)`")


def test_every_test_that_the_page_names_is_there_once():
    for file, beginning in NAMED.findall(PAGE):
        path = CHECKOUT / "tests" / (file if "/" in file else f"server/{file}")
        names = re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
        assert len([name for name in names if name.startswith(beginning)]) == 1, f"{file}::{beginning}"


def test_every_line_of_its_tables_names_one():
    rows = [line for line in PAGE.splitlines() if line.startswith("| ")]
    heads = [line for line in rows if re.search(r"\| test \|$", line)]
    untested = [line for line in rows if line not in heads and not NAMED.search(line.rpartition(" | ")[2])]
    assert len(heads) == 9
    assert untested == []
