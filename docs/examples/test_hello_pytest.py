from hello import greet
from pytest_twisted import ensureDeferred

from tcpsvc.testing import MemoryServer, connected, serving


def test_greets_by_name_in_memory():
    client = MemoryServer(greet).connect()
    client.send(b"Ada\n")
    assert client.received == b"Who is there?\nHello, Ada\n"
    assert client.is_closed


@ensureDeferred
async def test_greets_by_name_on_a_port():
    async with serving(greet) as server, connected(server) as client:
        assert await client.reader.readline() == b"Who is there?\n"
        client.write(b"Ada\n")
        assert await client.reader.read() == b"Hello, Ada\n"
