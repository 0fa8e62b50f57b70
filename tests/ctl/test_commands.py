"""The commands that are one call, their tables and documents, and their exit codes."""

import json
import os
import re
import shlex
import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path

import pytest

from tests.ctl.conftest import Imagectl
from tests.support.disks import make_disk
from tests.support.processes import Sidecar, wait_until

ISO_UTC = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{6})?Z")
MakeImage = Callable[[str], Path]


# --- ls, show, datastores ---


def test_ls_shows_the_images_of_all_datastores_or_one(imagectl: Imagectl, make_image: MakeImage) -> None:
    make_image("one/a")
    make_image("two/b")
    lines = imagectl("ls").splitlines()
    assert lines[0].split("  ")[0] == "IMAGE"
    assert [line.split()[:4] for line in lines[1:]] == [
        ["one/a", "VALID", "8.0", "MiB"],
        ["two/b", "VALID", "8.0", "MiB"],
    ]
    assert ISO_UTC.fullmatch(lines[1].split()[-1])
    assert [line.split()[0] for line in imagectl("ls", "two").splitlines()] == ["IMAGE", "two/b"]
    assert [image["image"] for image in imagectl.json("ls", "one")] == ["one/a"]


def test_ls_of_nothing_is_a_header_and_an_empty_list(imagectl: Imagectl) -> None:
    assert imagectl("ls").split() == ["IMAGE", "STATE", "CAPACITY", "ALLOCATED", "LAST", "USED"]
    assert imagectl.json("ls") == []


def test_deleted_images_are_listed_when_asked_for(imagectl: Imagectl, make_image: MakeImage) -> None:
    make_image("one/a")
    make_image("one/b")
    imagectl("rm", "one/a")
    assert [image["image_id"] for image in imagectl.json("ls")] == ["b"]
    (deleted,) = imagectl.json("ls", "--deleted")
    assert (deleted["image"], deleted["state"]) == ("one/a", "TOMBSTONED")
    assert ISO_UTC.fullmatch(deleted["tombstone_time"])
    assert [image["image_id"] for image in imagectl.json("ls", "--all")] == ["a", "b"]
    assert imagectl("ls", "--deleted").splitlines()[0].endswith("DELETED")


def test_an_id_is_whole_in_a_pipe_and_on_a_narrow_terminal(imagectl: Imagectl, make_image: MakeImage) -> None:
    ref = "one/" + "x" * 124
    make_image(ref)
    assert ref in imagectl("ls")
    assert ref in imagectl.on_terminal("ls", columns=40)
    assert ref in imagectl.on_terminal("show", ref, columns=40)


def test_a_table_in_a_pipe_has_no_colour_and_no_trailing_blanks(imagectl: Imagectl, make_image: MakeImage) -> None:
    make_image("one/a")
    for arguments in (["ls"], ["datastores"], ["show", "one/a"]):
        output = imagectl(*arguments)
        assert "\x1b" not in output
        assert all(line == line.rstrip() for line in output.splitlines())
    assert "\x1b[1m" in imagectl.on_terminal("ls")


def test_show_has_every_field(imagectl: Imagectl, make_image: MakeImage, tmp_path: Path) -> None:
    descriptor = make_image("one/b")
    (tmp_path / "m.json").write_text('{"os": "débi€an"}')
    imagectl("import", descriptor, "one/a", "--metadata", tmp_path / "m.json", "--manifest", tmp_path / "m.json")
    shown = imagectl("show", "one/a")
    for expected in (
        "one/a",
        "VALID",
        "monolithicFlat",
        "8.0 MiB (8388608 bytes)",
        "a-flat.vmdk",
        "débi€an",
        "image_a",
    ):
        assert expected in shown
    # An encoding that cannot say it is no reason to fail.
    assert r"débi\u20acan" in Imagectl(imagectl.address, {"PYTHONIOENCODING": "latin-1"}, "latin-1")("show", "one/a")
    document = imagectl.json("show", "one/a")
    assert document["metadata"] == document["manifest"] == {"os": "débi€an"}
    assert document["capacity_bytes"] == 8 << 20
    assert {file["name"] for file in document["files"]} == {"a.vmdk", "a-flat.vmdk", "a.ecv", "a.manifest"}
    assert ISO_UTC.fullmatch(document["touch_time"])
    assert document["tombstone_time"] is None
    assert document["users"] == document["problems"] == []


