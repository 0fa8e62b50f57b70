"""Whether a server is the one that is meant: by a certificate authority, or by the thumbprint of its certificate.

pyvmomi's own check of a thumbprint holds for the first connection only: it then turns verification off in the context
that later connections share, and checks the thumbprint of none of them.
"""

import hashlib
import hmac
import ssl
from typing import Any

from sidecar.errors import DatastoreDenied
from sidecar.vsphere.bounded import BoundedConnection


class WrongCertificate(ssl.SSLError):
    """The server's certificate has another thumbprint than the one that is configured."""


def trusted_context(ca_file: str | None, *, verify: bool) -> ssl.SSLContext:
    """A context that trusts the authorities in a PEM file, else those of the system; or, unless `verify`, everybody.

    DatastoreDenied when the file cannot be used.
    """
    try:
        context = ssl.create_default_context(cafile=ca_file)
    except OSError as error:  # SSLError, too
        raise DatastoreDenied(f"cannot read the certificates in {ca_file}: {error.strerror or error}") from error
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def pinned(thumbprint: str) -> type[BoundedConnection]:
    """Makes connections that end unless the certificate's SHA-256 is `thumbprint`: 64 hex digits, colons or not."""
    wanted = thumbprint.replace(":", "").lower()

    class Pinned(BoundedConnection):
        def connect(self) -> None:
            super().connect()
            opened: Any = self.sock
            found = hashlib.sha256(opened.getpeercert(binary_form=True)).hexdigest()
            if not hmac.compare_digest(found, wanted):
                self.close()
                raise WrongCertificate(f"its certificate has the thumbprint {found}")

    return Pinned
