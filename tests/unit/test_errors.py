"""The errors are one table, and the documentation says what the code does."""

import errno
import re
from pathlib import Path

import grpc
import pytest

from sidecar import errors
from sidecar.datastores.faults import Faults
from sidecar.datastores.posix import PosixDatastore

API_DOC = Path(__file__).parents[2] / "docs" / "api.md"


def test_the_documented_errors_are_those_of_the_code() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| `(\w+)` \| (\w+) \| (\d+) \|$", API_DOC.read_text(), re.MULTILINE)
    documented = {row[0]: row[1:] for row in rows}
    actual = {
        reason: (cls.code, cls.__name__, errno.errorcode[cls.errno], str(cls.exit_code))
        for reason, cls in errors.error_classes().items()
        if cls.__module__ == errors.__name__
    }
    assert documented == actual


def test_every_error_has_a_code_that_grpc_knows() -> None:
    assert all(cls.code in grpc.StatusCode.__members__ for cls in errors.error_classes().values())


def test_no_two_errors_share_a_reason() -> None:
    subclasses = errors.ImagesError.__subclasses__()
    assert len(errors.error_classes()) == len(subclasses)


def test_an_error_of_the_kernel_is_not_taken_for_a_bad_path(tmp_path: Path) -> None:
    # The harm: an image that is there, taken for one that is not.
    faults = Faults("one", "/images")
    with pytest.raises(errors.DatastoreUnavailable), faults.during("read", "a"):
        raise OSError(errno.EINVAL, "Invalid argument")
    datastore = PosixDatastore("one", str(tmp_path))
    try:
        with pytest.raises(errors.InvalidRequest):
            datastore.names("../b")
    finally:
        datastore.close()
