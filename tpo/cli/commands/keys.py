"""`tpo keys`: manage the API keys in the database of TPO_DATABASE_URL."""

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tpo.cli.environment import open_store
from tpo.cli.options import AsJson
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
    as_json: AsJson = False,
) -> None:
    """Create a key and print it. It is shown only now, and stored as a hash."""
    with open_store() as store:
        row, secret = store.keys.create(name, tenant)
    if as_json:
        print_json({**_shown(row), "key": secret})
        return
    messages().print(f"{row.id} gives access to the tenant {row.tenant}. The key is not shown again:", markup=False)
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

    table = Table("id", "tenant", "name", "created", "revoked", box=None)
    for row in rows:
        table.add_row(row.id, row.tenant, row.name, _date(row.created_at), _date(row.revoked_at))
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
    as_json: AsJson = False,
) -> None:
    """Set the limits of a tenant. The settings apply to each limit that is left out."""
    from tpo.tenants.tenants import Limits

    with open_store() as store:
        store.tenants.set_limits(tenant, Limits(in_flight, per_minute, running))
    if as_json:
        limits = {"jobs_in_flight": in_flight, "jobs_per_minute": per_minute, "jobs_running": running}
        print_json({"tenant": tenant, **limits})
    else:
        console().print(f"the limits of {tenant} are set", markup=False)


def _shown(row: "ApiKey") -> dict[str, Any]:
    return {
        "id": row.id,
        "tenant": row.tenant,
        "name": row.name,
        "created_at": int(row.created_at),
        "revoked_at": None if row.revoked_at is None else int(row.revoked_at),
    }


def _date(seconds: float | None) -> str:
    return "" if seconds is None else datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M")
