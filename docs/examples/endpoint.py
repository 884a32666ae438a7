from hello import greet
from twisted.internet import task
from twisted.internet.endpoints import TCP4ServerEndpoint

from tcpsvc import ServerFactory, log_error


async def main(reactor):
    factory = ServerFactory.of_streams(
        greet, on_handler_error=log_error, max_connections=100
    )
    endpoint = TCP4ServerEndpoint(reactor, 8003, interface="127.0.0.1")
    listening = await endpoint.listen(factory)
    print("listening on port", listening.getHost().port)

    def stop():
        factory.close()  # No further handler starts.
        listening.stopListening()  # The port is yours to close.
        return factory.when_over()  # The handlers end by themselves.

    reactor.addSystemEventTrigger("before", "shutdown", stop)
    await factory.when_over()


task.react(main)
