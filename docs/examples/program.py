from hello import greet
from twisted.internet.task import react

import tcpsvc
from tcpsvc import Server, WhereToListen


async def main(reactor):
    server = await Server.create(
        WhereToListen.of_port_chosen_by_os(),
        greet,
        on_handler_error=tcpsvc.log_error,
        max_connections=100,
    )
    print("listening on port", server.listening_on)
    await server.close_finished_and_handlers_determined()


react(main)
