"""Files, as OpenAI's clients know them: uploaded and read in pieces, and never held whole."""

import hashlib
from typing import Annotated, Any, Literal, NamedTuple

from fastapi import APIRouter, Depends, Query, Request, Response
from pydantic import Field, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.responses import StreamingResponse

from api.dependencies import NoQuery, SettingsDep, StoreDep, printable_id
from api.idempotency import REPLAYED, idempotency_request
from api.openapi.errors import FILE_NOT_FOUND, IN_USE, INVALID, INVALID_OR_SAID, UNAVAILABLE, UPLOAD
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
                        "file": {"type": "string", "format": "binary", "description": "JSON Lines, a request a line"},
                        "purpose": {"type": "string", "enum": ["batch"]},
                        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
                        "expires_after[seconds]": {
                            "type": "integer",
                            "minimum": 3600,
                            "maximum": 2_592_000,
                            "description": "when the file is deleted; default: as long as the server keeps files",
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
    """A page of files; the next one starts `after` its `last_id`."""


class FileQuery(PageOptions):
    """Which files a list holds."""

    limit: int = Field(1000, ge=1, le=10_000)
    order: Literal["asc", "desc"] = Field("desc", description="by age; desc: the newest first")
    purpose: Purpose | None = None


def _file_id(file_id: str) -> str:
    return printable_id(file_id, UploadNotFoundError("There is no file with this id."))


FileId = Annotated[str, Depends(_file_id)]


@router.post(
    "",
    dependencies=[NoQuery],
    response_model=files.File,
    responses={**INVALID_OR_SAID, **UPLOAD},
    openapi_extra={**_FORM, **described(IDEMPOTENCY_KEY)},
)
async def upload_file(request: Request, store: StoreDep, settings: SettingsDep, response: Response) -> files.File:
    """Upload a file of requests for a batch."""
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise HTTPException(415, "Send a form, with the header Content-Type: multipart/form-data.")
    try:
        form = await request.form(max_files=1, max_fields=10)
    except HTTPException as error:
        if error.status_code != 400:
            raise
        raise InvalidInputError("The body is not a form of one file and its purpose.") from None
    async with _closing(form):
        wanted = _uploaded(form)
        named = await run_in_threadpool(_named, request, settings, wanted)
        row, new = await run_in_threadpool(_keep, store, wanted, named)
    if not new:
        response.headers.update(REPLAYED)
    return files.file(row, settings.retention_days)


@router.get("")
def list_files(query: Annotated[FileQuery, Query()], store: StoreDep, settings: SettingsDep) -> FilePage:
    """List files by age."""
    rows = store.files.page(limit=query.limit + 1, after=query.after, order=query.order, purpose=query.purpose)
    return FilePage.of(rows, query.limit, lambda row: files.file(row, settings.retention_days))


@router.get("/{file_id}", dependencies=[NoQuery], responses=FILE_NOT_FOUND)
def get_file(file_id: FileId, store: StoreDep, settings: SettingsDep) -> files.File:
    """Get a file's description."""
    return files.file(store.files.get(file_id), settings.retention_days)


@router.get(
    "/{file_id}/content",
    dependencies=[NoQuery],
    response_class=StreamingResponse,
    responses={
        200: {"content": {"application/octet-stream": {"example": FILE_CONTENT}}, "description": "The bytes"},
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
    """A form whose temporary files are closed at the end."""

    def __init__(self, form: FormData) -> None:
        self._form = form

    async def __aenter__(self) -> FormData:
        return self._form

    async def __aexit__(self, *_error: object) -> None:
        await self._form.close()


class _Upload(NamedTuple):
    """What a form asks to be kept."""

    source: UploadFile
    name: str
    keep_seconds: int | None


def _uploaded(form: FormData) -> _Upload:
    """The one file of a form that says its purpose. Raises InvalidInputError."""
    for name in form:
        if name not in _FIELDS:
            raise InvalidInputError(f"{name}: is not a known field.", name)
    source = form.get("file")
    if not isinstance(source, UploadFile):
        raise InvalidInputError("file: is required.", "file")
    if form.get("purpose") != "batch":
        raise InvalidInputError("purpose: must be batch; files are for nothing else.", "purpose")
    name = (source.filename or "file").replace("\x00", "")[:255].encode("utf-8", "replace").decode()
    return _Upload(source, name, _keep_seconds(form))


def _keep_seconds(form: FormData) -> int | None:
    said = {name[14:-1]: value for name, value in form.items() if name.startswith("expires_after[")}
    if not said:
        return None
    try:
        return files.ExpiresAfter.model_validate_strings(said).seconds
    except ValidationError as error:
        raise validation_messages.invalid(error, lambda field: f"expires_after[{field}]") from None


def _named(request: Request, settings: Settings, wanted: _Upload) -> IdempotencyRequest | None:
    """What names an upload that has a key: its content is read once more for that."""
    if "idempotency-key" not in request.headers:
        return None
    digest = hashlib.file_digest(wanted.source.file, "sha256").hexdigest()  # type: ignore[arg-type]
    wanted.source.file.seek(0)
    return idempotency_request(request, settings, [wanted.name, wanted.keep_seconds, digest])


def _keep(store: Store, wanted: _Upload, named: IdempotencyRequest | None) -> tuple[File, bool]:
    """Copy an upload into the database, a part at a time. Gives the file, and whether it is a new one."""
    if named and (known := store.files.find_existing(named)):
        return known, False
    file_id = store.files.begin(wanted.name, "batch", wanted.keep_seconds)
    try:
        while data := wanted.source.file.read(PART_BYTES):
            store.files.append_part(file_id, data)
        made = store.files.complete(file_id, named)
        return made, made.id == file_id
    except BaseException:
        store.files.discard(file_id)
        raise
