from twisted.internet.defer import DeferredList
from twisted.internet.task import LoopingCall


async def tick(address, reader, writer):
    ticking = LoopingCall(lambda: writer.write(b"tick\n"))
    ticking.start(1.0)
    try:
        ends = [writer.when_draining(), writer.close_finished()]
        await DeferredList(ends, fireOnOneCallback=True)
    finally:
        ticking.stop()
    writer.write(b"No more ticks today.\n")
