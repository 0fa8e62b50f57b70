"""What a lock file says of its holder: any bytes give a holder or none, and what is written is read again."""

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.locks.interface import MAX_HOLDER_BYTES, LockHolder


@given(st.binary(max_size=300))
def test_any_bytes_give_a_holder_or_none(content: bytes) -> None:
    assert LockHolder.from_bytes(content) is None


@pytest.mark.parametrize(
    "content",
    [b"[" * 4000, b"1" * 4096, b"null", b"[]", b'"host"', b"{}",
     b'{"host":"h","pid":true,"process":"p","operation":"o","since":"2016-01-02T03:04:05+00:00"}',
     b'{"host":"h","pid":1.0,"process":"p","operation":"o","since":"2016-01-02T03:04:05+00:00"}',
     b'{"host":"h","pid":0,"process":"p","operation":"o","since":"2016-01-02T03:04:05+00:00"}',
     b'{"host":7,"pid":1,"process":"p","operation":"o","since":"2016-01-02T03:04:05+00:00"}',
     b'{"host":"h","pid":1,"process":"p","operation":"o","since":"2016-01-02T03:04:05"}',
     b'{"host":"h","pid":1,"process":"p","operation":"o","since":"0001-01-01T00:00:00+23:59"}',
     b'{"host":"h","pid":1,"process":"p","operation":"o","since":5}'],
)  # fmt: skip
def test_bytes_that_are_nearly_a_holder_give_none(content: bytes) -> None:
    assert LockHolder.from_bytes(content) is None


texts = st.text(st.characters(), max_size=2000)


@given(texts, st.integers(1, 2**31), texts, texts, st.datetimes(timezones=st.just(UTC)))
def test_a_holder_survives_its_bytes_within_the_bound(
    host: str, pid: int, process: str, operation: str, since: datetime
) -> None:
    holder = LockHolder(host, pid, process, operation, since)
    content = holder.to_bytes()
    assert len(content) <= MAX_HOLDER_BYTES
    assert LockHolder.from_bytes(content) == holder
    assert LockHolder.from_bytes(content + b" " * MAX_HOLDER_BYTES) is None
    assert str(holder).isprintable()
