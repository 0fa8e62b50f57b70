"""The session with a server: begun when needed, again when lost, bounded in time, and with nobody else."""

import contextlib
import gzip
import hashlib
import logging
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

import pytest
from pyVmomi import vim

from sidecar.errors import DatastoreDenied, DatastoreUnavailable, ImagesError
from sidecar.vsphere import connection, properties, stub
from sidecar.vsphere.connection import Connection, Server
from sidecar.vsphere.credentials import Credentials, from_file, from_variable
from tests.support.soap import (
    LOGGED_IN,
    Answer,
    Behavior,
    Call,
    content,
    fault,
    found,
    make_certificate,
    returned,
    soap_server,
    thing,
    value,
)
from tests.support.vcsim import PASSWORD, USER
from tests.vsphere.conftest import PATIENCE, TIMEOUT, MakeSite, Site, end_sessions


def root(call: Call) -> Answer:
    return found(call, thing("Folder", "root", value("name", "root")))


def name_of_the_root(connection: Connection) -> str:
    def read(content: vim.ServiceInstanceContent) -> str:
        return str(properties.read(content, content.rootFolder, ["name"])["name"])

    return connection.call("read the root folder", read, repeatable=True)


def test_a_call_logs_in(site: Site) -> None:
    assert name_of_the_root(site.connection()) in ("Datacenters", "ha-folder-root")


def test_a_property_read_after_the_session_was_ended_logs_in_again_instead_of_finding_nothing(site: Site) -> None:
    connection = site.connection()
    name = name_of_the_root(connection)
    end_sessions(site)
    assert name_of_the_root(connection) == name


def test_a_method_after_the_session_was_ended_is_called_again_with_a_new_one(site: Site) -> None:
    connection = site.connection()
    name_of_the_root(connection)
    end_sessions(site)
    calls = []

    def find(content: vim.ServiceInstanceContent) -> object:
        calls.append(1)
        assert content.searchIndex is not None
        return content.searchIndex.FindByInventoryPath("/nowhere")

    assert connection.call("find nothing", find) is None
    assert len(calls) == 2


def test_a_late_answer_to_an_expired_session_does_not_replace_the_new_one(tmp_path: Path, stack: ExitStack) -> None:
    """A server gives a cookie to whoever comes without a session, too."""
    logins: list[str] = []
    ended, renewed = threading.Event(), threading.Event()

    def log_in(call: Call) -> Answer:
        logins.append(f"session-{len(logins)}")
        return returned(call, LOGGED_IN, cookie=logins[-1])

    def reload(call: Call) -> Answer:
        if call.session == logins[-1] and not (len(logins) == 1 and ended.is_set()):
            return returned(call)
        if call.body.count("late"):
            renewed.wait(10)
        return fault("NotAuthenticated", cookie="fresh")

    server = stack.enter_context(soap_server(tmp_path, {"Login": log_in, "Reload": reload}))
    connection = stack.enter_context(closing(Connection(server)))
    connection.call("reload", lambda content: content.rootFolder.Reload())
    ended.set()
    started = threading.Event()
    errors: list[ImagesError] = []

    def be_late(content: vim.ServiceInstanceContent) -> None:
        started.set()
        vim.Folder("late", content.rootFolder._GetStub()).Reload()

    def run_late() -> None:
        try:
            connection.call("reload late", be_late)
        except ImagesError as error:
            errors.append(error)

    thread = threading.Thread(target=run_late)
    thread.start()
    started.wait(10)
    connection.call("reload", lambda content: content.rootFolder.Reload())
    renewed.set()
    thread.join(10)
    assert errors == []
    connection.call("reload", lambda content: content.rootFolder.Reload())
    assert len(logins) == 2


def soap(body: str) -> bytes:
    return f"<Envelope><Body>{body}</Body></Envelope>".encode()


