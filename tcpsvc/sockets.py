"""
Opening listening sockets: what is asked of the kernel, and what it may answer.

Everything here works on plain :class:`socket.socket` objects and knows nothing
of reactors. Whatever fails is closed, and unlinked, before the error leaves.
"""

from __future__ import annotations

import errno
import os
import socket
from dataclasses import dataclass

from twisted.internet.address import IPv4Address, IPv6Address, UNIXAddress
from twisted.internet.error import CannotListenError
from twisted.internet.interfaces import IAddress

from tcpsvc.unix_paths import BoundPath, absolute, bind_unix

#: How often port 0 is tried again after EADDRINUSE, as in Async (spec W3).
MAX_RETRIES_UPON_ADDR_IN_USE = 10


@dataclass(slots=True)
class ListeningSocket:
    """
    An open listening socket, and what is owed to it when it is closed.

    :ivar path: the UNIX path to unlink, or ``None``.
    :ivar is_shared: others may hold it too: it is never shut down.
    :ivar maps_ipv4: IPv4 clients arrive here as mapped IPv6 addresses.
    """

    socket: socket.socket
    path: BoundPath | None = None
    is_shared: bool = False
    maps_ipv4: bool = False

    @property
    def address(self) -> IAddress:
        """The address it is bound to, as Twisted says it."""
        name = self.socket.getsockname()
        if self.socket.family == socket.AF_UNIX:
            return UNIXAddress(name)
        if self.socket.family == socket.AF_INET6:
            return IPv6Address("TCP", *name)
        return IPv4Address("TCP", *name)

    def discard(self) -> None:
        """Close it unserved: the path first, then the descriptor."""
        try:
            if self.path is not None:
                self.path.unlink()
        finally:
            self.socket.close()


def make_socket(family: socket.AddressFamily) -> socket.socket:
    """
    A new non-blocking, close-on-exec stream socket. Tests put one that fails in the
    place of this.
    """
    made = socket.socket(family, socket.SOCK_STREAM)
    made.setblocking(False)
    if family != socket.AF_UNIX:
        # Accepted sockets inherit it: a system call less for each (spec A7).
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return made


def open_inet(
    host: str,
    port: int,
    *,
    backlog: int,
    reuseaddr: bool,
    reuseport: bool,
    dual_stack: bool,
) -> socket.socket:
    """
    Bind and listen on an IPv4 or IPv6 literal (spec W1 to W4).

    :raises CannotListenError: with address and errno; after retries of port 0
        the message says how many there were.
    """
    family = inet_family(host)
    retries = 0
    while True:
        made: socket.socket | None = None
        try:
            made = make_socket(family)
            if reuseaddr:
                made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if reuseport:
                made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            if family == socket.AF_INET6:
                made.setsockopt(
                    socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if dual_stack else 1
                )
            made.bind(inet_sockaddr(host, port))
            made.listen(backlog)
        except OSError as error:
            if made is not None:
                made.close()
            if (
                port == 0
                and error.errno == errno.EADDRINUSE
                and retries < MAX_RETRIES_UPON_ADDR_IN_USE
            ):
                retries += 1
                continue
            if retries:
                error = OSError(
                    error.errno, f"{error.strerror} (after {retries} retries)"
                )
            raise CannotListenError(host, port, error) from error
        except BaseException:
            if made is not None:
                made.close()
            raise
        return made


def inet_family(host: str) -> socket.AddressFamily:
    """The family of a literal."""
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def inet_sockaddr(host: str, port: int) -> tuple[object, ...]:
    """The sockaddr of a literal, with the scope of a link-local address."""
    if ":" not in host:
        return (host, port)
    found = socket.getaddrinfo(
        host,
        port,
        socket.AF_INET6,
        socket.SOCK_STREAM,
        flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
    )
    return found[0][4]


