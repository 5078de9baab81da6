"""Checks of `tpo doctor`. A check changes nothing, and its message says what to do about a problem."""

import os
import socket
import sys
from collections.abc import Iterator
from importlib import metadata, resources, util
from pathlib import Path
from typing import Literal, NamedTuple

import httpx
from pydantic import SecretStr

from tpo.backends.remote.connection import connect as connect_to
from tpo.backends.remote.connection import secret
from tpo.backends.remote.server import Limits, Server
from tpo.backends.rewards.config import read_reward_file
from tpo.broker import JobNotifier
from tpo.cli.environment import read_settings
from tpo.cli.stack.valkey import check_binary
from tpo.cli.ui.output import Failure
from tpo.core.errors import (
    BrokerUnavailableError,
    DatabaseRefusedError,
    ModelRefusedError,
    SchemaOutOfDateError,
    StoreUnavailableError,
)
from tpo.db import connect, schema
from tpo.settings import DEMO, OPENAI, REMOTE_REWARDS, SCRIPTED, Settings

_PACKAGES = ("celery", "fastapi", "flower", "httpx", "redis", "sqlalchemy", "uvicorn")
_TIMEOUT_SECONDS = 3.0
_LOCAL_PACKAGES = ("torch", "transformers", "safetensors", "tokenizers")


class Finding(NamedTuple):
    """The result of one check."""

    verdict: Literal["ok", "warn", "fail"]
    what: str
    message: str


def examine() -> list[Finding]:
    """Run all checks, in the order in which problems should be fixed."""
    findings = [*_python(), *_packages(_PACKAGES)]
    try:
        settings = read_settings()
    except Failure as error:
        return [*findings, Finding("fail", "settings", str(error))]
    return [
        *findings,
        Finding("ok", "settings", "the environment is valid"),
        *_local(settings),
        *_policy(settings),
        *_reward(settings),
        *_database(settings),
        *_broker(settings),
        *_ports(settings),
    ]


def _python() -> Iterator[Finding]:
    # An older Python does not get this far: the package cannot be installed on it.
    yield Finding("ok", "python", ".".join(str(part) for part in sys.version_info[:3]))


def _packages(names: tuple[str, ...]) -> Iterator[Finding]:
    missing = [name for name in names if util.find_spec(name) is None]
    if missing:
        yield Finding("fail", "packages", f"missing: {', '.join(missing)}; run `make install`")
    else:
        yield Finding("ok", "packages", ", ".join(f"{name} {metadata.version(name)}" for name in names))


def _local(settings: Settings) -> Iterator[Finding]:
    """Check torch and its device if a model of this environment runs in this process."""
    not_local = (SCRIPTED, OPENAI, *REMOTE_REWARDS)
    if settings.policy.startswith(not_local) and (settings.reward_file or settings.reward_model.startswith(not_local)):
        return
    findings = list(_packages(_LOCAL_PACKAGES))
    yield from findings
    if any(finding.verdict == "fail" for finding in findings):
        return
    import torch

    found = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if settings.device not in ("auto", "cpu", found):
        yield Finding("fail", "device", f"TPO_DEVICE={settings.device}, but torch {torch.__version__} finds {found}")
    elif found == "cpu":
        yield Finding("ok", "device", f"cpu, {os.cpu_count()} cores; enough for the demo models")
    else:
        yield Finding("ok", "device", found if settings.device == "auto" else settings.device)


def _policy(settings: Settings) -> Iterator[Finding]:
    if not settings.policy.startswith(OPENAI):
        yield from _model("policy", settings.policy)
        return
    yield _model_server("policy", settings.policy, settings.openai_url, settings.openai_api_key, "OPENAI", "models")


def _reward(settings: Settings) -> Iterator[Finding]:
    if settings.reward_file is not None:
        try:
            names = ", ".join(part.name for part in read_reward_file(settings.reward_file).part)
        except ModelRefusedError as error:
            yield Finding("fail", "reward", str(error))
        else:
            yield Finding("ok", "reward", f"{settings.reward_file}: {names}")
    elif settings.reward_model.startswith(REMOTE_REWARDS):
        key = settings.reward_api_key
        yield _model_server("reward", settings.reward_model, settings.reward_url, key, "REWARD", "v1/models")
    else:
        yield from _model("reward", settings.reward_model)


