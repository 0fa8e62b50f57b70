"""What a plain client of the vSphere API does: the peer of the sidecar."""

import http.client
import ssl
from typing import Any
from urllib.parse import quote, urlencode

from pyVim.connect import Disconnect, SmartConnect
from pyVmomi import vim, vmodl

from tests.bench.command import MIB
from tests.support.vcsim import PASSWORD, USER, Vcsim

_Collector = vmodl.query.PropertyCollector


def list_each(simulator: Vcsim, datastore: str) -> int:
    """Logs in, and asks for the root and for each directory in it, one after the other. How many files there are."""
    service: Any = SmartConnect(  # type: ignore[no-untyped-call]
        host="127.0.0.1", port=simulator.port, user=USER, pwd=PASSWORD, disableSslCertValidation=True
    )
    try:
        content = service.RetrieveContent()
        datacenter = content.rootFolder.childEntity[0]
        found = next(each for each in datacenter.datastore if each.name == datastore)
        browser = found.browser
        directories = [each.path for each in _search(content, browser, f"[{datastore}]")]
        return sum(len(_search(content, browser, f"[{datastore}] {path}")) for path in directories)
    finally:
        Disconnect(service)  # type: ignore[no-untyped-call]


def _search(
    content: vim.ServiceInstanceContent, browser: vim.host.DatastoreBrowser, path: str
) -> list[vim.host.DatastoreBrowser.FileInfo]:
    details = vim.host.DatastoreBrowser.FileInfo.Details(
        fileType=True, fileSize=True, modification=True, fileOwner=False
    )
    wanted = vim.host.DatastoreBrowser.SearchSpec(matchPattern=["*"], details=details)
    task = browser.SearchDatastore_Task(path, wanted)
    asked = _Collector.FilterSpec(
        objectSet=[_Collector.ObjectSpec(obj=task)],
        propSet=[_Collector.PropertySpec(type=vim.Task, pathSet=["info.state", "info.result"])],
    )
    while True:
        answer = content.propertyCollector.RetrievePropertiesEx([asked], _Collector.RetrieveOptions())
        assert answer is not None
        values = {each.name: each.val for each in answer.objects[0].propSet}
        if values["info.state"] == "success":
            return list(values["info.result"].file)
        assert values["info.state"] != "error", path


def stream(simulator: Vcsim, datastore: str, source: str, path: str) -> None:
    """Sends a file on as it is received."""
    context = ssl._create_unverified_context()
    reading = http.client.HTTPSConnection("127.0.0.1", simulator.port, context=context)
    writing = http.client.HTTPSConnection("127.0.0.1", simulator.port, context=context)
    where = urlencode({"dcPath": "DC0", "dsName": datastore})
    try:
        reading.request("GET", f"/folder/{quote(source)}?{where}")
        answer = reading.getresponse()
        assert answer.status == http.HTTPStatus.OK, answer.status
        writing.putrequest("PUT", f"/folder/{quote(path)}?{where}")
        writing.putheader("Content-Length", answer.headers["Content-Length"])
        writing.endheaders()
        while data := answer.read(MIB):
            writing.send(data)
        assert writing.getresponse().status < 300
    finally:
        reading.close()
        writing.close()
