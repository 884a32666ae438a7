from twisted.internet import defer, task

import tcpsvc
from tcpsvc import LOCALHOST, Server, WhereToListen


async def main(reactor):
    async def echo_until_stopped(address, reader, writer):
        async for line in reader:
            writer.write(line)
            if line == b"stop\n":
                server.close()
            await writer.drain()

    server = await Server.create(
        WhereToListen.bind_to(LOCALHOST, 8005),
        echo_until_stopped,
        on_handler_error=tcpsvc.log_error,
    )
    print("listening on port", server.listening_on)

    await server.close_finished()
    print(f"closed, {server.num_connections} remain")
    try:
        over = server.close_finished_and_handlers_determined()
        await over.addTimeout(10, reactor)
    except defer.TimeoutError:
        await server.close(close_existing_connections=True)
        server.cancel_handlers()
        await server.close_finished_and_handlers_determined()
    print("all have ended")


task.react(main)
