from calculator import divide
from twisted.internet import task

from tcpsvc import LOCALHOST, Server, WhereToListen


def tell(address, failure):
    """An ``on_handler_error`` of one's own; the server goes on."""
    print(f"{address.host}: {failure.type.__name__}")


async def main(reactor):
    server = await Server.create(
        WhereToListen.bind_to(LOCALHOST, 8002),
        divide,
        on_handler_error=tell,
    )
    print("listening on port", server.listening_on)
    await server.failed()  # Fails when `tell` raises, or with "raise".


task.react(main)
