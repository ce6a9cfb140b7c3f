"""A proxy between clients and a PostgreSQL server that knows where one statement ends and its answer begins.

It sees every statement of every connection, so a test can stop the world at each of them without keeping a list: just
before a statement reaches the server, or just after its answer has left the server and before the client sees it.
"""

import re
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from types import TracebackType
from typing import Final, Self

CANCEL_REQUEST: Final = 80877102
#: Options with which a client's connection can be read: no encryption.
PLAIN: Final = {"host": "127.0.0.1", "sslmode": "disable", "gssencmode": "disable"}
_UUID: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_NUMBER: Final = re.compile(r"\b\d+\b")


class Moment(StrEnum):
    """When something happens to a statement."""

    BEFORE = "before"
    AFTER = "after"


@dataclass(frozen=True, slots=True)
class Step:
    """The nth time that a client sends this text; ``connect`` is the opening of a connection."""

    text: str
    occurrence: int


@dataclass(slots=True)
class _Trap:
    step: Step
    moment: Moment
    spring: Callable[[], bool]


class Proxy:
    """Listens on a port of its own and passes on what arrives, statement by statement.

    :param port: of the server, on 127.0.0.1.
    """

    def __init__(self, port: int) -> None:
        self.server_port = port
        self.steps: list[Step] = []
        #: Called before each statement; what it returns is kept in ``states``.
        self.observe: Callable[[], str] | None = None
        self.states: dict[Step, str] = {}
        #: The server's process ids of every connection since the last :meth:`reset`.
        self.backends_ever: list[int] = []
        self.sprung = threading.Event()
        self.done = threading.Event()
        self._seen: Counter[str] = Counter()
        self._trap: _Trap | None = None
        self._lock = threading.Lock()
        self._sessions: set[_Session] = set()
        self._refusing = False
        self.flowing = threading.Event()
        self.flowing.set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()

    def trap(self, step: Step, moment: Moment, spring: Callable[[], bool]) -> None:
        """Call *spring* once, when *step* comes by; while it runs that connection stands still.

        :param spring: returns whether the statement, or its answer, is then passed on.
        """
        self._trap = _Trap(step, moment, spring)

    def reset(self) -> None:
        """Forget all that was seen, and any trap; the network is whole again."""
        self.cut()
        with self._lock:
            self.steps = []
            self.states = {}
            self.backends_ever = []
            self._seen.clear()
            self._trap = None
            self.sprung.clear()
            self.done.clear()
        self.mend()

    def cut(self) -> None:
        """Close every connection on both sides, and each new one as it comes, until :meth:`mend`."""
        with self._lock:
            self._refusing = True
            sessions = list(self._sessions)
        for session in sessions:
            session.close()

    def black_hole(self) -> None:
        """Pass nothing on any more, in either direction, and tell nobody, until :meth:`mend`."""
        self.flowing.clear()

    def mend(self) -> None:
        """End :meth:`cut` and :meth:`black_hole`."""
        with self._lock:
            self._refusing = False
        self.flowing.set()

    def backends(self) -> list[int]:
        """Return the server's process ids of the connections that are open now."""
        with self._lock:
            return [session.backend for session in self._sessions if session.backend]

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            session = _Session(self, client)
            with self._lock:
                welcome = not self._refusing
                if welcome:
                    self._sessions.add(session)
            if welcome:
                threading.Thread(target=session.run, daemon=True).start()
            else:
                client.close()

    def leave(self, session: "_Session") -> None:
        """Forget a connection that has ended."""
        with self._lock:
            self._sessions.discard(session)

    def meet(self, text: str) -> _Trap | None:
        """Count a statement, and return the trap that it has walked into, if it has."""
        state = self.observe() if self.observe is not None else ""
        with self._lock:
            self._seen[text] += 1
            step = Step(text, self._seen[text])
            self.steps.append(step)
            self.states[step] = state
            if self._trap is None or self._trap.step != step:
                return None
            trap, self._trap = self._trap, None
            return trap

    def spring(self, trap: _Trap) -> bool:
        """Do what the trap is for."""
        self.sprung.set()
        try:
            return trap.spring()
        finally:
            self.done.set()


