import sys

from hello import greet
from twisted.internet import task

import tcpsvc
from tcpsvc import LOCALHOST, Server, WhereToListen


async def main(reactor, port="8000"):
    server = await Server.create(
        WhereToListen.bind_to(LOCALHOST, int(port)),
        greet,
        on_handler_error=tcpsvc.log_error,
    )
    print(f"listening on port {server.listening_on}", flush=True)
    await server.close_finished_and_handlers_determined()


if __name__ == "__main__":
    task.react(main, sys.argv[1:])
