"""
What the kernel says of a connected socket, and how to get from a transport to
its socket. Linux knows all of it; elsewhere, what is not known counts as
pending, which costs time and loses nothing.
"""

from __future__ import annotations

import array
import fcntl
import select
import socket
import struct
import sys
import termios
from collections.abc import Iterator
from typing import Any

_SIOCINQ = termios.FIONREAD
_SIOCOUTQ = termios.TIOCOUTQ
#: Where the kernel puts a number; read at once.
_ANSWER = array.array("i", [0])
_TCP_INFO_SIZE = 136
_TCPI_BYTES_ACKED = 120
#: tcpi_bytes_acked and tcpi_bytes_received.
_TCPI_BYTES = struct.Struct("=QQ")
#: tcpi_notsent_bytes; tcpi_bytes_sent and tcpi_bytes_retrans, since Linux 4.19.
_TCPI_NOTSENT = 144
_TCPI_BYTES_SENT = 200
_TCP_INFO_SIZE_WITH_SENT = 216
_TCPI_LAST_DATA_SENT = 44
#: tcpi_last_data_sent, tcpi_last_ack_sent and tcpi_last_data_recv, in ms.
_TCPI_LAST = struct.Struct("=III")
_TCP_CLOSE = 7
#: As of linux/tcp.h; since Linux 4.18.
_TCP_INQ = 36
#: CLOSE_WAIT, LAST_ACK, CLOSING, TIME_WAIT and CLOSE.
_TCP_STATES_AFTER_FIN = frozenset({8, 9, 11, 6, 7})
#: FIN_WAIT2 and TIME_WAIT; and those, FIN_WAIT1, CLOSING and LAST_ACK.
_TCP_STATES_AFTER_OWN_FIN_ACK = frozenset({5, 6})
_TCP_STATES_AFTER_OWN_FIN = frozenset({4, 5, 6, 11, 9})
#: SO_MEMINFO, as of linux/sock_diag.h: numbers of bytes, of which the kernel keeps
#: these for what has come and is not read, for what is sent and not acknowledged,
#: and for what has come while it was looked at.
_SO_MEMINFO = 55
_MEMINFO = struct.Struct("=I16xI4xI")
_MEMINFO_SIZE = 36
_NO_MEMORY = (0, 0, 0)
_LINGER_NOT = struct.pack("ii", 1, 0)
_HAS_TCP_INFO = sys.platform == "linux" and hasattr(socket, "TCP_INFO")
#: ``socket.family`` looks for an enum, which takes five times as long.
_family_of = socket.SocketType.family.__get__


def base_transport(transport: Any) -> Any:
    """The lowest transport below any wrapping protocols (TLS, PROXY, policies)."""
    while (below := getattr(transport, "transport", None)) is not None:
        transport = below
    return transport


def socket_of(base: Any) -> socket.socket | None:
    """The socket of a lowest transport, ``None`` in memory."""
    get_handle = getattr(base, "getHandle", None)
    handle = get_handle() if get_handle is not None else None
    return handle if isinstance(handle, socket.socket) else None


def has_nodelay(opened: socket.socket) -> bool:
    """
    Whether a listening socket has TCP_NODELAY, which those that it accepts inherit
    then, or has no use for it.
    """
    if opened.family == socket.AF_UNIX:
        return True
    try:
        return bool(opened.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
    except OSError:
        return False


def set_options(connected: socket.socket, *, nodelay: bool, keepalive: bool) -> None:
    """TCP_NODELAY on an inet socket, SO_KEEPALIVE if asked for (spec A7, A5)."""
    try:
        if nodelay and connected.family != socket.AF_UNIX:
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if keepalive:
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    except OSError:
        pass  # The client is gone already; its handler will see.


def close_orderly(client: socket.socket) -> None:
    """``shutdown``, then ``close``: the client reads EOF even if it spoke early."""
    try:
        client.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass
    client.close()


def close_with_reset(client: socket.socket) -> None:
    """The client hears at once that nothing will come; nothing is left to wait for."""
    try:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NOT)
    except OSError:
        pass
    client.close()


def is_readable(opened: socket.socket) -> bool:
    """Whether a client waits at a listening socket. It costs no descriptor."""
    poll = select.poll()
    poll.register(opened.fileno(), select.POLLIN)
    return bool(poll.poll(0))


def traffic(connected: socket.socket | None) -> tuple[int | None, int | None]:
    """
    How many bytes have come in, and how many the client's kernel has acknowledged,
    since the start; ``None`` where the kernel does not tell: on UNIX sockets, and
    once the socket is closed.
    """
    info = _tcp_info(connected)
    if info is None:
        return None, None
    acknowledged, received = _TCPI_BYTES.unpack_from(info, _TCPI_BYTES_ACKED)
    state = info[0]
    return (
        _without_fin(received, state),
        acknowledged - (state in _TCP_STATES_AFTER_OWN_FIN_ACK),
    )


def _without_fin(received: int, state: int) -> int:
    """
    A FIN counts for a byte. Whether one has come before a reset can be asked only
    :func:`at the end <taken_at_end>`, but not if there are none to take it from.
    """
    return received - (state in _TCP_STATES_AFTER_FIN) if received else 0


