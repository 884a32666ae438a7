"""
A trial suite as a user would write it, for a handler of five lines.
"""

from __future__ import annotations

from asyncio import LimitOverrunError
from typing import Any

from twisted.internet.defer import Deferred, inlineCallbacks
from twisted.internet.protocol import Factory
from twisted.internet.task import Clock
from twisted.protocols.basic import LineReceiver
from twisted.protocols.policies import TimeoutMixin
from twisted.trial.unittest import SynchronousTestCase, TestCase

from tcpsvc import ConnectionGone, Reader, Server, Writer
from tcpsvc.testing import MemoryServer, connect, connected, serve, serving


async def greet(address: object, reader: Reader, writer: Writer) -> None:
    """The handler."""
    writer.write(b"What is your name?\n")
    name = (await reader.readline()).strip()
    writer.write(b"Hello, " + name + b"!\n")


async def echo(address: object, reader: Reader, writer: Writer) -> None:
    """Another one."""
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()


class Shout(LineReceiver, TimeoutMixin):
    """A protocol of an existing application."""

    delimiter = b"\n"

    def lineReceived(self, line: bytes) -> None:
        if line == b"crash":
            raise ValueError("crashed as asked")
        self.sendLine(line.upper())


class InMemoryTests(SynchronousTestCase):
    """Without sockets, and without a reactor."""

    def test_greets_by_name(self) -> None:
        """Give bytes, see bytes."""
        client = MemoryServer(greet).connect()
        self.assertEqual(client.take(), b"What is your name?\n")
        client.send(b"Bo")
        self.assertEqual(client.received, b"")
        client.send(b"b\n")
        self.assertEqual(client.received, b"Hello, Bob!\n")
        self.assertTrue(client.is_closed)
        self.assertFalse(client.was_reset)

    def test_client_leaves(self) -> None:
        """EOF in mid-line is what the handler makes of it."""
        client = MemoryServer(greet).connect()
        client.send(b"Bo")
        client.send_eof()
        self.assertIn(b"Hello, Bo!\n", client.received)

    def test_error_is_collected(self) -> None:
        """What a handler raises is seen."""

        async def limited(address: object, reader: Reader, writer: Writer) -> None:
            await reader.readline()

        server = MemoryServer(limited, reader_buffer_size=10)
        client = server.connect()
        client.send(b"x" * 100)
        [error] = server.errors
        self.assertIsInstance(error, LimitOverrunError)
        self.assertTrue(client.has_eof)

    def test_slow_client_is_closed_by_age(self) -> None:
        """A Clock drives every timer."""
        server = MemoryServer(echo, buffer_age_limit=5)
        client = server.connect()
        client.stop_reading()
        client.send(b"x" * 1000)
        server.clock.pump([1] * 10)
        self.assertTrue(client.is_closed)
        self.assertEqual(len(server.errors), 1)

    def test_backpressure(self) -> None:
        """A client that does not read stops the handler at its drain."""
        server = MemoryServer(echo, writer_buffer_size=1000, reader_buffer_size=1000)
        client = server.connect()
        client.stop_reading()
        client.send(b"x" * 500_000)
        [connection] = server.factory.connections
        self.assertLess(connection.writer.bytes_to_write, 200_000)
        client.resume_reading()
        self.assertEqual(len(client.received), 500_000)

    def test_reset_ends_a_handler_that_only_writes(self) -> None:
        """ConnectionGone is an ordinary end, and no error."""
        ended = []

        async def chatter(address: object, reader: Reader, writer: Writer) -> None:
            try:
                while True:
                    writer.write(b"x" * 1000)
                    await writer.drain()
            except ConnectionGone:
                ended.append(True)
                raise

        server = MemoryServer(chatter, writer_buffer_size=1000)
        client = server.connect(is_reading=False)
        client.reset()
        self.assertEqual(ended, [True])
        self.assertEqual(server.errors, [])
        self.assertEqual(server.factory.num_connections, 0)

    def test_limit_holds_the_surplus(self) -> None:
        """Beyond max_connections a client waits for a slot."""
        server = MemoryServer(greet, max_connections=1)
        first, second = server.connect(), server.connect()
        self.assertEqual(second.received, b"")
        first.send(b"A\n")
        self.assertEqual(second.received, b"What is your name?\n")
        second.send(b"B\n")
        self.assertEqual(server.factory.num_connections, 0)

    def test_protocols(self) -> None:
        """Any protocol factory, under the same rules."""
        server = MemoryServer.of_protocols(Factory.forProtocol(Shout))
        client = server.connect()
        client.send(b"hello\n")
        self.assertEqual(client.received, b"HELLO\n")
        client.send(b"crash\n")
        self.assertTrue(client.was_reset)
        self.assertEqual([str(e) for e in server.errors], ["crashed as asked"])

    def test_clock_is_the_callers(self) -> None:
        """The clock may be shared with what else is under test."""
        clock = Clock()
        server = MemoryServer(greet, clock=clock)
        self.assertIs(server.clock, clock)
        server.connect().send(b"Bob\n")
        self.assertEqual(clock.getDelayedCalls(), [])


class OnAPortTests(TestCase):
    """On a real port; trial sees a clean reactor afterwards."""

    async def test_greets_by_name(self) -> None:
        """With addCleanup."""
        server = await serve(self, greet)
        client = await connect(self, server)
        self.assertEqual(await client.reader.readline(), b"What is your name?\n")
        client.write(b"Bob\n")
        self.assertEqual(await client.reader.readline(), b"Hello, Bob!\n")
        self.assertEqual(await client.reader.read(), b"")

    async def test_context_managers(self) -> None:
        """With async with."""
        async with serving(greet) as server, connected(server) as client:
            client.write(b"Bob\n")
            await client.reader.readline()
            self.assertEqual(await client.reader.readline(), b"Hello, Bob!\n")

    @inlineCallbacks
    def test_inline_callbacks(self) -> Any:
        """In the older style too."""
        server = yield serve(self, greet)
        client = yield connect(self, server)
        line = yield client.reader.readline()
        self.assertEqual(line, b"What is your name?\n")

    async def test_connections_left_open(self) -> None:
        """Handlers that never end are ended after the test."""

        async def forever(address: object, reader: Reader, writer: Writer) -> None:
            await Deferred()

        server = await serve(self, forever)
        await connect(self, server)
        await connect(self, server)

    async def test_handler_error_is_reported_by_trial(self) -> None:
        """By default errors are logged, where trial finds them."""

        async def broken(address: object, reader: Reader, writer: Writer) -> None:
            raise ValueError("broken")

        async with serving(broken) as server:
            for _ in range(2):
                async with connected(server) as client:
                    self.assertEqual(await client.reader.read(), b"")
        self.assertEqual(len(self.flushLoggedErrors(ValueError)), 2)
        server = await serve(self, broken)
        for _ in range(2):
            client = await connect(self, server)
            self.assertEqual(await client.reader.read(), b"")
        self.assertEqual(len(self.flushLoggedErrors(ValueError)), 2)

    async def test_protocol_factory(self) -> None:
        """create= says which kind of server."""
        server = await serve(
            self, Factory.forProtocol(Shout), create=Server.create_protocol
        )
        client = await connect(self, server)
        client.write(b"hello\n")
        self.assertEqual(await client.reader.readline(), b"HELLO\n")

    async def test_client_resets(self) -> None:
        """A reset ends the handler."""
        server = await serve(self, echo)
        client = await connect(self, server)
        client.write(b"x")
        await client.reader.readexactly(1)
        await client.reset()
        server.close()
        await server.close_finished_and_handlers_determined()
