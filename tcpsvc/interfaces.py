"""
What others may implement, or rely on: zope interfaces of the public objects.
"""

from __future__ import annotations

from zope.interface import Attribute, Interface


class IReader(Interface):
    """The reading half of a connection: :class:`tcpsvc.Reader`."""

    bytes_read = Attribute("How many bytes have arrived so far.")
    draining = Attribute("Whether the server drains.")
    transport = Attribute("Twisted's transport.")
    connection = Attribute("The IConnection that it is of.")
    peer = Attribute("The client's address.")
    host = Attribute("The own address of the connection.")

    def read(n=-1):  # type: ignore[no-untyped-def]
        """At most ``n`` bytes; until EOF when negative. A coroutine."""

    def readline():  # type: ignore[no-untyped-def]
        """One line with its end. A coroutine."""

    def readuntil(separator=b"\n"):  # type: ignore[no-untyped-def]
        """Everything up to and with a separator. A coroutine."""

    def readexactly(n):  # type: ignore[no-untyped-def]
        """Exactly ``n`` bytes. A coroutine."""

    def peek(n):  # type: ignore[no-untyped-def]
        """The next ``n`` bytes, which stay. A coroutine."""

    def drain_to_eof():  # type: ignore[no-untyped-def]
        """Discard everything until EOF. A coroutine."""

    def eof_when_draining(wanted=True):  # type: ignore[no-untyped-def]
        """Whether to be at EOF when nothing is buffered while the server drains."""

    def at_eof():  # type: ignore[no-untyped-def]
        """Whether everything before EOF was read."""

    def close():  # type: ignore[no-untyped-def]
        """Close the whole connection at once."""


class IWriter(Interface):
    """The writing half of a connection: :class:`tcpsvc.Writer`."""

    is_closed = Attribute("Whether it was closed in any way.")
    can_write_eof = Attribute("Whether write_eof works here.")
    bytes_to_write = Attribute("How many bytes the kernel has not taken yet.")
    bytes_written = Attribute("How many bytes were written so far.")
    draining = Attribute("Whether the server drains.")
    transport = Attribute("Twisted's transport.")
    connection = Attribute("The IConnection that it is of.")
    peer = Attribute("The client's address.")
    host = Attribute("The own address of the connection.")

    def write(data):  # type: ignore[no-untyped-def]
        """Write bytes without waiting."""

    def writelines(lines):  # type: ignore[no-untyped-def]
        """Write several pieces of bytes."""

    def drain():  # type: ignore[no-untyped-def]
        """Wait until the buffer is small. A coroutine."""

    def flushed():  # type: ignore[no-untyped-def]
        """A Deferred: the kernel has all that was written so far."""

    def close():  # type: ignore[no-untyped-def]
        """Close when all is sent."""

    def close_finished():  # type: ignore[no-untyped-def]
        """A Deferred: the socket is closed."""

    def write_eof():  # type: ignore[no-untyped-def]
        """Close the write side when all is sent."""

    def consumer_left():  # type: ignore[no-untyped-def]
        """A Deferred: the client has left."""

    def when_draining():  # type: ignore[no-untyped-def]
        """A Deferred: the server drains."""

    def abort():  # type: ignore[no-untyped-def]
        """Close at once with a reset."""