class _Session:
    """One connection: a thread for either direction, and what has been sent but not answered."""

    def __init__(self, proxy: Proxy, client: socket.socket) -> None:
        self.proxy = proxy
        self.client = client
        self.server: socket.socket | None = None
        self.backend = 0
        self._prepared: dict[bytes, str] = {}
        self._pending: _Trap | None = None
        self._lock = threading.Lock()

    def run(self) -> None:
        """Pass messages on until either side is gone."""
        try:
            self._from_client()
        except OSError:
            pass  # closed by either side, or cut
        finally:
            self._unanswered()
            self.close()
            self.proxy.leave(self)

    def close(self) -> None:
        """Close both sides."""
        for end in (self.client, self.server):
            if end is not None:
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
                end.close()

    def _from_client(self) -> None:
        opening = self._read(self.client, 4)
        (length,) = struct.unpack("!I", opening)
        opening += self._read(self.client, length - 4)
        (code,) = struct.unpack("!I", opening[4:8])
        self.server = socket.create_connection(("127.0.0.1", self.proxy.server_port))
        self.server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if code == CANCEL_REQUEST:
            self.server.sendall(opening)
            return
        threading.Thread(target=self._from_server, args=(self.server,), daemon=True).start()
        self._pass_on("connect", opening)
        batch, text = b"", ""
        while True:
            kind, message = self._message(self.client)
            if kind == b"X":
                self._unanswered()
            if kind in b"XpdcfH":
                self.proxy.flowing.wait()
                self.server.sendall(message)
                continue
            # An extended query is several messages up to a Sync: the server must see all of them or none.
            batch += message
            text = self._text(kind, message[5:]) or text
            if kind in b"QS":
                self._pass_on(text or "sync", batch)
                batch, text = b"", ""

    def _text(self, kind: bytes, body: bytes) -> str:
        if kind == b"Q":
            return _normal(body.rstrip(b"\0"))
        if kind == b"P":
            name, query, _ = body.split(b"\0", 2)
            self._prepared[name] = _normal(query)
            return self._prepared[name]
        if kind == b"B":
            _, name, _ = body.split(b"\0", 2)
            return self._prepared.get(name, "")
        return ""

    def _pass_on(self, text: str, batch: bytes) -> None:
        assert self.server is not None
        trap = self.proxy.meet(text)
        if trap is not None and trap.moment is Moment.AFTER:
            self._pending = trap
        elif trap is not None and not self.proxy.spring(trap):
            raise ConnectionAbortedError
        self.proxy.flowing.wait()
        self.server.sendall(batch)

    def _unanswered(self) -> None:
        """Spring a trap whose statement gets no answer, since the client does not wait for one."""
        with self._lock:
            trap, self._pending = self._pending, None
        if trap is not None:
            self.proxy.spring(trap)

    def _from_server(self, server: socket.socket) -> None:
        held = b""
        try:
            while True:
                kind, message = self._message(server)
                if kind == b"K":
                    (self.backend,) = struct.unpack("!I", message[5:9])
                    self.proxy.backends_ever.append(self.backend)
                held += message
                if self._pending is not None and kind != b"Z":
                    # What the server needs an answer to itself, as the password, cannot wait.
                    if kind == b"R":
                        self.client.sendall(held)
                        held = b""
                    continue
                with self._lock:
                    trap, self._pending = self._pending, None
                if trap is not None and not self.proxy.spring(trap):
                    return
                self.proxy.flowing.wait()
                self.client.sendall(held)
                held = b""
        except OSError:
            with suppress(OSError):
                self.client.sendall(held)
        finally:
            self.close()

    def _message(self, end: socket.socket) -> tuple[bytes, bytes]:
        head = self._read(end, 5)
        (length,) = struct.unpack("!I", head[1:])
        return head[:1], head + self._read(end, length - 4)

    @staticmethod
    def _read(end: socket.socket, wanted: int) -> bytes:
        parts = []
        while wanted:
            part = end.recv(wanted)
            if not part:
                raise ConnectionResetError
            parts.append(part)
            wanted -= len(part)
        return b"".join(parts)


def _normal(query: bytes) -> str:
    """Return the text on one line, without what differs from run to run."""
    text = " ".join(query.decode().split())
    return _NUMBER.sub("…", _UUID.sub("…", text)) if text.startswith(("CALL", "SET LOCAL")) else text
