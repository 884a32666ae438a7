"""
The options of a server: what each is for, and its default. Their checks are in
:mod:`tcpsvc.settings`.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Collection, Iterable
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Any, Literal, TypedDict

from tcpsvc.overflow import Overflow, Refusal
from tcpsvc.rate import Rate

#: What a network may be given as.
Network = str | IPv4Address | IPv4Network | IPv6Address | IPv6Network

#: What is called with the error of an accept, and the :class:`tcpsvc.Server`.
AcceptErrorCallable = Callable[[OSError, Any], object]


class Options(TypedDict, total=False):
    """
    The keyword options of every ``create`` (the types are checked by mypy).

    ``max_connections``
        How many connections at a time, their handlers included; at least 1.
        Further clients wait in the kernel's backlog (A1). Default: what the soft
        limit of open files allows, at most 10 000 (A2).
    ``max_accepts_per_batch``
        How many clients are accepted in one turn of the reactor; at least 1,
        default 1.
    ``backlog``
        How many clients may wait in the kernel; at least 1, default 64. An
        endpoint has a backlog of its own, which stands.
    ``drop_incoming_connections``
        Close each client at once (D). Default false.
    ``socket``
        An unbound socket of yours, which is bound to ``where`` and used as it
        is. The server owns it, and closes it also when creation fails (W7).
    ``engine``
        ``"auto"`` (the default) serves connections by tcpsvc's own sub-reactor
        where it can: on Linux, with any reactor that can watch a descriptor.
        ``"reactor"`` serves them by the reactor itself, as Twisted does. What
        happens is the same; how fast is not.
    ``overflow``
        What becomes of a client that comes when ``max_connections`` are there:
        ``"hold"`` (the default: it waits in the kernel's backlog), ``"drop"``
        (closed with FIN), ``"reset"`` (with RST), :class:`Reply(bytes)
        <tcpsvc.Reply>` (told, then closed), ``"evict"`` (the connection that was
        idle for longest is closed and its handler cancelled; the client starts when
        that slot is free).
    ``refusal``
        What becomes of clients that the further limits keep out: ``"reset"`` (the
        default), ``"drop"``, or a :class:`Reply(bytes) <tcpsvc.Reply>`.
    ``max_connections_per_peer``
        How many live connections a peer may have. Default: no limit.
    ``accept_rate_per_peer``
        How often a peer may come: a :class:`tcpsvc.Rate`, or its text, such as
        ``"10/s:20"``. Default: no limit.
    ``peer_prefixes``
        What a peer is: how many bits of an IPv4 address, and of an IPv6 address.
        Default ``(32, 64)``. UNIX clients are never limited.
    ``accept_rate``
        How often clients are accepted at all; further ones wait in the kernel's
        backlog. Default: no limit.
    ``allow``, ``deny``
        Networks, such as ``["10.0.0.0/8", "::1"]``. Only clients out of ``allow``
        are let in, if it is given, and none out of ``deny``, which has the last
        word.
    ``dry_run``
        Limits, by the names of their options, or ``True`` for all, that let pass
        what they would refuse or end, and count and log it. ``flush_timeout`` is no
        limit of clients: it has none. Default ``()``.
    ``first_byte_timeout``
        Seconds, from its slot on, in which a client must have sent something; under
        TLS, something more than its handshake. Default: no limit.

        When this timeout or one of the next four is over, the connection is closed as
        by ``close(close_existing_connections=True)`` and its handler cancelled, once:
        an ordinary end, which is not reported. That is not before its time, and at
        most a quarter of it (and 0.05 s, or a second) later. A handler that has ended
        is left to ``flush_timeout``, one whose socket is closed to
        ``handler_timeout``. What a UNIX socket of ``create_sock`` moves nobody
        knows: where it listens on those only, this one, ``idle_timeout`` and
        ``min_throughput`` are refused; beside others they are for the others.
    ``idle_timeout``
        Seconds without a byte either way: received, or taken by this kernel or, of
        TCP, the client's. Default: no limit.
    ``handler_timeout``
        Seconds, from its slot on, that a handler may run. Default: no limit.
    ``lifetime``
        Seconds, from its slot on, that a connection may last. Default: no limit.
    ``min_throughput``
        Bytes a second that a connection must move, either way, on average of each
        ``throughput_window``, when it moves any or has some waiting to be sent: one
        that is silent is idle, not slow. What the client's kernel has acknowledged
        counts too. Default: no limit.
    ``throughput_window``
        Seconds. Default 30.
    ``on_exhaustion``
        What becomes of clients that come while the process has no descriptor for
        them: ``"back-off"`` (the default: they wait in the kernel's backlog), or
        ``"shed"`` (they are turned away, as ``refusal`` says but never with a reply,
        by means of a descriptor that the server keeps for this).
    ``on_accept_error``
        ``f(error, server)``, called whenever the kernel fails to give a client, for
        want of descriptors, say: at first, every 50 ms while it goes on, and whenever
        a descriptor of the server has been closed in vain. It may close connections;
        as soon as a descriptor is free accepting goes on. A coroutine or Deferred of
        its is followed, and it is not called again meanwhile. What it raises is
        logged.
    ``observer``
        Is told what happens: a :class:`tcpsvc.Observer`.
    ``keepalive``
        Set SO_KEEPALIVE on connections, so that a client that vanished does not
        hold its slot for ever. Default false.
    ``reactor``
        What serves. Default: the global reactor.
    ``clock``
        What times everything, an ``IReactorTime``. Default: the reactor.
    """

    max_connections: int | None
    max_accepts_per_batch: int
    backlog: int
    drop_incoming_connections: bool
    socket: socket.socket | None
    overflow: Overflow
    refusal: Refusal
    max_connections_per_peer: int | None
    accept_rate_per_peer: Rate | str | None
    peer_prefixes: tuple[int, int]
    accept_rate: Rate | str | None
    allow: Iterable[Network] | None
    deny: Iterable[Network]
    dry_run: bool | Collection[str]
    first_byte_timeout: float | None
    idle_timeout: float | None
    handler_timeout: float | None
    lifetime: float | None
    min_throughput: float | None
    throughput_window: float
    on_exhaustion: Literal["back-off", "shed"]
    on_accept_error: AcceptErrorCallable | None
    observer: Any
    keepalive: bool
    engine: Literal["auto", "reactor"]
    reactor: Any
    clock: Any


class StreamOptions(Options, total=False):
    """
    The further options of stream handlers (``create`` and ``create_inet``).

    ``buffer_age_limit``
        Seconds after which a client that does not take its bytes is closed
        (S6); ``None`` for never. Default 120.
    ``flush_timeout``
        Seconds after which a connection that is to close is aborted when its
        client takes no byte (H3). Default 30.
    ``reader_buffer_size``
        How many bytes may wait to be read, and the longest line (S2, S3).
        Default 131072.
    ``writer_buffer_size``
        How many bytes may wait to be sent before ``drain`` waits (S5). Default
        131072.
    ``eof_on_drain``
        While the server drains (:meth:`tcpsvc.Server.drain`), a read that waits with
        nothing buffered is at EOF, so that handlers that wait for a next message
        end. A handler may say otherwise: :meth:`tcpsvc.Reader.eof_when_draining`.
        Default false.
    """

    buffer_age_limit: float | None
    flush_timeout: float
    reader_buffer_size: int
    writer_buffer_size: int
    eof_on_drain: bool