def _model_server(what: str, spec: str, url: str | None, key: SecretStr | None, prefix: str, path: str) -> Finding:
    """Check that a model's server is reachable, accepts the key and serves the model."""
    if url is None:
        return Finding("fail", what, f"{spec} needs TPO_{prefix}_URL, the URL of its server")
    limits = Limits(connect=_TIMEOUT_SECONDS, read=_TIMEOUT_SECONDS, call=_TIMEOUT_SECONDS, tries=1)
    server = Server(url, secret(key), limits)
    try:
        connect_to(server, spec.partition(":")[2], _TIMEOUT_SECONDS, setting=f"TPO_{prefix}_API_KEY", path=path)
    except ModelRefusedError as error:
        return Finding("fail", what, str(error))
    finally:
        server.close()
    return Finding("ok", what, f"{spec} at {url}")


def _model(what: str, spec: str) -> Iterator[Finding]:
    if spec == SCRIPTED:
        yield Finding("ok", what, "scripted: a fake for tests; choose another with TPO_POLICY or TPO_REWARD_MODEL")
        return
    folder = Path(str(resources.files("demo") / "models" / what)) if spec == DEMO else Path(spec)
    if not folder.is_dir():
        yield _hub_model(what, spec, looks_local=spec == DEMO or spec.startswith((".", "/", "~")))
    elif not (folder / "config.json").is_file():
        yield Finding("fail", what, f"{folder} has no config.json, so it is not a transformers model")
    elif not list(folder.glob("*.safetensors")):
        yield Finding("fail", what, f"{folder} has no .safetensors file, the only supported format of weights")
    else:
        yield Finding("ok", what, f"{spec}: {folder}" if spec == DEMO else spec)


def _hub_model(what: str, spec: str, *, looks_local: bool) -> Finding:
    if looks_local:
        hint = "; run `make demo-models`" if spec == DEMO else ""
        return Finding("fail", what, f"there is no folder {spec}{hint}")
    if util.find_spec("huggingface_hub") is None:
        return Finding("fail", what, f"{spec} is not a folder, and huggingface_hub is missing; run `make install`")
    from huggingface_hub import try_to_load_from_cache

    if isinstance(try_to_load_from_cache(spec, "config.json"), str):
        return Finding("ok", what, f"{spec} is in this machine's cache")
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE"):
        return Finding("fail", what, f"{spec} is not in this machine's cache, and HF_HUB_OFFLINE is set")
    return Finding("warn", what, f"{spec} is not in this machine's cache: the first start downloads it")


def _database(settings: Settings) -> Iterator[Finding]:
    if "TPO_DATABASE_URL" not in os.environ:
        yield Finding("ok", "database", "`tpo up` uses its own SQLite; set TPO_DATABASE_URL for another database")
        return
    url = settings.database_url.get_secret_value()
    if url.startswith("sqlite:///") and not Path(url[10:]).exists():
        yield Finding("warn", "database", "the file does not exist yet: run `tpo db upgrade`")
        return
    try:
        engine = connect(url, pool_size=1)
    except DatabaseRefusedError as error:
        yield Finding("fail", "database", str(error))
        return
    try:
        schema.check(engine)
        yield Finding("ok", "database", f"reachable, with the schema of this version ({engine.dialect.name})")
    except (DatabaseRefusedError, SchemaOutOfDateError) as error:
        yield Finding("fail", "database", str(error))
    except StoreUnavailableError as error:
        yield Finding("fail", "database", f"{error} Is TPO_DATABASE_URL right, and does the server run?")
    finally:
        engine.dispose()


def _broker(settings: Settings) -> Iterator[Finding]:
    if "TPO_BROKER_URL" not in os.environ:
        try:
            check_binary()
        except Failure as error:
            yield Finding("fail", "broker", str(error))
        else:
            yield Finding("ok", "broker", "`tpo up` uses its own Valkey; set TPO_BROKER_URL for another broker")
        return
    notifier = JobNotifier(settings.broker_url.get_secret_value())
    try:
        notifier.ping()
        yield Finding("ok", "broker", "reachable")
    except BrokerUnavailableError as error:
        yield Finding("fail", "broker", f"{error} Is TPO_BROKER_URL right, and does the server run?")
    finally:
        notifier.close()


def _ports(settings: Settings) -> Iterator[Finding]:
    for service, host, port, path in (
        ("the API", settings.host, settings.port, "/readyz"),
        ("Flower", settings.flower_host, settings.flower_port, "/healthcheck"),
    ):
        if _is_free(host, port):
            yield Finding("ok", "ports", f"{port} is free for {service}")
        elif _is_ours(port, path):
            yield Finding("ok", "ports", f"{port}: {service} is running and ready")
        else:
            yield Finding("warn", "ports", f"{port} is in use: choose another for {service} when you start `tpo up`")


def _is_free(host: str, port: int) -> bool:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def _is_ours(port: int, path: str) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}{path}", timeout=3, trust_env=False).is_success
    except httpx.TransportError:
        return False