NO_ANSWERS = {
    "page": Answer(b"<html><body>hello</body></html>"),
    "page that is no XML": Answer(b"<html><br>hello</html>"),
    "page of an error": Answer(b"<html><body>oh</body></html>", 500),
    "empty error": Answer(b"", 500),
    "no gzip": Answer(b"no gzip", headers={"Content-Encoding": "gzip"}),
    "gzip that was not asked for": Answer(gzip.compress(b"<html/>", mtime=0), headers={"Content-Encoding": "gzip"}),
    "no deflate": Answer(b"x\x9cno", headers={"Content-Encoding": "deflate"}),
    "unknown field": Answer(soap("<FooResponse><returnval><nosuch>1</nosuch></returnval></FooResponse>")),
    "half a field": Answer(soap("<FooResponse><returnval><about><name>x</name></about></returnval></FooResponse>")),
    "empty value": Answer(soap("<FooResponse><returnval></returnval></FooResponse>")),
    "nothing": Answer(soap("<FooResponse></FooResponse>")),
}


@pytest.mark.parametrize("answer", NO_ANSWERS.values(), ids=NO_ANSWERS)
def test_what_is_no_vsphere_api_is_told_so(tmp_path: Path, stack: ExitStack, answer: Answer) -> None:
    server = stack.enter_context(soap_server(tmp_path, {"RetrieveServiceContent": lambda call: answer}))
    connection = stack.enter_context(closing(Connection(server)))
    with pytest.raises(DatastoreUnavailable, match="server fake: cannot log in: what answers there is no vSphere API"):
        name_of_the_root(connection)


def test_what_is_no_http_is_told_on_one_line(tmp_path: Path, stack: ExitStack) -> None:
    answer = Answer(b"", headers={}, raw=b"220 mail.example.org\x1b[31m ready\r\n")
    server = stack.enter_context(soap_server(tmp_path, {"RetrieveServiceContent": lambda call: answer}))
    with pytest.raises(DatastoreUnavailable, match=r"cannot log in: 220 mail.example.org \[31m ready; look") as caught:
        name_of_the_root(stack.enter_context(closing(Connection(server))))
    assert caught.value.message.isprintable()


@pytest.mark.parametrize("behavior", [returned, lambda call: returned(call, "<wrong>1</wrong>")])
def test_an_answer_of_another_shape_is_none(
    tmp_path: Path, stack: ExitStack, behavior: Callable[[Call], Answer]
) -> None:
    server = stack.enter_context(soap_server(tmp_path, {"CreateFolder": behavior}))
    connection = stack.enter_context(closing(Connection(server)))
    with pytest.raises(DatastoreUnavailable, match="cannot make a folder: what answers there is no vSphere API"):
        connection.call("make a folder", lambda content: content.rootFolder.CreateFolder("new"))


def test_a_call_that_cannot_be_sent_is_not_taken_for_a_server_that_is_away(site: Site) -> None:
    with pytest.raises(UnicodeEncodeError):
        site.connection().call("make a folder", lambda content: content.rootFolder.CreateFolder("\ud800"))


@pytest.mark.parametrize("host", ["a..b", f"{'x' * 70}.example.org"])
def test_a_name_that_no_host_can_have_is_told(site: Site, host: str) -> None:
    with pytest.raises(DatastoreUnavailable, match=r"server sim: cannot log in: .* is no address"):
        name_of_the_root(site.connection(host=host))


def test_a_restart_of_the_server_is_not_noticed_by_what_may_be_repeated(site: Site) -> None:
    connection = site.connection()
    name = name_of_the_root(connection)
    site.simulator.kill()
    site.simulator.start()
    assert name_of_the_root(connection) == name


def test_after_a_lost_connection_what_may_not_be_repeated_is_not(site: Site) -> None:
    connection = site.connection()
    name_of_the_root(connection)
    calls = []

    def die(content: vim.ServiceInstanceContent) -> None:
        calls.append(1)
        site.simulator.kill()
        content.rootFolder.Reload()

    with pytest.raises(DatastoreUnavailable):
        connection.call("reload", die)
    assert len(calls) == 1