class IServer(Interface):
    """A listening server: :class:`tcpsvc.Server`."""

    listeners = Attribute("Each place where it listens.")
    listening_on = Attribute("The port, the path, or the address of the first.")
    listening_on_address = Attribute("The first listening address.")
    listening_socket = Attribute("The first listening socket, while it is open.")
    num_connections = Attribute("How many slots are taken.")
    max_connections = Attribute("How many slots there are.")
    is_closed = Attribute("Whether close was called.")
    is_draining = Attribute("Whether a drain has begun.")
    is_paused = Attribute("'hold' or 'refuse' while paused, else None.")
    is_dropping_incoming_connections = Attribute("Whether clients are dropped.")
    connections = Attribute("A tcpsvc.ConnectionSnapshot of each live connection.")
    limits = Attribute("The limits that there are, in a line.")
    #: An attribute, since mypy-zope has no word for ``Unpack``.
    change = Attribute("``change(**options)``: other ones from now on, all or none.")

    def connection(id):  # type: ignore[no-untyped-def]
        """The live IConnection of a number."""

    def when_connections(condition):  # type: ignore[no-untyped-def]
        """A Deferred: the number of taken slots is as one wishes."""

    def set_handler(handler):  # type: ignore[no-untyped-def]
        """Serve new connections with another handler."""

    def add_observer(observer):  # type: ignore[no-untyped-def]
        """Tell an IObserver what happens from now on."""

    def remove_observer(observer):  # type: ignore[no-untyped-def]
        """Tell it no more."""

    def cancel_handlers():  # type: ignore[no-untyped-def]
        """Cancel every handler that still runs."""

    def close(*, close_existing_connections=False, cancel_handlers=False):  # type: ignore[no-untyped-def]
        """Close the listening sockets; a Deferred of one's own."""

    def drain(*, announce=0.0, timeout=30.0, spread=0.0, grace=1.0):  # type: ignore[no-untyped-def]
        """Close it, and see it to its end; a Deferred of a tcpsvc.DrainReport."""

    def force_drain():  # type: ignore[no-untyped-def]
        """Hurry that: close, cancel and reset what is left."""

    def close_finished():  # type: ignore[no-untyped-def]
        """A Deferred: the listening sockets are closed."""

    def close_finished_and_handlers_determined():  # type: ignore[no-untyped-def]
        """A Deferred: closed, and no connection is live."""

    def failed():  # type: ignore[no-untyped-def]
        """A Deferred that fails with the error that closed the server."""

    def pause(how):  # type: ignore[no-untyped-def]
        """Accept nobody for a while; a Deferred of one's own."""

    def resume():  # type: ignore[no-untyped-def]
        """Accept again; a Deferred of one's own."""

    def set_drop_incoming_connections(drop):  # type: ignore[no-untyped-def]
        """Drop incoming clients, or stop dropping them."""

    def invariant():  # type: ignore[no-untyped-def]
        """Raise AssertionError when the server's state is broken."""

    def describe():  # type: ignore[no-untyped-def]
        """A JSON-able description."""


class IConnection(Interface):
    """A live connection: of ``server.connection(id)``, ``writer.connection``."""

    id = Attribute("Its number within the server, from 1 on.")
    peer = Attribute("The client's address.")
    label = Attribute("What the handler calls it. To be set; default None.")
    reason = Attribute("Why it ends, a tcpsvc.Reason; None until something has.")
    age = Attribute("Seconds since its accept; for observers up to its end.")
    bytes_in = Attribute("Bytes received; None where nobody knows, or has observed.")
    bytes_out = Attribute("Bytes that the kernel has taken; None as for bytes_in.")
    holds_slot = Attribute("Whether it counts against max_connections.")
    draining = Attribute("Whether the server drains.")

    def when_draining():  # type: ignore[no-untyped-def]
        """A Deferred: the server drains."""

    def snapshot():  # type: ignore[no-untyped-def]
        """Its state now, a tcpsvc.ConnectionSnapshot."""

    def close():  # type: ignore[no-untyped-def]
        """Close it at once and orderly, as the server's close does."""

    def abort():  # type: ignore[no-untyped-def]
        """Close it with a reset."""

    def uncount():  # type: ignore[no-untyped-def]
        """It holds no slot from now on, and stays live."""


class IObserver(Interface):
    """
    Who is told what happens in a server. Derive from :class:`tcpsvc.Observer` to
    override some of it.
    """

    def connection_accepted(connection):  # type: ignore[no-untyped-def]
        """An IConnection has taken a slot."""

    def connection_refused(address, reason):  # type: ignore[no-untyped-def]
        """A client was not let in, for a tcpsvc.Reason."""

    def refused_in_dry_run(address, reason):  # type: ignore[no-untyped-def]
        """It would have been refused, or ended, but for ``dry_run``."""

    def handler_started(connection):  # type: ignore[no-untyped-def]
        """The handler of an IConnection runs."""

    def handler_ended(connection, outcome, failure):  # type: ignore[no-untyped-def]
        """
        It has ended: ``"finished"``, ``"left"`` (its connection was gone, or it was
        cancelled), or ``"failed"``, with its Failure.
        """

    def connection_finished(connection):  # type: ignore[no-untyped-def]
        """
        An IConnection is over: its reason, age and bytes are final. Its slot is free,
        and its handler's error reported, when all have been told.
        """

    def limit_reached(limit):  # type: ignore[no-untyped-def]
        """A limit, by the name of its option: further clients wait, or are refused."""

    def accept_failed(error):  # type: ignore[no-untyped-def]
        """Accepting has failed with an OSError."""

    def server_paused(how):  # type: ignore[no-untyped-def]
        """It accepts nobody: ``"hold"`` or ``"refuse"``."""

    def server_resumed():  # type: ignore[no-untyped-def]
        """It accepts again."""

    def server_draining():  # type: ignore[no-untyped-def]
        """A drain has begun."""

    def server_drained(report):  # type: ignore[no-untyped-def]
        """It is over; with its report."""
