from hello import greet
from twisted.internet import task

import tcpsvc
from tcpsvc import LOCALHOST, Server, WhereToListen


async def main(reactor):
    server = await Server.create(
        [
            WhereToListen.bind_to(LOCALHOST, 0),
            WhereToListen.bind_to("::1", 0),
            WhereToListen.of_file("hello.sock"),
        ],
        greet,
        on_handler_error=tcpsvc.log_error,
        max_connections=100,
    )
    reactor.addSystemEventTrigger("before", "shutdown", server.close)
    print("listening on port", server.listening_on)
    for listener in server.listeners:
        print(f"{listener.where} is {listener.listening_on}")
    await server.close_finished_and_handlers_determined()


task.react(main)
