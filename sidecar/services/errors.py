"""Errors on the wire: a gRPC status whose details carry google.rpc.ErrorInfo."""

from collections.abc import Mapping

import grpc
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]
from grpc_status import rpc_status

from sidecar.errors import ImagesError

DOMAIN = "images.v1"

# The message travels twice, percent-encoded (up to 3 bytes for 1) and in the details (base64), in trailers of which a
# peer takes 8 KiB by default: a longer one would reach the caller as "trailing metadata size exceeds limit" instead.
MAX_MESSAGE_BYTES = 1500


def to_status(error: ImagesError, metadata: Mapping[str, str] | None = None) -> grpc.Status:
    """The status that carries the error's code, message, reason and, in ErrorInfo, the metadata (short strings)."""
    # grpc.StatusCode's values are (number, name).
    number: int = grpc.StatusCode[error.code].value[0]
    info = error_details_pb2.ErrorInfo(domain=DOMAIN, reason=error.reason, metadata=dict(metadata or {}))
    detail = any_pb2.Any()
    detail.Pack(info)
    return rpc_status.to_status(status_pb2.Status(code=number, message=_fit(error.message), details=[detail]))


def _fit(message: str) -> str:
    """The message as valid UTF-8 of at most MAX_MESSAGE_BYTES.

    File names that are not UTF-8 come as lone surrogates, which a protobuf string refuses.
    """
    encoded = message.encode("utf-8", "backslashreplace")
    if len(encoded) > MAX_MESSAGE_BYTES:
        encoded = encoded[: MAX_MESSAGE_BYTES - 3] + "…".encode()
    return encoded.decode("utf-8", "ignore")
