"""
The life of a server under everything that can be done to it, in any order: limits and
their changes, pauses, drains, evictions, cancellations, closes, and clients of several
peers on several listeners, for each kind of handlers and each engine. Whoever is told
of something may call the server in the midst of it: observers, handlers, callbacks.

Unlike :mod:`tests.test_state_machine` this is no model of what exactly happens. It
says what must hold whatever happens: nobody is let in beyond a limit, while paused or
after the close; whoever is to be served is; whoever is sent away is so as was asked
for; everybody whom the kernel gave is accounted for, once; whatever ends has an end
that somebody has caused; and of all that nothing is left.

``TCPSVC_DEEP=20`` runs twenty times as many examples, and other ones each time.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import socket
import struct
import sys
import zlib
from dataclasses import dataclass
from typing import Any

import pytest
import pytest_twisted
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    rule,
)
from twisted.internet import tcp, unix
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.task import Clock

from tcpsvc import LOCALHOST, Observer, Reason, Reply, Server, WhereToListen
from tcpsvc.connection import Connection
from tcpsvc.driver import Driver
from tcpsvc.errors import BufferAgeLimitExceeded, ServerClosed
from tcpsvc.rate import Rate
from tcpsvc.reader import Reader
from tcpsvc.reasons import LIMITS
from tcpsvc.writer import Writer
from tests.kinds import KINDS
from tests.machines import Box, forget_log, own_log, run, with_the_reactor
from tests.support import Logs, open_descriptors, the_reactor, turn

HELLO = b"hello"

#: Where clients come from: peers of 127.0.0.0/8, and the UNIX socket.
SOURCES = ["127.0.0.2", "127.0.0.2", "127.0.0.3", "127.0.1.2", "unix"]

#: What a handler does. What does not end at once waits to be told, or for its client.
BEHAVIOURS = [
    *["waits", "waits", "swallows", "swallows", "swallows"],
    *["echoes", "echoes", "echoes", "returns", "raises", "unbuilt"],
]

#: The limits that a dry run is about, one by one, and all.
DRY_RUNS: list[Any] = [
    *[(), (), ()],
    True,
    ["max_connections"],
    ["max_connections_per_peer", "accept_rate_per_peer"],
    ["accept_rate"],
    ["allow", "deny"],
    ["first_byte_timeout", "idle_timeout", "handler_timeout", "lifetime"],
    ["buffer_age_limit"],
]

#: Options, and what they are changed to. The first is how they are at the beginning.
CHANGES: dict[str, list[Any]] = {
    "max_connections": [3, 1, 2, 4, 8],
    "max_accepts_per_batch": [1, 3],
    "overflow": ["hold", "hold", "drop", "reset", "evict", "evict", Reply(b"full")],
    "refusal": ["reset", "drop", Reply(b"go away")],
    "max_connections_per_peer": [None, 1, 2],
    "accept_rate": [None, "1/s:1", "2/s:3"],
    "accept_rate_per_peer": [None, "1/s:1", "2/s:2"],
    "peer_prefixes": [(32, 64), (24, 64)],
    "allow": [None, None, ["127.0.0.0/24"], ["127.0.0.2"]],
    "deny": [(), (), ["127.0.0.3"]],
    "dry_run": DRY_RUNS,
    "first_byte_timeout": [None, None, 2.0],
    "idle_timeout": [None, None, 1.0, 4.0],
    "handler_timeout": [None, None, 3.0],
    "lifetime": [None, None, 3.0, 6.0],
    "min_throughput": [None, None, 10.0],
    "throughput_window": [2.0],
}

#: Options of streams alone.
STREAM_CHANGES: dict[str, list[Any]] = {
    "eof_on_drain": [False, True],
    "flush_timeout": [8.0, 2.0],
    "buffer_age_limit": [None, 5.0],
}

#: What an example is about, besides all of that.
THEMES: dict[str, dict[str, Any]] = {
    "eviction": {"overflow": "evict", "max_connections": 2},
    "eviction of one": {"overflow": "evict", "max_connections": 1},
    "rates": {"accept_rate": "2/s:1", "accept_rate_per_peer": "1/s:2"},
    "peers": {"max_connections_per_peer": 2, "max_connections": 8},
    "time": {"lifetime": 3.0},
    "handlers": {"handler_timeout": 3.0, "idle_timeout": 1.0},
    "first time": {"first_byte_timeout": 2.0, "min_throughput": 10.0},
    "trial": {"dry_run": True, "max_connections": 1, "overflow": "drop"},
    "a drop": {"overflow": "drop", "max_connections": 1},
    "a reply": {
        "overflow": Reply(b"full"),
        "refusal": Reply(b"go"),
        "deny": ["127.0.0.3"],
    },
}

TIMEOUTS = {
    Reason.FIRST_BYTE: "first_byte_timeout",
    Reason.IDLE: "idle_timeout",
    Reason.HANDLER_TIMEOUT: "handler_timeout",
    Reason.LIFETIME: "lifetime",
    Reason.SLOW: "min_throughput",
}

#: More than the narrowed kernel buffers take.
MUCH = bytes(300_000)

#: How the clock goes on, in seconds, between two turns of the reactor; and by how much
#: an end may be later than its timeout.
STEP = 0.25
LATENESS = 1.0 + STEP + 0.05

#: When somebody calls the server in the midst of what it does: an observer is told, a
#: handler begins or ends, an error is reported, a Deferred fires.
EVENTS = [name for name in vars(Observer) if not name.startswith("_")]
OCCASIONS = [
    *EVENTS,
    *["connection_accepted", "connection_finished", "handler_ended", "ends", "ends"],
    *["begins", "reports", "closed", "drained", "paused", "is empty"],
]

_numbers = itertools.count()


def key_of(address: Any) -> Any:
    """What identifies a client."""
    return getattr(address, "name", None) or (address.host, address.port)


class Boom(Exception):
    """What handlers raise here."""


class Caller:
    """A client, and what is known of it."""

    def __init__(self, where: Any, source: str, behaviour: str) -> None:
        self.source = source
        self.behaviour = behaviour
        if source == "unix":
            self.socket = socket.socket(socket.AF_UNIX)
            self.socket.bind(b"\0tcpsvc-%d-%d" % (os.getpid(), next(_numbers)))
        else:
            self.socket = socket.socket()
            self.socket.bind((source, 0))
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.key = self.socket.getsockname()
        self.socket.setblocking(False)
        try:
            self.socket.connect(where)
        except BlockingIOError:
            pass
        except BaseException:
            self.socket.close()
            raise
        # What it has done.
        self.takes = True
        self.sent = 0
        self.has_left = ""  # fin, closed, reset
        self.active_at = 0.0
        # What it has seen.
        self.received = bytearray()
        self.end = ""
        # What the server has told of it.
        self.handler_version = -1
        self.accepted = 0
        self.started = 0
        self.handler_ended: list[str] = []
        self.finished: list[Any] = []
        self.refusals: list[tuple[Reason, Any]] = []
        self.held_since: int | None = None
        self.is_lost = False
        # Its handler.
        self.connection: Any = None
        self.given: Any = None
        self.wake: Deferred[None] | None = None
        self.written = bytearray()
        self.is_cut = False
        self.causes: set[str] = set()

    @property
    def listens(self) -> bool:
        """Whether it would hear of anything."""
        return self.takes and self.has_left in ("", "fin")

    def pump(self) -> None:
        """Take what there is."""
        while self.listens and not self.end:
            try:
                data = self.socket.recv(65536)
            except BlockingIOError:
                return
            except ConnectionError:
                self.end = "reset"
                return
            if not data:
                self.end = "eof"
            self.received += data

    def __repr__(self) -> str:
        return (
            f"<{self.source} {self.behaviour} accepted={self.accepted} "
            f"started={self.started} ended={self.handler_ended} "
            f"refusals={self.refusals} left={self.has_left!r} end={self.end!r}>"
        )


class Watch(Observer):
    """Has the machine look at each event."""

    def __init__(self, machine: Any) -> None:
        self.machine = machine


def _watching(name: str) -> Any:
    def watch(self: Any, *told: Any) -> None:
        machine = self.machine
        if machine is not None:
            try:
                getattr(machine, f"see_{name}")(*told)
            except BaseException as error:
                machine.wrong.append(f"{name}: {error!r}")
            machine.happens(name, *(t for t in told if isinstance(t, Connection)))

    return watch


for _name in EVENTS:
    setattr(Watch, _name, _watching(_name))


@dataclass
class CallBack:
    """Somebody calls the server when something happens, the first few times."""

    occasion: str
    call: str
    number: int
    times: int


class Lifecycle(RuleBasedStateMachine):
    """A server on a TCP port and a UNIX socket, and whatever befalls it."""

    kind = "stream"
    engine = "auto"
    theme = "eviction"
    directory = ""
    examples = 0
    steps_run = 0
    kept: list[Any] = []
    test_logs: Any = None

    @initialize(
        policy=st.sampled_from(["ignore", "ignore", "tell", "tell late", "raise"]),
        opens_for=st.sampled_from([99, 40, 30, 30, 20, 10, 0]),
        limit=st.integers(1, 4),
        other=st.sampled_from(sorted(THEMES)),
        ending=st.sampled_from(["close", "drain", "force_drain"]),
        calls_back=st.lists(
            st.builds(
                CallBack,
                occasion=st.sampled_from(OCCASIONS),
                call=st.deferred(lambda: st.sampled_from(sorted(CALLS))),
                number=st.integers(0, 11),
                times=st.sampled_from([1, 1, 2, 20]),
            ),
            max_size=5,
        ),
    )
    def begin(
        self,
        policy: str,
        opens_for: int,
        limit: int,
        other: str,
        ending: str,
        calls_back: list[CallBack],
    ) -> None:
        """Create the server."""
        type(self).examples += 1
        self.descriptors = open_descriptors()
        self.calls = set(the_reactor().getDelayedCalls())
        self._log_context = own_log()
        self.logs: Logs = self._log_context.__enter__()
        self.clock = Clock()
        self.wrong: list[str] = []
        self.callers: list[Caller] = []
        self.by_key: dict[Any, Caller] = {}
        self.by_id: dict[int, Caller] = {}
        self.reports: list[Deferred[None]] = []
        self.policy = policy
        self.opens_for = opens_for
        self.steps = 0
        self.options: dict[str, Any] = {
            name: values[0] for name, values in self.changes.items()
        }
        self.options["max_connections"] = limit
        self.causes: set[str] = set()
        self.ever: set[str] = set()
        self.paused: str | None = None
        self.told_paused: str | None = None
        self.paused_at = -1
        self.dropping = False
        self.closed = False
        self.unlistened_at = -1
        self.factories: list[Any] = []
        self.version = 0
        self.uncounted: set[int] = set()
        self.is_lowered = False
        self.changed_at = 0.0
        self.token_at = 0.0
        self.rate_since = (0.0, 0)
        self.peer_since: dict[str, tuple[float, int]] = {}
        self.peer_rate_at = 0.0
        self.counts: dict[Any, int] = {}
        self.taken = 0
        self.calls_back = calls_back
        # Whether one client may be let in that was judged before a call.
        self.may_be_judged = False
        self.closes: list[Box] = []
        self.pauses: list[Box] = []
        self.empties: list[Box] = []
        self.drains: list[Box] = []
        self.drain_ends = float("inf")
        self.drained: Any = None
        self.was_there: dict[int, Any] = {}
        self.there_failed = 0
        self.there_unserved = 0
        self.path = f"{self.directory}/{next(_numbers)}"
        self.watch = Watch(self)
        creating = KINDS[self.kind].create(
            [WhereToListen.bind_to(LOCALHOST, 0), WhereToListen.of_file(self.path)],
            self.handler(),
            on_handler_error=policy if policy in ("ignore", "raise") else self.report,
            observer=self.watch,
            clock=self.clock,
            engine=self.engine,
            **self.options,
        )
        self.server: Server[Any, Any] = pytest_twisted.blockon(creating)
        self.factory = self.server._factory
        # Who is there when a drain stops accepting; it is said in no other way.
        start_accepted = self.factory.starts.start_now
        self.factory.starts.start_now = lambda: self.see_drain_begin(start_accepted)  # type: ignore[method-assign]
        self.finished = self.boxed(self.server.close_finished(), "closed")
        self.over = Box(self.server.close_finished_and_handlers_determined())
        self.failed = Box(self.server.failed())
        self.port = self.server.listeners[0].listening_on
        self.ending = ending
        for theme in (other, self.theme):
            self.change(dict(THEMES[theme]))

    @property
    def changes(self) -> dict[str, list[Any]]:
        """What can be changed."""
        return CHANGES | (STREAM_CHANGES if self.kind == "stream" else {})

    def dry(self, *limits: str) -> bool:
        """Whether one of these limits is only tried out."""
        dry_run = self.options["dry_run"]
        return dry_run is True or (dry_run and not set(limits).isdisjoint(dry_run))

    # Who calls the server in the midst of what it does.

    def happens(self, occasion: str, connection: Any = None) -> None:
        """Whoever hears of that calls the server at once."""
        for back in self.calls_back:
            if back.occasion != occasion or not back.times:
                continue
            if back.call in CLOSING and not self.may_close:
                continue
            back.times -= 1
            self.may_be_judged = True
            try:
                CALLS[back.call](self, connection, back.number)
            except BaseException as error:
                self.wrong.append(f"{back}: {error!r}")

    def boxed(self, deferred: Deferred[Any], occasion: str) -> Box:
        """A Deferred, which is an occasion to call."""
        box = Box(deferred)
        deferred.addCallback(lambda _: self.happens(occasion))
        return box

    # What the server calls.

    def handler(self) -> Any:
        """One more handler. Each knows how many there were before."""
        self.version = version = len(self.factories)
        if self.kind == "protocol":
            made: Any = Lines(self, version)
        else:

            async def made(address: Any, *given: Any) -> None:
                caller = self.starts(version, address)
                try:
                    self.happens("begins", caller.connection)
                    await self.serve(caller, *given)
                finally:
                    self.happens("ends", caller.connection)

        self.factories.append(made)
        return made

    def starts(self, version: int, address: Any) -> Caller:
        """A client's handler begins."""
        caller = self.by_key[key_of(address)]
        if version != caller.handler_version:
            self.wrong.append(f"{caller} is served by {version}")
        return caller

    async def serve(self, caller: Caller, *given: Any) -> None:
        """As the client's behaviour says: for streams and sockets."""
        caller.given = given
        behaviour = caller.behaviour
        if behaviour == "raises":
            caller.causes.add("raised")
            raise Boom
        self.say(caller, HELLO)
        if behaviour in ("returns", "unbuilt"):
            caller.causes.add("told")
            return
        if behaviour == "echoes" and self.kind == "stream":
            reader, _ = given
            while data := await reader.read(100):
                self.say(caller, data)
            return
        while True:
            caller.wake = Deferred()
            try:
                await caller.wake
            except CancelledError:
                if behaviour != "swallows":
                    raise
            else:
                return

    def say(self, caller: Caller, data: bytes) -> None:
        """A handler sends."""
        given = caller.given
        if self.kind == "stream":
            given[1].write(data)
        elif self.kind == "protocol":
            given.transport.write(data)
        else:
            with contextlib.suppress(OSError):  # It may be closed, or full.
                given[0].send(data)
        caller.written += data

    def report(self, address: Any, failure: Any) -> Any:
        """The policy, where it is a callable."""
        if not failure.check(Boom, BufferAgeLimitExceeded):
            self.wrong.append(f"reported: {failure}")
        self.happens("reports")
        if self.policy == "tell late":
            self.reports.append(Deferred())
            return self.reports[-1]
        return None

    # What the server tells.

    def see_drain_begin(self, go_on: Any) -> None:
        """A drain stops accepting: who is there now is its business."""
        self.was_there = {
            c.id: None
            for c in self.factory.connections
            if c.id in self.by_id and not self.by_id[c.id].finished
        }
        self.there_failed = self.factory.counters.failed
        self.there_unserved = self.factory.counters.refused
        self.server_closes()
        go_on()

    def see_connection_accepted(self, connection: Any) -> None:
        """Somebody is let in: is that right?"""
        caller = self.by_key[key_of(connection.peer)]
        self.by_id[connection.id] = caller
        caller.connection = connection
        caller.accepted += 1
        caller.active_at = self.clock.seconds()
        if caller.held_since is None:
            caller.handler_version = self.version
        assert not caller.refusals
        # Who was accepted before the pause, and waits for a slot, is served in it.
        assert (
            self.server.is_paused is None
            or connection.id <= self.factory.entrance.held.last_before_pause
        ), "is paused"
        assert not self.server.is_closed, "is closed"
        if self.dropping:
            assert self.may_be_judged, "is not dropped"
            self.may_be_judged = False
        limit = self.options["max_connections"]
        assert self.dry("max_connections") or self.server.num_connections <= limit
        if caller.held_since is None and caller.source != "unix":
            allow, deny = self.options["allow"], self.options["deny"]
            allowed = allow is None or caller.source.startswith(
                tuple(a.partition("/")[0].rstrip("0") for a in allow)
            )
            assert allowed or self.dry("allow"), "is not allowed"
            assert caller.source not in deny or self.dry("deny"), "is denied"
        self.token_at = self.clock.seconds()

    def see_connection_refused(self, address: Any, reason: Reason) -> None:
        """Somebody is sent away."""
        caller = self.by_key[key_of(address)]
        how: Any = None
        if reason is Reason.DROPPED:
            how = "drop"
            assert self.dropping
        elif reason is Reason.OVERFLOW:
            how = self.options["overflow"]
            assert how not in ("hold", "evict")
            assert self.server.num_connections >= self.options["max_connections"]
        elif reason is not Reason.UNSERVED:
            how = self.options["refusal"]
        for limit, refuses in LIMITS.items():
            if refuses is reason and limit not in ("allow", "deny"):
                assert self.options[limit] is not None
                assert not self.dry(limit)
        assert caller.source != "unix" or reason in (
            Reason.DROPPED,
            Reason.OVERFLOW,
            Reason.UNSERVED,
        )
        assert not caller.refusals and not caller.started
        assert reason is not Reason.UNSERVED or (
            caller.behaviour == "unbuilt"
            or self.server.is_closed
            or caller.held_since is not None
        )
        assert not caller.accepted
        caller.refusals.append((reason, how))
        if reason is Reason.UNSERVED:  # Who got no protocol has taken a token, too.
            self.token_at = self.clock.seconds()

    def see_refused_in_dry_run(self, address: Any, reason: Reason) -> None:
        """What is only tried out."""
        limits = [limit for limit, refuses in LIMITS.items() if refuses is reason]
        assert self.dry(*limits), reason

    def see_handler_started(self, connection: Any) -> None:
        """A handler starts."""
        caller = self.by_id[connection.id]
        caller.started += 1
        assert not caller.refusals
        assert not self.server.is_closed

    def see_handler_ended(self, connection: Any, outcome: str, failure: Any) -> None:
        """A handler ends."""
        caller = self.by_id[connection.id]
        caller.handler_ended.append(outcome)
        assert caller.started
        assert (outcome == "failed") == (failure is not None and outcome != "left")
        if outcome == "failed":
            assert failure.check(Boom, BufferAgeLimitExceeded), failure

    def see_connection_finished(self, connection: Any) -> None:
        """A connection is over: somebody must have caused that."""
        caller = self.by_id[connection.id]
        reason = connection.reason
        caller.finished.append(reason)
        self.uncounted.discard(connection.id)
        if connection.id in self.was_there:
            self.was_there[connection.id] = reason
        causes = caller.causes | self.causes
        has_left = bool(caller.has_left)
        is_caused = {
            Reason.FINISHED: "told" in causes or has_left,
            Reason.EOF: has_left,
            Reason.RESET: caller.has_left in ("closed", "reset"),
            Reason.ERROR: "raised" in causes,
            Reason.CLOSED: "closed" in causes,
            Reason.ABORTED: "aborted" in causes or "drained" in causes,
            Reason.CANCELLED: "cancelled" in causes,
            Reason.DRAINED: "drained" in causes,
            Reason.EVICTED: "evict" in self.ever,
            Reason.TOO_OLD: "buffer_age_limit" in self.ever,
            Reason.FLUSH_TIMEOUT: self.kind == "stream",
            Reason.UNSERVED: not caller.started,
        }
        is_caused |= {why: name in self.ever for why, name in TIMEOUTS.items()}
        assert is_caused[reason], f"{reason} of {caller}, {causes}"
        if reason in TIMEOUTS:
            assert connection.age >= 1.0

    def see_limit_reached(self, limit: str) -> None:
        """It makes clients wait, or has them refused."""
        assert limit in ("max_connections", "accept_rate")
        assert self.options[limit] is not None
        assert not self.dry(limit)

    def see_accept_failed(self, error: OSError) -> None:
        """There is no want of descriptors here."""
        raise error

    def see_server_paused(self, how: str) -> None:
        """A pause begins."""
        self.told_paused = how

    def see_server_resumed(self) -> None:
        """And ends."""
        self.told_paused = None

    def see_server_draining(self) -> None:
        """A drain begins."""
        assert "drained" in self.causes

    def see_server_drained(self, report: Any) -> None:
        """A drain ends: are its figures right?"""
        assert self.drained is None
        self.drained = report
        server = self.server
        live = {c.id: c for c in self.factory.connections}
        counted = [
            number
            for number, reason in self.was_there.items()
            if number in live or not reason.is_refusal
        ]
        assert report.connections == len(counted), (report, self.was_there)
        assert report.given_up == sum(c.is_running for c in live.values())
        counters = self.factory.counters
        assert report.errors == counters.failed - self.there_failed
        assert report.unserved == counters.refused - self.there_unserved
        assert 0 <= report.longest_wait <= self.clock.seconds()
        assert server.is_closed
        assert live or self.over.state == "done" or report.given_up == 0
        reasons = [reason for reason in self.was_there.values() if reason is not None]
        assert report.closed_idle <= reasons.count(Reason.DRAINED)

    # What is so after each step.

    def server_closes(self) -> None:
        """From now on it is closed."""
        if not self.closed:
            self.closed = True
            self.paused = None
            self.unlistened_at = self.steps

    def peer_of(self, caller: Caller) -> str | None:
        """Whom a client counts for."""
        if caller.source == "unix":
            return None
        whole = self.options["peer_prefixes"] == (32, 64)
        return caller.source if whole else caller.source.rpartition(".")[0]

    def fingerprint(self) -> Any:
        """What changes while anything goes on."""
        counters = self.factory.counters
        return (
            counters.accepted,
            counters.finished + counters.left + counters.failed,
            sum(counters.ends.values()),
            sum(counters.refusals.values()),
            sum(len(c.received) + (c.end != "") for c in self.callers),
            sum(len(c.written) for c in self.callers),
            len(self.factory.starts),
            self.server.is_paused,
            self.server.is_closed,
            self.finished.state,
            self.over.state,
        )

    def settles(self) -> None:
        """The reactor turns until nothing moves any more, and all is as it must be."""
        self.steps += 1
        type(self).steps_run += 1
        reactor = the_reactor()
        deadline = reactor.seconds() + 10
        while True:
            still, before = 0, None
            while still < 3:
                pytest_twisted.blockon(turn())
                self.pump()
                self.server.invariant()
                now = self.fingerprint()
                still, before = (still + 1 if now == before else 0), now
            not_yet = self.as_expected()
            if not not_yet:
                break
            assert reactor.seconds() < deadline, not_yet
            pytest_twisted.blockon(turn(0.001))
        self.counts = self.count_peers()
        self.taken = self.server.num_connections

    def pump(self) -> None:
        """The clients take what there is; who is held is noted."""
        for caller in self.callers:
            if caller.has_left in ("", "fin"):
                caller.pump()
        for connection in self.factory.entrance.held.waiting:
            caller = self.by_key[key_of(connection.peer)]
            if caller.held_since is None:
                self.see_held(connection)
                caller.held_since = self.steps
                caller.handler_version = self.version
                self.token_at = self.clock.seconds()
        if self.server.is_closed:
            self.server_closes()

    def see_held(self, connection: Any) -> None:
        """Who is held was accepted before there was a slot, or too early: why?"""
        entrance = self.factory.entrance
        if self.paused_at == self.steps:
            return  # In the midst of the eviction that made room for it, perhaps.
        assert not self.paused, "is held during a pause"
        if connection.id not in entrance.held.too_early:
            assert self.options["overflow"] == "evict", "is held in vain"
            waiting, evicted = entrance.held.for_slots, entrance.eviction.under_way
            # Who is evicted beyond a lowered limit makes no room.
            assert waiting <= evicted or self.is_lowered, "nobody was evicted for it"

    def count_peers(self) -> dict[Any, int]:
        """How many each peer has, by the server's account of who is there."""
        counts: dict[Any, int] = {}
        held = self.factory.entrance.held.waiting
        for connection in [*self.factory.connections, *held]:
            peer = self.peer_of(self.by_key[key_of(connection.peer)])
            counts[peer] = counts.get(peer, 0) + 1
        return counts

    def as_expected(self) -> str:
        """
        :returns: what is not yet as it must become, nothing if all is.
        :raises AssertionError: something is as it must never be.
        """
        assert not self.wrong, self.wrong
        server, factory, options = self.server, self.factory, self.options
        live = {c.id: c for c in factory.connections}
        # The state that was asked for.
        if (server.is_paused, server.is_closed) != (self.paused, self.closed):
            return f"{server} is not paused={self.paused}, closed={self.closed}"
        assert self.closed or self.told_paused == self.paused
        assert server.is_dropping_incoming_connections == self.dropping
        # The limits.
        self.uncounted &= live.keys()
        assert server.num_connections == len(live) - len(self.uncounted)
        if not self.dry("max_connections"):
            most = max(options["max_connections"], self.taken)
            assert server.num_connections <= most
        most = options["max_connections_per_peer"]
        if most is not None and not self.dry("max_connections_per_peer"):
            for peer, count in self.count_peers().items():
                if peer is not None:
                    assert count <= max(most, self.counts.get(peer, 0)), peer
        self.rates_as_expected()
        # Who is there, and who is not.
        if not_yet := self.clients_as_expected(live):
            return not_yet
        counters = factory.counters
        assert counters.accepted == sum(c.accepted for c in self.callers)
        assert sum(counters.refusals.values()) == sum(
            len(c.refusals) for c in self.callers
        )
        for connection in live.values():
            if not_yet := self.connection_as_expected(connection):
                return (
                    f"{self.by_id[connection.id]}: {not_yet}: {connection.snapshot()}"
                )
        # Who waits in vain.
        entrance = factory.entrance
        held = entrance.held.waiting
        if self.closed:
            assert not held and not factory.replies._connections
        if held and not self.closed:
            first = held[0].id
            # Whoever was to be evicted for it has paused the server instead.
            may_wait = self.paused and first > entrance.held.last_before_pause
            assert may_wait or entrance.is_full or first in entrance.held.too_early
        timers = self.clock.getDelayedCalls()
        is_drained = not self.drains or self.drained is not None
        # Those who cancel handlers wait for reports of their errors, too.
        is_drained = is_drained and not self.factory.failures.is_reporting
        if is_drained and not (live or held or factory.replies._connections):
            waits = options["accept_rate"] is not None and not self.closed
            assert len(timers) <= waits, timers
        assert set(the_reactor().getDelayedCalls()) <= self.calls
        return self.waiters_as_expected(live)

    def rates_as_expected(self) -> None:
        """Nobody comes in faster than a rate allows."""
        now = self.clock.seconds()
        if self.options["accept_rate"] and not self.dry("accept_rate"):
            rate = Rate.parse(self.options["accept_rate"])
            since, accepted = self.rate_since
            most = rate.burst + rate.per_second * (now - since) + 1e-6
            assert self.factory.counters.accepted - accepted <= most
        text = self.options["accept_rate_per_peer"]
        if text and not self.dry("accept_rate_per_peer"):
            rate = Rate.parse(text)
            most = rate.burst + rate.per_second * (now - self.peer_rate_at) + 1e-6
            for source, count in self.came().items():
                before = self.peer_since.get(source, (0.0, 0))[1]
                assert count - before <= most, source

    def came(self) -> dict[str, int]:
        """How many of each address were let in, or held."""
        came: dict[str, int] = {}
        for caller in self.callers:
            if caller.source != "unix" and (
                caller.accepted or caller.held_since is not None
            ):
                came[caller.source] = came.get(caller.source, 0) + 1
        return came

    def clients_as_expected(self, live: dict[int, Any]) -> str:
        """Everybody is accounted for, once."""
        held = {key_of(c.peer) for c in self.factory.entrance.held.waiting}
        for caller in self.callers:
            assert caller.accepted <= 1 and caller.started <= caller.accepted
            assert len(caller.refusals) <= 1
            assert len(caller.finished) <= caller.accepted
            assert len(caller.handler_ended) <= caller.started
            assert not (caller.started and caller.refusals), caller
            is_live = caller.connection is not None and caller.connection.id in live
            assert caller.accepted == is_live + len(caller.finished), caller
            if caller.refusals:
                if not_yet := self.refused_as_expected(caller):
                    return f"{caller}: {not_yet}"
            elif caller.accepted or caller.key in held:
                is_over = bool(caller.accepted) and not is_live
                if is_over and caller.listens and not caller.end:
                    return f"{caller} has not seen its end"
            elif not caller.is_lost:
                if caller.held_since is not None or self.unlistened_at > caller.since:
                    assert caller.held_since is None, f"{caller} was forgotten"
                    caller.is_lost = True
                elif why := self.must_be_let_in(caller):
                    return f"{caller} waits: {why}"
            assert bytes(caller.written).startswith(caller.received) or (
                caller.refusals
            ), f"{caller} has got {caller.received[:99]!r}"
        return ""

    def must_be_let_in(self, caller: Caller) -> str:
        """Why a client must not wait in the kernel; nothing if it may."""
        if self.paused or self.closed:
            return ""
        if self.dropping:
            return "is not dropped"
        options, slots = self.options, self.factory.slots
        if options["accept_rate"] and not self.dry("accept_rate"):
            wait = 1 / Rate.parse(options["accept_rate"]).per_second
            if self.clock.seconds() - self.token_at < wait + 1e-6:
                return ""
        if slots.taken < options["max_connections"]:
            return "there is a slot"
        if self.dry("max_connections"):
            return "the limit is only tried out"
        if options["overflow"] == "hold":
            return ""
        if options["overflow"] == "evict":
            evicted = self.factory.entrance.eviction.evicted
            if all(i in evicted or not slots.holds(c) for i, c in slots.live.items()):
                return ""
            return "nobody was evicted"
        return "is not sent away"

    def refused_as_expected(self, caller: Caller) -> str:
        """Who was sent away sees it, as was asked for."""
        assert not caller.handler_ended
        reason, how = caller.refusals[0]
        if not caller.listens:
            return ""
        if not caller.end:
            return "has not seen its end"
        if isinstance(how, Reply):
            assert how.data.startswith(caller.received)
            if not (caller.sent or self.closed or caller.has_left):
                assert (caller.received, caller.end) == (how.data, "eof"), caller
            return ""
        assert not caller.received, caller
        if (
            caller.source != "unix"
            and not caller.sent
            and reason is not Reason.UNSERVED
        ):
            assert caller.end == {"drop": "eof", "reset": "reset"}[how], caller
        return ""

    def connection_as_expected(self, connection: Any) -> str:
        """Somebody is live."""
        caller = self.by_id[connection.id]
        now = self.clock.seconds()
        snapshot = connection.snapshot()
        if not caller.started and not caller.refusals:
            return "has not started"
        is_open = not connection.is_socket_closed
        assert is_open or connection.is_running, f"{caller}: {snapshot} is over"
        if caller.listens and is_open and connection.reason is None:
            assert not caller.end, f"{caller} is cut off"
            if len(caller.received) < len(caller.written):
                return "has not got all"
            if self.echoes(caller) and len(caller.written) < len(HELLO) + caller.sent:
                return "is not answered"
        if caller.is_cut and is_open:
            return "is not closed"
        heeds = self.kind != "protocol" and caller.behaviour != "swallows"
        if "cancelled" in caller.causes and connection.is_running and heeds:
            return "does not heed its cancellation"
        if caller.has_left and connection.is_running and self.echoes(caller):
            return "has not seen its client leave"
        return self.timeouts_as_expected(caller, connection, now)

    def echoes(self, caller: Caller) -> bool:
        """Whether its handler reads."""
        return caller.behaviour == "echoes" and self.kind != "sock"

    def timeouts_as_expected(self, caller: Caller, connection: Any, now: float) -> str:
        """Nobody is there for longer than a timeout, and a little."""
        if not connection.is_running or now - self.changed_at <= LATENESS:
            return ""
        if connection.is_ended:
            heeds = self.kind != "protocol" and caller.behaviour != "swallows"
            return "has not ended" if heeds else ""
        for reason, name in TIMEOUTS.items():
            timeout = self.options[name]
            if timeout is None or self.dry(name) or reason is Reason.SLOW:
                continue
            age = connection.age
            if reason is not Reason.HANDLER_TIMEOUT and connection.is_socket_closed:
                continue
            is_known = self.kind != "sock" or caller.source != "unix"
            if reason in (Reason.IDLE, Reason.FIRST_BYTE) and not is_known:
                continue
            if reason is Reason.FIRST_BYTE and caller.sent:
                continue
            if reason is Reason.IDLE:
                age = now - caller.active_at
                if not caller.takes:
                    continue
            since = min(age, now - self.changed_at + timeout)
            if since > timeout + LATENESS:
                return f"{name} of {timeout} is over, {age}"
        return ""

    def waiters_as_expected(self, live: dict[int, Any]) -> str:
        """Whoever waits for something is told when it is so, and not before."""
        for waits in (self.finished, *self.closes):
            assert self.closed or waits.state == "pending"
            if self.closed and waits.state != "done":
                return "close() has not finished"
        is_over = self.closed and not live and not self.factory.failures.is_reporting
        assert is_over or self.over.state == "pending"
        if is_over and self.over.state != "done":
            return "not over"
        failures = [
            c
            for c in self.callers
            if c.finished and "raised" in c.causes and c.handler_ended == ["failed"]
        ]
        if self.policy == "raise" and failures:
            if not self.closed or self.failed.state != "Boom":
                return "has not failed"
        elif is_over:
            if self.failed.state != "done":
                return "failed() has not fired"
        else:
            assert self.failed.state == "pending"
            later = self.factory.counters.later_errors
            assert len(self.logs.bad()) == later, self.logs.bad()
        for waits in self.pauses:
            if waits.state == "pending":
                return "a pause has not begun, or ended"
            assert waits.state == "done" or self.closed, waits.value
        for waits in self.empties:
            if waits.state == "pending" and not self.server.num_connections:
                return "nobody was told that nobody is there"
            assert waits.state in ("pending", "done"), waits.value
        for waits in self.drains:
            assert waits.state == ("pending" if self.drained is None else "done")
            assert self.drained is None or waits.value is self.drained
        if self.drains and self.drained is None:
            if is_over:
                return "is not drained"
            if self.clock.seconds() > self.drain_ends + 0.01:
                return f"the drain is not over, {self.server._drain._phase}"
        return ""

    # Choosing.

    def chosen(self, pick: int, callers: list[Caller]) -> Caller | None:
        """One of some clients."""
        return callers[pick % len(callers)] if callers else None

    def some_clients(self) -> list[Caller]:
        """Clients who are there, as far as they know."""
        return [c for c in self.callers if c.has_left in ("", "fin") and not c.end]

    def some_running(self) -> list[Caller]:
        """Those whose handlers run."""
        return [c for c in self.some_live() if c.connection.is_running]

    def some_live(self) -> list[Caller]:
        """Those whose connections are live."""
        return [c for c in self.callers if c.accepted and not c.finished]

    @property
    def may_close(self) -> bool:
        """Not too early."""
        return self.steps >= self.opens_for

    # The clients' steps.

    def connect(self, source: str, behaviour: str) -> None:
        """A client connects, or cannot."""
        where: Any = self.path if source == "unix" else (LOCALHOST, self.port)
        if self.closed or self.paused == "refuse":
            with pytest.raises((ConnectionRefusedError, FileNotFoundError)):
                connect_now(where, source)
            return
        waiting = sum(not (c.accepted or c.refusals or c.is_lost) for c in self.callers)
        if waiting > 20:
            return
        if behaviour == "raises" and self.policy == "raise" and not self.may_close:
            return
        caller = Caller(where, source, behaviour)
        caller.since = self.steps
        self.callers.append(caller)
        self.by_key[caller.key] = caller

    def connect_many(self, many: int, behaviour: int) -> None:
        """Several do, before anybody is accepted."""
        for number in range(many):
            self.connect(
                SOURCES[(many + number) % len(SOURCES)],
                BEHAVIOURS[(behaviour + number) % len(BEHAVIOURS)],
            )

    def client_sends(self, pick: int, leaves: bool) -> None:
        """A client sends, and perhaps leaves at once."""
        caller = self.chosen(pick, [c for c in self.some_clients() if not c.has_left])
        if caller is not None:
            try:
                caller.socket.send(b"0123456789")
            except OSError:
                return
            caller.sent += 10
            caller.active_at = self.clock.seconds()
            if leaves:
                self.leaves(caller, "fin")

    def leaves(self, caller: Caller, how: str) -> None:
        """A client shuts, closes or resets."""
        caller.has_left = how
        if how == "fin":
            with contextlib.suppress(OSError):
                caller.socket.shutdown(socket.SHUT_WR)
            return
        if how == "reset":
            caller.socket.setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
            )
        caller.socket.close()

    def client_leaves(self, pick: int, how: str) -> None:
        """A client shuts, closes or resets."""
        caller = self.chosen(pick, self.some_clients())
        if caller is not None:
            self.leaves(caller, how)

    def client_stalls(self, pick: int) -> None:
        """A client takes nothing more, and is sent much."""
        running = [c for c in self.some_running() if not c.connection.is_socket_closed]
        caller = self.chosen(pick, running)
        if caller is not None and self.kind != "sock":
            caller.takes = False
            self.say(caller, MUCH)

    def client_goes_on(self, pick: int) -> None:
        """A client takes again what there is."""
        caller = self.chosen(pick, [c for c in self.callers if not c.takes])
        if caller is not None:
            caller.takes = True
            caller.active_at = self.clock.seconds()

    # The handlers' steps.

    def handler_ends(self, pick: int, raises: bool) -> None:
        """A handler finishes or raises."""
        caller = self.chosen(pick, self.some_running())
        if caller is not None and not (
            raises and self.policy == "raise" and not self.may_close
        ):
            self.ends(caller, raises=raises)

    def ends(self, caller: Caller, *, raises: bool = False) -> None:
        if self.kind == "protocol":
            if raises and not caller.has_left and not caller.end:
                caller.causes.add("raised")
                caller.given.raises = True
                with contextlib.suppress(OSError):
                    caller.socket.send(b"!")
                    caller.sent += 1
            else:
                caller.causes.add("told")
                caller.given.transport.loseConnection()
        elif caller.wake is not None and not caller.wake.called:
            caller.causes.add("raised" if raises else "told")
            if raises:
                caller.wake.errback(Boom())
            else:
                caller.wake.callback(None)

    def handler_uncounts_itself(self, pick: int) -> None:
        """A handler's connection holds no slot any more."""
        caller = self.chosen(pick, self.some_live())
        if caller is not None:
            self.uncounts(self.server.connection(caller.connection.id))

    def uncounts(self, connection: Any) -> None:
        if connection is not None:
            if connection.holds_slot:
                self.uncounted.add(connection.id)
            connection.uncount()
            connection.label = f"label {connection.id}"
            assert not connection.holds_slot or self.by_id[connection.id].finished

    # The server's steps.

    def change_one(self, option: int, value: int) -> None:
        """Another value of an option."""
        names = list(self.changes)
        name = names[option % len(names)]
        self.change({name: self.changes[name][value % len(self.changes[name])]})

    def change(self, changed: dict[str, Any]) -> None:
        """Other options."""
        if self.policy == "raise":  # It is an error that closes the server.
            changed.pop("buffer_age_limit", None)
        now = self.clock.seconds()
        lower = changed.get("max_connections", self.options["max_connections"])
        self.is_lowered |= lower < self.server.num_connections
        self.taken = max(self.taken, self.server.num_connections)
        self.options |= changed
        self.ever |= {name for name, value in changed.items() if value is not None}
        if self.options["overflow"] == "evict":
            self.ever.add("evict")
        if not changed.keys().isdisjoint({*TIMEOUTS.values(), "dry_run", "overflow"}):
            self.changed_at = now
        if not changed.keys().isdisjoint({"accept_rate", "dry_run"}):
            # Who is held has taken a token, or will take one.
            held = len(self.factory.entrance.held.waiting)
            self.rate_since = (now, self.factory.counters.accepted + held)
            self.token_at = now
        if not changed.keys().isdisjoint(
            {"accept_rate_per_peer", "dry_run", "peer_prefixes"}
        ):
            self.peer_rate_at = now
            self.peer_since = {s: (now, n) for s, n in self.came().items()}
        if "peer_prefixes" in changed or "max_connections_per_peer" in changed:
            self.counts = self.count_peers()
        self.server.change(**changed)

    def change_badly(self) -> None:
        """All of a change or nothing."""
        before = self.server.describe()["options"]
        with pytest.raises(ValueError, match="lifetime"):
            self.server.change(max_connections=1, lifetime=-1)
        assert self.server.describe()["options"] == before

    def time_passes(self, seconds: float) -> None:
        """The clock is advanced."""
        end = self.clock.seconds() + seconds
        while (left := end - self.clock.seconds()) > 1e-9:
            self.clock.advance(min(left, STEP))
            pytest_twisted.blockon(turn())
            self.pump()
            self.server.invariant()
            now = self.clock.seconds()
            for connection in self.factory.connections:
                caller = self.by_id[connection.id]
                late = self.timeouts_as_expected(caller, connection, now)
                assert not late, f"{caller}: {late}"

    def pause(self, how: Any) -> None:
        """Pause, in one way or the other, or resume."""
        was_closed = self.closed  # It may be closed by that, when it drains.
        box = self.asks_to_pause(how)
        if was_closed:
            assert box.state == ServerClosed.__name__
            return
        while box.state == "pending":
            pytest_twisted.blockon(turn())
        assert box.state == "done" or self.server.is_closed, box.value

    def asks_to_pause(self, how: Any) -> Box:
        """Pauses and resumes are made in the order in which they are asked for."""
        if not self.server.is_closed:
            self.paused, self.paused_at = how, self.steps
            if how == "refuse":
                self.unlistened_at = self.steps
        pausing = self.server.pause(how) if how else self.server.resume()
        self.pauses.append(self.boxed(pausing, "paused"))
        return self.pauses[-1]

    def drop(self, drop: bool) -> None:
        """Drop incoming connections, or not any more."""
        self.dropping = drop
        self.server.set_drop_incoming_connections(drop)

    def one_is_closed(self, pick: int, how: str) -> None:
        """A connection is closed, or aborted."""
        caller = self.chosen(pick, self.some_live())
        if caller is not None:
            self.cuts(self.server.connection(caller.connection.id), how)

    def cuts(self, connection: Any, how: str) -> None:
        if connection is not None:
            caller = self.by_id[connection.id]
            caller.causes.add("closed" if how == "close" else "aborted")
            caller.is_cut = True
            getattr(connection, how)()

    def cancel_handlers(self) -> None:
        """All handlers are cancelled."""
        self.cancels()
        self.server.cancel_handlers()

    def cancels(self) -> None:
        for caller in self.some_running():
            caller.causes.add("cancelled")

    def set_handler(self) -> None:
        """New connections are served by another handler."""
        self.server.set_handler(self.handler())

    def drain(self, **seconds: Any) -> None:
        """Drain, or sooner than it was to be."""
        self.causes.add("drained")
        self.causes.add("cancelled")
        timeout = seconds["timeout"]
        ends = seconds["announce"] + seconds["spread"] + 2 * seconds["grace"]
        ends += float("inf") if timeout is None else timeout
        self.drain_ends = min(self.drain_ends, self.clock.seconds() + ends)
        self.drains.append(self.boxed(self.server.drain(**seconds), "drained"))
        assert self.server.is_draining

    def force_drain(self) -> None:
        """The time is up."""
        self.causes.add("drained")
        self.causes.add("cancelled")
        grace = 1.0 if not self.drains else 2.0
        self.drain_ends = min(self.drain_ends, self.clock.seconds() + 2 * grace)
        self.drains.append(self.boxed(self.server.force_drain(), "drained"))

    def close(self, existing: bool, cancel: bool) -> None:
        """Close, with the connections or their handlers or without."""
        if existing:
            self.causes.add("closed")
            for caller in self.some_live():
                caller.is_cut = True
        if cancel:
            self.causes.add("cancelled")
            self.cancels()
        self.server_closes()
        closing = self.server.close(
            close_existing_connections=existing, cancel_handlers=cancel
        )
        self.closes.append(self.boxed(closing, "closed"))
        assert self.server.is_closed

    def wait_until_empty(self) -> None:
        """Somebody wants to hear when nobody is there."""
        waiting = self.server.when_connections(lambda n: n == 0)
        self.empties.append(self.boxed(waiting, "is empty"))

    def report_ends(self) -> None:
        """A call of on_handler_error returns."""
        if self.reports:
            self.reports.pop(0).callback(None)

    # All of them.

    @rule(
        moves=st.lists(
            st.tuples(
                st.deferred(lambda: st.sampled_from(NAMES)),
                st.integers(0, 59),
                st.integers(0, 59),
            ),
            min_size=1,
            max_size=12,
        )
    )
    def things_happen(self, moves: list[tuple[str, int, int]]) -> None:
        """Any of them, in any order."""
        for name, a, b in moves:
            if name not in CLOSING or self.may_close:
                MOVES[name][1](self, a, b)
                self.settles()

    # The end.

    def teardown(self) -> None:
        """All leave: nothing is left."""
        if not hasattr(self, "server"):
            return
        is_well = False
        try:
            if sys.exc_info()[0] is None:
                self.ends_well()
                is_well = True
        finally:
            self._log_context.__exit__(None, None, None)
            for caller in self.callers:
                caller.socket.close()
            if not is_well:
                self.gives_up()

    def gives_up(self) -> None:
        """Whatever has failed: other examples are not to suffer."""
        if not hasattr(self, "server"):
            return
        self.server.close(close_existing_connections=True, cancel_handlers=True)
        for _ in range(20):
            for caller in self.some_running():
                self.ends(caller)
            while self.reports:
                self.report_ends()
            self.clock.advance(10)
            pytest_twisted.blockon(turn())
        self.kept.extend(o for o in gc.get_objects() if type(o) in OURS)

    def ends_well(self) -> None:
        """Close, let everybody go, and count what is left."""
        self.opens_for = 0
        if self.ending != "close":
            if self.ending == "drain":
                self.drain(announce=1, timeout=2, spread=2, grace=1)
            else:
                self.force_drain()
            self.settles()
            if self.drained is None:
                self.time_passes(self.drain_ends - self.clock.seconds() + 0.1)
            self.settles()
            assert self.drained is not None or self.reports
        self.close(existing=True, cancel=True)
        for caller in self.callers:
            if caller.has_left in ("", "fin"):
                self.leaves(caller, "reset")
        for caller in self.some_running():
            if caller.behaviour == "swallows":
                self.ends(caller)
        while self.reports:
            self.report_ends()
        self.settles()
        assert self.server.num_connections == 0
        assert self.over.state == "done"
        assert self.failed.state in ("done", "Boom")
        assert all(box.state == "done" for box in self.empties)
        self.time_passes(1.0)
        self.settles()
        assert self.clock.getDelayedCalls() == []
        for factory in self.factories:
            assert getattr(factory, "numPorts", 0) == 0
        self.let_go()
        for _ in range(50):
            if open_descriptors() == self.descriptors:
                break
            pytest_twisted.blockon(turn())
        assert open_descriptors() == self.descriptors
        assert set(the_reactor().getDelayedCalls()) == self.calls
        gc.collect()
        alive = [o for o in gc.get_objects() if type(o) in OURS and o not in self.kept]
        if alive:
            self.kept.extend(alive)  # Or the next examples fail, too.
        assert not alive

    def let_go(self) -> None:
        """The test itself is not what keeps anything alive."""
        self.watch.machine = None
        self.calls_back = []
        for logs in (self.logs, self.test_logs):
            logs.events.clear()  # Events have sources.
        forget_log()
        for caller in self.callers:
            caller.connection = caller.given = caller.wake = None
        boxes = [self.finished, self.over, self.failed, *self.closes, *self.drains]
        for box in (*boxes, *self.pauses, *self.empties):
            box.value = None
        self.factories.clear()
        # What has closed it keeps its frames, as long as it can be asked for.
        del self.server, self.factory


