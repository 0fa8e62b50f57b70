"""imagectl locks: who is changing images now."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from sidecar.ctl.output import human_time
from tests.ctl.conftest import Imagectl
from tests.locks.support import other_process_holding
from tests.support.places import Place
from tests.support.processes import Sidecar

MakeImage = Callable[[str], Path]


def test_held_locks_are_a_row_each(imagectl: Imagectl, make_image: MakeImage, tmp_path: Path, sidecar: Sidecar) -> None:
    make_image("one/a")
    assert imagectl("locks").split() == ["LOCK", "PATH", "HOST", "PID", "PROCESS", "OPERATION", "SINCE", "AGE"]
    assert imagectl.json("locks", "one") == []
    with (
        other_process_holding(tmp_path / "one", "image_a.ec_lock") as other,
        sidecar.client() as client,
        client.create_staging("two/new"),
    ):
        lines = [re.split(r" {2,}", line) for line in imagectl("locks").splitlines()]
        assert [line[0] for line in lines] == ["LOCK", "IMAGE", "STAGING"]
        assert lines[1][1:4] == ["one/image_a.ec_lock", "otherhost", str(other.pid)]
        assert lines[1][5] == "copy image ab"
        assert re.fullmatch(r"\d+ s", lines[1][7])
        assert lines[2][3:5] == [str(sidecar.pid), "image-sidecar"]
        assert len(imagectl("locks", "two").splitlines()) == 2

        image, staging = imagectl.json("locks")
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", image.pop("since_time"))
        assert image.pop("process").startswith("python")
        assert image == {
            "datastore": "one",
            "path": "image_a.ec_lock",
            "kind": "IMAGE",
            "image_id": "a",
            "host": "otherhost",
            "pid": other.pid,
            "operation": "copy image ab",
        }
        assert (staging["kind"], staging["datastore"], staging["image_id"]) == ("STAGING", "two", None)
    assert imagectl.json("locks") == []


def test_a_holder_without_a_name_is_listed_without_one(imagectl: Imagectl, tmp_path: Path) -> None:
    with Place("one", "compound", tmp_path / "one").locked("a"):
        line = re.split(r" {2,}", imagectl("locks", "one").splitlines()[1])
        assert line[:6] == ["IMAGE", "one/image_a.ec_lock", "-", "-", "-", "-"]
        document = imagectl.json("locks")[0]
        assert [document[key] for key in ("host", "pid", "process", "operation")] == [None] * 4


def test_a_datastore_that_is_unknown_or_away_is_not_one_without_locks(
    imagectl: Imagectl, tmp_path: Path, sidecar: Sidecar
) -> None:
    assert "there is no datastore 'nope'" in imagectl.error("locks", "nope", code=3)
    sidecar.stop()
    (tmp_path / "two").rename(tmp_path / "away")
    sidecar.start()
    assert "cannot open" in imagectl.error("locks", "two", code=6)
    with sidecar.client() as client, client.create_staging("one/new"):
        result = imagectl.result("locks")
        assert result.returncode == 6
        assert "STAGING" in result.stdout
        assert "not all locks are known: datastore two: cannot open" in result.stderr


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-5, "0 s"), (0.9, "0 s"), (59.9, "59 s"), (60, "1 min"), (7199, "1 h"), (86400 * 3.5, "3 d")],
)
def test_ages_are_in_their_largest_unit(seconds: float, text: str) -> None:
    assert human_time(seconds) == text
