from hello import greet
from twisted.application.service import Application

import tcpsvc
from tcpsvc import TcpService, WhereToListen

application = Application("hello")
service = TcpService(
    WhereToListen.of_port(8000), greet, on_handler_error=tcpsvc.log_error
)
service.setServiceParent(application)
