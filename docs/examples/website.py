import sys

from pages import make_site
from twisted.internet import task

import tcpsvc
from tcpsvc import LOCALHOST, Server, WhereToListen


async def main(reactor, port="8080"):
    server = await Server.create_protocol(
        WhereToListen.bind_to(LOCALHOST, int(port)),
        make_site(),
        on_handler_error=tcpsvc.log_error,
        max_connections=100,
    )
    print(f"listening on port {server.listening_on}", flush=True)
    await server.close_finished_and_handlers_determined()


if __name__ == "__main__":
    task.react(main, sys.argv[1:])
