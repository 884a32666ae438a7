"""
The whole server against a small model of the specification, driven in any order.

Two machines. The one in memory is exact: after each step the model says who is
live, who waits, who was dropped, which handlers have started and in what order,
every counter, every byte, every Deferred and every report. The one on real
sockets says the same of what the kernel lets it know.

``TCPSVC_DEEP=20`` runs twenty times as many examples, and other ones each time.
"""

from __future__ import annotations

import gc
import json
import socket
import struct
import weakref
from asyncio import IncompleteReadError
from dataclasses import fields
from typing import Any

import pytest
import pytest_twisted
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
)
from twisted.internet.address import IPv4Address
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import Clock

from tcpsvc import (
    LOCALHOST,
    BufferAgeLimitExceeded,
    ConnectionGone,
    Server,
    WhereToListen,
)
from tcpsvc.listeners import Listeners
from tcpsvc.testing import MemoryServer
from tests.machines import Box, box, forget_log, own_log, run, with_the_reactor
from tests.support import Logs, the_reactor, turn


class Boom(Exception):
    """What handlers raise here."""


class PolicyBoom(Exception):
    """What ``on_handler_error`` raises here."""


# The machine in memory.

#: Options of the servers in memory. What is as small is often reached.
READER_LIMIT = 16
WRITER_LIMIT = 64
AGE_LIMIT = 6.0
FLUSH_TIMEOUT = 8.0
OWN_CLOSE_TIMEOUT = 5.0

#: What :mod:`tcpsvc.testing` does otherwise than a socket; each has a test of its
#: own at the end of this file. Turn it off when that passes.
FIN_NEEDS_READING = False
RESET_LOSES_UNREAD = False

#: What a handler does when it starts. Unless it ends, it then waits to be told.
BEHAVIOURS = [
    *["waits"] * 8,
    "deferred",
    "deferred",
    "returns",
    "says",
    "raises",
    "generator",
    "closes",
    "closes all",
]


#: What a handler ends with when it raises.
KINDS = ["boom", "gone", "incomplete", "cancelled", "another's"]

#: Which of them may close the server.
ENDS = {
    "ignore": lambda behaviour: behaviour.startswith("closes"),
    "raise": lambda behaviour: (
        behaviour not in ("waits", "deferred", "returns", "says")
    ),
}


class FakePort:
    """A listening port that closes when the test says so, or at once."""

    def __init__(self, address: Any, *, at_once: bool) -> None:
        self._address = address
        self._at_once = at_once
        self.stopping: Deferred[None] | None = None

    def getHost(self) -> Any:
        return self._address

    def stopListening(self) -> Deferred[None] | None:
        assert self.stopping is None, "stopListening was called twice"
        self.stopping = Deferred()
        return None if self._at_once else self.stopping


class Peer:
    """The model of one client, of its connection and of its handler."""

    def __init__(self, name: int, address: Any, behaviour: str) -> None:
        self.name = name
        self.address = address
        self.behaviour = behaviour
        self.client: Any = None
        self.reader: Any = None
        self.writer: Any = None
        self.end: Deferred[None] = Deferred()
        #: gone (dropped, or never let in), held, waiting, running, ended
        self.state = "gone"
        self.open = True
        # Input.
        self.input = bytearray()
        self.consumed = 0
        self.floor: int | None = None  # What is certainly buffered, when cut off.
        self.fin = False
        self.eof = False
        self.reading: tuple[str, int, Box] | None = None
        self.reader_closed = False
        # Output.
        self.output = bytearray()
        self.delivered = 0
        self.takes = True
        self.writer_state = "open"
        self.waiters: list[list[Any]] = []  # [kind, target, Box, expected]
        self.consumer_left: Box | None = None
        self.has_left = False
        self.pending_since = 0.0
        # Its end.
        self.closing = False
        self.closing_since = 0.0
        self.timeout = 0.0
        self.was_reset = False
        self.has_eof = False
        self.closed_by_server = False
        self.is_x3 = False
        self.age_error = False
        self.error: type[BaseException] | None = None
        self.error_reported = False

    @property
    def pending(self) -> int:
        """How many bytes wait to be sent."""
        return len(self.output) - self.delivered if self.open else 0

    @property
    def available(self) -> bytes:
        """What the handler has not read yet."""
        return bytes(self.input[self.consumed :])

    def __repr__(self) -> str:
        return f"<Peer {self.name} {self.state} {'open' if self.open else 'closed'}>"


