"""Routes of batches, compatible with OpenAI's API: a file of requests in, a file of results out."""

import logging
from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response

from api.bodies import BatchBody
from api.dependencies import NoQuery, NotifierDep, SettingsDep, StoreDep, printable_id
from api.idempotency import REPLAYED, idempotency_request
from api.openapi.errors import (
    BATCH_NOT_FOUND,
    FILE_NOT_FOUND,
    INVALID,
    INVALID_OR_REUSED,
    NOT_ENDED,
    UNAVAILABLE,
    UNREADABLE,
)
from api.openapi.parameters import IDEMPOTENCY_KEY, described
from api.schemas.paging import Page, PageQuery
from tpo.broker import JobNotifier
from tpo.core.errors import BatchNotFoundError, BrokerUnavailableError
from tpo.openai import batches

logger = logging.getLogger("api")

router = APIRouter(prefix="/v1/batches", tags=["OpenAI"], responses={**INVALID, **UNAVAILABLE})


class BatchPage(Page[batches.Batch]):
    """A page of batches, the newest first. Request the next page with `after` set to `last_id`."""


def _batch_id(batch_id: str) -> str:
    return printable_id(batch_id, BatchNotFoundError())


BatchId = Annotated[str, Depends(_batch_id)]


@router.post(
    "",
    dependencies=[NoQuery],
    responses={**INVALID_OR_REUSED, **UNREADABLE, **FILE_NOT_FOUND},
    openapi_extra=described(IDEMPOTENCY_KEY),
)
def create_batch(
    body: BatchBody,
    store: StoreDep,
    notifier: NotifierDep,
    settings: SettingsDep,
    request: Request,
    response: Response,
) -> batches.Batch:
    """Create a batch from an uploaded file. An invalid line does not affect the others."""
    keep = body.output_expires_after
    made = store.batches.create(
        endpoint=body.endpoint,
        input_file_id=body.input_file_id,
        window=body.completion_window,
        seconds=body.window_seconds,
        metadata=body.metadata or {},
        output_seconds=None if keep is None else keep.seconds,
        idempotency=idempotency_request(request, settings, body.model_dump(mode="json", exclude_unset=True)),
    )
    if made.new:
        _notify(notifier, made.batch.id, request)
    else:
        response.headers.update(REPLAYED)
    return batches.batch(made.batch)


@router.get("")
def list_batches(query: PageQuery, store: StoreDep) -> BatchPage:
    """List batches, the newest first."""
    rows = store.batches.page(limit=query.limit + 1, after=query.after)
    return BatchPage.of(rows, query.limit, batches.batch)


@router.get("/{batch_id}", dependencies=[NoQuery], responses=BATCH_NOT_FOUND)
def get_batch(batch_id: BatchId, store: StoreDep) -> batches.Batch:
    """Get a batch."""
    return batches.batch(store.batches.get(batch_id))


@router.post("/{batch_id}/cancel", dependencies=[NoQuery], responses=BATCH_NOT_FOUND)
def cancel_batch(batch_id: BatchId, store: StoreDep) -> batches.Batch:
    """Cancel a batch and keep its finished results. Returns the batch, even if it had already ended."""
    return batches.batch(store.batches.cancel(batch_id))


@router.delete("/{batch_id}", dependencies=[NoQuery], responses={**BATCH_NOT_FOUND, **NOT_ENDED})
def delete_batch(batch_id: BatchId, store: StoreDep) -> batches.BatchDeleted:
    """Delete an ended batch with its output and error files. Its input file and its jobs are kept."""
    store.batches.delete(batch_id)
    return batches.BatchDeleted(id=batch_id)


def _notify(notifier: JobNotifier, batch_id: str, request: Request) -> None:
    try:
        notifier.notify_batch(batch_id)
    except BrokerUnavailableError:
        request_id = request.state.request_id
        logger.warning("request %s: the broker cannot be reached; maintenance will start %s", request_id, batch_id)
