from hello import greet
from twisted.internet import task

import tcpsvc
from tcpsvc import Server, WhereToListen


async def main(reactor):
    server = await Server.create(
        WhereToListen.of_endpoint(
            "ssl:8443:interface=127.0.0.1"
            ":privateKey=server.pem:certKey=server.pem:backlog=64"
        ),
        greet,
        on_handler_error=tcpsvc.log_error,
        max_connections=100,
    )
    print("listening on port", server.listening_on.port)
    await server.close_finished_and_handlers_determined()


task.react(main)