class InMemory(RuleBasedStateMachine):
    """
    A :class:`MemoryServer`, and a :class:`Server` that closes it, whose port is
    the machine's. Nothing here waits: a step's every effect is there when the
    model has taken the step too.
    """

    policy: Any = "ignore"
    leaks: list[Any] = []

    # The start.

    @initialize(
        limit=st.integers(1, 4),
        at_once=st.booleans(),
        drops=st.sampled_from([False, False, False, True]),
        asks_failed=st.booleans(),
        ages=st.booleans(),
        opens_for=st.sampled_from([0, 20, 40, 60]),
        clients=st.lists(st.sampled_from(BEHAVIOURS), min_size=2, max_size=6),
        mode=st.sampled_from(["ok", "takes its time"]),
    )
    def begin(
        self,
        limit: int,
        at_once: bool,
        drops: bool,
        asks_failed: bool,
        ages: bool,
        opens_for: int,
        clients: list[str],
        mode: str,
    ) -> None:
        """Create the server."""
        #: So many steps pass before anything closes it.
        self.opens_for = opens_for
        self.steps = 0
        self._log_context = own_log()
        self.logs = self._log_context.__enter__()
        self.clock = Clock()

        def report(address: Any, failure: Any) -> Any:
            return self.on_handler_error(address, failure)

        self.memory = MemoryServer(
            self.handler,
            on_handler_error=report if self.policy == "callable" else self.policy,
            clock=self.clock,
            max_connections=limit,
            drop_incoming_connections=drops,
            reader_buffer_size=READER_LIMIT,
            writer_buffer_size=WRITER_LIMIT,
            buffer_age_limit=AGE_LIMIT if ages else None,
            flush_timeout=FLUSH_TIMEOUT,
        )
        self.port = FakePort(self.memory.address, at_once=at_once)
        self.factory = self.memory.factory
        self.server: Server[Any, Any] = Server(
            Listeners(
                [WhereToListen.bind_to(LOCALHOST, 8000)],
                [self.port],  # type: ignore[list-item]
                self.factory,
            ),
            self.factory,
        )
        # What really happens.
        self.started: list[int] = []
        self.reported: list[tuple[int, str]] = []
        self.mode = mode
        self.reporting: list[Deferred[None]] = []
        # What is to happen.
        self.ages = ages
        self.paused = False
        self.came_before = 0
        self.at_once = at_once
        self.limit = limit
        self.dropping = drops
        self.closed = False
        self.port_state = "open"  # open, closing, closed
        self.peers: list[Peer] = []
        self.live: list[Peer] = []
        self.held: list[Peer] = []
        self.starting: list[Peer] = []
        self.to_start: list[int] = []
        self.to_report: list[tuple[int, str]] = []
        self.pending_reports = 0
        self.failure: str | None = None
        self.is_over = False
        self.logged_failures = 0
        self.count = dict.fromkeys(
            [f.name for f in fields(self.factory.counters) if f.type == "int"], 0
        )
        # Who waits from the start, and from later.
        self.finished = Box(self.server.close_finished())
        self.over = Box(self.server.close_finished_and_handlers_determined())
        self.closes: list[Box] = []
        self.failed: Box | None = None
        self.is_closed_when_failed: bool | None = None
        if asks_failed:
            failed = self.server.failed()
            failed.addBoth(self.hears_of_failure)
            self.failed = Box(failed)
        for behaviour in clients:
            self.connect(behaviour, True)

    def hears_of_failure(self, result: Any) -> Any:
        """E2: is_closed is true before anyone hears of the error."""
        self.is_closed_when_failed = self.server.is_closed
        return result

    # What the server calls.

    def handler(self, address: Any, reader: Any, writer: Any) -> Any:
        """Each client's handler does what its client's behaviour says."""
        peer = self.peers[address.port - 50_000]
        assert peer.reader is None, "started twice"
        self.started.append(peer.name)
        peer.reader, peer.writer = reader, writer
        peer.consumer_left = Box(writer.consumer_left())
        if self.server.is_closed:
            self.started.append(-1)  # H5: the model never expects that.
        behaviour = peer.behaviour
        if behaviour == "returns":
            return None
        if behaviour == "says":
            writer.write(b"bye")
            return "a plain value"
        if behaviour == "raises":
            raise Boom(peer.name)
        if behaviour == "generator":
            return (x for x in ())
        if behaviour == "closes":
            self.closes.append(Box(self.server.close()))
        if behaviour == "closes all":
            self.closes.append(Box(self.server.close(close_existing_connections=True)))
        if behaviour == "deferred":
            return peer.end
        return self.waits(peer)

    async def waits(self, peer: Peer) -> None:
        """A coroutine that ends when told to."""
        await peer.end

    def on_handler_error(self, address: Any, failure: Any) -> Any:
        """The policy, where it is a callable."""
        name = address.port - 50_000
        kind = type(failure.value).__name__
        self.reported.append((name, kind))
        # E1: after its slot is released; but for S6, where the handler runs on.
        holds_slot = address in [c.peer for c in self.factory.connections]
        if holds_slot != (kind == "BufferAgeLimitExceeded"):
            self.reported.append((name, f"live: {holds_slot}"))
        if self.mode == "raises":
            raise PolicyBoom(name)
        if self.mode == "closes":
            self.closes.append(Box(self.server.close()))
        if self.mode == "closes all":
            self.closes.append(Box(self.server.close(close_existing_connections=True)))
        if self.mode == "takes its time":
            self.reporting.append(Deferred())
            return self.reporting[-1]
        return None

    # The model.

    def model_turn(self) -> None:
        """What is due at once has happened."""
        while self.starting:
            peer = self.starting.pop(0)
            self.model_start(peer)
        if self.port_state == "closing" and self.at_once:
            self.port_state = "closed"
        self.model_over()

    def model_start(self, peer: Peer) -> None:
        assert not self.closed
        peer.state = "running"
        self.to_start.append(peer.name)
        behaviour = peer.behaviour
        if behaviour == "returns":
            self.model_end(peer, None)
        elif behaviour == "says":
            self.model_write(peer, b"bye")
            self.model_end(peer, None)
        elif behaviour == "raises":
            self.model_end(peer, Boom)
        elif behaviour == "generator":
            self.model_end(peer, TypeError)
        elif behaviour == "closes":
            self.model_close()
        elif behaviour == "closes all":
            self.model_close(existing=True)

    def model_write(self, peer: Peer, data: bytes) -> None:
        if not peer.open:
            return  # S4: dropped.
        if not peer.pending:
            peer.pending_since = self.clock.seconds()
        peer.output += data
        if peer.takes:
            self.model_deliver(peer)

    def model_deliver(self, peer: Peer) -> None:
        """The client takes all there is."""
        peer.delivered = len(peer.output)
        for waiter in peer.waiters:
            if waiter[3] == "pending":
                waiter[3] = "done"
        if peer.closing and peer.open:
            self.model_lost(peer)

    def model_end(self, peer: Peer, error: Any, *, ordinary: bool = False) -> None:
        """The handler has ended."""
        peer.state = "ended"
        if error is None:
            self.count["finished"] += 1
        elif ordinary:
            self.count["left"] += 1
        else:
            self.count["failed"] += 1
            if peer.error is None:
                peer.error = error
            elif error is not BufferAgeLimitExceeded:
                self.count["later_errors"] += 1
                self.logged_failures += 1
        if peer.open:
            self.model_begin_to_close(peer, FLUSH_TIMEOUT)
        else:
            self.model_release(peer)

    def model_begin_to_close(self, peer: Peer, timeout: float) -> None:
        if peer.closing or not peer.open:
            return
        peer.closing = True
        peer.closing_since = self.clock.seconds()
        peer.timeout = timeout
        self.model_cut(peer)
        if not peer.pending and (peer.takes or not FIN_NEEDS_READING):
            self.model_lost(peer)

    def model_cut(self, peer: Peer) -> None:
        """EOF, after what is buffered."""
        if not peer.eof:
            peer.eof = True
            if not peer.fin and len(peer.available) > READER_LIMIT:
                peer.floor = peer.consumed + READER_LIMIT

    def model_lost(self, peer: Peer, *, how: str = "orderly") -> None:
        """The socket is closed."""
        assert peer.open
        peer.open = False
        if how == "by the client":
            if RESET_LOSES_UNREAD and (
                peer.state == "held" or len(peer.available) > READER_LIMIT
            ):
                peer.floor = peer.consumed
            peer.eof = True
            peer.has_left = True
        else:
            self.model_cut(peer)
        peer.was_reset = how == "aborted"
        gone = "BufferAgeLimitExceeded" if peer.age_error else "ConnectionGone"
        for waiter in peer.waiters:
            if waiter[3] == "pending":
                waiter[3] = gone
        if peer.state == "ended":
            self.model_release(peer)

    def model_close_now(self, peer: Peer) -> None:
        """X3, for one."""
        if peer.open:
            peer.closed_by_server = True
            self.model_lost(peer)

    def model_release(self, peer: Peer) -> None:
        """H4, in its order."""
        self.live.remove(peer)
        if peer.error is not None and not peer.error_reported:
            self.model_report(peer, peer.error)
        self.model_places()
        self.model_over()

    def model_places(self) -> None:
        while (
            self.held
            and not self.closed
            and not (self.paused and self.held[0].name >= self.came_before)
            and len(self.live) < self.limit
        ):
            self.model_admit(self.held.pop(0))

    def model_admit(self, peer: Peer) -> None:
        peer.state = "waiting"
        self.live.append(peer)
        self.starting.append(peer)
        self.count["accepted"] += 1

    def model_report(self, peer: Peer, error: Any) -> None:
        """E1, E2."""
        if self.policy == "raise":
            self.pending_reports += 1
            self.model_fail(error.__name__)
            self.pending_reports -= 1
        if self.policy != "callable":
            return
        self.to_report.append((peer.name, error.__name__))
        self.pending_reports += 1
        if self.mode == "raises":
            self.model_fail("PolicyBoom")
        if self.mode == "closes":
            self.model_close()
        if self.mode == "closes all":
            self.model_close(existing=True)
        if self.mode != "takes its time":
            self.pending_reports -= 1

    def model_fail(self, error: str) -> None:
        """E2, E3."""
        if self.failure is not None:
            self.logged_failures += 1
            return
        self.failure = error
        self.model_close()
        if self.failed is None:
            self.logged_failures += 1

    def model_close(self, *, existing: bool = False) -> None:
        if not self.closed:
            self.closed = True
            self.port_state = "closing"
            held, self.held = self.held, []
            for peer in held:
                self.count["refused"] += 1
                peer.state = "gone"
                peer.open = False
            starting, self.starting = self.starting, []
            for peer in starting:
                self.count["refused"] += 1
                peer.state = "ended"
                if peer.open:
                    self.model_lost(peer)
                else:
                    self.model_release(peer)
        if existing:
            for peer in list(self.live):
                if peer.open:
                    peer.is_x3 = True
                self.model_close_now(peer)
        self.model_over()

    def model_over(self) -> None:
        """X4."""
        if (
            self.closed
            and self.port_state == "closed"
            and not self.live
            and not self.pending_reports
        ):
            self.is_over = True

    def model_sweep(self, order: list[Peer]) -> None:
        """The look at old bytes and slow clients, once a second."""
        now = self.clock.seconds()
        for peer in order:
            if not peer.open:
                continue
            age = now - peer.pending_since if peer.pending else 0.0
            if self.ages and age > AGE_LIMIT:
                # S6: "about once a second".
                is_old = peer.writer._age_error is not None
                assert is_old or age <= AGE_LIMIT + 1, f"{peer} is {age} s behind"
                if is_old:
                    self.count["too_old"] += 1
                    peer.age_error = True
                    if peer.state == "running":
                        peer.error = BufferAgeLimitExceeded
                        peer.error_reported = True
                        self.model_report(peer, BufferAgeLimitExceeded)
                    self.model_close_now(peer)
                    continue
            if peer.closing and now - peer.closing_since >= peer.timeout:
                self.count["aborted"] += 1
                peer.closed_by_server = True
                self.model_lost(peer, how="aborted")

    # Choosing.

    def all_running(self) -> list[Peer]:
        return [p for p in self.live if p.state == "running"]

    def all_connected(self) -> list[Peer]:
        """Clients whose connection is open at both ends."""
        return [p for p in (*self.live, *self.held) if p.open]

    @property
    def may_close(self) -> bool:
        """Not too early, or all examples would be short."""
        return self.steps >= self.opens_for

    @property
    def is_full(self) -> bool:
        """Whether there are clients enough."""
        if self.closed:
            return self.count["refused"] > 2
        return len(self.live) + len(self.held) >= 10

    def some_running(self) -> bool:
        return bool(self.all_running())

    def some_connected(self) -> bool:
        return bool(self.all_connected())

    # The clients' steps. Each lets time pass, of no length.

    def connect_any(self, behaviour: str) -> None:
        """A client connects, with any handler."""
        self.connect(behaviour, True)

    def connect(self, behaviour: str, takes: bool) -> None:
        """A client connects."""
        if not self.may_close and ENDS.get(self.policy, ENDS["ignore"])(behaviour):
            behaviour = "waits"
        name = len(self.peers)
        peer = Peer(name, IPv4Address("TCP", LOCALHOST, 50_000 + name), behaviour)
        peer.takes = takes
        self.peers.append(peer)
        if self.closed or self.dropping:
            self.count["refused" if self.closed else "dropped"] += 1
            peer.open = False
        elif self.paused or len(self.live) >= self.limit:
            peer.state = "held"
            self.held.append(peer)
        else:
            self.model_admit(peer)
        peer.client = self.memory.connect(peer.address, is_reading=takes)
        self.model_turn()
        for connection in self.factory.connections:
            if connection.peer == peer.address:
                self.leaks.append(weakref.ref(connection))

    def client_sends(self, pick: int, size: int) -> None:
        """A client sends."""
        peer = self.pick(self.all_connected(), pick)
        if peer.fin:
            return
        data = bytes(len(peer.input) + i & 255 for i in range(size))
        if not peer.eof:
            peer.input += data
        peer.client.send(data)
        self.model_turn()

    def client_fin(self, pick: int) -> None:
        """A client sends FIN."""
        peer = self.pick(self.all_connected(), pick)
        if peer.fin:
            return
        if not peer.eof:
            peer.fin = peer.eof = True
        peer.fin = True
        peer.client.send_eof()
        self.model_turn()

    def client_resets(self, pick: int) -> None:
        """A client sends RST."""
        peer = self.pick(self.all_connected(), pick)
        self.model_lost(peer, how="by the client")
        peer.client.reset()
        self.model_turn()

    def client_stops_reading(self, pick: int) -> None:
        """A client takes nothing more."""
        peer = self.pick(self.all_connected(), pick)
        peer.takes = False
        peer.client.stop_reading()

    def client_resumes_reading(self, pick: int) -> None:
        """A client takes all there is, and goes on."""
        peer = self.pick(self.all_connected(), pick)
        peer.takes = True
        if peer.pending or peer.closing:
            self.model_deliver(peer)
        peer.client.resume_reading()
        self.model_turn()

    # The handlers' steps. No turn of the reactor is in them.

    def end_with(self, peer: Peer, error: BaseException | None, ordinary: bool) -> None:
        """A handler ends."""
        if error is None:
            peer.end.callback(None)
            self.model_end(peer, None)
        else:
            peer.end.errback(error)
            self.model_end(peer, type(error), ordinary=ordinary)

    def handler_finishes(self, pick: int) -> None:
        """A handler finishes."""
        self.end_with(self.pick(self.all_running(), pick), None, True)

    def handler_raises(self, pick: int, kind: str) -> None:
        """A handler raises: an error of its own, or how its connection ended (H6)."""
        peer = self.pick(self.all_running(), pick)
        if self.policy == "raise" and not self.may_close:
            return
        ordinary = False
        error: BaseException = Boom(peer.name)
        if kind == "incomplete":
            if peer.closed_by_server and not peer.is_x3:
                return  # H6 says nothing of it.
            error = IncompleteReadError(b"", 1)
            ordinary = peer.is_x3
        elif kind == "cancelled":
            error = CancelledError()  # By whomever, but not by the server.
        elif kind == "gone" and not peer.open and peer.writer_state != "closed":
            error = Box(peer.writer.flushed()).value
            ordinary = not peer.age_error
        elif kind == "another's":
            error = ConnectionGone("of another connection")
        self.end_with(peer, error, ordinary)

    def handler_writes(self, pick: int, size: int) -> None:
        """A handler writes (S4, S8)."""
        peer = self.pick(self.all_running(), pick)
        data = bytes([len(peer.output) & 255]) * size
        if peer.writer_state != "open":
            with pytest.raises(RuntimeError):
                peer.writer.write(data)
            return
        peer.writer.write(data)
        self.model_write(peer, data)

    def client_stalls(self, pick: int, size: int) -> None:
        """A handler writes what its client does not take."""
        peer = self.pick(self.all_running(), pick)
        if peer.open and peer.writer_state == "open":
            peer.takes = False
            peer.client.stop_reading()
            self.handler_writes(pick, size)

    def handler_waits_for_output(self, pick: int, kind: str) -> None:
        """A handler awaits drain or flushed (S4, S5)."""
        peer = self.pick(self.all_running(), pick)
        if peer.writer_state == "closed":
            expected = "RuntimeError"
        elif not peer.open:
            expected = "BufferAgeLimitExceeded" if peer.age_error else "ConnectionGone"
        elif peer.pending > (WRITER_LIMIT if kind == "drain" else 0):
            expected = "pending"
        else:
            expected = "done"
        writer = peer.writer
        waits = Box(writer.flushed()) if kind == "flushed" else box(writer.drain())
        peer.waiters.append([kind, len(peer.output), waits, expected])

    def handler_cancels_a_wait(self, pick: int, which: int) -> None:
        """Cancelling a drain or a flushed affects nobody else (S1)."""
        peer = self.pick(self.all_running(), pick)
        waiting = [w for w in peer.waiters if w[3] == "pending"]
        if waiting:
            waiter = waiting[which % len(waiting)]
            waiter[3] = "CancelledError"
            waiter[2].deferred.cancel()

    def handler_closes_its_writer(self, pick: int) -> None:
        """A handler closes its writer: flushed, then closed; the slot is kept."""
        peer = self.pick(self.all_running(), pick)
        if peer.writer_state != "closed":
            peer.writer_state = "closed"
            self.model_begin_to_close(peer, min(OWN_CLOSE_TIMEOUT, FLUSH_TIMEOUT))
        peer.writer.close()

    def handler_closes_its_reader(self, pick: int) -> None:
        """A handler closes its reader: the connection is closed (S8)."""
        peer = self.pick(self.all_running(), pick)
        peer.reader.close()
        peer.reader_closed = True
        self.model_close_now(peer)

    def handler_writes_eof(self, pick: int) -> None:
        """A handler closes its write side."""
        peer = self.pick(self.all_running(), pick)
        if peer.writer_state == "closed":
            with pytest.raises(RuntimeError):
                peer.writer.write_eof()
            return
        peer.writer.write_eof()
        peer.writer_state = "eof"

    def handler_aborts(self, pick: int) -> None:
        """A handler aborts its connection."""
        peer = self.pick(self.all_running(), pick)
        peer.writer.abort()
        if peer.open:
            peer.closed_by_server = True
            self.model_lost(peer, how="aborted")

    def handler_reads(self, pick: int, kind: str, size: int) -> None:
        """A handler reads (S1, S2)."""
        peer = self.pick(self.all_running(), pick)
        reads = box(getattr(peer.reader, kind)(size))
        if peer.reading is not None or peer.reader_closed:
            assert reads.state == "RuntimeError"
            return
        peer.reading = (kind, size, reads)

    def handler_cancels_its_read(self, pick: int) -> None:
        """Cancelling a read loses no byte, and leaves the reader free (S1)."""
        peer = self.pick(self.all_running(), pick)
        if peer.reading is not None:
            reads = peer.reading[2]
            peer.reading = None
            reads.deferred.cancel()
            assert reads.state == "CancelledError"

    # The server's steps.

    def turn(self) -> None:
        """One turn of the reactor."""
        self.clock.advance(0)
        self.model_turn()

    def time_passes(self, seconds: float) -> None:
        """The clock is advanced."""
        for _ in range(int(seconds * 2)):
            sweeper = self.factory.sweeper
            timer = sweeper.timer
            sweeps = timer is not None and timer.getTime() <= self.clock.seconds() + 0.5
            by_id = {id(c): c.peer.port - 50_000 for c in sweeper._watched}
            order = [self.peers[name] for name in by_id.values()]
            self.clock.advance(0.5)
            self.model_turn()
            if sweeps:
                self.model_sweep(order)
                self.model_turn()
            self.as_expected()

    def set_drop(self, drop: bool) -> None:
        """Drop incoming connections, or not any more (D1, D2)."""
        self.dropping = drop
        if drop:
            held, self.held = self.held, []
            for peer in held:
                self.count["dropped"] += 1
                peer.state = "gone"
                peer.open = False
        self.server.set_drop_incoming_connections(drop)

    def set_limit(self, limit: int) -> None:
        """Another limit: it closes nobody, and lets in who waits."""
        self.limit = limit
        self.server.max_connections = limit
        self.model_places()

    def pause(self) -> None:
        """
        Hold (Z2): a port of somebody's own accepts, and whom it accepts waits; who
        was accepted before does not wait for the resume (Z1).
        """
        if not self.paused:
            self.came_before = len(self.peers)
        self.paused = True
        assert Box(self.server.pause("hold")).state == "done"

    def resume(self) -> None:
        """Go on (Z1), also when not paused."""
        self.paused = False
        assert Box(self.server.resume()).state == "done"
        self.model_places()

    def close(self) -> None:
        """Close (X1, X2)."""
        waits = Box(self.server.close())
        self.model_close()
        assert (waits.state == "done") == (self.port_state == "closed")
        self.closes.append(waits)

    def close_all(self) -> None:
        """Close with existing connections (X3), also after a plain close."""
        waits = Box(self.server.close(close_existing_connections=True))
        self.model_close(existing=True)
        assert (waits.state == "done") == (self.port_state == "closed")
        self.closes.append(waits)

    def port_closes(self) -> None:
        """The listening socket is closed."""
        self.port_state = "closed"
        self.port.stopping.callback(None)  # type: ignore[union-attr]
        self.model_over()

    def cancel_handlers(self) -> None:
        """The server cancels its handlers: they end ordinarily (H6)."""
        for peer in list(self.live):
            if peer.state == "running":
                self.model_end(peer, CancelledError, ordinary=True)
        self.server.cancel_handlers()

    def set_mode(self, mode: str) -> None:
        """What on_handler_error does from now on."""
        if self.may_close or mode in ("ok", "takes its time"):
            self.mode = mode

    def report_ends(self, pick: int, fails: bool) -> None:
        """The Deferred of an on_handler_error fires."""
        report = self.reporting.pop(pick % len(self.reporting))
        if fails and self.may_close:
            report.errback(PolicyBoom())
            self.model_fail("PolicyBoom")
        else:
            report.callback(None)
        self.pending_reports -= 1
        self.model_over()

    @rule(
        moves=st.lists(
            st.tuples(
                st.deferred(lambda: st.sampled_from(NAMES)),
                st.integers(0, 9),
                st.integers(0, 29),
            ),
            min_size=1,
            max_size=12,
        )
    )
    def steps_are_taken(self, moves: list[tuple[str, int, int]]) -> None:
        """
        Any steps. They are no rules of their own, since Hypothesis leaves out a
        part of the rules in each example; here they all meet.
        """
        for name, a, b in moves:
            needs, take, _ = MOVES[name]
            if needs is None or needs(self):
                take(self, a, b)
                self.as_expected()

    def pick(self, candidates: list[Peer], number: int) -> Peer:
        return candidates[number % len(candidates)]

    # What must hold after each step.

    @invariant()
    def as_expected(self) -> None:
        """Everything that can be seen is as the model says."""
        self.steps += 1
        server = self.server
        server.invariant()
        assert [c.peer.port - 50_000 for c in self.factory.connections] == [
            p.name for p in self.live
        ]
        assert server.num_connections == len(self.live)
        assert server.max_connections == self.limit
        assert server.is_closed == self.closed
        assert (server.is_paused == "hold") == (self.paused and not self.closed)
        assert server.is_dropping_incoming_connections == self.dropping
        assert self.started == self.to_start
        assert self.reported == self.to_report
        described = json.loads(json.dumps(server.describe()))
        assert {n: described["counters"][n] for n in self.count} == self.count
        assert described["held"] == len(self.held)
        assert "\n" not in repr(server)
        for peer in self.peers:
            self.peer_as_expected(peer)
        self.waiters_as_expected()
        assert len(self.logs.bad()) == self.logged_failures

    def peer_as_expected(self, peer: Peer) -> None:
        client = peer.client
        assert client.is_closed != peer.open, peer
        assert len(client._received) == peer.delivered
        assert client._received == peer.output[: peer.delivered]
        peer.has_eof |= not peer.open or (
            peer.writer_state == "eof"
            and not peer.pending
            and (peer.takes or not FIN_NEEDS_READING)
        )
        assert client.has_eof == peer.has_eof, peer
        assert client.was_reset == peer.was_reset, peer
        if peer.writer is None:
            return
        writer = peer.writer
        assert writer.bytes_to_write == peer.pending
        assert writer.is_closed == (
            not peer.open or peer.writer_state == "closed" or peer.state == "ended"
        )
        assert peer.consumer_left is not None
        assert (peer.consumer_left.state == "done") == peer.has_left
        for kind, _, waits, expected in peer.waiters:
            assert waits.state == expected, (peer, kind)
        self.read_as_expected(peer)

    def read_as_expected(self, peer: Peer) -> None:
        """The outstanding read has ended exactly if it should."""
        if peer.reading is None:
            return
        kind, size, reads = peer.reading
        available = peer.available
        if peer.reader_closed:
            assert reads.state == "RuntimeError"
            peer.reading = None
            return
        if reads.state == "pending":
            assert not peer.eof
            assert len(available) < (1 if kind == "read" else size)
            return
        peer.reading = None
        if reads.state == "IncompleteReadError":
            got, is_last = reads.value.partial, True
            assert kind == "readexactly"
            assert len(got) < size
        else:
            assert reads.state == "done", reads.value
            got = reads.value
            is_last = not got
            assert len(got) == size if kind == "readexactly" else len(got) <= size
        assert available.startswith(got)
        peer.consumed += len(got)
        if is_last:
            assert peer.eof
            least = len(peer.input) if peer.floor is None else peer.floor
            assert peer.consumed >= least, f"{peer} has lost input"
            del peer.input[peer.consumed :]

    def waiters_as_expected(self) -> None:
        server = self.server
        port_closed = self.port_state == "closed"
        for expected, mine, make in (
            (port_closed, self.finished, server.close_finished),
            (self.is_over, self.over, server.close_finished_and_handlers_determined),
        ):
            assert (mine.state == "done") == expected
            # One that is asked for now knows, and its end is nobody else's.
            fresh = Box(make())
            assert (fresh.state == "done") == expected
            fresh.deferred.cancel()
        for waits in self.closes:
            assert (waits.state == "done") == port_closed
        if self.failed is None and self.failure is None:
            return  # Asking now would change what is logged later.
        fresh = Box(server.failed())
        for waits in (fresh, self.failed or fresh):
            if self.failure is not None:
                assert waits.state == self.failure
                assert self.failed is None or self.is_closed_when_failed
            else:
                assert (waits.state == "done") == self.is_over
        fresh.deferred.cancel()

    # The end.

    def teardown(self) -> None:
        """Close it all: nothing is left."""
        if not hasattr(self, "server"):
            return
        try:
            self.mode = "ok"
            self.opens_for = 0
            self.close_all()
            if not self.at_once and self.port_state == "closing":
                self.port_closes()
            self.turn()
            while self.some_running():
                self.handler_finishes(0)
            self.as_expected()
            while self.reporting:
                self.report_ends(0, False)
            self.turn()
            self.as_expected()
            assert not self.live
            assert self.is_over
            assert self.over.state == "done"
            assert self.clock.getDelayedCalls() == []
        finally:
            self._log_context.__exit__(None, None, None)
            self.logs.events.clear()


