from twisted.internet import task
from twisted.internet.task import LoopingCall

import tcpsvc
from tcpsvc import LOCALHOST, Server, WhereToListen


class Application:
    """What was there before: it has a timer, and a count."""

    def __init__(self, reactor):
        self.ticks = 0
        self.ticking = LoopingCall(self.tick)
        self.ticking.clock = reactor

    def tick(self):
        self.ticks += 1

    async def report(self, address, reader, writer):
        writer.write(b"%d ticks\n" % self.ticks)


async def main(reactor):
    application = Application(reactor)
    application.ticking.start(0.1)
    server = await Server.create(
        WhereToListen.bind_to(LOCALHOST, 8001),
        application.report,
        on_handler_error=tcpsvc.log_error,
        reactor=reactor,
    )
    print("listening on port", server.listening_on)
    await server.close_finished_and_handlers_determined()


task.react(main)