def taken(connected: socket.socket | None) -> tuple[int | None, int | None]:
    """
    How many bytes have come in, and how many this kernel has taken to send, as
    :func:`traffic`. It asks the kernel twice.
    """
    info = _tcp_info(connected)
    if info is None or connected is None:
        return None, None
    waiting = _queued(connected, _SIOCOUTQ) or 0
    acknowledged, received = _TCPI_BYTES.unpack_from(info, _TCPI_BYTES_ACKED)
    state = info[0]
    return (
        _without_fin(received, state),
        acknowledged + waiting - (state in _TCP_STATES_AFTER_OWN_FIN),
    )


def taken_at_end(connected: socket.socket | None) -> tuple[int | None, int | None]:
    """
    As :func:`taken`, of a socket that is to be closed now. It may take the error that
    would be read next, and so knows of one that is reset whether FINs came before.
    """
    info = _tcp_info(connected)
    received, sent = taken(connected)
    if (
        info is None
        or info[0] != _TCP_CLOSE
        or connected is None
        or received is None
        or sent is None
    ):
        return received, sent
    no_fin = bool(received) and not _has_fin(connected)
    return received + no_fin, sent - _has_own_fin(connected, sent)


def _has_fin(connected: socket.socket) -> bool:
    """
    Whether the client's FIN came before the connection was reset: TCP_INQ counts it
    with what is to be read, SIOCINQ does not.
    """
    try:
        connected.setsockopt(socket.IPPROTO_TCP, _TCP_INQ, 1)
    except OSError:
        return True  # Nobody knows; so it was counted.
    try:
        _, answers, _, _ = connected.recvmsg(
            1, socket.CMSG_SPACE(4), socket.MSG_PEEK | socket.MSG_DONTWAIT
        )
    except OSError:
        return False  # After a FIN the end is read, not the reset.
    unread = _queued(connected, _SIOCINQ)
    return any(struct.unpack("i", data)[0] != unread for _, _, data in answers)


def _has_own_fin(connected: socket.socket, taken: int) -> bool:
    """Whether one more has been taken than was sent or is to be: our own FIN."""
    info = connected.getsockopt(
        socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_SIZE_WITH_SENT
    )
    if len(info) != _TCP_INFO_SIZE_WITH_SENT:
        return False
    sent, again = _TCPI_BYTES.unpack_from(info, _TCPI_BYTES_SENT)
    (waiting,) = struct.unpack_from("=I", info, _TCPI_NOTSENT)
    return bool(taken == sent - again + waiting + 1)


def idle(connected: socket.socket | None) -> float | None:
    """Seconds since the last byte came in or went out, as :func:`traffic`."""
    info = _tcp_info(connected)
    if info is None:
        return None
    sent, _, received = _TCPI_LAST.unpack_from(info, _TCPI_LAST_DATA_SENT)
    milliseconds: int = min(sent, received)
    return milliseconds / 1000


def _tcp_info(connected: socket.socket | None) -> bytes | None:
    if connected is None or not _HAS_TCP_INFO:
        return None
    try:
        info = connected.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_SIZE)
    except OSError:
        return None
    return info if len(info) == _TCP_INFO_SIZE else None


def _queued(connected: socket.socket, request: int) -> int | None:
    try:
        fcntl.ioctl(connected.fileno(), request, _ANSWER)
    except (OSError, ValueError):
        return None
    return _ANSWER[0]


def rest_of_input(connected: socket.socket) -> Iterator[bytes]:
    """What is still to be read of a connection that is lost."""
    while True:
        try:
            data = connected.recv(65536)
        except OSError:
            return
        if not data:
            return
        yield data


def has_eof(connected: socket.socket) -> bool:
    """Whether the client has ended its side, or all, whatever is still unread."""
    if connected.fileno() < 0 or not _HAS_TCP_INFO:
        return False
    poll = select.poll()
    poll.register(connected, select.POLLRDHUP)
    return bool(poll.poll(0))


def has_input(connected: socket.socket) -> bool:
    """Whether bytes have come that are not read yet."""
    return bool(_queued(connected, _SIOCINQ))


def nothing_pending(connected: socket.socket) -> bool:
    """
    Whether no input is unread and no output is on its way: then ``close`` sends
    FIN, and nothing is lost. On a UNIX socket what was sent has arrived.
    """
    if _family_of(connected) != socket.AF_UNIX and _holds_nothing(connected):
        return True
    if _queued(connected, _SIOCINQ) != 0:
        return False
    return _queued(connected, _SIOCOUTQ) == 0 or connected.family == socket.AF_UNIX


def _holds_nothing(connected: socket.socket) -> bool:
    """
    Whether Linux has no memory in use for bytes of a TCP connection, as nearly
    always. In one question, of which :func:`_queued` needs two: 3 % of a short
    connection.
    """
    if not _HAS_TCP_INFO:
        return False
    try:
        info = connected.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, _MEMINFO_SIZE)
    except OSError:
        return False
    return len(info) == _MEMINFO_SIZE and _MEMINFO.unpack_from(info) == _NO_MEMORY


def output_state(connected: socket.socket | None) -> tuple[int | None, int | None]:
    """
    How many bytes the client's kernel has not acknowledged, and how many it has
    since the start. While both stay as they are the client has taken nothing.
    """
    if connected is None:
        return None, None
    return _queued(connected, _SIOCOUTQ), traffic(connected)[1]