def move(name: str, needs: Any, *choices: Any, times: int = 1) -> Any:
    """A step that is chosen by two small numbers; ``needs`` says when it can be."""

    def take(machine: InMemory, a: int, b: int) -> None:
        chosen: list[Any] = []
        if needs in (RUNNING, CONNECTED):
            chosen.append(a)
        for among in choices:
            b, which = divmod(b, len(among))
            chosen.append(among[which])
        getattr(machine, name)(*chosen)

    return name, (needs, take, times)


RUNNING, CONNECTED = InMemory.some_running, InMemory.some_connected
MOVES: dict[str, Any] = dict(
    [
        move(
            "connect",
            lambda m: not m.is_full,
            ["waits", "waits", "deferred", "says", "waits", "returns"],
            [True, False, True],
            times=4,
        ),
        move("connect_any", lambda m: not m.is_full, BEHAVIOURS, times=2),
        move("client_sends", CONNECTED, [1, 7, 16, 17, 40], times=3),
        move("client_fin", CONNECTED, times=2),
        move("client_resets", CONNECTED, times=2),
        move("client_stops_reading", CONNECTED),
        move("client_resumes_reading", CONNECTED),
        move("client_stalls", RUNNING, [10, 65, 150_000], times=3),
        move("handler_finishes", RUNNING, times=2),
        move("handler_raises", RUNNING, KINDS, times=2),
        move("handler_writes", RUNNING, [1, 10, 64, 65, 150_000], times=2),
        move("handler_waits_for_output", RUNNING, ["flushed", "drain"], times=2),
        move("handler_cancels_a_wait", RUNNING, [0, 1, 2]),
        move("handler_closes_its_writer", RUNNING),
        move("handler_closes_its_reader", RUNNING),
        move("handler_writes_eof", RUNNING),
        move("handler_aborts", RUNNING),
        move(
            "handler_reads",
            RUNNING,
            ["read", "readexactly"],
            [1, 5, 16, 30, 60],
            times=2,
        ),
        move("handler_cancels_its_read", RUNNING),
        move("turn", None),
        move("time_passes", None, [1, 0.5, 3, 9], times=3),
        move("set_drop", None, [False, False, False, True]),
        move("set_limit", None, [1, 2, 3, 4, 5]),
        move("pause", lambda m: not m.closed),
        move("resume", lambda m: not m.closed, times=2),
        move("cancel_handlers", lambda m: m.may_close),
        move("close", lambda m: m.may_close),
        move("close_all", lambda m: m.may_close),
        move("port_closes", lambda m: m.port_state == "closing" and not m.at_once),
        move("report_ends", lambda m: m.reporting, [0, 1, 2], [False, False, True]),
        move(
            "set_mode",
            lambda m: m.policy == "callable",
            ["ok", "takes its time", "raises", "closes", "closes all"],
            times=2,
        ),
    ]
)
NAMES = [name for name, (_, _, times) in MOVES.items() for _ in range(times)]


