from twisted.internet import task

import tcpsvc
from tcpsvc import LOCALHOST, Server, WhereToListen


async def main(reactor):
    async def obey(address, reader, writer):
        async for line in reader:
            if line == b"resume\n":
                await server.resume()
            else:
                await server.pause(line.decode().strip())
            writer.write(f"paused: {server.is_paused}\n".encode())

    server = await Server.create(
        WhereToListen.bind_to(LOCALHOST, 8007),
        obey,
        on_handler_error=tcpsvc.log_error,
    )
    print("listening on port", server.listening_on)
    await server.close_finished_and_handlers_determined()


task.react(main)
