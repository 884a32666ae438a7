"""
``twistd tcpsvc`` and ``python -m twisted tcpsvc`` as real processes, each in a
directory of its own, and whatever it leaves running there.
"""

from __future__ import annotations

import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.address import IPv4Address, UNIXAddress

import tcpsvc
from tests.support import the_reactor

#: Seconds that a process may take for anything; only a failing test waits so long.
PATIENCE = 20.0

ROOT = Path(tcpsvc.__file__).parent.parent

#: A module of a user's, as it lies in the current directory.
HANDS = '''
import atexit, gc, os, socket
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.protocol import Factory, Protocol

VALUE = 3

async def obey(address, reader, writer):
    """Greets, and does as each line says."""
    writer.write(b"hello\\n")
    async for line in reader:
        order, _, rest = line.decode().strip().partition(" ")
        if order == "answer":
            writer.write(b"x" * 1_000_000)
            return
        elif order == "exit":
            writer.write(b"last words\\n")
            raise SystemExit(int(rest) if rest.isdigit() else rest or None)
        elif order == "interrupt":
            raise KeyboardInterrupt
        elif order == "raise":
            raise ValueError("oh dear")
        elif order == "deaf":
            writer.write(b"what?\\n")
            await Deferred()
        elif order == "stubborn":
            writer.write(b"no\\n")
            while True:
                try:
                    await Deferred()
                except CancelledError:
                    pass
        elif order == "uid":
            writer.write(b"%d\\n" % os.getuid())
        elif order == "collect":
            writer.write(b"%d\\n" % len(gc.get_objects()))
        elif order == "note":
            atexit.register(open, rest, "w")
            writer.write(b"noted\\n")
        elif order == "flood":
            while True:
                writer.write(b"x" * 65536)
                await writer.drain()

def sock(address, client):
    client.send(b"socket\\n")

class Once(Protocol):
    def connectionMade(self):
        self.transport.write(b"protocol\\n")
        self.transport.loseConnection()

def factory():
    return Factory.forProtocol(Once)

def nothing():
    return None

def bad_factory():
    raise RuntimeError("no\\nfactory today")

def leaving_factory():
    raise SystemExit(0)

async def async_factory():
    return factory()
'''

#: An endpoint that takes its time before it fails, and its handler.
SLOW = """
from twisted.internet import endpoints, task
import tcpsvc.where

class Slow:
    def __init__(self, reactor, description):
        self.reactor = reactor

    def listen(self, factory):
        def fail():
            raise OSError(99, "not today")
        return task.deferLater(self.reactor, 0.01, fail)

tcpsvc.where.serverFromString = Slow

def handler(address, reader, writer):
    pass
"""

#: What lies in a child's directory before it starts.
OURS = ["hands.py", "slow.py"]


def reactor_options() -> list[str]:
    """The children run on the kind of reactor that these tests run on."""
    if type(the_reactor()).__module__ == "twisted.internet.asyncioreactor":
        return ["--reactor=asyncio"]
    return []


def twistd(*options: str) -> list[str]:
    """
    The command line of the twistd script, which unlike ``python -m`` does not
    see the current directory.
    """
    script = Path(sys.executable).with_name("twistd")
    assert script.exists()
    return [sys.executable, str(script), *reactor_options(), *options]


def twist(*options: str) -> list[str]:
    """The command line of ``python -m twisted``; its log is lines of text."""
    return [
        sys.executable, "-m", "twisted", *reactor_options(), "--log-format=text",
        *options,
    ]  # fmt: skip


def environment() -> dict[str, str]:
    """A user's, in which our tcpsvc is installed."""
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    return {**kept, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}


def processes_in(directory: Path) -> list[int]:
    """The processes that work in a directory: daemons do not hide from this."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                if os.readlink(f"/proc/{name}/cwd") == str(directory):
                    found.append(int(name))
            except OSError:
                continue  # It has ended, as the most of them.
    return found


def wait_for_end(pid: int) -> None:
    """Wait for the end of a process that is nobody's child."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        assert poll.poll(PATIENCE * 1000), f"process {pid} goes on"
    finally:
        os.close(descriptor)