class InMemoryCallable(InMemory):
    policy = "callable"


class InMemoryRaise(InMemory):
    policy = "raise"


@pytest.mark.whatever("engine", "reactor")
@pytest.mark.parametrize("machine", [InMemory, InMemoryCallable, InMemoryRaise])
def test_in_memory_everything_is_as_the_model_says(machine: Any, logs: Logs) -> None:
    """
    A1, A5, H1 to H6, D1, D2, E1 to E5, S1 to S6, S8, X1 to X5, Z1, Z2, I1, I4: any
    order of events, for each policy; and no connection outlives its server.
    """
    machine.leaks = []
    try:
        run(machine, 40, 12)
    finally:
        logs.events.clear()  # Each example has looked at its own.
        forget_log()
    gc.collect()
    alive = [c for c in (ref() for ref in machine.leaks) if c is not None]
    assert machine.leaks
    assert alive == []


# The machine on real sockets.

#: The bytes that anybody sends, whatever their number.
PATTERN = bytes(i % 251 for i in range(251)) * 8_000

#: More than the narrowed kernel buffers take.
MUCH = 400_000


class Caller:
    """A plain non-blocking client, and the model of its connection."""

    def __init__(self, name: int, behaviour: str, port: int) -> None:
        self.name = name
        self.behaviour = behaviour
        self.socket = socket.socket()
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.socket.connect((LOCALHOST, port))
        self.port = self.socket.getsockname()[1]
        self.socket.setblocking(False)
        # What it has done.
        self.takes = True
        self.sent = 0
        self.has_left = ""  # fin, closed, reset
        # What it has seen.
        self.received = 0
        self.end = ""  # EOF, reset
        # Its handler.
        self.fate = "queued"  # queued, running, ended, dropped, refused
        self.reader: Any = None
        self.writer: Any = None
        self.wake: Deferred[None] = Deferred()
        self.written = 0
        self.read = 0
        self.fails = False
        self.is_cut = False  # Closed by the server otherwise than in the end.
        self.writer_closed = False
        self.active_at = 0.0

    def pump(self) -> None:
        """Take what there is."""
        while self.takes and not self.end and self.has_left in ("", "fin"):
            try:
                data = self.socket.recv(65536)
            except BlockingIOError:
                return
            except ConnectionError:
                self.end = "reset"
                return
            if not data:
                self.end = "EOF"
            expected = PATTERN[self.received : self.received + len(data)]
            assert data == expected, f"{self} was sent something else"
            self.received += len(data)

    @property
    def is_over_when_ended(self) -> bool:
        """Whether nothing can keep the socket, once the handler has ended."""
        return (
            self.is_cut
            or self.has_left in ("closed", "reset")
            or (self.has_left == "fin" and self.takes)
        )

    def __repr__(self) -> str:
        return (
            f"<Caller {self.name} {self.behaviour} {self.fate} {self.has_left} "
            f"{self.received}/{self.written} {self.end}>"
        )


