"""
The paths of UNIX sockets: bound, left alone or replaced, and removed (spec W6).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass

#: The longest path that fits ``sockaddr_un.sun_path`` with its final NUL.
MAX_UNIX_PATH_BYTES = 107

#: A starter holds the directory's lock for less than a millisecond. One that
#: holds it longer than this is no starter, and is not waited for.
LOCK_SECONDS = 1.0


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


def absolute(path: str) -> str:
    """
    A path made absolute.

    :raises ValueError: it is too long then.
    """
    path = os.path.abspath(path)
    check_unix_path(path)
    return path


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
