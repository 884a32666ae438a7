import sys

from calculator import divide
from twisted.internet import task

from tcpsvc import LOCALHOST, Server, WhereToListen


def tell(address, failure):
    """An ``on_handler_error`` of one's own; the server goes on."""
    print(f"{address.host}: {failure.type.__name__}", flush=True)


async def main(reactor, port="8000"):
    server = await Server.create(
        WhereToListen.bind_to(LOCALHOST, int(port)),
        divide,
        on_handler_error=tell,
    )
    print(f"listening on port {server.listening_on}", flush=True)
    await server.failed()  # Fails when `tell` raises, or with "raise".


if __name__ == "__main__":
    task.react(main, sys.argv[1:])