class OnSockets(RuleBasedStateMachine):
    """
    A server on a port, and plain clients. After each step the reactor turns
    until everything is as the model says, and then must stay so.
    """

    policy: Any = "ignore"
    leaks: list[Any] = []

    @initialize(
        limit=st.integers(1, 4),
        batch=st.integers(1, 3),
        drops=st.sampled_from([False, False, False, True]),
        opens_for=st.sampled_from([0, 10, 20, 30]),
        clients=st.integers(1, 5),
    )
    def begin(
        self, limit: int, batch: int, drops: bool, opens_for: int, clients: int
    ) -> None:
        """Create the server."""
        self._log_context = own_log()
        self.logs = self._log_context.__enter__()
        self.clock = Clock()
        self.reported: list[int] = []
        self.started: list[int] = []
        self.ended: set[int] = set()
        self.callers: list[Caller] = []
        self.by_port: dict[int, Caller] = {}
        self.queue: list[Caller] = []
        self.accepted: list[Caller] = []
        self.server = Server.create_inet(
            WhereToListen.bind_to(LOCALHOST, 0),
            self.handler,
            on_handler_error=(lambda address, _: self.report(address))
            if self.policy == "callable"
            else self.policy,
            clock=self.clock,
            max_connections=limit,
            max_accepts_per_batch=batch,
            drop_incoming_connections=drops,
            reader_buffer_size=1000,
            flush_timeout=FLUSH_TIMEOUT,
            buffer_age_limit=None,
        )
        self.factory = self.server._factory
        self.limit = self.allowed = limit
        self.dropping = drops
        self.closed = False
        self.dropped = 0
        self.steps = 0
        self.opens_for = opens_for
        self.closes: list[Box] = []
        self.finished = Box(self.server.close_finished())
        self.over = Box(self.server.close_finished_and_handlers_determined())
        self.failed = Box(self.server.failed())
        for _ in range(clients):
            self.connect("waits")

    # What the server calls.

    async def handler(self, address: Any, reader: Any, writer: Any) -> None:
        """Each client's handler does what its client's behaviour says."""
        caller = self.by_port[address.port]
        self.started.append(caller.name)
        self.leaks.append(weakref.ref(reader._connection))
        caller.reader, caller.writer = reader, writer
        handle = writer.transport.getHandle()
        handle.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        if self.server.is_closed or self.server.num_connections > self.allowed:
            self.started.append(-1)  # Never: H5, A1.
        try:
            if caller.behaviour == "raises":
                raise Boom(caller.name)
            if caller.behaviour == "says":
                writer.write(PATTERN[:100])
            elif caller.behaviour == "echoes":
                while data := await reader.read(500):
                    writer.write(data)
            elif caller.behaviour == "waits":
                await caller.wake
        finally:
            self.ended.add(caller.name)

    def report(self, address: Any) -> None:
        """The policy, where it is a callable."""
        self.reported.append(self.by_port[address.port].name)

    # Driving.

    def alive(self) -> list[Caller]:
        """Who has a slot, by the server's account."""
        return [self.by_port[c.peer.port] for c in self.factory.connections]

    def absorb(self) -> None:
        """Take note of what the server may decide the moment of."""
        for caller in self.callers:
            caller.pump()
        for name in self.started[len(self.accepted) :]:
            caller = self.queue.pop(0)
            assert caller.name == name, f"{name} has overtaken {caller.name}"
            assert not self.dropping
            caller.fate = "running"
            caller.fails = caller.behaviour == "raises"
            if caller.behaviour == "says":
                caller.written = 100
            self.accepted.append(caller)
        for _ in range(self.factory.counters.dropped - self.dropped):
            assert self.dropping
            self.queue.pop(0).fate = "dropped"
            self.dropped += 1
        for caller in self.accepted:
            if caller.fate == "running" and caller.name in self.ended:
                caller.fate = "ended"
                caller.active_at = self.clock.seconds()
        if self.policy == "raise" and not self.closed:
            alive = self.alive()
            if any(c.fails and c not in alive for c in self.accepted):
                self.model_close()

    def model_close(self) -> None:
        self.closed = True
        for caller in self.queue:
            caller.fate = "refused"
        self.queue.clear()

    def as_expected(self) -> str:
        """
        :returns: what is not yet as it must become, nothing if all is.
        :raises AssertionError: something is as it must never be.
        """
        server = self.server
        server.invariant()
        alive = self.alive()
        assert server.num_connections == len(alive)
        assert server.num_connections <= self.allowed
        assert server.is_dropping_incoming_connections == self.dropping
        if server.is_closed != self.closed:
            return f"is_closed: {server.is_closed}"
        if self.queue and self.dropping:
            return f"not dropped: {self.queue}"
        if self.queue and len(alive) < self.limit:
            return f"not accepted: {self.queue}, {len(alive)} live"
        if server._factory.counters.accepted > len(self.accepted) and not self.closed:
            return "not started"
        for caller in self.accepted:
            if wrong := self.caller_as_expected(caller, caller in alive):
                return f"{caller}: {wrong}"
        for caller in self.callers:
            if (
                caller.fate in ("dropped", "refused")
                and caller.has_left in ("", "fin")
                and caller.takes
            ):
                assert not caller.received
                if not caller.end:
                    return f"{caller}: not ended"
                assert caller.fate == "refused" or caller.end == "EOF", caller
        return self.waiters_as_expected(alive)

    def caller_as_expected(self, caller: Caller, is_alive: bool) -> str:
        assert is_alive or caller.fate == "ended", f"{caller} has lost its slot"
        if caller.fate == "running":
            if caller.behaviour in ("raises", "says"):
                return "has not ended"
            if caller.behaviour == "echoes" and (caller.has_left or caller.is_cut):
                return "has not read EOF"
        elif is_alive and caller.is_over_when_ended:
            return "keeps its slot"
        elif is_alive:
            idle = self.clock.seconds() - caller.active_at
            if idle >= FLUSH_TIMEOUT + 2:
                return f"keeps its slot for {idle} s"
        listens = caller.takes and caller.has_left in ("", "fin")
        if listens and not caller.is_cut:
            if caller.received < self.all_written(caller):
                assert not caller.end, f"{caller} has lost output"
                return "has not received all"
            if (caller.fate == "ended" or caller.writer_closed) and not caller.end:
                return "has not read EOF at its end"
            assert caller.end != "reset", caller
        elif listens and not caller.end:
            return "has not seen the close"
        if self.policy == "callable" and caller.fails:
            reports = self.reported.count(caller.name)
            assert reports == (not is_alive), f"{caller}: {reports} reports"
        return ""

    def all_written(self, caller: Caller) -> int:
        if caller.behaviour == "echoes":
            return caller.sent if caller.fate == "running" or not caller.is_cut else 0
        return caller.written

    def waiters_as_expected(self, alive: list[Caller]) -> str:
        for waits in (self.finished, *self.closes):
            assert self.closed or waits.state == "pending"
            if self.closed and waits.state != "done":
                return "close() has not finished"
        is_over = self.closed and not alive
        assert is_over or self.over.state == "pending"
        if is_over and self.over.state != "done":
            return "not over"
        failures = sum(c.fails for c in self.accepted if c not in alive)
        if self.policy == "raise" and failures:
            if self.failed.state != "Boom":
                return "has not failed"
        elif is_over:
            if self.failed.state != "done":
                return "failed() has not fired"
        else:
            assert self.failed.state == "pending"
        ended = [c for c in self.accepted if c.fate == "ended"]
        counters = self.factory.counters
        assert not counters.refused or self.closed
        if counters.accepted != len(self.accepted) + counters.refused:
            return "not started"
        assert counters.failed == sum(c.fails for c in ended)
        assert counters.finished == len(ended) - counters.failed
        logged = failures - 1 if self.policy == "raise" and failures else 0
        assert len(self.logs.bad()) == logged
        return ""

    def settle(self) -> None:
        """Turn the reactor until all is as expected; then it stays so."""
        self.steps += 1
        deadline = the_reactor().seconds() + 10
        while True:
            pytest_twisted.blockon(turn())
            self.absorb()
            wrong = self.as_expected()
            if not wrong:
                break
            assert the_reactor().seconds() < deadline, wrong
        self.allowed = max(self.limit, self.server.num_connections)
        for _ in range(2):
            pytest_twisted.blockon(turn())
            self.absorb()
            wrong = self.as_expected()
            assert not wrong, f"it did not stay so: {wrong}"

    # Choosing.

    def some_clients(self) -> list[Caller]:
        """Clients who are there, so far as they know."""
        return [
            c
            for c in self.callers
            if c.fate in ("queued", "running", "ended")
            and c.has_left in ("", "fin")
            and not c.end
        ]

    def some_waiting(self) -> list[Caller]:
        """Those whose handlers wait to be told."""
        return [
            c for c in self.accepted if c.fate == "running" and c.behaviour == "waits"
        ]

    @property
    def may_close(self) -> bool:
        """Not too early."""
        return self.steps >= self.opens_for

    # The steps.

    def connect(self, behaviour: str) -> None:
        """A client connects."""
        if len(self.server.describe()["connections"]) + len(self.queue) > 9:
            return
        if self.policy == "raise" and behaviour == "raises" and not self.may_close:
            return
        if self.closed:
            with pytest.raises(ConnectionRefusedError):
                Caller(-1, behaviour, self.server.listening_on)
            return
        caller = Caller(len(self.callers), behaviour, self.server.listening_on)
        self.callers.append(caller)
        self.by_port[caller.port] = caller
        self.queue.append(caller)

    def connect_many(self, count: int) -> None:
        """Several do, before anybody is accepted."""
        for number in range(count):
            self.connect(["waits", "echoes", "says"][number % 3])

    def client_sends(self, caller: Caller, size: int) -> None:
        """A client sends."""
        if caller.has_left:
            return
        try:
            caller.sent += caller.socket.send(PATTERN[caller.sent : caller.sent + size])
        except BlockingIOError:
            pass
        except ConnectionError:
            assert caller.is_cut or caller.fate == "ended" or caller.writer_closed

    def client_fin(self, caller: Caller) -> None:
        """A client sends FIN."""
        if not caller.has_left:
            caller.has_left = "fin"
            try:
                caller.socket.shutdown(socket.SHUT_WR)
            except OSError:  # It was reset, and has not looked.
                assert caller.is_cut or caller.fate != "running"

    def client_closes(self, caller: Caller) -> None:
        """A client closes, whatever is under way."""
        caller.has_left = "closed"
        caller.socket.close()

    def client_resets(self, caller: Caller) -> None:
        """A client sends RST."""
        caller.has_left = "reset"
        caller.socket.setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
        )
        caller.socket.close()

    def client_stops_reading(self, caller: Caller) -> None:
        """A client takes nothing more."""
        caller.takes = False

    def client_resumes_reading(self, caller: Caller) -> None:
        """A client takes all there is, and goes on."""
        caller.takes = True
        caller.active_at = self.clock.seconds()

    def handler_finishes(self, caller: Caller) -> None:
        """A handler finishes."""
        caller.wake.callback(None)

    def handler_raises(self, caller: Caller) -> None:
        """A handler raises."""
        if self.policy != "raise" or self.may_close:
            caller.fails = True
            caller.wake.errback(Boom(caller.name))

    def handler_writes(self, caller: Caller, size: int) -> None:
        """A handler writes."""
        if caller.writer_closed:
            return
        if not caller.is_cut and caller.written + size <= len(PATTERN):
            caller.writer.write(PATTERN[caller.written : caller.written + size])
            caller.written += size

    def handler_reads(self, caller: Caller) -> None:
        """A handler reads what there is."""
        if caller.is_cut:
            return
        reads = box(caller.reader.read(100_000))
        if reads.state == "pending":
            reads.deferred.cancel()
        else:
            assert reads.state == "done", reads.value
            expected = PATTERN[caller.read : caller.read + len(reads.value)]
            assert reads.value == expected
            caller.read += len(reads.value)
            assert caller.read <= caller.sent

    def handler_closes_its_writer(self, caller: Caller) -> None:
        """A handler closes its writer."""
        caller.writer.close()
        caller.writer_closed = True

    def handler_closes_its_reader(self, caller: Caller) -> None:
        """A handler closes its reader."""
        caller.reader.close()
        caller.is_cut = True

    def handler_aborts(self, caller: Caller) -> None:
        """A handler aborts."""
        caller.writer.abort()
        caller.is_cut = True

    def set_drop(self, drop: bool) -> None:
        """Drop incoming connections, or not any more."""
        self.dropping = drop
        self.server.set_drop_incoming_connections(drop)

    def set_limit(self, limit: int) -> None:
        """Another limit."""
        self.limit = limit
        self.allowed = max(limit, self.server.num_connections)
        self.server.max_connections = limit

    def close(self) -> None:
        """Close."""
        waits = Box(self.server.close())
        assert (waits.state == "done") == (self.finished.state == "done")
        self.closes.append(waits)
        self.model_close()

    def close_all(self) -> None:
        """Close with existing connections."""
        for caller in self.alive():
            caller.is_cut = True
        waits = Box(self.server.close(close_existing_connections=True))
        assert (waits.state == "done") == (self.finished.state == "done")
        self.closes.append(waits)
        self.model_close()

    def time_passes(self, seconds: int) -> None:
        """The clock is advanced."""
        for _ in range(seconds):
            for caller in self.alive():
                if caller.fate == "ended" or caller.writer_closed:
                    idle = self.clock.seconds() + 1 - caller.active_at
                    limit = OWN_CLOSE_TIMEOUT if caller.writer_closed else FLUSH_TIMEOUT
                    if not caller.takes and idle >= limit:
                        caller.is_cut = True  # It may be aborted, if it must not yet.
            self.clock.advance(1)
            self.settle()

    @rule(
        moves=st.lists(
            st.tuples(
                st.deferred(lambda: st.sampled_from(SOCKET_NAMES)),
                st.integers(0, 9),
                st.integers(0, 9),
            ),
            min_size=1,
            max_size=12,
        )
    )
    def steps_are_taken(self, moves: list[tuple[str, int, int]]) -> None:
        """Any steps."""
        for name, a, b in moves:
            needs, choices, _ = SOCKET_MOVES[name]
            chosen = [choices[b % len(choices)]] if choices else []
            if callable(needs):
                candidates = needs(self)
                if not candidates:
                    continue
                if candidates is not True:
                    chosen.insert(0, candidates[a % len(candidates)])
            getattr(self, name)(*chosen)
            self.settle()

    def teardown(self) -> None:
        """All leave: nothing is left."""
        if not hasattr(self, "server"):
            return
        try:
            self.opens_for = 0
            for caller in self.callers:
                if caller.has_left in ("", "fin"):
                    self.client_resets(caller)
            self.close_all()
            for caller in self.some_waiting():
                self.handler_finishes(caller)
            self.settle()
            assert self.server.num_connections == 0
            assert self.over.state == "done"
            assert self.clock.getDelayedCalls() == []
        finally:
            for caller in self.callers:
                caller.socket.close()
            if not self.server.is_closed or self.over.state != "done":
                pytest_twisted.blockon(
                    self.server.close(close_existing_connections=True)
                )
            self._log_context.__exit__(None, None, None)
            self.logs.events.clear()


