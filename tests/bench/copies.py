"""Copies of one image, each timed from the same state, and taken away afterwards."""

import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from sidecar.client import ImageState, errors
from tests.bench.command import MIB
from tests.bench.disks import Disk, read_data
from tests.bench.rounds import Contender
from tests.bench.stage import Stage
from tests.support.disks import allocated, assert_same_disk
from tests.support.processes import BIN, wait_until

COPIED, DURABLE = "copied", "durable"


class Copies:
    """The contenders that copy an image. They answer seconds: until the copy is there, and until it is safe."""

    def __init__(self, stage: Stage, disk: Disk) -> None:
        self._stage = stage
        self._disk = disk
        self._source = stage.image_directory(disk.name)
        # A new name for every copy: the kernel may remember for a moment what a mount showed under one that was purged.
        self._number = 0
        # Seconds from cp's exit until the image was there, where it was not at once.
        self._late: list[float] = []

    @property
    def published_late(self) -> float:
        """Seconds, the median; 0 when the image was there when cp ended."""
        return statistics.median(self._late) if self._late else 0.0

    def raw(self, *flags: str) -> Contender:
        """cp -r on the file system itself, and then sync -f."""
        target = self._stage.file_system / "raw-copy"

        def copy(first: bool) -> dict[str, float]:
            self._settle()
            seconds = timed_copy(self._source, target, *flags)
            shutil.rmtree(target)
            return seconds

        return copy

    def by_client(self) -> Contender:
        source = self._stage.ref(self._disk.name)
        return self._published(lambda: self._stage.client.copy(source, self._ref).wait())

    def by_imagectl(self) -> Contender:
        command = [str(BIN / "imagectl"), "--sidecar", self._stage.sidecar.address, "cp"]
        source = self._stage.ref(self._disk.name)
        return self._published(
            lambda: subprocess.run([*command, source, self._ref], check=True, stdout=subprocess.DEVNULL)
        )

    def through(self, mountpoint: Path) -> Contender:
        """cp -r in a mount, and until the image is there."""
        datastore = mountpoint / self._stage.kind
        wait_until((datastore / self._disk.name / f"{self._disk.name}.vmdk").exists, "the mount shows the image")

        def copy() -> None:
            subprocess.run(["cp", "-r", datastore / self._disk.name, datastore / self._name], check=True)
            if not self._is_there():
                copied = time.perf_counter()
                wait_until(self._is_there, "the copy is published", 60)
                self._late.append(time.perf_counter() - copied)

        return self._published(copy)

    def _published(self, copy: Callable[[], object]) -> Contender:
        """What is published is durable. The first copy is compared with its source."""

        def contender(first: bool) -> dict[str, float]:
            self._number += 1
            self._settle()
            start = time.perf_counter()
            copy()
            seconds = time.perf_counter() - start
            if first:
                self._late.clear()
                self._check()
            self._stage.client.delete(self._ref, force=True)
            return {DURABLE: seconds}

        return contender

    @property
    def _name(self) -> str:
        return f"{self._disk.name}-copy-{self._number}"

    @property
    def _ref(self) -> str:
        return self._stage.ref(self._name)

    def _is_there(self) -> bool:
        try:
            return self._stage.client.image(self._ref).state == ImageState.IMAGE_STATE_VALID
        except errors.ImageNotFound:
            return False

    def _settle(self) -> None:
        self._stage.settle()
        read_data(self._source)

    def _check(self) -> None:
        """What was measured is a copy: the guest sees the same bytes, and holes are holes."""
        copy = self._stage.image_directory(self._name)
        assert_same_disk(self._source / f"{self._disk.name}.vmdk", copy / f"{self._name}.vmdk")
        if allocated(copy) > allocated(self._source) * 1.02 + MIB:
            raise AssertionError(
                f"the copy of {self._source} takes {allocated(copy)} bytes instead of {allocated(self._source)}"
            )


def timed_copy(source: Path, target: Path, *flags: str) -> dict[str, float]:
    """Seconds of cp -r until its exit, and of a following sync -f until its."""
    start = time.perf_counter()
    subprocess.run(["cp", "-r", *flags, source, target], check=True)
    copied = time.perf_counter()
    subprocess.run(["sync", "-f", target], check=True)
    return {COPIED: copied - start, DURABLE: time.perf_counter() - start}
