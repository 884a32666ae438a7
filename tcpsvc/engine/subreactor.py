"""
A reactor within the reactor: one epoll object that watches all connections of
one Twisted reactor, itself a single readable descriptor of it.

Twisted spends some 4 µs on each ready descriptor before its transport is asked
to read. Here one ``poll`` tells of every connection that is ready, and a plain
loop serves them. It works in every reactor that can watch a descriptor; the
application's other descriptors and timers stay where they are.

How a turn goes::

    the main reactor sees the epoll descriptor readable
        └─ doRead: poll once, then for each connection that is ready
               serve it (read, or write, or lose it), then
               flush what was written meanwhile, to it or to others

- A turn is bounded by :data:`TURN`; what is left is served in the next one, first
  and in its order, so nobody is passed over.
- When turns take too long, less is read from each connection at a time: see
  :attr:`SubReactor.receive_size`.
- A descriptor that was closed and opened again within a turn is not served by
  what the kernel said of the old one: see :meth:`SubReactor._forget`.
"""

from __future__ import annotations

import select
from collections.abc import Iterator
from time import monotonic
from typing import Any, cast
from weakref import WeakKeyDictionary, ref

from twisted.internet.error import ConnectionDone, ConnectionFdescWentAway
from twisted.internet.interfaces import IReactorFDSet, IReadDescriptor
from twisted.internet.main import CONNECTION_DONE, CONNECTION_LOST
from twisted.python import context
from twisted.python.failure import Failure
from twisted.python.log import ILogContext
from zope.interface import implementer

from tcpsvc.transport import is_dealt_with, log_unhandled

#: How long connections are served before the main reactor's other descriptors
#: and timers have their turn, in seconds.
TURN = 0.005

#: How many ready connections the kernel is asked for at a time. Each costs it 12
#: bytes of memory for the call.
MOST_EVENTS = 512

#: How many bytes are read from a connection at a time: as many as Twisted reads,
#: fewer while turns are too long.
MOST_RECEIVED = 65536
LEAST_RECEIVED = 4096

#: The clock is looked at when so much credit is used up, not after each connection:
#: 8 % of an echo. A connection uses up so much of it, and one for each byte that it
#: has sent. There is none at first, and when what was done takes long.
MOST_CREDIT = 8192
CREDIT_OF_ONE = 512

#: When so many new clients in a row had not sent anything yet, others are read from
#: first only after the next turn; one more, and it is two turns, then four, up to
#: this. To try costs a system call, to succeed saves three.
FAILED_FIRST_READS = 4
MOST_TURNS_OF_REST = 32

_IN: int = getattr(select, "EPOLLIN", 0)
_OUT: int = getattr(select, "EPOLLOUT", 0)
_DISCONNECTED: int = getattr(select, "EPOLLHUP", 0) | getattr(select, "EPOLLERR", 0)

_DONE = Failure(CONNECTION_DONE)
_LOST = Failure(CONNECTION_LOST)


def reason_of(why: Any) -> Failure:
    """Why a connection is lost, as it is told, of what a read or a flush returned."""
    if isinstance(why, ConnectionDone):
        return _DONE
    return _LOST if why is CONNECTION_LOST else Failure(why)


class _LogContext(dict[str, Any]):
    """
    What legacy log lines are marked with: whoever is being served when one is
    written, asked then and not at each event. Twisted copies it for each line.
    """

    def __init__(self, group: SubReactor, outer: dict[str, Any]) -> None:
        super().__init__(outer)
        self._group = group

    def __getitem__(self, key: str) -> Any:
        served = self._group.served
        if key == "system" and served is not None:
            return served.logPrefix()
        return super().__getitem__(key)

    def copy(self) -> dict[str, Any]:
        """The context of one line."""
        return {key: self[key] for key in self}