def test_a_server_that_is_away_is_told_at_once(site: Site) -> None:
    connection = site.connection()
    site.simulator.kill()
    start = time.monotonic()
    with pytest.raises(DatastoreUnavailable, match="server sim: cannot log in: Connection refused"):
        name_of_the_root(connection)
    assert time.monotonic() - start < PATIENCE / 2


@pytest.mark.parametrize("used", [False, True])
def test_a_server_that_hangs_is_waited_for_no_longer_than_the_timeout(site: Site, used: bool) -> None:
    connection = site.connection(timeout=TIMEOUT)
    if used:
        name_of_the_root(connection)
    with site.simulator.hanging():
        start = time.monotonic()
        with pytest.raises(DatastoreUnavailable, match="did not answer in time"):
            name_of_the_root(connection)
        assert TIMEOUT - 0.5 < time.monotonic() - start < TIMEOUT + 3
    assert name_of_the_root(connection)


def test_a_call_that_is_too_slow_is_given_up(make_site: MakeSite, kind: str) -> None:
    site = make_site(kind=kind, delays={"RetrievePropertiesEx": int(1000 * (TIMEOUT + 2))})
    with pytest.raises(DatastoreUnavailable, match="cannot read the root folder: it did not answer in time"):
        name_of_the_root(site.connection(timeout=TIMEOUT))
    assert name_of_the_root(site.connection())


def test_many_who_wait_for_one_login_do_not_each_wait_for_a_timeout_more(site: Site) -> None:
    connection = site.connection(timeout=TIMEOUT)
    errors: list[ImagesError] = []

    def try_it() -> None:
        with pytest.raises(DatastoreUnavailable) as caught:
            name_of_the_root(connection)
        errors.append(caught.value)

    threads = [threading.Thread(target=try_it) for _ in range(8)]
    with site.simulator.hanging():
        start = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert time.monotonic() - start < TIMEOUT + 3
    assert len(errors) == 8


def test_the_end_does_not_wait_for_a_server_that_hangs(site: Site) -> None:
    connection = site.connection()
    name_of_the_root(connection)
    with site.simulator.hanging():
        start = time.monotonic()
        connection.close()
        assert time.monotonic() - start < 5


def test_a_server_that_sends_a_byte_now_and_then_is_given_up(tmp_path: Path, stack: ExitStack) -> None:
    behaviors = {"Reload": lambda call: replace(returned(call), pause=TIMEOUT / 20)}
    server = replace(stack.enter_context(soap_server(tmp_path, behaviors)), timeout=TIMEOUT)
    connection = stack.enter_context(closing(Connection(server)))
    start = time.monotonic()
    with pytest.raises(DatastoreUnavailable, match=r"cannot reload: .*did not answer in time"):
        connection.call("reload", lambda content: content.rootFolder.Reload())
    assert time.monotonic() - start < TIMEOUT + 3


def test_a_login_ends_in_time_however_slow_each_of_its_answers_is(tmp_path: Path, stack: ExitStack) -> None:
    calls: list[Call] = []

    def be_slow(call: Call) -> Answer:
        calls.append(call)
        time.sleep(0.75 * TIMEOUT)
        return content(call)

    behaviors: dict[str, Behavior] = {"RetrieveServiceContent": be_slow, "Login": be_slow}
    server = replace(stack.enter_context(soap_server(tmp_path, behaviors)), timeout=TIMEOUT)
    connection = stack.enter_context(closing(Connection(server)))
    with pytest.raises(DatastoreUnavailable, match=r"cannot log in: .*did not answer in time"):
        name_of_the_root(connection)
    assert len(calls) == 2


