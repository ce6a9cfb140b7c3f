"""What one does to a server, each as a function of a connector and a database."""

from devtools.asking import pause, preflight
from pg_freeze import history, resume, status

ACTS = [
    lambda connect, database: preflight(connect, databases=[database], holder="test"),
    lambda connect, database: pause(connect, databases=[database], holder="test"),
    lambda connect, database: resume(connect, databases=[database], holder="test"),
    lambda connect, _: status(connect),
    lambda connect, _: history(connect),
]