def test_a_valid_image_with_a_problem_is_not_listed_as_if_it_had_none(
    imagectl: Imagectl, make_image: MakeImage, tmp_path: Path
) -> None:
    make_image("one/a")
    make_image("one/b")
    (tmp_path / "one" / "image_a" / "a-flat.vmdk").unlink()
    wait_until(lambda: bool(imagectl.json("ls")[0]["problems"]), "the sidecar noticed")
    rows = {line.split("  ")[0]: line for line in imagectl("ls").splitlines()}
    assert "  VALID, 1 problem  " in rows["one/a"]
    assert "  VALID  " in rows["one/b"]
    assert imagectl.json("ls")[0]["state"] == "VALID"
    assert "imagectl show" in imagectl("ls", "--help")


def test_programs_read_names_as_they_are_and_json_whatever_the_encoding(
    imagectl: Imagectl, make_image: MakeImage, tmp_path: Path
) -> None:
    make_image("one/a")
    odd = b"d\xc3\xa9bi\xe2\x82\xac\xf0\x9f\x98\x80"
    assert f'"directory": "{tmp_path}/{odd.decode()}"' in imagectl(
        "-o", "json", "export", "one/a", tmp_path / odd.decode()
    )
    latin = Imagectl(imagectl.address, {"PYTHONIOENCODING": "latin-1"}, "latin-1")
    document = latin.json("export", "one/a", tmp_path / f"{odd.decode()}2")
    assert document["directory"] == f"{tmp_path}/{odd.decode()}2"
    # Of a name that is no UTF-8 its bytes stay, as Python has them.
    broken = os.fsdecode(b"bad\xff")
    assert imagectl.json("export", "one/a", tmp_path / broken)["directory"] == f"{tmp_path}/{broken}"
    assert (tmp_path / broken / "a.vmdk").exists()
    result = imagectl.result("-o", "json", "export", "one/a", tmp_path / broken)
    assert result.returncode == 4
    assert broken in json.loads(result.stderr.splitlines()[1])["error"]["message"]


def test_show_names_what_is_wrong(imagectl: Imagectl, make_image: MakeImage, tmp_path: Path) -> None:
    make_image("one/a")
    (tmp_path / "one" / "image_a" / "a-flat.vmdk").unlink()
    assert any("a-flat.vmdk" in problem for problem in imagectl.json("show", "one/a")["problems"])
    assert "a-flat.vmdk" in imagectl("show", "one/a").partition("problems:")[2]


def test_datastores_are_listed_with_type_layout_and_space(imagectl: Imagectl, tmp_path: Path) -> None:
    documents = {document["name"]: document for document in imagectl.json("datastores")}
    assert {name: (d["type"], d["layout"]) for name, d in documents.items()} == {
        "one": ("local", "compound"),
        "two": ("local", "sharded"),
        "three": ("local", "vsan"),
    }
    assert documents["one"]["root_path"] == str(tmp_path / "one")
    assert 0 < documents["one"]["free_bytes"] <= documents["one"]["capacity_bytes"]
    lines = imagectl("datastores").splitlines()
    assert lines[0].split() == ["NAME", "TYPE", "LAYOUT", "CAPACITY", "FREE", "RESERVE", "IMAGES", "ROOT", "STATUS"]
    assert all("  64.0 MiB  " in line for line in lines[1:])
    assert all(line.endswith("ok") for line in lines[1:])


# --- changes ---


def test_an_image_is_copied_deleted_restored_and_purged(imagectl: Imagectl, make_image: MakeImage) -> None:
    make_image("one/a")
    assert imagectl("cp", "one/a", "two/b").startswith("one/a copied to two/b: ")
    assert imagectl("rm", "two/b") == "two/b deleted; imagectl restore two/b brings it back\n"
    assert imagectl("restore", "two/b") == "two/b restored: VALID\n"
    imagectl("rm", "two/b")
    assert re.fullmatch(r"two/b purged: .* freed\n", imagectl("purge", "two/b"))
    assert imagectl.json("ls", "two") == []
    imagectl("rm", "--force", "one/a")
    assert imagectl.json("ls", "--all") == []


