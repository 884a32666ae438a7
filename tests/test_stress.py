"""
Storms of hostile clients: what the server promises holds for all of them
together, and nothing is left when they have gone.
"""

from __future__ import annotations

import gc
import random
import socket
import struct
import threading
import weakref
from collections import deque
from functools import partial
from typing import Any

import pytest
from pytest_twisted import ensureDeferred
from twisted.internet.defer import gatherResults
from twisted.logger import globalLogBeginner

from tcpsvc import ConnectionGone, Server, WhereToListen
from tests.support import PATIENCE, Logs, in_thread, open_descriptors, turn, until

#: How many connections one thread of clients keeps open without use.
LINGERING = 40

#: How many clients may wait to be accepted. So few that the server, not the
#: backlog, has those who stay.
WAITING = 20

#: No client waits for longer; none should have to.
CLIENT_PATIENCE = 2 * PATIENCE


class Served:
    """A handler that answers lines, and what happened to it."""

    def __init__(self) -> None:
        self.server: Any = None
        self.running = 0
        self.peak = 0
        self.excess: list[int] = []
        self.started = 0
        self.errors: list[str] = []
        self.connections: list[Any] = []
        self.started_when_closed = 0
        self.may_connect = threading.Semaphore(WAITING)

    async def __call__(self, address: Any, reader: Any, writer: Any) -> None:
        self.started += 1
        self.may_connect.release()
        self.running += 1
        self.peak = max(self.peak, self.running)
        self.connections.append(weakref.ref(reader._connection))
        if self.server.num_connections > self.server.max_connections:
            self.excess.append(self.server.num_connections)
        self.started_when_closed += self.server.is_closed
        try:
            async for line in reader:
                if line == b"much\n":
                    for _ in range(20):
                        writer.write(b"x" * 50_000)
                        await writer.drain()
                else:
                    writer.write(line)
        finally:
            self.running -= 1

    def failed(self, address: Any, failure: Any) -> None:
        """The ``on_handler_error``."""
        self.errors.append(failure.type.__name__)

    def has_started(self, number: int) -> bool:
        """Whether so many handlers have started."""
        return self.started >= number

    async def still_there(self, logs: Logs) -> list[Any]:
        """
        Connections that nothing should hold any more. Log events hold those
        they are of: the test's, and what Twisted keeps until logging begins,
        which under pytest it never does.
        """
        await turn()  # Out of the call that has ended the last one.
        assert logs.bad() == []
        logs.events.clear()
        buffer = getattr(globalLogBeginner, "_initialBuffer", None)
        if buffer is not None:
            buffer._buffer.clear()
        gc.collect()
        return [c for c in (ref() for ref in self.connections) if c is not None]


