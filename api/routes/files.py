"""Routes of files, compatible with OpenAI's API. Files are stored and read in parts, never as a whole."""

import hashlib
from typing import Annotated, Any, Literal, NamedTuple

from fastapi import APIRouter, Depends, Query, Request, Response
from pydantic import Field, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.responses import StreamingResponse

from api.dependencies import NoQuery, SettingsDep, StoreDep, printable_id
from api.errors import FORM_REQUIRED
from api.idempotency import REPLAYED, idempotency_request
from api.openapi.errors import FILE_NOT_FOUND, IN_USE, INVALID, INVALID_OR_REUSED, TOO_MANY, UNAVAILABLE, UPLOAD
from api.openapi.examples import FILE_CONTENT
from api.openapi.parameters import IDEMPOTENCY_KEY, described
from api.schemas.paging import Page, PageOptions
from tpo import validation_messages
from tpo.batches.files import PART_BYTES
from tpo.batches.tables import File, Purpose
from tpo.core.errors import InvalidInputError, UploadNotFoundError
from tpo.openai import files
from tpo.settings import Settings
from tpo.store import Store
from tpo.tenants.idempotency import IdempotencyRequest
from tpo.tenants.tenants import Limits

router = APIRouter(prefix="/v1/files", tags=["OpenAI"], responses={**INVALID, **UNAVAILABLE})

_FORM: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "additionalProperties": False,
                    "properties": {
                        "file": {
                            "type": "string",
                            "format": "binary",
                            "description": "JSON Lines: one request per line",
                        },
                        "purpose": {"type": "string", "enum": ["batch"]},
                        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
                        "expires_after[seconds]": {
                            "type": "integer",
                            "minimum": 3600,
                            "maximum": 2_592_000,
                            "description": "lifetime of the file; default: the retention time of the server",
                        },
                    },
                },
                "example": {"file": FILE_CONTENT, "purpose": "batch"},
            }
        },
    }
}
_FIELDS = ("file", "purpose", "expires_after[anchor]", "expires_after[seconds]")


class FilePage(Page[files.File]):
    """A page of files. Request the next page with `after` set to `last_id`."""


class FileQuery(PageOptions):
    """Filter, order and page of a list of files."""

    limit: int = Field(1000, ge=1, le=10_000)
    order: Literal["asc", "desc"] = Field("desc", description="order by creation time; desc: newest first")
    purpose: Purpose | None = None


def _file_id(file_id: str) -> str:
    return printable_id(file_id, UploadNotFoundError())


FileId = Annotated[str, Depends(_file_id)]


@router.post(
    "",
    dependencies=[NoQuery],
    response_model=files.File,
    responses={**INVALID_OR_REUSED, **UPLOAD, **TOO_MANY},
    openapi_extra={**_FORM, **described(IDEMPOTENCY_KEY)},
)
async def upload_file(request: Request, store: StoreDep, settings: SettingsDep, response: Response) -> files.File:
    """Upload a file of requests for a batch."""
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise HTTPException(415, FORM_REQUIRED)
    try:
        form = await request.form(max_files=1, max_fields=10)
    except HTTPException as error:
        if error.status_code != 400:
            raise
        raise InvalidInputError("The body must be a form with one file and its purpose.") from None
    async with _closing(form):
        upload = _validated(form)
        idempotency = await run_in_threadpool(_identity, request, settings, upload)
        row, new = await run_in_threadpool(_stored, store, upload, idempotency, settings)
    if not new:
        response.headers.update(REPLAYED)
    return files.file(row, settings.retention_days)


@router.get("")
def list_files(query: Annotated[FileQuery, Query()], store: StoreDep, settings: SettingsDep) -> FilePage:
    """List files by creation time."""
    rows = store.files.page(limit=query.limit + 1, after=query.after, order=query.order, purpose=query.purpose)
    return FilePage.of(rows, query.limit, lambda row: files.file(row, settings.retention_days))