SOCKET_MOVES: dict[str, Any] = {
    "connect": (None, ["waits", "waits", "echoes", "says", "waits", "raises"], 4),
    "connect_many": (None, [2, 3, 4, 5], 1),
    "client_sends": (OnSockets.some_clients, [1, 100, 999, 1000, 3000], 3),
    "client_fin": (OnSockets.some_clients, (), 2),
    "client_closes": (OnSockets.some_clients, (), 2),
    "client_resets": (OnSockets.some_clients, (), 2),
    "client_stops_reading": (OnSockets.some_clients, (), 2),
    "client_resumes_reading": (OnSockets.some_clients, (), 1),
    "handler_finishes": (OnSockets.some_waiting, (), 2),
    "handler_raises": (OnSockets.some_waiting, (), 2),
    "handler_writes": (OnSockets.some_waiting, [1, 1000, MUCH], 2),
    "handler_reads": (OnSockets.some_waiting, (), 1),
    "handler_closes_its_writer": (OnSockets.some_waiting, (), 1),
    "handler_closes_its_reader": (OnSockets.some_waiting, (), 1),
    "handler_aborts": (OnSockets.some_waiting, (), 1),
    "set_drop": (None, [False, False, False, True], 1),
    "set_limit": (None, [1, 2, 3, 4, 5], 1),
    "close": (lambda m: m.may_close, (), 1),
    "close_all": (lambda m: m.may_close, (), 1),
    "time_passes": (None, [1, 1, 5, 11], 2),
}
SOCKET_NAMES = [n for n, (_, _, times) in SOCKET_MOVES.items() for _ in range(times)]


