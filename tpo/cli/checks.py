"""What `tpo doctor` looks at. A check never changes anything and says what to do about what it finds."""

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
from tpo.backends.rewards.config import read as read_reward_file
from tpo.broker import JobNotifier
from tpo.cli.environment import read_settings
from tpo.cli.stack.valkey import valkey_command
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
_SECONDS = 3.0
_LOCAL_PACKAGES = ("torch", "transformers", "safetensors", "tokenizers")


class Finding(NamedTuple):
    """One line of the doctor."""

    verdict: Literal["ok", "warn", "fail"]
    what: str
    message: str


def examine() -> list[Finding]:
    """Everything, in the order in which one would mend it."""
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
    # An older one does not get this far: the package refuses to install.
    yield Finding("ok", "python", ".".join(str(part) for part in sys.version_info[:3]))


def _packages(names: tuple[str, ...]) -> Iterator[Finding]:
    missing = [name for name in names if util.find_spec(name) is None]
    if missing:
        yield Finding("fail", "packages", f"missing: {', '.join(missing)}; run `make install`")
    else:
        yield Finding("ok", "packages", ", ".join(f"{name} {metadata.version(name)}" for name in names))


def _local(settings: Settings) -> Iterator[Finding]:
    """torch and its device, where a model of this environment needs them."""
    elsewhere = (SCRIPTED, OPENAI, *REMOTE_REWARDS)
    if settings.policy.startswith(elsewhere) and (settings.reward_file or settings.reward_model.startswith(elsewhere)):
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
        yield Finding("ok", "device", f"cpu, {os.cpu_count()} cores; the models that ship need no more")
    else:
        yield Finding("ok", "device", found if settings.device == "auto" else settings.device)


def _policy(settings: Settings) -> Iterator[Finding]:
    if not settings.policy.startswith(OPENAI):
        yield from _model("policy", settings.policy)
        return
    yield _answers("policy", settings.policy, settings.openai_url, settings.openai_api_key, "OPENAI", "models")


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
        yield _answers("reward", settings.reward_model, settings.reward_url, key, "REWARD", "v1/models")
    else:
        yield from _model("reward", settings.reward_model)


def _answers(what: str, spec: str, url: str | None, key: SecretStr | None, prefix: str, path: str) -> Finding:
    """Whether a model's server is there, takes the key and has the model."""
    if url is None:
        return Finding("fail", what, f"{spec} needs TPO_{prefix}_URL, the address of its server")
    server = Server(url, secret(key), Limits(connect=_SECONDS, read=_SECONDS, call=_SECONDS, tries=1))
    try:
        connect_to(server, spec.partition(":")[2], _SECONDS, setting=f"TPO_{prefix}_API_KEY", path=path)
    except ModelRefusedError as error:
        return Finding("fail", what, str(error))
    finally:
        server.close()
    return Finding("ok", what, f"{spec} at {url}")


def _model(what: str, spec: str) -> Iterator[Finding]:
    if spec == SCRIPTED:
        yield Finding("ok", what, "scripted: a fake for tests; TPO_POLICY and TPO_REWARD_MODEL choose another")
        return
    folder = Path(str(resources.files("demo") / "models" / what)) if spec == DEMO else Path(spec)
    if not folder.is_dir():
        yield _hub_model(what, spec, looks_local=spec == DEMO or spec.startswith((".", "/", "~")))
    elif not (folder / "config.json").is_file():
        yield Finding("fail", what, f"{folder} has no config.json: it is not a model of transformers")
    elif not list(folder.glob("*.safetensors")):
        yield Finding("fail", what, f"{folder} has no .safetensors; no other format of weights is read")
    else:
        yield Finding("ok", what, f"{spec}: {folder}" if spec == DEMO else spec)


def _hub_model(what: str, spec: str, *, looks_local: bool) -> Finding:
    if looks_local:
        hint = "; run `make demo-models`" if spec == DEMO else ""
        return Finding("fail", what, f"there is no folder {spec}{hint}")
    if util.find_spec("huggingface_hub") is None:
        return Finding("fail", what, f"{spec} is no folder, and huggingface_hub is missing; run `make install`")
    from huggingface_hub import try_to_load_from_cache

    if isinstance(try_to_load_from_cache(spec, "config.json"), str):
        return Finding("ok", what, f"{spec}: in this machine's cache")
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE"):
        return Finding("fail", what, f"{spec} is not in this machine's cache, and HF_HUB_OFFLINE is set")
    return Finding("warn", what, f"{spec} is not in this machine's cache: the first start downloads it")


def _database(settings: Settings) -> Iterator[Finding]:
    if "TPO_DATABASE_URL" not in os.environ:
        yield Finding("ok", "database", "tpo up brings its own (SQLite); TPO_DATABASE_URL names another")
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
        yield Finding("ok", "database", f"reached, with the schema of this version ({engine.dialect.name})")
    except (DatabaseRefusedError, SchemaOutOfDateError) as error:
        yield Finding("fail", "database", str(error))
    except StoreUnavailableError as error:
        yield Finding("fail", "database", f"{error} Is TPO_DATABASE_URL right, and does the server run?")
    finally:
        engine.dispose()


def _broker(settings: Settings) -> Iterator[Finding]:
    if "TPO_BROKER_URL" not in os.environ:
        try:
            valkey_command(6379, Path())
        except Exception as error:
            yield Finding("warn", "broker", f"no embedded broker for this machine ({error}): set TPO_BROKER_URL")
        else:
            yield Finding("ok", "broker", "tpo up brings its own (Valkey); TPO_BROKER_URL names another")
        return
    notifier = JobNotifier(settings.broker_url.get_secret_value())
    try:
        notifier.ping()
        yield Finding("ok", "broker", "reached")
    except BrokerUnavailableError as error:
        yield Finding("fail", "broker", f"{error} Is TPO_BROKER_URL right, and does the server run?")
    finally:
        notifier.close()


def _ports(settings: Settings) -> Iterator[Finding]:
    for what, host, port, path in (
        ("API", settings.host, settings.port, "/readyz"),
        ("Flower", settings.flower_host, settings.flower_port, "/healthcheck"),
    ):
        if _is_free(host, port):
            yield Finding(
                "ok", "ports", f"{port} is free for the {what}" if what == "API" else f"{port} is free for {what}"
            )
        elif _is_ours(port, path):
            yield Finding("ok", "ports", f"{port}: {what} runs and is ready")
        else:
            yield Finding("warn", "ports", f"{port} is taken: choose another for {what} when you start `tpo up`")


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
