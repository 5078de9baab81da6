"""`tpo keys`: manage the API keys in the database of TPO_DATABASE_URL."""

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tpo.cli.environment import open_store
from tpo.cli.options import AsJson, duration_seconds
from tpo.cli.ui.output import Commands, console, messages, print_json

if TYPE_CHECKING:
    from tpo.tenants.tables import ApiKey

keys = typer.Typer(cls=Commands, help="Manage the API keys in the database of TPO_DATABASE_URL.", no_args_is_help=True)


@keys.command("create")
def create(
    name: Annotated[str, typer.Argument(help="Name that says what the key is for.")],
    tenant: Annotated[
        str, typer.Option(help="Tenant that the key belongs to. A new name creates a tenant.")
    ] = "default",
    expires_in: Annotated[
        str | None, typer.Option(help="Time after which the key is refused, such as 12h or 90d.", show_default="never")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Create a key and print it. It is shown only now, and stored as a hash."""
    seconds = None if expires_in is None else duration_seconds(expires_in)
    with open_store() as store:
        row, secret = store.keys.create(name, tenant, expires_in=seconds)
    if as_json:
        print_json({**_shown(row), "key": secret})
        return
    until = "" if row.expires_at is None else f" until {_date(row.expires_at)} UTC"
    text = f"{row.id} gives access to the tenant {row.tenant}{until}. The key is not shown again:"
    messages().print(text, markup=False)
    console().print(secret, markup=False)


@keys.command("list")
def list_keys(as_json: AsJson = False) -> None:
    """List all keys, without their secrets."""
    with open_store() as store:
        rows = store.keys.page()
    if as_json:
        print_json([_shown(row) for row in rows])
        return
    from rich.table import Table

    table = Table("id", "tenant", "name", "created", "expires", "revoked", box=None)
    for row in rows:
        times = (row.created_at, row.expires_at, row.revoked_at)
        table.add_row(row.id, row.tenant, row.name, *map(_date, times))
    console().print(table if rows else "no keys")


@keys.command("revoke")
def revoke(key_id: Annotated[str, typer.Argument(metavar="ID", help="The key's id.")], as_json: AsJson = False) -> None:
    """Revoke a key. Running servers refuse it within seconds."""
    with open_store() as store:
        row = store.keys.revoke(key_id)
    print_json(_shown(row)) if as_json else console().print(f"{row.id} is revoked", markup=False)


@keys.command("limit")
def limit(
    tenant: Annotated[str, typer.Argument(help="Tenant to limit.")],
    in_flight: Annotated[
        int | None, typer.Option("--jobs-in-flight", min=0, help="Maximum number of jobs that wait or run.")
    ] = None,
    per_minute: Annotated[
        int | None, typer.Option("--jobs-per-minute", min=0, help="Maximum number of jobs created in a minute.")
    ] = None,
    running: Annotated[
        int | None, typer.Option("--jobs-running", min=0, help="Maximum number of jobs that run at the same time.")
    ] = None,
    stored_bytes: Annotated[
        int | None, typer.Option("--stored-bytes", min=0, help="Maximum number of bytes of its inputs and files.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Set the limits of a tenant. The settings apply to each limit that is left out."""
    from tpo.tenants.tenants import Limits

    with open_store() as store:
        store.tenants.set_limits(tenant, Limits(in_flight, per_minute, running, stored_bytes))
    if as_json:
        limits = {
            "jobs_in_flight": in_flight,
            "jobs_per_minute": per_minute,
            "jobs_running": running,
            "stored_bytes": stored_bytes,
        }
        print_json({"tenant": tenant, **limits})
    else:
        console().print(f"the limits of {tenant} are set", markup=False)


def _shown(row: "ApiKey") -> dict[str, Any]:
    return {
        "id": row.id,
        "tenant": row.tenant,
        "name": row.name,
        "created_at": int(row.created_at),
        "expires_at": None if row.expires_at is None else int(row.expires_at),
        "revoked_at": None if row.revoked_at is None else int(row.revoked_at),
    }


def _date(seconds: float | None) -> str:
    return "" if seconds is None else datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M")