class Hostile:
    """
    One thread of clients. Each behaves in a way of its own, by chance.

    :param served: its server's handler.
    :param seed: of the chance.
    """

    def __init__(self, served: Served, seed: int) -> None:
        address = served.server.listening_on_address
        self._address = (address.host, address.port)
        self._served = served
        self._random = random.Random(seed)
        self._lingering: deque[socket.socket] = deque()
        self.connected = 0
        self.wrong: list[str] = []

    def run(self, number: int) -> None:
        """So many clients, one after the other."""
        try:
            for _ in range(number):
                if not self._served.may_connect.acquire(timeout=0.01):
                    # Whoever waits must not hold the slots that it waits for.
                    self._end_lingering(0)
                    self._served.may_connect.acquire(timeout=CLIENT_PATIENCE)
                self._one()
        finally:
            self._end_lingering(0)

    def run_until_refused(self) -> None:
        """Clients until the server is gone; none is promised an answer."""
        try:
            while True:
                try:
                    self._one()
                except ConnectionRefusedError:
                    return
                except TimeoutError:
                    raise
                except OSError:
                    # Reset in the backlog: ENOTCONN, EPIPE, ECONNRESET, EAGAIN.
                    self.connected += 1
        finally:
            self._end_lingering(0)

    def _one(self) -> None:
        client = socket.create_connection(self._address, CLIENT_PATIENCE)
        self.connected += 1
        try:
            lingers = self._random.choice(self.BEHAVIOURS)(self, client)
        except BaseException:
            client.close()
            raise
        if lingers:
            self._lingering.append(client)
            self._end_lingering(LINGERING)
        else:
            client.close()

    def _end_lingering(self, keep: int) -> None:
        while len(self._lingering) > keep:
            client = self._lingering.popleft()
            if self._random.random() < 0.5:
                self._reset(client)
            else:
                client.close()

    def _expects(self, client: socket.socket, expected: bytes) -> None:
        self._end_lingering(0)
        got = bytearray()
        while data := client.recv(65536):
            got += data
        if got != expected:
            self.wrong.append(f"{bytes(got)!r:.60} instead of {expected!r:.60}")

    # How they behave. Each returns whether the client stays for a while.

    def _polite(self, client: socket.socket) -> bool:
        client.sendall(b"hello\nworld\n")
        client.shutdown(socket.SHUT_WR)
        self._expects(client, b"hello\nworld\n")
        return False

    def _greedy(self, client: socket.socket) -> bool:
        client.sendall(b"much\nmuch\n")
        client.shutdown(socket.SHUT_WR)
        self._expects(client, b"x" * 2_000_000)
        return False

    def _fin_early(self, client: socket.socket) -> bool:
        client.shutdown(socket.SHUT_WR)
        self._expects(client, b"")
        return False

    def _half_line(self, client: socket.socket) -> bool:
        client.sendall(b"half a li")
        return False

    def _garbage(self, client: socket.socket) -> bool:
        client.sendall(self._random.randbytes(5_000))
        return self._random.random() < 0.5

    def _too_long(self, client: socket.socket) -> bool:
        try:
            client.sendall(b"z" * 10_000)
        except ConnectionError:
            pass  # Its handler has given up before.
        return False

    def _reset(self, client: socket.socket) -> bool:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return False

    def _speaks_and_resets(self, client: socket.socket) -> bool:
        client.sendall(b"one\ntwo\nthr")
        self._reset(client)
        return False

    def _vanishes(self, client: socket.socket) -> bool:
        return True

    def _never_reads(self, client: socket.socket) -> bool:
        client.sendall(b"much\n")
        return True

    IMPATIENT = (
        _half_line,
        _garbage,
        _too_long,
        _reset,
        _speaks_and_resets,
        *[_vanishes] * 3,
        *[_never_reads] * 2,
    )
    BEHAVIOURS: tuple[Any, ...] = (*[_polite] * 3, _fin_early, *IMPATIENT)


class Impatient(Hostile):
    """None of these waits for an answer, so that many are there at a time."""

    BEHAVIOURS = Hostile.IMPATIENT


class Greedy(Hostile):
    """Some of these want much, and take it all."""

    BEHAVIOURS = (*Hostile.BEHAVIOURS, Hostile._greedy)


@ensureDeferred
async def test_two_thousand_hostile_clients_leave_nothing(
    serve: Any, connect: Any, logs: Logs
) -> None:
    """
    A1, A5, H3, H4, S4: the limit holds at every moment, who is owed an answer
    gets it, every connection ends, and no object or descriptor is left.
    """
    served = Served()
    before = open_descriptors()
    server = served.server = await serve(
        served,
        on_handler_error=served.failed,
        max_connections=50,
        max_accepts_per_batch=7,
        backlog=500,
        reader_buffer_size=4096,
    )
    clients = [
        kind(served, seed)
        for seed, kind in enumerate((Hostile, Impatient, Hostile, Impatient))
    ]
    crowd = [connect(server) for _ in range(60)]
    await until(lambda: served.running == 50)
    for idle in crowd:
        idle.close()
    storm = [in_thread(client.run, 485) for client in clients]
    await gatherResults(storm, consumeErrors=True)
    assert [client.wrong for client in clients] == [[], [], [], []]
    await until(lambda: served.started == 2_000)
    await until(lambda: not server.num_connections)
    server.invariant()
    assert served.excess == []
    assert served.peak == 50
    assert served.running == 0
    counters = server._factory.counters
    assert counters.accepted == 2_000
    assert counters.failed == len(served.errors)
    assert counters.finished + counters.left + counters.failed == 2_000
    assert set(served.errors) <= {"LimitOverrunError"}
    await server.close()
    await server.close_finished_and_handlers_determined()
    assert open_descriptors().keys() <= before.keys()
    assert await served.still_there(logs) == []


