"""
For tests of your own handlers.

Without sockets and without a reactor, give bytes, see bytes, advance a clock::

    from tcpsvc.testing import MemoryServer

    class GreetTests(SynchronousTestCase):
        def test_greets_by_name(self):
            client = MemoryServer(greet).connect()
            client.send(b"Bob\\n")
            self.assertEqual(client.received, b"What is your name?\\nHello, Bob!\\n")
            self.assertTrue(client.is_closed)

With a server on a real port, and a clean reactor afterwards::

    class GreetOnAPortTests(TestCase):
        async def test_greets_by_name(self):
            server = await serve(self, greet)
            client = await connect(self, server)
            client.write(b"Bob\\n")
            self.assertEqual(await client.reader.readline(), b"What is your name?\\n")

Both work in pytest too; there, :func:`serving` and :func:`connected` close what
they opened at the end of an ``async with``.
"""

from tcpsvc.testing.client import Client
from tcpsvc.testing.memory import MemoryClient, MemoryServer, MemoryTransport
from tcpsvc.testing.ports import connect, connected, serve, serving

__all__ = [
    "Client",
    "MemoryClient",
    "MemoryServer",
    "MemoryTransport",
    "connect",
    "connected",
    "serve",
    "serving",
]
