"""The stack of `tpo up`: the services of one machine, their ports and files, and their order."""

import fcntl
import os
import secrets
import socket
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import httpx

from tpo.broker import JobNotifier
from tpo.cli.stack.supervisor import ChildLost, Service, Stopped, Supervisor
from tpo.cli.stack.valkey import valkey_command, write_password
from tpo.cli.ui.output import FAILED, INTERRUPTED, USAGE, Failure, messages, print_json
from tpo.core.errors import BrokerUnavailableError
from tpo.db.schema import upgrade
from tpo.settings import Settings

BROKER_SECONDS = 20.0
READY_SECONDS = 300.0
"""Long, because a model of many gigabytes needs time to load."""

_BROKER_FILE = "broker/valkey.conf"
_BROKER_STAGE, _EDGE_STAGE, _WORKER_STAGE = range(3)


@dataclass(frozen=True)
class Stack:
    """Everything that one `tpo up` runs, with its addresses and files."""

    data_dir: Path
    broker: Service | None
    services: tuple[Service, ...]
    database_url: str
    broker_url: str = field(repr=False)
    broker_password: str = field(repr=False)
    """A new one at each start: other users of this machine reach the broker's port, and it controls the workers."""
    ports: dict[str, tuple[str, int]]
    api_url: str
    flower_url: str
    guard: str
    """Who may use the API, in words."""

    @classmethod
    def plan(cls, settings: Settings, data_dir: Path, *, broker_port: int, workers: int) -> Self:
        """Plan the stack without touching anything."""
        own_broker = "TPO_BROKER_URL" not in os.environ
        own_database = "TPO_DATABASE_URL" not in os.environ
        password = secrets.token_hex(24)
        embedded_url = f"redis://:{password}@127.0.0.1:{broker_port}/0"
        broker_url = embedded_url if own_broker else settings.broker_url.get_secret_value()
        database_url = f"sqlite:///{data_dir}/tpo.db" if own_database else settings.database_url.get_secret_value()
        environment = {
            **os.environ,
            "TPO_DATABASE_URL": database_url,
            "TPO_BROKER_URL": broker_url,
            "TPO_HOST": settings.host,
            "TPO_PORT": str(settings.port),
            "TPO_FLOWER_PORT": str(settings.flower_port),
            "PYTHONUNBUFFERED": "1",
        }
        drain = settings.drain_seconds + 10

        def python(name: str, module: str, stage: int = _EDGE_STAGE, drain_seconds: float = 10.0) -> Service:
            return Service(name, (sys.executable, "-m", module), environment, stage, drain_seconds)

        names = ["worker"] if workers == 1 else [f"worker-{number}" for number in range(1, workers + 1)]
        ports = {"the API (--port)": (settings.host, settings.port)}
        ports["Flower (--flower-port)"] = (settings.flower_host, settings.flower_port)
        if own_broker:
            ports["the broker (--broker-port)"] = ("127.0.0.1", broker_port)
        return cls(
            data_dir=data_dir,
            broker=Service(
                "broker",
                valkey_command(broker_port, data_dir / "broker", data_dir / _BROKER_FILE),
                dict(os.environ),
                _BROKER_STAGE,
            )
            if own_broker
            else None,
            services=(
                python("api", "api"),
                python("flower", "worker.celery.flower"),
                python("maintenance", "worker.maintenance"),
                *(python(name, "worker", _WORKER_STAGE, drain) for name in names),
            ),
            database_url=database_url,
            broker_url=broker_url,
            broker_password=password,
            ports=ports,
            api_url=f"http://{_client_host(settings.host)}:{settings.port}",
            flower_url=f"http://{_client_host(settings.flower_host)}:{settings.flower_port}",
            guard=_guard(settings),
        )


@dataclass(frozen=True)
class Report:
    """Reports events: as text on stderr for people, or as lines of JSON on stdout for programs."""

    as_json: bool

    def __call__(self, event: str, facts: dict[str, Any]) -> None:
        """Report one event."""
        if self.as_json:
            print_json({"event": event, **facts})
        elif line := _LINES[event]:
            messages().print(line.format(**facts))


_LINES = {
    "started": "",
    "starting": "starting in {data_dir} ...",
    "ended": "[red]{service} ended with {how}[/]; restart {restart} in {restart_in:g} s",
    "stopping": "stopping {service} ...",
    "stopped": "",
    "ready": (
        "[green bold]ready[/]\n  API       {api} ({guard})\n  API docs  {docs}\n  Flower    {flower}\n"
        '  logs      {logs}\nTry: tpo submit --wait "{example}"{url}\nCtrl-C drains and stops everything.'
    ),
    "done": "all stopped; the jobs are stored in {database}",
}
_EXAMPLE = "Hello, I am Clara. The teapot that I bought is now cracked. I would like a quick replacement."


