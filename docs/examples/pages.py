from twisted.web.resource import Resource
from twisted.web.server import Site
from twisted.web.static import Data


def make_site():
    root = Resource()
    root.putChild(b"", Data(b"Hello, browser!\n", "text/plain"))
    return Site(root)