@implementer(IReactorFDSet, IReadDescriptor)
class SubReactor:
    """
    Watches connections for one reactor. There is one for each: :meth:`of`.

    It is in the main reactor while it watches anything, or while somebody has
    asked it to stay (:meth:`stay`).

    :ivar is_serving: whether a turn is going on. Then what is written is sent when
        the connection that is being served has been.
    :ivar turn: how many turns there have been.
    :ivar due: connections with something to flush after that.
    :ivar served: the connection that is being served.
    :ivar first_bytes: how many bytes may be read from new connections, when their
        handlers first wait, before the next turn: as many as one connection gives in
        one. Else a crowd of them would keep everybody else waiting.
    :ivar receive_size: how many bytes to read at a time. A handler that works off
        a full 64 KiB of small requests takes milliseconds; with many of those a
        turn that took too long halves this, and one that did not doubles it.
    """

    def __init__(self, reactor: Any) -> None:
        # Who has a reactor has its sub-reactor; it must not be the other way round.
        self._reactor = ref(reactor)
        self.is_serving = False
        self.turn = 0
        self.due: list[Any] = []
        self.served: Any = None
        self.receive_size = MOST_RECEIVED
        self.first_bytes = MOST_RECEIVED
        #: How many first reads in a row have failed, and up to which turn they rest.
        self._failed_first_reads = 0
        self._rests_until = 0
        self._credit = 0
        self._poller: Any = None
        #: Who is watched, by descriptor, and for what.
        self._selectables: dict[int, Any] = {}
        self._interests: dict[int, int] = {}
        #: Who came in the course of a turn.
        self._late: dict[int, Any] = {}
        #: Ready, and not served yet in this turn.
        self._ready: Iterator[tuple[int, int]] = iter(())
        #: Ready, and not served yet when the last turn was over.
        self._left: dict[int, int] = {}
        self._stays = 0

    @classmethod
    def of(cls, reactor: Any) -> SubReactor:
        """The one of a reactor."""
        found = _sub_reactors.get(reactor)
        if found is None:
            found = _sub_reactors[reactor] = cls(reactor)
        return found

    @property
    def reactor(self) -> Any:
        """The main reactor."""
        return self._reactor()

    def stay(self) -> None:
        """
        Stay in the main reactor, although nothing is watched, until
        :meth:`may_leave`: a server with one client at a time would have it come
        and go with each.

        :raises OSError: no descriptor could be had.
        """
        self._open()
        if self not in self.reactor.getReaders():
            # It has let go of all that it had, as trial does after a test that left
            # something there: whoever had asked us to stay has lost us too.
            self._stays = 0
            self.reactor.addReader(self)
        self._stays += 1

    def may_leave(self) -> None:
        """The end of a :meth:`stay`."""
        self._stays -= 1
        self._close_if_idle()

    # IReactorFDSet: who is watched, and for what.

    def addReader(self, reader: Any) -> None:
        """Watch a connection for input."""
        self._watch(reader, reader.fileno(), _IN)

    def addWriter(self, writer: Any) -> None:
        """Watch a connection for room to send."""
        self._watch(writer, writer.fileno(), _OUT)

    def removeReader(self, reader: Any) -> None:
        """Watch it for input no longer."""
        self._unwatch(reader, _IN)

    def removeWriter(self, writer: Any) -> None:
        """Watch it for room no longer."""
        self._unwatch(writer, _OUT)

    def remove(self, selectable: Any) -> None:
        """Watch it no longer at all."""
        fd = selectable.fileno()
        if fd in self._interests:
            self._forget(fd)
        elif fd < 0:
            self._unwatch(selectable, _IN | _OUT)

    def removeAll(self) -> list[Any]:
        """Watch nobody any more. Returns who was watched."""
        watched = list(self._everybody())
        for selectable in watched:
            self.remove(selectable)
        return watched

    def getReaders(self) -> list[Any]:
        """Who is watched for input."""
        return self._interested(_IN)

    def getWriters(self) -> list[Any]:
        """Who is watched for room."""
        return self._interested(_OUT)

    def _everybody(self) -> list[Any]:
        return [*self._selectables.values(), *self._late.values()]

    def _interested(self, event: int) -> list[Any]:
        return [s for s in self._everybody() if self._interests[s.fileno()] & event]

    def _watch(self, selectable: Any, fd: int, event: int) -> None:
        before = self._interests.get(fd)
        if before is None:
            if self._poller is None:
                self._open()
            self._poller.register(fd, event)
            self._interests[fd] = event
            # What the kernel has said before is not of this one.
            (self._late if self.is_serving else self._selectables)[fd] = selectable
        elif not before & event:
            self._poller.modify(fd, before | event)
            self._interests[fd] = before | event

    def _unwatch(self, selectable: Any, event: int) -> None:
        fd = selectable.fileno()
        if fd not in self._interests:
            if fd >= 0:
                return
            # Its socket was closed behind its back.
            fd = next((f for f, s in self._selectables.items() if s is selectable), -1)
            if fd < 0:
                return
        before = self._interests[fd]
        after = before & ~event
        if after == before:
            return
        if after:
            self._poller.modify(fd, after)
            self._interests[fd] = after
            if self._left:  # It may have been ready for what is no longer wanted.
                self._left.pop(fd, None)
        else:
            self._forget(fd)

    def _forget(self, fd: int) -> None:
        """
        From now on an event of this descriptor that is still to be served is
        nobody's: it is in neither dictionary, and whoever opens the descriptor
        anew within this turn is in ``_late`` until the end of it.
        """
        del self._interests[fd]
        if self._selectables.pop(fd, None) is None:
            self._late.pop(fd, None)
        if self._left:  # It may have been ready, and not served yet.
            self._left.pop(fd, None)
        try:
            self._poller.unregister(fd)
        except OSError:
            pass  # Closed behind its back; the kernel has done it.
        if not self._interests and not self.is_serving:
            self._close_if_idle()

    # Reading from new connections before the kernel tells of them.

    def first_read_succeeded(self, size: int) -> None:
        """A new client's first bytes were there."""
        self.first_bytes -= size
        self._failed_first_reads = 0

    def first_read_failed(self) -> None:
        """They were not: of many like this, wait for the kernel to tell."""
        self._failed_first_reads += 1
        excess = self._failed_first_reads - FAILED_FIRST_READS
        if excess >= 0:
            self.first_bytes = 0
            # There may be millions in a row, and 1 << that is a huge number.
            rest = min(1 << min(excess, MOST_TURNS_OF_REST), MOST_TURNS_OF_REST) - 1
            self._rests_until = self.turn + rest

    # The own descriptor, in the main reactor.

    def _open(self) -> None:
        if self._poller is None:
            self._poller = select.epoll()
            self.reactor.addReader(self)

    def _close_if_idle(self) -> None:
        if self._poller is not None and not self._interests and self._stays <= 0:
            self.reactor.removeReader(self)
            self._poller.close()
            self._poller = None

    def fileno(self) -> int:
        """The epoll object's."""
        return -1 if self._poller is None else cast(int, self._poller.fileno())

    def logPrefix(self) -> str:
        """How lines of Twisted's legacy log are marked that are of no connection."""
        return "tcpsvc"

    def connectionLost(self, reason: Failure) -> None:
        """
        The main reactor lets go of all its descriptors, at its end or at
        ``removeAll``: so do we.
        """
        # One that was not watched may be, by what another does at its end.
        while watched := self.removeAll():
            for selectable in watched:
                self._lose(selectable, reason)
        if self._poller is not None:
            # Whoever has asked us to stay has lost us too. Who comes later finds
            # us as at the beginning.
            self.reactor.removeReader(self)
            self._poller.close()
            self._poller = None

    # A turn.

    def doRead(self) -> None:
        """Some connections are ready: serve them."""
        outer = context.get(ILogContext) or {}
        context.call({ILogContext: _LogContext(self, outer)}, self._serve)

    def _serve(self) -> None:
        if self._left:
            events = list(self._left.items())
            self._left.clear()
        else:
            events = self._poller.poll(0, MOST_EVENTS)
        is_nested = self.is_serving  # A handler has called reactor.iterate().
        if is_nested:
            self._end_outer()
        outer = self.serves(None)
        self.is_serving = True
        self.turn += 1
        if self.turn > self._rests_until:
            self.first_bytes = MOST_RECEIVED
        selectables = self._selectables
        due = self.due
        size = self.receive_size
        credit = self._credit
        looked_at = monotonic()
        end = looked_at + TURN
        ready = self._ready = iter(events)
        try:
            for fd, event in ready:
                selectable = selectables.get(fd)
                if selectable is None:
                    continue
                self.served = selectable
                plain_socket = selectable.plain_socket
                if event != _IN or plain_socket is None:
                    self._serve_other(selectable, fd, event)
                    credit -= CREDIT_OF_ONE
                else:
                    # As its doRead does, and without the way over ``due`` for
                    # what it answers: 12 % of an echo.
                    try:
                        data = plain_socket.recv(size)
                    except BlockingIOError:
                        continue
                    except OSError:
                        selectable.read_failed = True
                        self._disconnect(selectable, CONNECTION_LOST, is_read=True)
                        continue
                    credit -= CREDIT_OF_ONE + len(data)
                    why: Any = None
                    try:
                        if not data:
                            why = CONNECTION_DONE
                        elif selectable.is_flush_due:
                            selectable.protocol.dataReceived(data)
                        else:
                            selectable.is_flush_due = True
                            selectable.protocol.dataReceived(data)
                            if selectable.is_flush_due and not selectable.dataBuffer:
                                why = selectable.flush()
                    except BaseException:
                        why = self._raised(selectable)
                    if why is not None:
                        # It is the client's end only when nothing was read: what
                        # was may have been answered with an end of our own.
                        self._disconnect(selectable, why, is_read=not data)
                if due:
                    self._flush(due)
                if credit < 0:
                    now = monotonic()
                    if now > end:
                        # Who was closed meanwhile may have an heir by then.
                        self._left.update(e for e in ready if e[0] in selectables)
                        if size > LEAST_RECEIVED:
                            self.receive_size = size // 2
                        break
                    credit = self._next_credit(now - looked_at)
                    looked_at = now
            else:
                if size < MOST_RECEIVED:
                    self.receive_size = size * 2
        finally:
            self.is_serving = is_nested
            self.served = outer
            if due:
                self._flush_later()
            if self._late:
                self._admit_late()
            if not is_nested and not self._interests:
                self._close_if_idle()

    def _admit_late(self) -> None:
        """No event is left that is older than they are."""
        self._selectables.update(self._late)
        self._late.clear()

    def _end_outer(self) -> None:
        """
        A turn begins within another one, which ends with the connection that it
        serves: the kernel tells of the others again, and of who has come meanwhile.
        """
        for _ in self._ready:
            pass
        self._admit_late()

    def serves(self, selectable: Any) -> Any:
        """
        From now on a connection is served, or one after the other.

        :returns: who was before, and is to be afterwards.
        """
        outer = self.served
        if outer is not None and outer.is_flush_due:
            self._wait_for_room(outer)  # Its own flush comes after that.
        self.served = selectable
        return outer

    def _next_credit(self, spent: float) -> int:
        """How much may be done before the clock is looked at again."""
        if spent > TURN / 10:
            self._credit = 0
        else:
            self._credit = min(MOST_CREDIT, 2 * self._credit + CREDIT_OF_ONE)
        return self._credit

    def _serve_other(self, selectable: Any, fd: int, event: int) -> None:
        """As Twisted's reactors do, whatever it is that is ready."""
        if event & _DISCONNECTED and not event & _IN:
            # No input is left, or none is wanted.
            is_reading = self._interests[fd] & _IN
            gone = CONNECTION_DONE if is_reading else CONNECTION_LOST
            self._disconnect(selectable, gone, is_read=bool(is_reading))
            return
        is_read = False
        why: Any = None
        try:
            if selectable.fileno() == -1:
                why = ConnectionFdescWentAway("File descriptor lost")
            else:
                if event & _IN:
                    is_read = True
                    why = selectable.doRead()
                if why is None and event & _OUT and selectable.connected:
                    is_read = False
                    why = selectable.doWrite()
        except BaseException:
            why = self._raised(selectable)
        if why is not None:
            self._disconnect(selectable, why, is_read=is_read)

    def _raised(self, selectable: Any) -> Any:
        """
        A protocol has raised. As Twisted does: log it, lose the connection, go on.
        """
        failure = Failure()
        if is_dealt_with(selectable.watcher, failure):
            return None
        return failure.value

    def _disconnect(self, selectable: Any, why: Any, *, is_read: bool) -> None:
        reason = reason_of(why)
        if is_read and reason is _DONE:
            self.removeReader(selectable)
            watcher = selectable.watcher  # It may let go meanwhile.
            try:
                selectable.readConnectionLost(reason)
            except BaseException:
                log_unhandled(watcher, Failure())
        else:
            self._lose(selectable, reason)

    def _lose(self, selectable: Any, reason: Failure) -> None:
        watcher = selectable.watcher
        try:
            selectable.connectionLost(reason)
        except BaseException:
            log_unhandled(watcher, Failure())

    def _flush(self, due: list[Any]) -> None:
        """Send what was written while a connection was served."""
        # A producer that is asked for more may write at once: that is for later, or
        # a turn might never end.
        flushed = due[:]
        due.clear()
        for transport in flushed:
            if transport.is_flush_due:
                if transport.dataBuffer:
                    # One before has ended it: it was flushed, and has to wait.
                    self._wait_for_room(transport)
                else:
                    self.flush_one(transport)
        if due:
            self._flush_later()

    def flush_one(self, transport: Any) -> None:
        """Send what was written to a connection, or lose it."""
        try:
            why = transport.flush()
        except BaseException:
            why = self._raised(transport)
        if why is not None:
            self._disconnect(transport, why, is_read=False)

    def _flush_later(self) -> None:
        for transport in self.due:
            if transport.is_flush_due:
                self._wait_for_room(transport)
        self.due.clear()

    def _wait_for_room(self, transport: Any) -> None:
        # An error that left the turn would cost all connections theirs.
        try:
            transport.wait_for_room()
        except BaseException:
            why = self._raised(transport)
            if why is not None:
                self._disconnect(transport, why, is_read=False)

    def __repr__(self) -> str:
        watched = self._everybody()
        return f"<SubReactor of {len(watched)} connections: {watched}>"


_sub_reactors: WeakKeyDictionary[Any, SubReactor] = WeakKeyDictionary()
