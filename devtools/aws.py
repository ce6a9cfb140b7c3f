"""An AWS endpoint on loopback: moto in a process of its own, and before it a proxy that fails as AWS does.

moto's snapshots are complete at once; the proxy tells them as ``pending`` for as long as it is told to.
"""

import json
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final, Literal
from urllib.parse import parse_qsl

import boto3
from botocore.config import Config

REGION: Final = "eu-central-1"
CREDENTIALS: Final = {"aws_access_key_id": "testing", "aws_secret_access_key": "testing", "region_name": REGION}
_EC2_ERROR: Final = (
    "<Response><Errors><Error><Code>{code}</Code><Message>{message}</Message></Error></Errors>"
    "<RequestID>0</RequestID></Response>"
)
_OTHER_ERROR: Final = (
    "<ErrorResponse><Error><Code>{code}</Code><Message>{message}</Message></Error>"
    "<RequestId>0</RequestId></ErrorResponse>"
)


@contextmanager
def moto() -> Iterator[int]:
    """Have a moto server, and yield its port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    quiet: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    with subprocess.Popen(command, **quiet) as process:
        try:
            deadline = time.monotonic() + 60
            while True:
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/moto-api/", timeout=5).close()
                    break
                except OSError:
                    if process.poll() is not None or time.monotonic() > deadline:
                        raise
                    time.sleep(0.1)
            yield port
        finally:
            process.terminate()


def client(service: str, port: int) -> Any:
    """Return a boto3 client for what listens on *port*."""
    one_try = Config(retries={"total_max_attempts": 1})
    return boto3.client(service, endpoint_url=f"http://127.0.0.1:{port}", config=one_try, **CREDENTIALS)


@dataclass(frozen=True, slots=True)
class Request:
    """What came to the proxy: the action with its parameters, when, and what was answered."""

    at: datetime
    action: str
    parameters: dict[str, str]
    outcome: str


@dataclass(slots=True)
class Fault:
    """What happens to requests of one action, so many times.

    :param kind: ``refuse`` answers with *code* and *status*, and ``cut`` closes the connection; ``fail-after`` and
        ``cut-after`` do so once moto has carried it out.
    :param skip: leave so many alone before.
    :param seconds: wait before the connection is closed.
    """

    action: str
    kind: Literal["refuse", "fail-after", "cut", "cut-after"]
    times: int = 1
    code: str = "InternalError"
    status: int = 500
    skip: int = 0
    seconds: float = 0.0


@dataclass(slots=True)
class Proxy:
    """Passes requests on to moto, or fails them.

    :param told: the state in which snapshots are told to be in the answer to an action, or None for the truth.
    :param progress: how far they are told to be copied.
    """

    port: int
    told: Callable[[str], str | None] = lambda _: None
    progress: Callable[[], int] = lambda: 0
    faults: list[Fault] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)

    @property
    def url(self) -> str:
        """Where the proxy listens."""
        return f"http://127.0.0.1:{self.port}"

    def connection(self, **extra: Any) -> str:
        """Return an Airflow connection to it, for the environment."""
        return json.dumps(
            {
                "conn_type": "aws",
                "login": "testing",
                "password": "testing",
                "extra": {"region_name": REGION, "endpoint_url": self.url, **extra},
            }
        )

    def actions(self, *names: str) -> list[Request]:
        """Return the requests of these actions, in the order in which they came."""
        return [request for request in self.requests if request.action in names]

    def take(self, action: str) -> Fault | None:
        """Return the fault that this request is to suffer."""
        for fault in self.faults:
            if fault.action == action and fault.times > 0:
                if fault.skip > 0:
                    fault.skip -= 1
                    continue
                fault.times -= 1
                return fault
        return None

    def retold(self, action: str, text: str) -> str:
        """Return moto's answer to *action* with the snapshots in the state that is told."""
        told = self.told(action)
        if told is None:
            return text
        text = re.sub(r"<progress>100%</progress>", f"<progress>{self.progress()}%</progress>", text)
        text = re.sub(r"<status>completed</status>", f"<status>{told}</status>", text)
        return text.replace("<Status>available</Status>", f"<Status>{told}</Status>")


class _Listener(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, moto_port: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.moto_port = moto_port
        self.proxy = Proxy(self.server_address[1])

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Keep quiet about clients that went away."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # A client that goes on with an open connection would keep its thread.
    timeout = 30
    server: _Listener

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        parameters = dict(parse_qsl(body.decode(), keep_blank_values=True))
        action = parameters.get("Action", "")
        fault = self.server.proxy.take(action)
        accepts = fault is None or fault.kind in ("fail-after", "cut-after")
        status, kind, answer = self._pass_on(body) if accepts else (0, "", b"")
        outcome = str(status) if fault is None else f"{fault.kind} {fault.code}"
        self.server.proxy.requests.append(Request(datetime.now(UTC), action, parameters, outcome))
        match fault:
            case None:
                self._answer(status, kind, self.server.proxy.retold(action, answer.decode()).encode())
            case Fault(kind="refuse" | "fail-after"):
                form = _EC2_ERROR if "/ec2/" in self.headers.get("Authorization", "") else _OTHER_ERROR
                text = form.format(code=fault.code, message=f"told to fail with {fault.code}")
                self._answer(fault.status, "text/xml", text.encode())
            case _:
                time.sleep(fault.seconds)
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)

    def _pass_on(self, body: bytes) -> tuple[int, str, bytes]:
        upstream = HTTPConnection("127.0.0.1", self.server.moto_port, timeout=60)
        try:
            upstream.request("POST", self.path, body, dict(self.headers))
            response = upstream.getresponse()
            return response.status, response.headers.get("Content-Type", "text/xml"), response.read()
        finally:
            upstream.close()

    def _answer(self, status: int, kind: str, answer: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  its name in the standard library
        """Keep quiet."""


@contextmanager
def proxy(moto_port: int) -> Iterator[Proxy]:
    """Have a proxy before moto."""
    server = _Listener(moto_port)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server.proxy
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