@pytest.mark.parametrize("hidden", ["name", "handshake"])
def test_what_comes_before_a_request_is_bounded_too(
    tmp_path: Path, stack: ExitStack, monkeypatch: pytest.MonkeyPatch, hidden: str
) -> None:
    ended = threading.Event()
    listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    if hidden == "name":
        monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **more: ended.wait(20))
    stack.callback(ended.set)
    address = Server("slow", "127.0.0.1", listener.getsockname()[1], lambda: Credentials("u", "p"), timeout=TIMEOUT)
    start = time.monotonic()
    with pytest.raises(DatastoreUnavailable, match=r"cannot log in: .*(did not answer|is not told in time)"):
        name_of_the_root(stack.enter_context(closing(Connection(address))))
    assert time.monotonic() - start < TIMEOUT + 3


def test_a_login_that_does_not_end_keeps_the_others_for_no_longer_than_the_timeout(
    tmp_path: Path, stack: ExitStack
) -> None:
    """As where the file of the credentials is on a datastore that hangs."""
    begun, ended = threading.Event(), threading.Event()

    def wait() -> Credentials:
        begun.set()
        ended.wait(20)
        return Credentials("u", "p")

    server = stack.enter_context(soap_server(tmp_path, {"RetrievePropertiesEx": root}))
    connection = stack.enter_context(closing(Connection(replace(server, timeout=TIMEOUT, credentials=wait))))

    def log_in() -> None:
        with contextlib.suppress(DatastoreUnavailable):  # its time is over
            name_of_the_root(connection)

    thread = threading.Thread(target=log_in)
    thread.start()
    begun.wait(10)
    try:
        with pytest.raises(DatastoreUnavailable, match="cannot log in: another call does so"):
            name_of_the_root(connection)
    finally:
        ended.set()
        thread.join()


def test_a_connection_that_the_server_ended_while_it_was_idle_is_not_used(tmp_path: Path, stack: ExitStack) -> None:
    ended = threading.Event()
    behaviors: dict[str, Behavior] = {
        "RetrievePropertiesEx": lambda call: replace(root(call), ended=ended),
        "Reload": returned,
    }
    connection = stack.enter_context(closing(Connection(stack.enter_context(soap_server(tmp_path, behaviors)))))
    name_of_the_root(connection)
    assert ended.wait(10)
    connection.call("reload", lambda content: content.rootFolder.Reload())


