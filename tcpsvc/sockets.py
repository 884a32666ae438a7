"""
Opening listening sockets: what is asked of the kernel, and what it may answer.

Everything here works on plain :class:`socket.socket` objects and knows nothing
of reactors. Whatever fails is closed, and unlinked, before the error leaves.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from twisted.internet.error import CannotListenError

#: How often port 0 is tried again after EADDRINUSE, as in Async (spec W3).
MAX_RETRIES_UPON_ADDR_IN_USE = 10

#: The longest path that fits ``sockaddr_un.sun_path`` with its final NUL.
MAX_UNIX_PATH_BYTES = 107

#: A starter holds the directory's lock for less than a millisecond. One that
#: holds it longer than this is no starter, and is not waited for.
LOCK_SECONDS = 1.0

SocketMaker = Callable[[socket.AddressFamily], socket.socket]


def stream_socket(family: socket.AddressFamily) -> socket.socket:
    """
    A new non-blocking, close-on-exec stream socket. The default of every
    ``make_socket`` here, and the place where a test makes opening fail.
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
    make_socket: SocketMaker = stream_socket,
) -> socket.socket:
    """
    Bind and listen on an IPv4 or IPv6 literal (spec W1 to W4).

    :raises CannotListenError: with address and errno; after retries of port 0
        the message says how many there were.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
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


@dataclass(frozen=True, slots=True)
class BoundPath:
    """A UNIX socket's path, as it was bound, and the inode that is there."""

    path: str
    device: int
    inode: int

    @classmethod
    def of(cls, path: str) -> BoundPath:
        found = os.lstat(path)
        return cls(path, found.st_dev, found.st_ino)

    def unlink(self) -> bool:
        """
        Remove the path if it is still this server's (spec W6). To be called
        while the descriptor is open: a freed inode's number is used again at
        once.

        :returns: whether anything was there.
        :raises OSError: it is there, and could not be removed.
        """
        try:
            found = os.lstat(self.path)
            if (found.st_dev, found.st_ino) == (self.device, self.inode):
                os.unlink(self.path)
        except FileNotFoundError:
            return False
        return True


def check_unix_path(path: str) -> None:
    """
    :raises ValueError: the path is empty, holds a NUL, or is too long.
    """
    encoded = os.fsencode(path)
    if not encoded:
        raise ValueError("path='' is no path for a UNIX socket")
    if b"\0" in encoded:
        raise ValueError(f"path={path!r} holds a NUL byte")
    if len(encoded) > MAX_UNIX_PATH_BYTES:
        raise ValueError(
            f"path={path!r} has {len(encoded)} bytes, a UNIX socket's path "
            f"at most {MAX_UNIX_PATH_BYTES}: choose a shorter directory"
        )


def open_unix(
    path: str,
    *,
    backlog: int,
    mode: int | None,
    make_socket: SocketMaker = stream_socket,
) -> tuple[socket.socket, BoundPath]:
    """
    Bind and listen on a UNIX path (spec W6, W9): a stale socket is replaced, a
    live one or another kind of file is left alone.

    :raises CannotListenError: with the path and the errno.
    :raises ValueError: the path, made absolute, is too long.
    """
    path = os.path.abspath(path)
    check_unix_path(path)
    try:
        made = make_socket(socket.AF_UNIX)
    except OSError as error:
        raise CannotListenError(None, path, error) from error
    try:
        return made, bind_unix(made, path, backlog=backlog, mode=mode)
    except OSError as error:
        made.close()
        raise CannotListenError(None, path, error) from error
    except BaseException:
        made.close()
        raise


def bind_unix(
    made: socket.socket, path: str, *, backlog: int, mode: int | None
) -> BoundPath:
    """Bind a socket to an absolute path and listen. Raises plain ``OSError``."""
    with directory_lock(os.path.dirname(path)):
        remove_stale(path)
        made.bind(path)
        bound = BoundPath.of(path)
        try:
            if mode is not None:
                # Nobody can connect before listen: the mode is there in time.
                os.chmod(path, mode)
            made.listen(backlog)
        except BaseException:
            bound.unlink()
            raise
    return bound


@contextlib.contextmanager
def directory_lock(directory: str) -> Iterator[None]:
    """
    An exclusive ``flock`` on a directory: two starters do not both find the
    same stale path and remove each other's new one. It leaves nothing behind.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise OSError(
                        errno.EAGAIN,
                        f"another process holds the lock of directory {directory!r}",
                    ) from None
                time.sleep(0.001)
        yield
    finally:
        os.close(descriptor)


def remove_stale(path: str) -> None:
    """
    Unlink a socket that no process serves.

    A SOCK_DGRAM socket cannot connect to a stream server, and the kernel says
    why: ECONNREFUSED when no process holds the other end, EPROTOTYPE when one
    does, even if it does not listen yet or its backlog is full. The server
    hears nothing of it.

    :raises OSError: what is there is alive, or no socket, or cannot be removed.
    """
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise OSError(errno.EADDRINUSE, "a file that is no socket is there; left alone")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            pass
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno != errno.EPROTOTYPE:
                raise
            raise OSError(errno.EADDRINUSE, "a server is alive there") from error
        else:
            raise OSError(errno.EADDRINUSE, "a datagram server is alive there")
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def listen_on_given(
    given: socket.socket,
    sockaddr: tuple[object, ...] | str,
    backlog: int,
    mode: int | None = None,
) -> BoundPath | None:
    """
    Bind and listen on the caller's own socket, setting no option and retrying
    nothing (spec W7).

    :raises CannotListenError: with address and errno.
    """
    given.setblocking(False)
    try:
        if isinstance(sockaddr, str):
            return bind_unix(given, sockaddr, backlog=backlog, mode=mode)
        given.bind(sockaddr)
        given.listen(backlog)
    except OSError as error:
        if isinstance(sockaddr, str):
            raise CannotListenError(None, sockaddr, error) from error
        raise CannotListenError(sockaddr[0], sockaddr[1], error) from error
    return None


def close_given(given: object) -> None:
    """Close the caller's own socket, which creation has failed to use (W7)."""
    if isinstance(given, socket.socket):
        given.close()


def is_unbound(given: socket.socket) -> bool:
    """Whether a socket has no local address yet."""
    name = given.getsockname()
    return not name if given.family == socket.AF_UNIX else name[1] == 0
