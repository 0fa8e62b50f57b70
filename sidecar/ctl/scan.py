"""imagectl scan: which images does no VM use?"""

import click

from sidecar.client import Scan
from sidecar.ctl.maintenance import datastore_argument, outcome_of, run_document, run_options, stop_run, warn_of
from sidecar.ctl.progress import count_bar
from sidecar.ctl.session import Session, command


@command("scan")
@datastore_argument
@run_options("VMs read, and images marked, a minute.")
@click.pass_obj
def scan(session: Session, datastore: str, rate: float, timeout: float | None, wait: bool, stop: bool) -> None:
    """Mark the images of DATASTORE that no VM uses.

    Reads the VMs of all datastores of the sidecar. Nothing is deleted: see imagectl unused and imagectl sweep. Ctrl-C
    stops the scan.
    """
    from sidecar.client_calls import new_request_id

    if stop:
        stop_run(session, "scan", datastore, lambda client: client.stop_scan(datastore).run)
        return
    run_id = new_request_id()
    with session.client() as sidecar:

        def outcome() -> str:
            return outcome_of(sidecar.address, "scan", lambda client: client.stop_scan(datastore, run_id).run, run_id)

        with session.taking_back(sidecar, outcome):
            found = sidecar.maintenance.start_scan(
                datastore, vm_rate=rate, image_rate=rate, timeout=timeout, request_id=run_id
            )
            if wait:
                with count_bar(f"scan {datastore}") as show:

                    def progress(scan: Scan) -> None:
                        show(scan.run.current_item, scan.run.done_items, scan.run.total_items)

                    found = sidecar.maintenance.wait_scan(datastore, run_id, progress)
    if not wait:
        session.answer(f"scan of {datastore} started", scan_document(found))
        return
    session.answer(
        f"{datastore} scanned: {found.read_vms} VMs read, {found.marked_images} images unused, {found.used_images} in "
        f"use, {found.other_images} neither",
        scan_document(found),
    )
    warn_of(session, "left as they were", found.unread_images)


def scan_document(scan: Scan) -> dict[str, object]:
    return {
        **run_document(scan.run),
        "read_vms": scan.read_vms,
        "marked_images": scan.marked_images,
        "used_images": scan.used_images,
        "other_images": scan.other_images,
        "unread_images": list(scan.unread_images),
    }
