"""imagectl sweep: the unused images are deleted."""

import click

from sidecar.client import Sweep, SweepResult
from sidecar.ctl.maintenance import datastore_argument, outcome_of, run_document, run_options, seconds_option, stop_run
from sidecar.ctl.output import human_size, table
from sidecar.ctl.progress import count_bar
from sidecar.ctl.session import Session, command


@command("sweep")
@datastore_argument
@click.argument("images", nargs=-1, metavar="[IMAGE]...")
@click.option("--dry-run", is_flag=True, help="Delete nothing; say what would be, and why each of the others stays.")
@seconds_option("--grace", "Leave alone what was used so long before the scan, or later; by default 60.")
@run_options("Deletions a minute.")
@click.pass_obj
def sweep(
    session: Session,
    datastore: str,
    images: tuple[str, ...],
    dry_run: bool,
    grace: float | None,
    rate: float,
    timeout: float | None,
    wait: bool,
    stop: bool,
) -> None:
    """Delete the images of DATASTORE that a scan found unused, and that were not touched since.

    They cannot be restored. Of the images that are named, or of all. Ctrl-C stops the sweep.
    """
    from sidecar.client_calls import new_request_id

    if stop:
        stop_run(session, "sweep", datastore, lambda client: client.stop_sweep(datastore).run)
        return
    run_id = new_request_id()
    targets = [_target(datastore, image) for image in images]
    results: list[SweepResult] = []
    with session.client() as sidecar:

        def outcome() -> str:
            return outcome_of(sidecar.address, "sweep", lambda client: client.stop_sweep(datastore, run_id).run, run_id)

        with session.taking_back(sidecar, outcome):
            made = sidecar.maintenance.start_sweep(
                datastore, targets, rate=rate, timeout=timeout, grace=grace, dry_run=dry_run, request_id=run_id
            )
            if wait:
                with count_bar(f"sweep {datastore}") as show:

                    def progress(sweep: Sweep, more: list[SweepResult]) -> None:
                        results.extend(more)
                        show(sweep.run.current_item, sweep.run.done_items, sweep.run.total_items)

                    made = sidecar.maintenance.wait_sweep(datastore, run_id, progress)
    if wait:
        session.answer(_text(datastore, made, results), _document(made, results))
    else:
        session.answer(f"sweep of {datastore} started", _document(made, results))


def _target(datastore: str, image: str) -> str:
    """An image id; DATASTORE/IMAGE is understood as well."""
    named, slash, image_id = image.partition("/")
    if slash and named != datastore:
        raise click.UsageError(f"{image!r} is not on {datastore}; a sweep is of one datastore")
    return image_id if slash else image


def _text(datastore: str, sweep: Sweep, results: list[SweepResult]) -> str:
    deleted = "would be deleted" if sweep.dry_run else "deleted"
    rows = [[f"{datastore}/{r.image_id}", deleted if r.deleted else "stays", r.reason] for r in results]
    total = f"{sweep.deleted_images} of {len(results)} images {deleted}: {human_size(sweep.freed_bytes)}"
    return f"{table(('IMAGE', 'RESULT', 'REASON'), rows)}\n{total}" if rows else total


def _document(sweep: Sweep, results: list[SweepResult]) -> dict[str, object]:
    return {
        **run_document(sweep.run),
        "dry_run": sweep.dry_run,
        "deleted_images": sweep.deleted_images,
        "freed_bytes": sweep.freed_bytes,
        "results": [
            {"image_id": r.image_id, "deleted": r.deleted, "reason": r.reason, "freed_bytes": r.freed_bytes}
            for r in results
        ],
    }
