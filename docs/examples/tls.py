import sys

from hello import greet
from twisted.internet import task

import tcpsvc
from tcpsvc import Server, WhereToListen


async def main(reactor, port="8443"):
    server = await Server.create(
        WhereToListen.of_endpoint(
            f"ssl:{port}:interface=127.0.0.1"
            ":privateKey=server.pem:certKey=server.pem:backlog=64"
        ),
        greet,
        on_handler_error=tcpsvc.log_error,
        max_connections=100,
    )
    print(f"listening on port {server.listening_on.port}", flush=True)
    await server.close_finished_and_handlers_determined()


if __name__ == "__main__":
    task.react(main, sys.argv[1:])