def test_every_change_answers_programs_too(imagectl: Imagectl, make_image: MakeImage) -> None:
    make_image("one/a")
    copied = imagectl.json("cp", "one/a", "two/b")
    assert copied["image"]["image"] == "two/b"
    assert copied["copied_bytes"] >= copied["cloned_bytes"] >= 0
    assert imagectl.json("rm", "two/b") == {"image": "two/b", "deleted": True, "purged": False}
    assert imagectl.json("restore", "two/b")["state"] == "VALID"
    assert ISO_UTC.fullmatch(imagectl.json("touch", "two/b")["touch_time"])
    assert imagectl.json("validate", "two/b")["valid"] is True
    imagectl("rm", "two/b")
    freed = imagectl.json("purge", "two/b")
    assert freed["image"] == "two/b"
    assert freed["freed_bytes"] >= 2 << 20


def test_touch_notes_the_time(imagectl: Imagectl, make_image: MakeImage, tmp_path: Path) -> None:
    make_image("one/a")
    stamp = tmp_path / "one" / "image_a" / "image_timestamp.txt"
    os.utime(stamp, (0, 0))
    time = datetime.fromisoformat(imagectl("touch", "one/a").split()[-1])
    assert int(stamp.stat().st_mtime) == int(time.timestamp()) > 0


def test_an_image_that_lost_its_timestamp_is_told_and_repaired(
    imagectl: Imagectl, make_image: MakeImage, tmp_path: Path
) -> None:
    make_image("one/a")
    assert imagectl("validate", "one/a") == "one/a is valid\n"
    stamp = tmp_path / "one" / "image_a" / "image_timestamp.txt"
    stamp.unlink()
    assert "timestamp" in imagectl.error("validate", "one/a", code=5)
    assert "again" in imagectl("validate", "--repair", "one/a")
    assert stamp.exists()


def test_an_image_that_lost_its_data_is_not_valid(imagectl: Imagectl, make_image: MakeImage, tmp_path: Path) -> None:
    make_image("one/a")
    (tmp_path / "one" / "image_a" / "a-flat.vmdk").unlink()
    assert "a-flat.vmdk" in imagectl.error("validate", "one/a", code=5)
    assert "a-flat.vmdk" in imagectl.error("validate", "--repair", "one/a", code=5)


def test_every_layout_is_the_same_at_the_command_line(imagectl: Imagectl, make_image: MakeImage) -> None:
    make_image("one/a")
    for datastore in ("one", "two", "three"):
        imagectl("cp", "one/a", f"{datastore}/b")
        imagectl("validate", f"{datastore}/b")
        assert imagectl.json("show", f"{datastore}/b")["capacity_bytes"] == 8 << 20


# --- errors ---


def test_each_kind_of_error_has_its_exit_code(imagectl: Imagectl, make_image: MakeImage) -> None:
    make_image("one/a")
    make_image("one/gone")
    imagectl("rm", "one/gone")
    assert "one/none" in imagectl.error("show", "one/none", code=3)
    assert "nowhere" in imagectl.error("ls", "nowhere", code=3)
    assert "one/a" in imagectl.error("cp", "one/gone", "one/a", code=4)
    assert "restore" in imagectl.error("cp", "one/gone", "two/b", code=5)
    assert "restore" in imagectl.error("touch", "one/gone", code=5)
    assert "one/a" in imagectl.error("restore", "one/a", code=5)
    assert "one/a" in imagectl.error("purge", "one/a", code=5)
    imagectl.error("cp", "one/a", "two/.b", code=2)


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["show"],
        ["show", "one"],
        ["show", "one/a/b"],
        ["cp", "one/a"],
        ["ls", "one/a"],
        ["ls", "--all", "--deleted"],
        ["ls", "--nonsense"],
        ["--output", "xml", "ls"],
        ["import", "/nowhere/disk.vmdk", "one/a"],
    ],
)
def test_wrong_usage_is_told_in_one_line(arguments: list[str], imagectl: Imagectl) -> None:
    assert "--help" in imagectl.error(*arguments, code=2)


def test_no_command_shows_the_commands(imagectl: Imagectl) -> None:
    result = imagectl.result()
    assert result.returncode == 2
    assert "validate" in result.stderr


def test_no_sidecar_is_unavailable_and_says_what_to_do(tmp_path: Path) -> None:
    imagectl = Imagectl(f"unix:{tmp_path}/none.sock")
    message = imagectl.error("ls", code=6)
    assert f"{tmp_path}/none.sock" in message
    assert "image-sidecar serve" in message
    assert "write unix:PATH or HOST:PORT" in Imagectl("nonsense").error("ls", code=2)


