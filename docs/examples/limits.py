from twisted.internet import task

import tcpsvc
from tcpsvc import LOCALHOST, Server, WhereToListen
from tcpsvc.handlers import echo


async def main(reactor):
    server = await Server.create(
        WhereToListen.bind_to(LOCALHOST, 8004),
        echo,
        on_handler_error=tcpsvc.log_error,
        max_connections=2,
        backlog=16,
        buffer_age_limit=10.0,
        reader_buffer_size=4096,
        keepalive=True,
    )
    print("listening on port", server.listening_on)
    await server.close_finished_and_handlers_determined()


task.react(main)