def pick(names: list[Any], number: int) -> Any:
    """One of them."""
    return names[number % len(names)]


#: What may happen, how often, and what becomes of the two numbers that come with it.
MOVES: dict[str, tuple[int, Any]] = {
    "connect": (
        14,
        lambda m, a, b: m.connect(pick(SOURCES, a), pick(BEHAVIOURS, b)),
    ),
    "connect_many": (6, lambda m, a, b: m.connect_many(2 + a % 5, b)),
    "client_sends": (5, lambda m, a, b: m.client_sends(a, b % 3 == 0)),
    "client_leaves": (
        3,
        lambda m, a, b: m.client_leaves(a, pick(["fin", "closed", "reset"], b)),
    ),
    "client_stalls": (1, lambda m, a, b: m.client_stalls(a)),
    "client_goes_on": (1, lambda m, a, b: m.client_goes_on(a)),
    "handler_ends": (4, lambda m, a, b: m.handler_ends(a, b % 3 == 0)),
    "handler_uncounts_itself": (2, lambda m, a, b: m.handler_uncounts_itself(a)),
    "change_one": (6, lambda m, a, b: m.change_one(a, b)),
    "change_the_limit": (
        4,
        lambda m, a, b: m.change(
            {
                "max_connections": pick(CHANGES["max_connections"], a),
                "overflow": pick(CHANGES["overflow"], b),
            }
        ),
    ),
    "change_badly": (1, lambda m, a, b: m.change_badly()),
    "time_passes": (
        5,
        lambda m, a, b: m.time_passes(pick([0.1, 0.5, 1.0, 2.0, 4.0, 12.0], a)),
    ),
    "pause": (2, lambda m, a, b: m.pause(pick(["hold", "refuse"], a))),
    "resume": (4, lambda m, a, b: m.pause(None)),
    "drop": (1, lambda m, a, b: m.drop(True)),
    "drop_no_more": (2, lambda m, a, b: m.drop(False)),
    "one_is_closed": (
        2,
        lambda m, a, b: m.one_is_closed(a, pick(["close", "abort"], b)),
    ),
    "cancel_handlers": (1, lambda m, a, b: m.cancel_handlers()),
    "set_handler": (1, lambda m, a, b: m.set_handler()),
    "wait_until_empty": (1, lambda m, a, b: m.wait_until_empty()),
    "report_ends": (2, lambda m, a, b: m.report_ends()),
    "drain": (
        2,
        lambda m, a, b: m.drain(
            announce=pick([0, 0, 1, 3], a),
            timeout=pick([0, 1, 5, None], b),
            spread=pick([0, 0, 1, 4], a // 4),
            grace=pick([0, 1, 2], b // 4),
        ),
    ),
    "force_drain": (1, lambda m, a, b: m.force_drain()),
    "close": (1, lambda m, a, b: m.close(existing=bool(a % 2), cancel=bool(b % 2))),
}
NAMES = [name for name, (times, _) in MOVES.items() for _ in range(times)]

#: What those call who are told of something, of a connection perhaps; with a number.
CALLS: dict[str, Any] = {
    "close": lambda m, c, n: m.close(existing=False, cancel=False),
    "close all": lambda m, c, n: m.close(existing=True, cancel=n % 3 == 0),
    "close, cancel": lambda m, c, n: m.close(existing=False, cancel=True),
    "cancel_handlers": lambda m, c, n: m.cancel_handlers(),
    "drain": lambda m, c, n: m.drain(
        announce=pick([0, 0, 1], n), timeout=pick([0, 2], n), spread=0, grace=1
    ),
    "force_drain": lambda m, c, n: m.force_drain(),
    "pause": lambda m, c, n: m.asks_to_pause(pick(["hold", "refuse"], n)),
    "resume": lambda m, c, n: m.asks_to_pause(None),
    "change": lambda m, c, n: m.change(
        {
            "max_connections": pick(CHANGES["max_connections"], n),
            "overflow": pick(CHANGES["overflow"], n),
        }
    ),
    "drop": lambda m, c, n: m.drop(n % 2 == 0),
    "close it": lambda m, c, n: m.cuts(c, "close"),
    "abort it": lambda m, c, n: m.cuts(c, "abort"),
    "abort another": lambda m, c, n: m.one_is_closed(n, "abort"),
    "uncount": lambda m, c, n: m.uncounts(c),
    "wait": lambda m, c, n: m.wait_until_empty(),
}

#: What ends a server, which is not to be too early.
CLOSING = ("drain", "force_drain", "close", "close all", "close, cancel")


def subclasses(cls: type) -> set[type]:
    """A class and all that are derived from it."""
    return {cls}.union(*(subclasses(c) for c in cls.__subclasses__()))


#: What is to be left of none.
OURS: set[type] = set()


def connect_now(where: Any, source: str) -> None:
    """Connect, where nobody listens."""
    with socket.socket(
        socket.AF_UNIX if source == "unix" else socket.AF_INET
    ) as client:
        client.connect(where)


class Line(Protocol):
    """The protocol handler, as its client's behaviour says."""

    raises = False

    def __init__(self, machine: Lifecycle, version: int, address: Any) -> None:
        self.machine = machine
        self.version = version
        self.address = address

    def connectionMade(self) -> None:
        machine = self.machine
        self.caller = caller = machine.starts(self.version, self.address)
        caller.given = self
        machine.happens("begins", caller.connection)
        if caller.behaviour == "raises":
            caller.causes.add("raised")
            raise Boom
        machine.say(caller, HELLO)
        if caller.behaviour == "returns":
            caller.causes.add("told")
            self.transport.loseConnection()  # type: ignore[union-attr]

    def dataReceived(self, data: bytes) -> None:
        if self.raises:
            raise Boom
        if self.caller.behaviour == "echoes":
            self.machine.say(self.caller, data)

    def connectionLost(self, reason: Any = None) -> None:
        self.machine.happens("ends", self.caller.connection)


class Lines(Factory):
    """Builds them."""

    noisy = False

    def __init__(self, machine: Lifecycle, version: int) -> None:
        self.machine = machine
        self.version = version

    def buildProtocol(self, addr: Any) -> Any:
        caller = self.machine.by_key[key_of(addr)]
        if caller.behaviour == "unbuilt":
            return None
        return Line(self.machine, self.version, addr)


@pytest.mark.whatever("engine")
@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("engine", ["auto", "reactor"])
@pytest.mark.parametrize("kind", KINDS)
@pytest_twisted.ensureDeferred
async def test_whatever_happens_it_ends_well(
    kind: str, engine: str, theme: str, logs: Logs, tmp_path: Any
) -> None:
    """
    I1, and of accepting, limits, timeouts, events, pauses, drains, closes: any order.
    """
    machine: Any = type(
        "Machine",
        (Lifecycle,),
        {
            "kind": kind,
            "engine": engine,
            "theme": theme,
            "directory": str(tmp_path),
            "kept": [],
            "test_logs": logs,
        },
    )
    OURS.update(
        *(subclasses(c) for c in (Connection, Reader, Writer, Driver, Server)),
        subclasses(tcp.Connection),
        subclasses(unix.Server),
    )
    seed = zlib.crc32(f"{kind} {engine} {theme}".encode())
    try:
        await with_the_reactor(run, machine, 8, 8, seed)
    finally:
        logs.events.clear()  # Each example has looked at its own.
        forget_log()
        if os.environ.get("TCPSVC_DEEP"):
            print(f"{machine.examples} examples, {machine.steps_run} steps")  # noqa: T201