def run_stack(stack: Stack, report: Report) -> int:
    """Start a stack, keep it running until it is stopped, and drain it. Returns the exit code."""
    with _locked(stack):
        _check_ports(stack)
        if stack.broker is None:
            _check_broker(stack)
        report("starting", {"data_dir": str(stack.data_dir)})
        upgrade(stack.database_url)
        try:
            with Supervisor(stack.data_dir / "logs", report) as supervisor:
                _start(stack, supervisor)
                report("ready", _ready_facts(stack))
                supervisor.watch()
        except Stopped:
            if supervisor.forced:
                return INTERRUPTED
            report("done", {"database": stack.database_url if stack.database_url.startswith("sqlite") else "SQL"})
        except ChildLost as error:
            messages().print(f"tpo: {error}", style="red", markup=False)
            return FAILED
        except OSError as error:
            raise Failure(f"cannot continue: {error.filename or stack.data_dir}: {error.strerror}") from None
    return 0


def _start(stack: Stack, supervisor: Supervisor) -> None:
    if stack.broker:
        (stack.data_dir / "broker").mkdir(exist_ok=True)
        write_password(stack.data_dir / _BROKER_FILE, stack.broker_password)
        supervisor.start(stack.broker)
        address = stack.ports["the broker (--broker-port)"]
        supervisor.wait_until(lambda: _accepts_connections(address), BROKER_SECONDS, "the broker")
    for service in stack.services:
        supervisor.start(service)
    with httpx.Client(timeout=5, trust_env=False) as client:
        supervisor.wait_until(lambda: _is_ok(client, f"{stack.api_url}/readyz"), READY_SECONDS, "a worker")
        supervisor.wait_until(lambda: _is_ok(client, f"{stack.flower_url}/healthcheck"), BROKER_SECONDS, "Flower")


def _ready_facts(stack: Stack) -> dict[str, Any]:
    return {
        "api": stack.api_url,
        "docs": f"{stack.api_url}/docs",
        "flower": stack.flower_url,
        "logs": str(stack.data_dir / "logs"),
        "guard": stack.guard,
        "example": _EXAMPLE,
        "url": "" if stack.api_url.endswith(":8000") else f" --url {stack.api_url}",
    }


@contextmanager
def _locked(stack: Stack) -> Iterator[None]:
    """Allow only one `tpo up` for each folder, with a lock that ends with the process."""
    try:
        stack.data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = (stack.data_dir / "lock").open("a+")
    except OSError as error:
        raise Failure(f"cannot write to {stack.data_dir}: {error.strerror}; choose another --data-dir") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise Failure(
                f"tpo up already runs on {stack.data_dir} ({lock.read().strip()}): "
                "stop it, or choose another --data-dir"
            ) from None
        lock.truncate(0)
        lock.write(f"process {os.getpid()}, API at {stack.api_url}")
        lock.flush()
        yield


def _check_ports(stack: Stack) -> None:
    """Raise Failure unless every port is free."""
    seen: dict[int, str] = {}
    for service, (host, port) in stack.ports.items():
        if port in seen:
            raise Failure(f"{service} and {seen[port]} cannot both have port {port}: choose another")
        seen[port] = service
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        except (OSError, UnicodeError):
            raise Failure(
                f"{host} is not an address of this machine: choose another host for {service}", USAGE
            ) from None
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(address)
            except OSError as error:
                raise Failure(
                    f"port {port} on {host} cannot be used for {service}: {error.strerror}; choose another"
                ) from None


def _check_broker(stack: Stack) -> None:
    """Raise Failure unless the broker can be reached."""
    with closing(JobNotifier(stack.broker_url)) as notifier:
        try:
            notifier.ping()
        except BrokerUnavailableError as error:
            raise Failure(f"{error} Is TPO_BROKER_URL right, and does the server run?") from None


def _accepts_connections(address: tuple[str, int]) -> bool:
    try:
        socket.create_connection(address, timeout=1).close()
    except OSError:
        return False
    return True


def _is_ok(client: httpx.Client, url: str) -> bool:
    try:
        return client.get(url).status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


def _guard(settings: Settings) -> str:
    if settings.api_key:
        return "with the key in TPO_API_KEY"
    if settings.require_key:
        return "with a key that `tpo keys create` made"
    return "this machine only, without a key until `tpo keys create` makes one"


def _client_host(host: str) -> str:
    """Return the host by which a client on this machine reaches a server that binds to `host`."""
    if host in ("0.0.0.0", "::"):  # noqa: S104 - compared, not bound
        return "127.0.0.1" if host == "0.0.0.0" else "[::1]"  # noqa: S104
    return f"[{host}]" if ":" in host else host