def test_programs_get_the_reason_of_an_error(imagectl: Imagectl) -> None:
    for arguments, reason in (
        (["-o", "json", "show", "one/none"], "IMAGE_NOT_FOUND"),
        (["show", "one/none", "-o", "json"], "IMAGE_NOT_FOUND"),
        (["-o", "json", "show"], "USAGE"),
    ):
        result = imagectl.result(*arguments)
        line, document = result.stderr.splitlines()
        error = json.loads(document)["error"]
        assert error["reason"] == reason
        assert line.startswith("imagectl: ")
        assert error["message"]
        assert result.stdout == ""


def test_a_datastore_that_cannot_be_read_is_not_an_empty_one(tmp_path: Path, stack: ExitStack) -> None:
    (tmp_path / "here").mkdir()
    sidecar = stack.enter_context(Sidecar(tmp_path / "run", f"here={tmp_path / 'here'}", f"away={tmp_path / 'away'}"))
    imagectl = Imagectl(sidecar.address)
    imagectl("import", make_disk(tmp_path / "disk"), "here/a")
    for arguments in (["ls"], ["ls", "away"]):
        result = imagectl.result(*arguments)
        assert result.returncode == 6
        assert "away" in result.stderr
        assert ("here/a" in result.stdout) == (arguments == ["ls"])
    row = next(line for line in imagectl("datastores").splitlines() if line.startswith("away "))
    assert "unavailable: " in row


# --- manners ---


def test_the_version_and_help_need_no_sidecar() -> None:
    imagectl = Imagectl("unix:/nowhere")
    assert re.fullmatch(r"imagectl \d+\.\d+\.\d+\n", imagectl("--version"))
    assert "Exit codes" in imagectl("--help")
    assert "DATASTORE/IMAGE" in imagectl("show", "--help")


def test_the_address_on_the_command_line_wins(sidecar: Sidecar) -> None:
    imagectl = Imagectl("unix:/nowhere")
    assert imagectl("--sidecar", sidecar.address, "ls") == imagectl("ls", "--sidecar", sidecar.address)


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_what_nobody_wants_to_hear_is_no_error(closed: str, imagectl: Imagectl, make_image: MakeImage) -> None:
    make_image("one/a")

    def run(arguments: str) -> tuple[int, str, str]:
        result = subprocess.run(
            ["bash", "-c", f"exec {shlex.join(imagectl.command())} {arguments} {closed}"],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
            env=imagectl.env(),
        )
        return result.returncode, result.stdout, result.stderr

    code, _, message = run("cp one/a one/b")
    assert (code, message) == (0, "")
    code, _, message = run("rm -o json one/a")
    assert (code, message) == (0, "")
    code, output, _ = run("show one/none")
    assert (code, output) == (3, "")
    assert [image["image"] for image in imagectl.json("ls")] == ["one/b"]


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["show", "--help"], ["ls"]])
def test_a_reader_that_is_gone_is_told_by_the_exit_code(arguments: list[str], imagectl: Imagectl) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        result = subprocess.run(
            imagectl.command(*arguments),
            stdout=writing,
            stderr=subprocess.PIPE,
            text=True,
            timeout=30,
            check=False,
            env=imagectl.env(),
        )
    finally:
        os.close(writing)
    assert (result.returncode, result.stderr) == (141, "")


@pytest.mark.parametrize("arguments", ["--help", "ls"])
def test_a_full_disk_at_the_output_is_told(arguments: str, imagectl: Imagectl) -> None:
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            imagectl.command(arguments),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=30,
            check=False,
            env=imagectl.env(),
        )
    assert (result.returncode, result.stderr) == (7, "imagectl: No space left on device\n")


def test_a_reader_that_has_enough_is_no_error(imagectl: Imagectl, make_image: MakeImage) -> None:
    make_image("one/a")
    for command in ("ls", "ls -o json", "watch"):
        result = subprocess.run(
            ["bash", "-c", f"{shlex.join(imagectl.command())} {command} | head -c 1; echo ${{PIPESTATUS[0]}}"],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
            env=imagectl.env(),
        )
        assert result.stderr == ""
        # 0 when all was in the pipe before it was closed.
        assert result.stdout.strip()[1:].strip() in ("0", "141")