@ensureDeferred
async def test_a_storm_of_output_is_whole(serve: Any) -> None:
    """H3, S5: megabytes for who reads them, amid those who never do."""
    served = Served()
    server = served.server = await serve(
        served, on_handler_error=served.failed, max_connections=20, backlog=500
    )
    clients = [Greedy(served, seed) for seed in range(2)]
    await gatherResults(
        [in_thread(client.run, 150) for client in clients], consumeErrors=True
    )
    assert [client.wrong for client in clients] == [[], []]
    await until(lambda: not server.num_connections)
    assert served.excess == []


@pytest.mark.parametrize("existing", [False, True])
@ensureDeferred
async def test_closing_in_the_middle_of_the_storm(
    serve: Any, logs: Logs, existing: bool
) -> None:
    """
    X1, X3, X4, H5: wherever the close falls, no handler starts after it, it
    finishes, every handler ends, and nothing is left. Again and again.
    """
    chance = random.Random(existing)
    before = open_descriptors()
    for storms in range(12):
        served = Served()
        server = served.server = await serve(
            served,
            on_handler_error=served.failed,
            max_connections=chance.choice([1, 3, 10, 50]),
            max_accepts_per_batch=chance.choice([1, 5, 100]),
            backlog=500,
            reader_buffer_size=4096,
        )
        clients = [
            kind(served, 100 * storms + seed)
            for seed, kind in enumerate((Hostile, Impatient, Hostile))
        ]
        storm = [in_thread(client.run_until_refused) for client in clients]
        enough = chance.randrange(40)
        await until(partial(served.has_started, enough))
        await server.close(close_existing_connections=existing)
        if existing:
            # What was there has been closed; none has come since.
            assert all(
                c.when_socket_closed.has_happened for c in server._factory.connections
            )
        await gatherResults(storm, consumeErrors=True)
        await server.close_finished_and_handlers_determined()
        server.invariant()
        assert server.num_connections == 0
        assert served.running == 0
        assert served.started_when_closed == 0
        assert served.excess == []
        counters = server._factory.counters
        assert sum(counters.ends.values()) == counters.accepted
        # Besides, some have left before their start.
        assert served.started + counters.refused <= counters.accepted
        assert await served.still_there(logs) == []
    assert open_descriptors().keys() <= before.keys()


@ensureDeferred
async def test_three_hundred_servers_leave_no_descriptor(tmp_path: Any) -> None:
    """
    X1, X2, W6: ports and paths, closed in each way, some with a client in the
    backlog or with a handler; each is free again, and nothing is left.
    """
    path = tmp_path / "socket"
    before = open_descriptors()
    servers = []

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        await reader.read()

    for number in range(300):
        server: Server[Any, Any]
        if number % 3 == 2:
            server = await Server.create(
                WhereToListen.of_file(str(path)), handler, on_handler_error="raise"
            )
            family, address = socket.AF_UNIX, str(path)
        else:
            server = Server.create_inet(
                WhereToListen.bind_to("127.0.0.1", 0),
                handler,
                on_handler_error="raise",
            )
            family, address = socket.AF_INET, ("127.0.0.1", server.listening_on)
        client = socket.socket(family)
        if number % 5 < 2:
            client.connect(address)
        if number % 5 == 1:
            await until(partial(getattr, server, "num_connections"))
        await server.close(close_existing_connections=number % 2 == 0)
        if family == socket.AF_UNIX:
            assert not path.exists()
        client.close()
        await server.close_finished_and_handlers_determined()
        servers.append(weakref.ref(server))
    del server
    assert open_descriptors().keys() <= before.keys()
    await turn()
    gc.collect()
    assert [s for s in (ref() for ref in servers) if s is not None] == []


@ensureDeferred
async def test_a_handler_that_always_writes_ends_with_its_client(serve: Any) -> None:
    """S4, H6: a hundred handlers that only write; each ends when its client goes."""
    gone = []

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        try:
            while True:
                writer.write(b"x" * 10_000)
                await writer.drain()
        except ConnectionGone:
            gone.append(address)
            raise

    server = await serve(handler, on_handler_error="raise", max_connections=10)

    address = server.listening_on_address
    pair = (address.host, address.port)

    def clients(number: int) -> None:
        for size in range(number):
            with socket.create_connection(pair, CLIENT_PATIENCE) as connected:
                connected.recv(1 + size * 1_000)

    await gatherResults([in_thread(clients, 25) for _ in range(4)], consumeErrors=True)
    await until(lambda: len(gone) == 100)
    await until(lambda: not server.num_connections)
    assert not server.is_closed
    assert server._factory.counters.left == 100
