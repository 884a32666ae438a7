import os

from hello import greet
from twisted.application.service import Application

from tcpsvc import TcpService, WhereToListen, log_error

port = int(os.environ.get("PORT", "8000"))

application = Application("hello")
service = TcpService(
    WhereToListen.of_port(port),
    greet,
    on_handler_error=log_error,
    max_connections=100,
)
service.setServiceParent(application)
