from twisted.internet import task

import tcpsvc
from tcpsvc import LOCALHOST, Server, WhereToListen
from tcpsvc.handlers import echo


def tell_the_operator(error, server):
    print(f"{error.strerror}, with {server.num_connections} connections")


async def main(reactor):
    server = await Server.create(
        WhereToListen.bind_to(LOCALHOST, 8008),
        echo,
        on_handler_error=tcpsvc.log_error,
        max_connections=1000,
        on_exhaustion="shed",
        on_accept_error=tell_the_operator,
    )
    print("listening on port", server.listening_on)
    await server.close_finished_and_handlers_determined()


task.react(main)