class OnSocketsCallable(OnSockets):
    policy = "callable"


class OnSocketsRaise(OnSockets):
    policy = "raise"


@pytest.mark.parametrize("machine", [OnSockets, OnSocketsCallable, OnSocketsRaise])
@pytest_twisted.ensureDeferred
async def test_on_sockets_everything_becomes_as_the_model_says(
    machine: Any, logs: Logs
) -> None:
    """
    A1, A4, A5, H1, H3 to H5, D1, D2, E1 to E3, S8, X1 to X4, I1: any order of
    events on a port, for each policy; and no connection outlives its server.
    """
    machine.leaks = []
    try:
        await with_the_reactor(run, machine, 25, 8)
    finally:
        logs.events.clear()  # Each example has looked at its own.
        forget_log()
    gc.collect()
    alive = [c for c in (ref() for ref in machine.leaks) if c is not None]
    assert machine.leaks
    assert alive == []


# What the machines have found.


class Chatty:
    """An ``on_handler_error`` as applications have it: a method of theirs."""

    def __init__(self) -> None:
        self.server: Any = None
        self.generator = (x for x in ())  # One of many things that copy refuses.

    def failed(self, address: Any, failure: Any) -> None:
        """What is to happen then."""


def test_describe_does_not_copy_the_policy() -> None:
    """I4, I1: whatever on_handler_error is a method of."""
    chatty = Chatty()
    server = MemoryServer(lambda *args: None, on_handler_error=chatty.failed)
    options = server.factory.describe()["options"]
    assert options["on_handler_error"] == "Chatty.failed"


