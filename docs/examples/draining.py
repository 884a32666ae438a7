from twisted.internet import task
from twisted.internet.defer import Deferred

import tcpsvc
from tcpsvc import LOCALHOST, Server, WhereToListen


async def answer(address, reader, writer):
    async for line in reader:
        writer.write(line)
    if writer.draining:
        writer.write(b"This server stops. Come back soon!\n")


async def main(reactor):
    async def say_health(address, reader, writer):
        writer.write(b"drain\n" if server.is_draining else b"up\n")

    async def drain():
        report = await server.drain(announce=0.5, timeout=10, spread=5)
        await health.close()
        print(f"drained: {report}")

    server = await Server.create(
        WhereToListen.bind_to(LOCALHOST, 8012),
        answer,
        on_handler_error=tcpsvc.log_error,
        eof_on_drain=True,
    )
    health = await Server.create(
        WhereToListen.bind_to(LOCALHOST, 8013),
        say_health,
        on_handler_error=tcpsvc.log_error,
    )
    reactor.addSystemEventTrigger(
        "before", "shutdown", lambda: Deferred.fromCoroutine(drain())
    )
    print("listening on port", server.listening_on)
    await server.close_finished_and_handlers_determined()


task.react(main)