@router.get("/{file_id}", dependencies=[NoQuery], responses=FILE_NOT_FOUND)
def get_file(file_id: FileId, store: StoreDep, settings: SettingsDep) -> files.File:
    """Get the metadata of a file."""
    return files.file(store.files.get(file_id), settings.retention_days)


@router.get(
    "/{file_id}/content",
    dependencies=[NoQuery],
    response_class=StreamingResponse,
    responses={
        200: {
            "content": {"application/octet-stream": {"example": FILE_CONTENT}},
            "description": "The content of the file",
        },
        **FILE_NOT_FOUND,
    },
)
def get_file_content(file_id: FileId, store: StoreDep) -> Response:
    """Download a file."""
    row = store.files.get(file_id)
    headers = {"content-length": str(row.bytes), "content-disposition": "attachment"}
    return StreamingResponse(store.files.content(file_id), media_type="application/octet-stream", headers=headers)


@router.delete("/{file_id}", dependencies=[NoQuery], responses={**FILE_NOT_FOUND, **IN_USE})
def delete_file(file_id: FileId, store: StoreDep) -> files.FileDeleted:
    """Delete a file."""
    store.files.delete(file_id)
    return files.FileDeleted(id=file_id)


class _closing:  # noqa: N801 - it is used as a context
    """Context of a form, which closes its temporary files."""

    def __init__(self, form: FormData) -> None:
        self._form = form

    async def __aenter__(self) -> FormData:
        return self._form

    async def __aexit__(self, *_error: object) -> None:
        await self._form.close()


class _Upload(NamedTuple):
    """Validated fields of an upload form."""

    source: UploadFile
    name: str
    keep_seconds: int | None


def _validated(form: FormData) -> _Upload:
    """Validate an upload form. Raises InvalidInputError."""
    for name in form:
        if name not in _FIELDS:
            raise InvalidInputError(f"{name}: is not a known field.", name)
    source = form.get("file")
    if not isinstance(source, UploadFile):
        raise InvalidInputError("file: is required.", "file")
    if form.get("purpose") != "batch":
        raise InvalidInputError("purpose: must be batch, the only supported purpose.", "purpose")
    name = (source.filename or "file").replace("\x00", "")[:255].encode("utf-8", "replace").decode()
    return _Upload(source, name, _keep_seconds(form))


def _keep_seconds(form: FormData) -> int | None:
    given = {name[14:-1]: value for name, value in form.items() if name.startswith("expires_after[")}
    if not given:
        return None
    try:
        return files.ExpiresAfter.model_validate_strings(given).seconds
    except ValidationError as error:
        raise validation_messages.invalid(error, lambda field: f"expires_after[{field}]") from None


def _identity(request: Request, settings: Settings, upload: _Upload) -> IdempotencyRequest | None:
    """Return the idempotency identity of an upload with a key. It hashes the content."""
    if "idempotency-key" not in request.headers:
        return None
    digest = hashlib.file_digest(upload.source.file, "sha256").hexdigest()  # type: ignore[arg-type]
    upload.source.file.seek(0)
    return idempotency_request(request, settings, [upload.name, upload.keep_seconds, digest])


def _stored(
    store: Store, upload: _Upload, idempotency: IdempotencyRequest | None, settings: Settings
) -> tuple[File, bool]:
    """Copy an upload into the database part by part. Return the file, and True if it is new."""
    if idempotency and (known := store.files.find_existing(idempotency)):
        return known, False
    file_id = store.files.begin(upload.name, "batch", upload.keep_seconds)
    try:
        while data := upload.source.file.read(PART_BYTES):
            store.files.append_part(file_id, data)
        made = store.files.complete(file_id, idempotency, Limits(stored_bytes=settings.max_stored_bytes))
        return made, made.id == file_id
    except BaseException:
        store.files.discard(file_id)
        raise
