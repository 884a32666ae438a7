"""
What others may implement, or rely on: zope interfaces of the public objects.
"""

# Methods of zope interfaces have no annotations that mypy could read.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from twisted.internet.interfaces import IProtocolFactory
from zope.interface import Attribute, Interface


class IReader(Interface):
    """The reading half of a connection: :class:`tcpsvc.Reader`."""

    bytes_read = Attribute("How many bytes have arrived so far.")
    bytes_buffered = Attribute("How many of them are not read yet.")
    draining = Attribute("Whether the server drains.")
    transport = Attribute("Twisted's transport.")
    connection = Attribute("The IConnection that it is of.")
    peer = Attribute("The client's address.")
    host = Attribute("The own address of the connection.")

    def read(n=-1):
        """At most ``n`` bytes; until EOF when negative. A coroutine."""

    def readline():
        """One line with its end. A coroutine."""

    def readuntil(separator=b"\n"):
        """Everything up to and with a separator. A coroutine."""

    def readexactly(n):
        """Exactly ``n`` bytes. A coroutine."""

    def peek(n):
        """The next ``n`` bytes, which stay. A coroutine."""

    def drain_to_eof():
        """Discard everything until EOF. A coroutine."""

    def eof_when_draining(wanted=True):
        """Whether to be at EOF when nothing is buffered while the server drains."""

    def at_eof():
        """Whether everything before EOF was read."""

    def close():
        """Close the whole connection at once."""


class IWriter(Interface):
    """The writing half of a connection: :class:`tcpsvc.Writer`."""

    is_closed = Attribute("Whether it was closed in any way.")
    can_write_eof = Attribute("Whether write_eof works here.")
    bytes_to_write = Attribute("How many bytes the kernel has not taken yet.")
    bytes_written = Attribute("How many bytes were written so far.")
    bytes_taken = Attribute("How many of them the kernel has taken.")
    draining = Attribute("Whether the server drains.")
    transport = Attribute("Twisted's transport.")
    connection = Attribute("The IConnection that it is of.")
    peer = Attribute("The client's address.")
    host = Attribute("The own address of the connection.")

    def write(data):
        """Write bytes without waiting."""

    def writelines(lines):
        """Write several pieces of bytes."""

    def drain():
        """Wait until the buffer is small. A coroutine."""

    def flushed():
        """A Deferred: the kernel has all that was written so far."""

    def close():
        """Close when all is sent."""

    def close_finished():
        """A Deferred: the socket is closed."""

    def write_eof():
        """Close the write side when all is sent."""

    def consumer_left():
        """A Deferred: the client has left."""

    def when_draining():
        """A Deferred: the server drains."""

    def abort():
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
    limits_set = Attribute("Those of them that are not as by default, in a line.")
    stopped_by = Attribute("What a handler has stopped the reactor with, else None.")
    #: An attribute, since mypy-zope has no word for ``Unpack``.
    change = Attribute("``change(**options)``: other ones from now on, all or none.")

    def connection(id):
        """The live IConnection of a number."""

    def when_connections(condition):
        """A Deferred: the number of taken slots is as one wishes."""

    def set_handler(handler):
        """Serve new connections with another handler."""

    def add_observer(observer):
        """Tell an IObserver what happens from now on."""

    def remove_observer(observer):
        """Tell it no more."""

    def cancel_handlers():
        """Cancel every handler that still runs."""

    def close(*, close_existing_connections=False, cancel_handlers=False):
        """Close the listening sockets; a Deferred of one's own."""

    def drain(*, announce=0.0, timeout=30.0, spread=0.0, grace=1.0):
        """Close it, and see it to its end; a Deferred of a tcpsvc.DrainReport."""

    def force_drain():
        """Hurry that: close, cancel and reset what is left."""

    def close_finished():
        """A Deferred: the listening sockets are closed."""

    def close_finished_and_handlers_determined():
        """A Deferred: closed, and no connection is live."""

    def failed():
        """A Deferred that fails with the error that closed the server."""

    def pause(how):
        """Accept nobody for a while; a Deferred of one's own."""

    def resume():
        """Accept again; a Deferred of one's own."""

    def set_drop_incoming_connections(drop):
        """Drop incoming clients, or stop dropping them."""

    def invariant():
        """Raise AssertionError when the server's state is broken."""

    def describe():
        """A JSON-able description."""


class IServerFactory(IProtocolFactory):
    """
    What an application may use of a :class:`tcpsvc.ServerFactory` that it listens
    with itself.
    """

    num_connections = Attribute("How many slots are taken.")
    max_connections = Attribute("How many slots there are. May be set.")
    is_closed = Attribute("Whether close was called.")
    is_draining = Attribute("Whether handlers were told that the server drains.")
    is_dropping_incoming_connections = Attribute("Whether clients are dropped.")
    connections = Attribute("Each live IConnection, in the order of their accepts.")

    def connection(id):
        """The live IConnection of a number."""

    def when_connections(condition):
        """A Deferred: the number of taken slots is as one wishes."""

    def change(changes):
        """Other options from now on, by their names, all or none."""

    def set_handler(handler):
        """Serve new connections with another handler."""

    def set_drop_incoming_connections(drop):
        """Drop incoming clients, or stop dropping them."""

    def add_observer(observer):
        """Tell an IObserver what happens from now on."""

    def remove_observer(observer):
        """Tell it no more."""

    def failed():
        """A Deferred that fails with the error that closed the server."""

    def close():
        """Admit nobody any more. The port is its owner's to close."""

    def close_connections():
        """Close all live connections at once; a Deferred: their sockets are closed."""

    def cancel_handlers():
        """Cancel every handler that still runs."""

    def tell_of_drain():
        """Tell every handler that the server drains."""

    def when_over():
        """A Deferred: it is closed, and no connection is live."""

    def invariant():
        """Raise AssertionError when its state is broken."""

    def describe():
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

    def when_draining():
        """A Deferred: the server drains."""

    def snapshot():
        """Its state now, a tcpsvc.ConnectionSnapshot."""

    def close():
        """Close it at once and orderly, as the server's close does."""

    def abort():
        """Close it with a reset."""

    def uncount():
        """It holds no slot from now on, and stays live."""


class IObserver(Interface):
    """
    Who is told what happens in a server. Derive from :class:`tcpsvc.Observer` to
    override some of it.
    """

    def connection_accepted(connection):
        """An IConnection has taken a slot."""

    def connection_refused(address, reason):
        """A client was not let in, for a tcpsvc.Reason."""

    def refused_in_dry_run(address, reason):
        """It would have been refused, or ended, but for ``dry_run``."""

    def handler_started(connection):
        """The handler of an IConnection runs."""

    def handler_ended(connection, outcome, failure):
        """
        It has ended: ``"finished"``, ``"left"`` (its connection was gone, or it was
        cancelled), or ``"failed"``, with its Failure.
        """

    def connection_finished(connection):
        """
        An IConnection is over: its reason, age and bytes are final. Its slot is free,
        and its handler's error reported, when all have been told.
        """

    def limit_reached(limit):
        """
        ``"max_connections"``: the last slot was taken. ``"accept_rate"``: the last
        token was. Each time, not for each client that waits then, or is refused. Not
        for a limit in a dry run, nor for those of one peer, which
        ``connection_refused`` tells of.
        """

    def accept_failed(error):
        """Accepting has failed with an OSError."""

    def server_paused(how):
        """It accepts nobody: ``"hold"`` or ``"refuse"``."""

    def server_resumed():
        """It accepts again."""

    def server_draining():
        """A drain has begun."""

    def server_drained(report):
        """It is over; with its report."""