def test_a_connection_that_was_idle_for_long_is_not_used(
    tmp_path: Path, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who is between may have forgotten it, and says nothing."""
    monkeypatch.setattr(stub, "IDLE_SECONDS", 0.0)
    behaviors: dict[str, Behavior] = {"Reload": lambda call: None if call.earlier else returned(call)}
    connection = stack.enter_context(closing(Connection(stack.enter_context(soap_server(tmp_path, behaviors)))))
    for _ in range(2):
        connection.call("reload", lambda content: content.rootFolder.Reload())


@pytest.mark.parametrize("method", ["RetrieveServiceContent", "Login"])
def test_a_login_whose_connection_is_lost_is_begun_once_more(tmp_path: Path, stack: ExitStack, method: str) -> None:
    answers: dict[str, Behavior] = {
        "RetrieveServiceContent": content,
        "Login": lambda call: returned(call, LOGGED_IN, cookie="the-session"),
    }
    tries: list[Call] = []

    def be_lost_once(call: Call) -> Answer | None:
        tries.append(call)
        return None if len(tries) == 1 else answers[method](call)

    behaviors: dict[str, Behavior] = {method: be_lost_once, "Reload": returned}
    connection = stack.enter_context(closing(Connection(stack.enter_context(soap_server(tmp_path, behaviors)))))
    connection.call("reload", lambda content: content.rootFolder.Reload())
    assert len(tries) == 2


def test_a_wrong_password_is_refused_and_neither_it_nor_the_user_is_told(
    site: Site, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    wrong = tmp_path / "wrong"
    wrong.write_text(f"{USER}:something-else")
    with pytest.raises(DatastoreDenied, match="InvalidLogin") as caught:
        name_of_the_root(site.connection(credentials=from_file(str(wrong))))
    name_of_the_root(site.connection())
    for secret in (USER, PASSWORD, "something-else"):
        assert secret not in caught.value.message + caplog.text


def test_a_password_that_was_put_right_is_used_by_the_next_call(site: Site, tmp_path: Path) -> None:
    credentials = tmp_path / "changing"
    connection = site.connection(credentials=from_file(str(credentials)))
    with pytest.raises(DatastoreDenied, match="No such file"):
        name_of_the_root(connection)
    credentials.write_text(f"{USER}:{PASSWORD}\n")
    assert name_of_the_root(connection)


def test_an_account_is_not_locked_by_trying_a_wrong_password_again_and_again(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def logins() -> int:
        return sum(count for what, count in site.simulator.requests().items() if what.startswith("Login"))

    credentials = tmp_path / "changing"
    credentials.write_text(f"{USER}:something-else")
    refused = site.connection(credentials=from_file(str(credentials)))
    for _ in range(5):
        with pytest.raises(
            DatastoreDenied,
            match=r"wrong user or password, it says InvalidLogin .* put right",
        ):
            name_of_the_root(refused)
    assert logins() == 1
    credentials.write_text(f"{USER}:{PASSWORD}")
    assert name_of_the_root(refused)
    assert logins() == 2

    # It may have been the server's that was wrong.
    monkeypatch.setattr(connection, "_REFUSED_SECONDS", 0.0)
    credentials.write_text(f"{USER}:something-else")
    refused = site.connection(credentials=from_file(str(credentials)))
    for _ in range(2):
        with pytest.raises(DatastoreDenied, match="wrong user or password"):
            name_of_the_root(refused)
    assert logins() == 4


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("", "there are no credentials"),
        ("secret-word", "there is no colon"),
        ("user:", "there is no password"),
        (":secret-word", "there is no user"),
        ("user:secret-word\nmore\n", "there is more than one line"),
    ],
)
def test_credentials_that_cannot_be_meant_are_not_shown(tmp_path: Path, content: str, what: str) -> None:
    file = tmp_path / "credentials"
    file.write_text(content)
    with pytest.raises(DatastoreDenied, match=f"{what} in .*: write one line, USER:PASSWORD") as caught:
        from_file(str(file))()
    assert "secret-word" not in caught.value.message


@pytest.mark.parametrize(("mode", "told"), [(0o600, False), (0o640, True), (0o604, True)])
def test_that_others_may_read_a_password_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: int, told: bool
) -> None:
    file = tmp_path / "credentials"
    file.write_text("user:secret-word")
    file.chmod(mode)
    assert from_file(str(file))() == Credentials("user", "secret-word")
    assert ("credentials are not the sidecar's alone" in caplog.text) is told


def test_credentials_that_would_have_to_be_waited_for_are_not(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path, Path("/dev/null")):
        with pytest.raises(DatastoreDenied, match=r"no regular file|Is a directory"):
            from_file(str(path))()


def test_credentials_are_utf_8_wherever_this_runs(tmp_path: Path) -> None:
    (tmp_path / "credentials").write_bytes("jürgen:straße\n".encode())
    code = f"from sidecar.vsphere.credentials import from_file; c = from_file({str(tmp_path / 'credentials')!r})()"
    code += "; assert (c.user, c.password) == ('j\\xfcrgen', 'stra\\xdfe')"
    environment = os.environ | {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=30)


def test_credentials_come_from_a_variable_too(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIM_CREDENTIALS", f"{USER}:{PASSWORD}")
    assert name_of_the_root(site.connection(credentials=from_variable("SIM_CREDENTIALS")))
    with pytest.raises(DatastoreDenied, match="OTHER_CREDENTIALS"):
        from_variable("OTHER_CREDENTIALS")()


def certificate(site: Site) -> str:
    return ssl.get_server_certificate(("127.0.0.1", site.simulator.port), timeout=5)


def thumbprint(pem: str) -> str:
    digits = hashlib.sha256(ssl.PEM_cert_to_DER_cert(pem)).hexdigest().upper()
    return ":".join(digits[index : index + 2] for index in range(0, 64, 2))


def test_a_certificate_that_no_authority_vouches_for_gets_no_password(make_site: MakeSite) -> None:
    connection = make_site().connection(insecure=False)
    for _ in range(2):
        with pytest.raises(DatastoreDenied, match=r"certificate verify failed.*ca_file, or its thumbprint"):
            name_of_the_root(connection)


def test_an_authority_in_a_file_is_trusted(make_site: MakeSite, tmp_path: Path) -> None:
    site = make_site(certificate=make_certificate(tmp_path / "own.pem"))
    authority = tmp_path / "authority.pem"
    authority.write_text(certificate(site))
    assert name_of_the_root(site.connection(insecure=False, ca_file=str(authority)))


def test_an_authority_that_was_put_right_is_trusted_by_the_next_login(make_site: MakeSite, tmp_path: Path) -> None:
    site = make_site(certificate=make_certificate(tmp_path / "own.pem"))
    authority = tmp_path / "authority.pem"
    make_certificate(authority)
    connection = site.connection(insecure=False, ca_file=str(authority))
    with pytest.raises(DatastoreDenied, match="certificate verify failed"):
        name_of_the_root(connection)
    authority.write_text(certificate(site))
    assert name_of_the_root(connection)


def test_another_authority_is_not(make_site: MakeSite, tmp_path: Path) -> None:
    site = make_site(certificate=make_certificate(tmp_path / "own.pem"))
    other = make_certificate(tmp_path / "other.pem")
    with pytest.raises(DatastoreDenied, match="certificate verify failed"):
        name_of_the_root(site.connection(insecure=False, ca_file=str(other)))


def test_the_right_thumbprint_is_trusted(make_site: MakeSite) -> None:
    site = make_site()
    assert name_of_the_root(site.connection(insecure=False, thumbprint=thumbprint(certificate(site))))


def test_another_thumbprint_is_refused_by_every_connection_and_the_right_one_is_told(make_site: MakeSite) -> None:
    site = make_site()
    found = hashlib.sha256(ssl.PEM_cert_to_DER_cert(certificate(site))).hexdigest()
    connection = site.connection(insecure=False, thumbprint="00" * 32)
    for _ in range(3):
        with pytest.raises(DatastoreDenied, match=f"has the thumbprint {found}"):
            name_of_the_root(connection)


def test_who_takes_the_place_of_a_server_that_was_trusted_by_its_thumbprint_gets_nothing(
    make_site: MakeSite, tmp_path: Path
) -> None:
    site = make_site()
    connection = site.connection(insecure=False, thumbprint=thumbprint(certificate(site)))
    name_of_the_root(connection)
    site.simulator.kill()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(make_certificate(tmp_path / "other.pem"))
    received = []

    def impersonate(listener: socket.socket) -> None:
        while True:
            try:
                peer, _ = listener.accept()
                with peer, context.wrap_socket(peer, server_side=True) as wrapped:
                    received.append(wrapped.recv(4096))
            except ssl.SSLError:
                continue
            except OSError:
                return

    with socket.create_server(("127.0.0.1", site.simulator.port)) as listener:
        thread = threading.Thread(target=impersonate, args=(listener,))
        thread.start()
        with pytest.raises(DatastoreDenied, match="has the thumbprint"):
            name_of_the_root(connection)
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
    assert b"".join(received) == b""


def test_no_check_at_all_is_warned_of(make_site: MakeSite, caplog: pytest.LogCaptureFixture) -> None:
    make_site().connection()
    assert "certificate not checked server=sim" in caplog.text
