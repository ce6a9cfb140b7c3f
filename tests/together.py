"""Which tests share a worker of pytest-xdist; all others go to whichever is free.

Airflow takes a process several seconds to import and to run its first task, as does each process of our own that runs
tasks or is AWS. So few workers do that, and the others not at all.
"""

import re
from typing import Final

from xdist.scheduler import LoadScopeScheduling

#: The tests with such processes of our own, and the rest of those with Airflow.
_TOGETHER: Final = (r"tests/airflow/test_(decorator|kill|rds|\w*ebs\w*)\.py", "tests/airflow/")


class Together(LoadScopeScheduling):  # type: ignore[misc]
    """Begins with the tests that stay together, in two workers; then follows the order of the tests."""

    def _split_scope(self, nodeid: str) -> str:
        return next((pattern for pattern in _TOGETHER if re.match(pattern, nodeid)), nodeid)
