from calculator import divide
from hello import greet
from patient import patient
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase, TestCase

from tcpsvc.testing import MemoryServer, connect, serve


class GreetInMemory(SynchronousTestCase):
    def test_greets_by_name(self):
        client = MemoryServer(greet).connect()
        self.assertEqual(client.take(), b"Who is there?\n")
        client.send(b"Ada\n")
        self.assertEqual(client.take(), b"Hello, Ada\n")
        self.assertTrue(client.is_closed)

    def test_gives_up_after_half_a_minute(self):
        clock = Clock()
        client = MemoryServer(patient(clock), clock=clock).connect()
        client.take()
        clock.advance(29)
        self.assertEqual(client.received, b"")
        clock.advance(1)
        self.assertEqual(client.received, b"Hello, stranger\n")

    def test_nothing_is_divided_by_zero(self):
        server = MemoryServer(divide)
        client = server.connect()
        client.send(b"1 0\n")
        self.assertIsInstance(server.errors[0], ZeroDivisionError)
        self.assertTrue(client.has_eof)


class GreetOnAPort(TestCase):
    async def test_greets_by_name(self):
        server = await serve(self, greet)
        client = await connect(self, server)
        self.assertEqual(await client.reader.readline(), b"Who is there?\n")
        client.write(b"Ada\n")
        self.assertEqual(await client.reader.read(), b"Hello, Ada\n")

    async def test_division_by_zero_is_logged(self):
        server = await serve(self, divide)
        client = await connect(self, server)
        client.write(b"1 0\n")
        self.assertEqual(await client.reader.read(), b"")
        server.close()
        await client.close()
        await server.close_finished_and_handlers_determined()
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