def kill_all_in(directory: Path) -> None:
    """Whatever a test has left running in its own directory."""
    for pid in processes_in(directory):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
        wait_for_end(pid)


class Child:
    """A command in a directory of its own, and what it says."""

    def __init__(self, directory: Path, argv: list[str]) -> None:
        self.directory = directory
        self.text = {"stdout": "", "stderr": ""}
        # A suite that runs in the background has SIGINT ignored, which a child
        # would inherit and, rightly, keep.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            self.process = subprocess.Popen(
                argv,
                cwd=directory,
                env=environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        finally:
            signal.signal(signal.SIGINT, before)
        self._pipes = {
            pipe.fileno(): name
            for name, pipe in (
                ("stdout", self.process.stdout),
                ("stderr", self.process.stderr),
            )
            if pipe is not None
        }
        self._poll = select.poll()
        for descriptor in self._pipes:
            self._poll.register(descriptor, select.POLLIN)
        self._deadline = time.monotonic() + PATIENCE

    @property
    def out(self) -> str:
        return self.text["stdout"]

    @property
    def err(self) -> str:
        return self.text["stderr"]

    def read(self) -> bool:
        """Wait for more of its output. False when there will be none."""
        while self._pipes:
            left = self._deadline - time.monotonic()
            ready = self._poll.poll(max(0, left * 1000))
            assert ready, f"waited in vain:\n{self.out}\n{self.err}"
            for descriptor, _ in ready:
                data = os.read(descriptor, 65536)
                self.text[self._pipes[descriptor]] += data.decode()
                if data:
                    return True
                self._poll.unregister(descriptor)
                del self._pipes[descriptor]
        return False

    def expect(self, pattern: str, count: int = 1) -> list[Any]:
        """Wait until a line of its stdout was seen so many times."""
        self._deadline = time.monotonic() + PATIENCE
        while len(found := re.findall(pattern, self.out)) < count:
            more = self.read()
            assert more, f"no {pattern!r}:\n{self.out}\n{self.err}"
        return found

    def address(self, host: str = r"127\.0\.0\.1") -> IPv4Address:
        """Where it says that it listens."""
        port = self.expect(rf"listening on {host}:(\d+)\n")[0]
        return IPv4Address("TCP", "127.0.0.1", int(port))

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self) -> int:
        """Its exit status, once it has ended and everything it said is read."""
        self._deadline = time.monotonic() + PATIENCE
        while self.read():
            pass
        return self.process.wait(PATIENCE)

    def end(self) -> None:
        """Whatever has happened: it ends, and its daemon with it."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdout, self.process.stderr):
            assert pipe is not None
            pipe.close()
        kill_all_in(self.directory)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Child]]:
    """``start(*argv)``: a child in a new directory with the module ``hands``."""
    made: list[Child] = []

    def start(*argv: str, directory: Path | None = None) -> Child:
        if directory is None:
            directory = tmp_path / f"child{len(made)}"
            directory.mkdir()
            (directory / "hands.py").write_text(HANDS)
            (directory / "slow.py").write_text(SLOW)
        child = Child(directory, list(argv))
        made.append(child)
        return child

    yield start
    for child in made:
        child.end()


def stop(*children: Child) -> list[int]:
    """SIGTERM to all of them. Their exit status."""
    for child in children:
        child.signal(signal.SIGTERM)
    return [child.wait() for child in children]


def refused(address: Any) -> bool:
    """
    Connecting is refused, at the latest when a server that is about to close its port
    has closed it. A client that still gets in waits for what comes of it: an answer,
    its end, or the reset of those whom nobody has accepted.
    """
    is_path = isinstance(address, UNIXAddress)
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        with socket.socket(socket.AF_UNIX if is_path else socket.AF_INET) as client:
            client.settimeout(PATIENCE)
            try:
                client.connect(
                    address.name if is_path else (address.host, address.port)
                )
                client.sendall(b"\n")
                client.recv(1)
            except (ConnectionRefusedError, FileNotFoundError):
                return True
            except (ConnectionResetError, BrokenPipeError):
                continue
    return False
