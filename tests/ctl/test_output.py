"""What people read: sizes, and other people's text."""

import pytest

from sidecar.client import Image, ImageRef, ImageState
from sidecar.ctl.output import exact_size, human_size, table
from sidecar.documents import full_document


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 KiB"),
        (1024, "1.0 KiB"),
        (150 << 20, "150 MiB"),
        (5 << 30, "5.0 GiB"),
        ((1 << 63) - 1, "8.0 EiB"),
    ],
)
def test_a_size_has_few_digits_and_a_unit(count: int, text: str) -> None:
    assert human_size(count) == text


def test_a_size_can_be_exact_too() -> None:
    assert exact_size(512) == "512 B"
    assert exact_size(10 << 30) == "10.0 GiB (10737418240 bytes)"


def test_text_of_others_moves_no_cursor_and_is_no_markup() -> None:
    lines = table(("A", "B"), [("x\x1b[2J\n", "[red]y[/red]"), ("", "z" * 5000)]).splitlines()
    assert lines[1] == r"x\x1b[2J\n  [red]y[/red]"
    assert lines[2] == "-" + " " * 11 + "z" * 5000


@pytest.mark.parametrize("text", ["{", '{"a": NaN}', '{"a": 1e999}', 100_000 * "["])
def test_companions_that_are_not_json_are_shown_as_they_are(text: str) -> None:
    image = Image(ref=ImageRef(datastore="one", image_id="a"), state=ImageState.IMAGE_STATE_VALID, metadata_json=text)
    document = full_document(image)
    assert (document["metadata"], document["manifest"]) == (text, None)
