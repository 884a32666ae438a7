from pages import make_site
from twisted.internet import task

import tcpsvc
from tcpsvc import LOCALHOST, Server, WhereToListen


async def main(reactor):
    server = await Server.create_protocol(
        WhereToListen.bind_to(LOCALHOST, 8081),
        make_site(),
        on_handler_error=tcpsvc.log_error,
        max_connections=100,
    )
    print("listening on port", server.listening_on)
    await server.close_finished_and_handlers_determined()


task.react(main)