def open_unix(
    path: str, *, backlog: int, mode: int | None
) -> tuple[socket.socket, BoundPath]:
    """
    Bind and listen on a UNIX path (spec W6, W9): a stale socket is replaced, a
    live one or another kind of file is left alone.

    :raises CannotListenError: with the path and the errno.
    :raises ValueError: the path, made absolute, is too long.
    """
    path = absolute(path)
    try:
        made = make_socket(socket.AF_UNIX)
        try:
            return made, bind_unix(made, path, backlog=backlog, mode=mode)
        except BaseException:
            made.close()
            raise
    except OSError as error:
        raise CannotListenError("unix", path, error) from error


def listen_on_given(
    given: socket.socket,
    where: tuple[str, int] | str,
    backlog: int,
    mode: int | None = None,
) -> ListeningSocket:
    """
    Bind and listen on the caller's own socket, setting no option and retrying
    nothing (spec W7). It is closed if this fails.

    :param where: a literal and a port, or a path.
    :raises CannotListenError: with address and errno.
    :raises ValueError: it is bound, of another family or no stream.
    """
    try:
        sockaddr: tuple[object, ...] | str
        if isinstance(where, str):
            _check_given(given, socket.AF_UNIX)
            sockaddr = absolute(where)
        else:
            _check_given(given, inet_family(where[0]))
            sockaddr = inet_sockaddr(*where)
        given.setblocking(False)
        try:
            if isinstance(sockaddr, str):
                path = bind_unix(given, sockaddr, backlog=backlog, mode=mode)
                return ListeningSocket(given, path=path)
            given.bind(sockaddr)
            given.listen(backlog)
        except OSError as error:
            if isinstance(sockaddr, str):
                raise CannotListenError("unix", sockaddr, error) from error
            raise CannotListenError(sockaddr[0], sockaddr[1], error) from error
        return ListeningSocket(given, maps_ipv4=_maps_ipv4(given))
    except BaseException:
        close_given(given)
        raise


def _check_given(given: socket.socket, family: int) -> None:
    if not isinstance(given, socket.socket):
        raise TypeError(f"socket={given!r} is not a socket.socket")
    if given.family != family or given.type != socket.SOCK_STREAM:
        raise ValueError(
            f"socket={given!r} does not fit: a stream socket of family "
            f"{socket.AddressFamily(family).name} is needed"
        )
    name = given.getsockname()
    if name if given.family == socket.AF_UNIX else name[1]:
        raise ValueError(
            f"socket={given!r} is bound already: give an unbound one, or use "
            "WhereToListen.of_fd for one that listens"
        )


def close_given(given: object) -> None:
    """Close the caller's own socket, which creation has failed to use (W7)."""
    if isinstance(given, socket.socket):
        given.close()


def adopt(fd: int, *, own: bool) -> ListeningSocket:
    """
    A descriptor that listens already.

    :param own: take it over; else it is duplicated.
    :raises ValueError: it does not listen.
    """
    made: socket.socket | None = None
    try:
        number = fd if own else os.dup(fd)
        try:
            made = socket.socket(fileno=number)
        except BaseException:
            if not own:
                os.close(number)
            raise
        if not made.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise ValueError(f"fd={fd} does not listen")
        if made.family not in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX):
            raise ValueError(f"fd={fd} is of family {made.family!r}")
    except OSError as error:
        if made is not None:
            made.close()
        raise ValueError(f"fd={fd} is no socket that listens: {error}") from error
    except BaseException:
        if made is not None and own:
            made.detach()  # It may be anybody's.
        elif made is not None:
            made.close()
        raise
    os.set_inheritable(made.fileno(), False)
    made.setblocking(False)
    return ListeningSocket(made, is_shared=True, maps_ipv4=_maps_ipv4(made))


def _maps_ipv4(listening: socket.socket) -> bool:
    """Whether IPv4 clients of a socket arrive as mapped addresses."""
    return listening.family == socket.AF_INET6 and not listening.getsockopt(
        socket.IPPROTO_IPV6, socket.IPV6_V6ONLY
    )