def test_a_client_that_does_not_read_keeps_no_finished_connection() -> None:
    """H3, A5: with nothing unsent there is nothing that it could hold up."""
    server = MemoryServer(lambda *args: None)
    client = server.connect(is_reading=False)
    assert client.is_closed
    assert server.factory.num_connections == 0


def test_a_client_that_does_not_read_sees_the_end_of_output() -> None:
    """S8: its kernel takes the FIN, whether it reads or not."""

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        writer.write_eof()
        await reader.read()

    client = MemoryServer(handler).connect(is_reading=False)
    assert client.has_eof


@pytest.mark.parametrize("held", [False, True])
def test_in_memory_too_what_came_before_a_reset_is_read(held: bool) -> None:
    """S8, A4: "bytes that came before it, then EOF", held or with reading paused."""
    data = bytes(range(40))
    got: list[bytes] = []
    first: Deferred[None] = Deferred()

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        if address.port == 1:
            await first
        else:
            await paused
            got.append(await reader.read())

    paused: Deferred[None] = Deferred()
    server = MemoryServer(handler, max_connections=1, reader_buffer_size=16)
    if held:
        server.connect(IPv4Address("TCP", LOCALHOST, 1))
    client = server.connect(IPv4Address("TCP", LOCALHOST, 2))
    client.send(data[:20])
    client.send(data[20:])
    client.reset()
    first.callback(None)
    server.clock.advance(0)
    paused.callback(None)
    assert got == [data]
