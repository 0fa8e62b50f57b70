"""imagectl watch: what happens to images, as it happens."""

import os
import select
import stat
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import click

from sidecar import errors
from sidecar.client import Datastore, Image, ImageState, SidecarClient, WatchImagesResponse
from sidecar.ctl.output import human_size
from sidecar.ctl.session import BROKEN_PIPE, Session, command, is_terminal, plain, ref_text
from sidecar.documents import Document, datastore_document, image_document, state_name

PAUSE_SECONDS = 0.5
# What ends a stream of a sidecar that stops, or is gone.
GONE = (errors.SidecarUnavailable, errors.OperationCancelled)
TOMBSTONED = ImageState.IMAGE_STATE_TOMBSTONED

Event = tuple[str, Document]


@command("watch")
@click.argument("datastore", required=False, default="")
@click.pass_obj
def watch(session: Session, datastore: str) -> None:
    """Print every image, then every change.

    Of DATASTORE, or of all; until Ctrl-C, also over restarts of the sidecar.
    """
    known = Known()
    _end_with_the_reader()
    with session.client() as sidecar:
        for answer in _answers(session, sidecar, datastore):
            for text, document in known.take(answer):
                session.event(text, document)
            if answer.snapshot_complete and is_terminal():
                session.note(f"watching {len(known.images)} images; Ctrl-C ends it")


def _answers(session: Session, sidecar: SidecarClient, datastore: str) -> Iterator[WatchImagesResponse]:
    """The answers of one stream after the other: a sidecar that was there once is waited for."""
    token, connected = "", False
    while True:
        try:
            for answer in sidecar.watch(datastore, resume_token=token):
                token, connected = answer.resume_token or token, True
                yield answer
            cause = "it ended the stream"
        except GONE as error:
            if not connected:
                raise
            cause = error.message
        session.note(f"lost the sidecar at {sidecar.address}, waiting for it ({cause})")
        time.sleep(PAUSE_SECONDS)
        while True:
            try:
                sidecar.wait_ready(60)
                break
            except errors.SidecarUnavailable:
                continue
        session.note("the sidecar is back")


def _end_with_the_reader() -> None:
    """Ends the process when nobody reads any more, even when nothing happens to images.

    Otherwise `imagectl watch | head -1` would not end before the next event.
    """
    if not stat.S_ISFIFO(os.fstat(sys.stdout.fileno()).st_mode):
        return

    def look() -> None:
        reader = select.poll()
        reader.register(sys.stdout.fileno(), 0)
        reader.poll()
        os._exit(BROKEN_PIPE)

    threading.Thread(target=look, daemon=True).start()


@dataclass(slots=True)
class Known:
    """What was told already, so that another snapshot tells only what is different."""

    images: dict[str, Image] = field(default_factory=dict)
    faults: dict[str, str] = field(default_factory=dict)
    seen: set[str] | None = None
    """The images of the snapshot that is on its way; None between snapshots."""
    first: bool = True

    def take(self, answer: WatchImagesResponse) -> Iterator[Event]:
        """The events in an answer, as a line and as a document."""
        for datastore in answer.datastores:
            yield from self._datastore(datastore)
        if answer.snapshot_start:
            self.seen = set()
        for image in answer.images:
            yield from self._image(image)
        for ref in answer.removed:
            yield from self._removed(ref_text(ref))
        if answer.snapshot_complete and self.seen is not None:
            unknown = set(answer.incomplete_datastores)
            gone = (name for name in self.images.keys() - self.seen if name.partition("/")[0] not in unknown)
            for name in sorted(gone):
                yield from self._removed(name)
            self.seen, self.first = None, False

    def _image(self, image: Image) -> Iterator[Event]:
        name = ref_text(image.ref)
        before = self.images.get(name)
        self.images[name] = image
        if self.seen is not None:
            self.seen.add(name)
        if before == image:
            return
        was, now = before is not None and before.state == TOMBSTONED, image.state == TOMBSTONED
        if before is None:
            event = "present" if self.first else "added"
        elif was != now:
            event = "deleted" if now else "restored"
        else:
            event = "changed"
        size = human_size(image.allocated_bytes) if image.details_known else ""
        line = f"{event:<9} {name}  {state_name(image.state)}  {size}".rstrip()
        yield line, {"event": event, "image": image_document(image)}

    def _removed(self, name: str) -> Iterator[Event]:
        if self.images.pop(name, None) is not None:
            datastore, _, image_id = name.partition("/")
            yield (
                f"{'removed':<9} {name}",
                {"event": "removed", "image": {"image": name, "datastore": datastore, "image_id": image_id}},
            )

    def _datastore(self, datastore: Datastore) -> Iterator[Event]:
        """Free space changes all the time; that a datastore cannot be reached, or can again, is an event."""
        fault = "" if datastore.accessible else datastore.fault or "not accessible"
        if self.faults.get(datastore.name, "") != fault:
            text = f"unavailable: {plain(fault)}" if fault else "available again"
            yield (
                f"{'datastore':<9} {datastore.name}  {text}",
                {
                    "event": "datastore",
                    "datastore": datastore_document(datastore),
                },
            )
        self.faults[datastore.name] = fault
