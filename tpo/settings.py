"""Settings of a process, read from environment variables that start with `TPO_`. Unsafe values are refused."""

import ipaddress
import json
import re
import ssl
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import parse_qsl, urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationError, model_validator
from pydantic_core import ErrorDetails
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from tpo.core import prompts
from tpo.core.state import MAX_ITERATIONS, MAX_SAMPLE_SIZE, EarlyStop
from tpo.service_links import without_service_links

DEMO = "demo"
"""Name of the policy and of the reward model that are part of this project."""

SCRIPTED = "scripted"
"""Name of the deterministic fake policy and of the fake reward model."""

OPENAI = "openai:"
"""Prefix of the name of a policy behind an OpenAI-compatible server."""

REMOTE_REWARDS = ("vllm:", "vllm-pooling:", "sglang:")
"""Prefixes of the name of a reward model behind HTTP."""

_OWN_FIELDS = frozenset(
    {"model", "messages", "n", "seed", "stream", "temperature", "top_p", "max_tokens", "max_completion_tokens", "stop"}
)
"""Fields of a request's body that each call sets, and that settings must not change."""


def _json_object(value: object) -> object:
    """Parse a JSON object from the environment. Errors do not quote it, because it may contain API keys."""
    if not isinstance(value, str):
        return value
    try:
        parsed = json.loads(value or "{}")
    except ValueError:
        raise ValueError("must be a JSON object") from None
    if not isinstance(parsed, dict):
        raise ValueError("must be a JSON object")
    return parsed


def _comma_separated(value: object) -> object:
    """Split a list from the environment."""
    if not isinstance(value, str):
        return value
    return tuple(word.strip().lower() for word in value.split(",") if word.strip())


Words = Annotated[tuple[str, ...] | None, NoDecode, BeforeValidator(_comma_separated)]
"""A setting of several words, separated by commas."""


def _ports(value: object) -> object:
    """Parse ports from the environment: a list with commas, or None for `any`."""
    if not isinstance(value, str):
        return value
    return None if value == "any" else [port.strip() for port in value.split(",")]


def check_extra_body(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields unchanged. Raises ValueError if one of them is set by each job."""
    if own := _OWN_FIELDS & fields.keys():
        raise ValueError(f"{', '.join(sorted(own))} cannot be set here: each job sets this itself")
    return fields


def _spell_as_redis(url: SecretStr) -> SecretStr:
    """Accept Celery's documented spelling `ssl_cert_reqs=CERT_REQUIRED`; redis-py only knows `required`."""
    spelled = re.sub(
        r"(?<=ssl_cert_reqs=)CERT_(NONE|OPTIONAL|REQUIRED)\b", lambda found: found[1].lower(), url.get_secret_value()
    )
    return SecretStr(spelled)


class StorageSettings(BaseSettings):
    """Database and broker."""

    database_url: SecretStr = Field(
        SecretStr("sqlite:///.tpo/tpo.db"),
        description="This URL, sqlite:///FILE or postgresql+psycopg://…, names the database that all processes share.",
    )
    broker_url: Annotated[SecretStr, AfterValidator(_spell_as_redis)] = Field(
        SecretStr("redis://127.0.0.1:6379/0"),
        description="This URL, redis://… or rediss://…, names the broker (Redis or Valkey).",
    )


class ModelSettings(BaseSettings):
    """Models."""

    policy: str = Field(
        DEMO,
        description="The policy is demo, scripted, a folder, a name on the Hugging Face Hub, or openai:MODEL "
        "(docs/backends.md).",
    )
    reward_model: str = Field(
        DEMO,
        description="The reward model is demo, scripted, a folder or a name on the Hub (a sequence classifier with "
        "one label), vllm:MODEL, vllm-pooling:MODEL or sglang:MODEL. With TPO_REWARD_FILE, this is the "
        "name of that reward.",
    )
    prompt_set: str | None = Field(
        None,
        description="Jobs that name no prompt set use this one. The default is tiny for the demo policy and "
        "conversation for others.",
    )


class LocalModelSettings(BaseSettings):
    """Local models."""

    device: Literal["auto", "cuda", "mps", "cpu"] = Field(
        "auto",
        description="Local models run on this device: cuda, mps or cpu. The default, auto, is the first of these that "
        "is available.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="A local policy computes in this number format: float32, bfloat16 or float16. The default, auto, "
        "is float32 on a CPU, bfloat16 elsewhere, and float16 on cuda without bfloat16.",
    )
    reward_dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32",
        description="A local reward model computes in this number format: float32, bfloat16 or float16. The last two "
        "give coarser scores.",
    )
    batch_rows: int = Field(
        512,
        ge=1,
        description="The local policy generates at most this number of samples at the same time, over all jobs.",
    )
    cache_gib: float | None = Field(
        None,
        gt=0,
        description="The key/value cache of the local policy takes this much memory, in GiB. The default is what a "
        "GPU has left, and 2 GiB on a CPU.",
    )
    prefill_tokens: int | None = Field(
        None,
        ge=1,
        description="The local policy reads at most this number of prompt tokens between two generated tokens. The "
        "default is 4096 on a GPU and 512 on a CPU.",
    )
    engine_fallback: bool = Field(
        False,
        description="If true, a local policy that the engine cannot serve runs one request at a time, with "
        "generate(). If false, it is refused.",
    )
    threads: int | None = Field(
        None, ge=1, description="torch uses this number of CPU threads. The default is all cores."
    )


class ScriptedSettings(BaseSettings):
    """Scripted back end, for tests."""

    scripted_latency: float = Field(
        0.0, ge=0, description="Each call of the scripted back end takes this long, in seconds."
    )
    scripted_log: Path | None = Field(
        None, description="The scripted back end appends a line for each call to this file. The default is no file."
    )


class OpenAIPolicySettings(BaseSettings):
    """Policy behind an OpenAI-compatible server."""

    openai_url: str | None = Field(
        None,
        description="The server for TPO_POLICY=openai:MODEL is at this URL, which includes /v1: http://host:8000/v1.",
    )
    openai_api_key: SecretStr | None = Field(
        None, min_length=1, description="This API key is sent to the policy's server as a bearer token."
    )
    openai_samples: Literal["batched", "separate"] = Field(
        "batched",
        description="Samples are requested in this way. batched: one request with n. separate: one request for each "
        "sample, with its own seed and token count.",
    )
    openai_max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = Field(
        "max_tokens", description="The request field of this name limits the tokens of an answer."
    )
    openai_extra_body: Annotated[
        dict[str, Any], NoDecode, BeforeValidator(_json_object), AfterValidator(check_extra_body)
    ] = Field(
        {},
        description="The fields of this JSON object are added to every request, such as chat_template_kwargs, top_k "
        "or stop.",
    )


class RemoteRewardSettings(BaseSettings):
    """Reward model behind HTTP."""

    reward_url: str | None = Field(
        None,
        description="The server for TPO_REWARD_MODEL=vllm:MODEL, vllm-pooling:MODEL or sglang:MODEL is at this URL, "
        "without /v1.",
    )
    reward_api_key: SecretStr | None = Field(
        None, min_length=1, description="This API key is sent to the reward model's server as a bearer token."
    )
    reward_in_unit_interval: bool = Field(
        False,
        description="Set this to true if the model's raw scores lie between 0 and 1. Otherwise a server that returns "
        "only such scores is refused, because they look like the output of a sigmoid.",
    )
    reward_task: Literal["classify", "token_classify"] = Field(
        "classify",
        description="vllm-pooling:MODEL is asked for this pooling task. With token_classify, the score is that of the "
        "last token.",
    )
    reward_tokenizer: str | None = Field(
        None,
        description="sglang:MODEL uses the tokenizer in this folder or of this name on the Hub. The default is the "
        "model's name.",
    )


class RewardFileSettings(BaseSettings):
    """Reward with several parts."""

    reward_file: Path | None = Field(
        None,
        description="This TOML file defines the parts of the reward (docs/rewards.md). TPO_REWARD_MODEL names that "
        "reward.",
    )
    server_api_keys: Annotated[dict[str, SecretStr], NoDecode, BeforeValidator(_json_object)] = Field(
        {}, description="This JSON object holds API keys by name, for the servers in TPO_REWARD_FILE."
    )


class RemoteRequestSettings(BaseSettings):
    """Requests to the servers of models."""

    remote_connect_seconds: float = Field(
        5.0, gt=0, description="A connection to a model's server must be made within this time, in seconds."
    )
    remote_read_seconds: float = Field(
        300.0,
        gt=0,
        description="An attempt is abandoned when a model's server is silent for longer than this, in seconds.",
    )
    remote_call_seconds: float = Field(
        900.0,
        gt=0,
        description="A whole model call, including all retries and pauses, must end within this time, in seconds.",
    )
    remote_tries: int = Field(
        6,
        ge=1,
        description="A request that a model's server accepts but does not answer properly is sent at most this number "
        "of times.",
    )
    remote_connections: int = Field(
        256, ge=1, description="A process opens at most this number of connections to each model's server."
    )
    remote_start_seconds: float = Field(
        300.0, gt=0, description="A starting worker waits at most this long for a model's server, in seconds."
    )


class WorkerSettings(BaseSettings):
    """Workers and the queue."""

    concurrency: int = Field(
        16, ge=1, le=1024, description="One worker runs at most this number of jobs at the same time."
    )
    lease_seconds: float = Field(
        30.0,
        gt=0,
        description="The lease of a running job lasts this long, in seconds. A worker that is silent for longer loses "
        "its jobs.",
    )
    sweep_seconds: float = Field(
        5.0,
        gt=0,
        description="The maintenance worker checks for lost notifications and expired leases at this interval, in "
        "seconds.",
    )
    renotify_seconds: float = Field(
        15.0, gt=0, description="Workers are notified again of a job that has been queued for this long, in seconds."
    )
    priority_seconds: float = Field(
        60.0,
        gt=0,
        description="Waiting for this long counts as much as one point of priority, in seconds. This ensures that "
        "every job runs eventually.",
    )
    drain_seconds: float = Field(
        20.0, gt=0, description="After SIGTERM, running model calls have this long to finish, in seconds."
    )
    max_attempts: int = Field(
        3,
        ge=1,
        description="A job fails after this number of consecutive attempts without a recorded model call.",
    )


class ServerSettings(BaseSettings):
    """API and Flower."""

    host: str = Field("127.0.0.1", description="The API binds to this address.")
    port: int = Field(8000, ge=1, le=65535, description="The API listens on this port.")
    api_key: SecretStr | None = Field(
        None,
        min_length=16,
        description="Clients of the tenant default send this API key as a bearer token. It has at least 16 characters.",
    )
    require_key: bool = Field(
        False, description="If true, every request needs an API key, even before the first one is created."
    )
    allowed_hosts: Words = Field(
        None,
        description="The API and Flower answer to these host names, separated by commas: names, *.NAME for all below a "
        "name, or * for all. Loopback names are always allowed. The default is no other name for a server on loopback, "
        "and all names for others.",
    )
    allowed_origins: Words = Field(
        None,
        description="Web pages of these origins may use the API in a browser (CORS), separated by commas: "
        "https://app.example.com. * is all, where every request needs a key. The default is only its own pages.",
    )
    root_path: str | None = Field(
        None,
        pattern=r"^(/[!-.0-~]+)*$",
        description="A proxy serves the API under this path, such as /tpo. The proxy may send it or leave it out.",
    )
    max_connections: int = Field(
        10_000,
        ge=16,
        description="An API process has at most this number of connections. The limit of open files (ulimit -n) minus "
        "128 limits it further.",
    )
    max_connections_per_address: int = Field(
        500,
        ge=1,
        description="One address has at most this number of connections to an API process. Loopback and "
        "TPO_TRUSTED_PROXIES are exempt.",
    )
    trusted_proxies: Words = Field(
        None,
        description="These addresses or networks, separated by commas, are proxies in front of the API: 10.0.0.0/8. "
        "Their connections are limited only in total. The default is none.",
    )
    flower_host: str = Field("127.0.0.1", description="Flower binds to this address.")
    flower_port: int = Field(5555, ge=1, le=65535, description="Flower listens on this port.")
    flower_basic_auth: SecretStr | None = Field(
        None,
        description="Flower asks for these credentials, written as user:password. The password has at least 8 "
        "characters.",
    )


class JobSettings(BaseSettings):
    """Limits and defaults of jobs."""

    max_sample_size: int = Field(
        MAX_SAMPLE_SIZE,
        ge=1,
        le=MAX_SAMPLE_SIZE,
        description="A job may request a sample_size up to this number of samples.",
    )
    max_iterations: int = Field(
        MAX_ITERATIONS,
        ge=0,
        le=MAX_ITERATIONS,
        description="A job may request a max_iterations up to this number of iterations.",
    )
    max_input_characters: int = Field(
        200_000, ge=1, description="A job's input may have up to this number of characters, over all its messages."
    )
    early_stop: EarlyStop | None = Field(
        None,
        description='Jobs that set no early-stop rule use this one, as JSON: {"patience": 2, "min_gain": 0.1}. The '
        "default is no rule.",
    )
    stop_on_decline: bool = Field(
        False,
        description="If true, jobs that do not set stop_on_decline end when an iteration's mean reward falls below "
        "the one before.",
    )


class TenantSettings(BaseSettings):
    """Limits of tenants that have none of their own."""

    max_jobs_in_flight: int | None = Field(
        None,
        ge=0,
        description="At most this number of a tenant's jobs wait or run; further submissions are refused. The default "
        "is no limit.",
    )
    max_jobs_per_minute: int | None = Field(
        None,
        ge=0,
        description="A tenant creates at most this number of jobs in a minute; further submissions are refused. The "
        "default is no limit.",
    )
    max_stored_bytes: int | None = Field(
        None,
        ge=0,
        description="A tenant may store at most this number of bytes: the inputs of its jobs, and its files. The "
        "default is no limit.",
    )
    max_jobs_running: int | None = Field(
        None,
        ge=0,
        description="At most this number of a tenant's jobs run at the same time; others wait. The default is no "
        "limit.",
    )


class RetentionSettings(BaseSettings):
    """Retention."""

    idempotency_hours: float = Field(24.0, gt=0, description="An Idempotency-Key is stored for this long, in hours.")
    retention_days: float | None = Field(
        None,
        gt=0,
        description="Ended jobs are deleted with all their texts after this time, in days. The default is never.",
    )


class OpenAIServerSettings(BaseSettings):
    """OpenAI-compatible API: waiting, files and batches."""

    wait_seconds: float = Field(
        300.0,
        gt=0,
        le=590,
        description="A request for a chat completion, or for a response that is not in the background, waits at most "
        "this long for its job, in seconds.",
    )
    max_file_bytes: int = Field(200_000_000, ge=1, description="An uploaded file may have up to this size, in bytes.")
    max_batch_lines: int = Field(50_000, ge=1, description="A batch may have up to this number of requests.")
    batch_jobs: int = Field(
        100, ge=1, description="At most this number of a batch's jobs wait or run at the same time."
    )


class WebhookSettings(BaseSettings):
    """Webhooks."""

    webhook_timeout_seconds: float = Field(
        10.0, gt=0, le=60, description="A receiver must respond to a delivery within this time, in seconds."
    )
    webhook_retry_seconds: float = Field(
        5.0,
        gt=0,
        description="The pause after the first failed attempt is this long, in seconds. Each further pause is four "
        "times as long, up to 4 hours.",
    )
    webhook_retry_hours: float = Field(
        24.0, gt=0, description="The delivery of an event is given up when the event is older than this, in hours."
    )
    webhook_slots: int = Field(
        16,
        ge=1,
        le=256,
        description="The maintenance worker sends at most this number of deliveries at the same time.",
    )
    webhook_allow_private: bool = Field(
        False,
        description="If true, webhooks are also delivered to addresses that are not public, including this machine's.",
    )
    webhook_ports: Annotated[
        Annotated[frozenset[Annotated[int, Field(ge=1, le=65535)]], Field(min_length=1)] | None,
        NoDecode,
        BeforeValidator(_ports),
    ] = Field(
        frozenset({80, 443, 8080, 8443}),
        description="Webhooks are sent to these ports only, separated by commas. With any, all ports are allowed.",
    )
    webhook_ca_file: Path | None = Field(
        None,
        description="Receivers may use the certificate authorities in this file (PEM) in addition to the system's.",
    )


class Settings(
    StorageSettings,
    ModelSettings,
    LocalModelSettings,
    ScriptedSettings,
    OpenAIPolicySettings,
    RemoteRewardSettings,
    RewardFileSettings,
    RemoteRequestSettings,
    WorkerSettings,
    ServerSettings,
    JobSettings,
    TenantSettings,
    RetentionSettings,
    OpenAIServerSettings,
    WebhookSettings,
):
    """The settings of a process, read from environment variables. Each base class is a group of them."""

    model_config = SettingsConfigDict(env_prefix="TPO_", extra="ignore", hide_input_in_errors=True)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Read arguments, then the environment without the variables that Kubernetes sets for services."""
        environment = EnvSettingsSource(settings_cls)
        environment.env_vars = without_service_links(environment.env_vars, "TPO_")
        return init_settings, environment

    @classmethod
    def groups(cls) -> tuple[type[BaseSettings], ...]:
        """Return the groups of settings, in the order of the documentation. The docstring of a group is its title."""
        return cls.__bases__

    @model_validator(mode="after")
    def _safe(self) -> Self:
        database_url, broker_url = self.database_url.get_secret_value(), self.broker_url.get_secret_value()
        if not database_url.startswith(("sqlite:///", "postgresql+psycopg://")):
            raise ValueError("TPO_DATABASE_URL must start with sqlite:/// or postgresql+psycopg://")
        if not broker_url.startswith(("redis://", "rediss://")):
            hint = ": Redis Sentinel is not supported, name the primary" if broker_url.startswith("sentinel") else ""
            raise ValueError(f"TPO_BROKER_URL must start with redis:// or rediss://{hint}")
        for name, url in (("DATABASE", database_url), ("BROKER", broker_url)):
            try:
                _ = urlsplit(url).port
            except ValueError:
                raise ValueError(f"TPO_{name}_URL: its port must be a number from 0 to 65535") from None
        _check_broker(broker_url)
        if database_url.removeprefix("sqlite:///") in ("", ":memory:"):
            raise ValueError("TPO_DATABASE_URL must name a file, because all processes share the database")
        if self.webhook_ca_file is not None and not _holds_certificates(self.webhook_ca_file):
            raise ValueError("TPO_WEBHOOK_CA_FILE must be a readable file of certificates (PEM)")
        if self.prompt_set is not None and self.prompt_set not in prompts.names():
            raise ValueError(f"TPO_PROMPT_SET: no such prompt_set; there are {', '.join(prompts.names())}")
        self._check_remote()
        if self.api_key is None and not self.require_key and not is_loopback(self.host):
            raise ValueError(
                f"TPO_HOST={self.host} can be reached from other machines: "
                "set TPO_API_KEY or TPO_REQUIRE_KEY, or bind to 127.0.0.1"
            )
        for host in self.allowed_hosts or ():
            if not re.fullmatch(r"\*|(\*\.)?[a-z0-9._-]+|[0-9a-f:.]+", host):
                raise ValueError(f"TPO_ALLOWED_HOSTS: {host} is not a host name; write it without scheme and port")
        for origin in self.allowed_origins or ():
            if origin == "*":
                if self.api_key is None and not self.require_key:
                    raise ValueError("TPO_ALLOWED_ORIGINS=* lets every web page in: set TPO_API_KEY or TPO_REQUIRE_KEY")
            elif not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/?#@]+", origin):
                raise ValueError(f"TPO_ALLOWED_ORIGINS: {origin} is not an origin, as in https://app.example.com")
        for network in self.trusted_proxies or ():
            try:
                ipaddress.ip_network(network)
            except ValueError:
                raise ValueError(f"TPO_TRUSTED_PROXIES: {network} is neither an address nor a network") from None
        if self.flower_basic_auth and not re.fullmatch("[^:]+:.{8,}", self.flower_basic_auth.get_secret_value()):
            raise ValueError("TPO_FLOWER_BASIC_AUTH must be user:password, with a password of at least 8 characters")
        if self.flower_basic_auth is None and not is_loopback(self.flower_host):
            raise ValueError(
                f"TPO_FLOWER_HOST={self.flower_host} can be reached from other machines: "
                "set TPO_FLOWER_BASIC_AUTH, or bind to 127.0.0.1"
            )
        return self

    def _check_remote(self) -> None:
        for name, address in (("OPENAI_URL", self.openai_url), ("REWARD_URL", self.reward_url)):
            if address is not None:
                check_server_url(f"TPO_{name}", address)
        if self.policy == OPENAI or self.reward_model in REMOTE_REWARDS:
            raise ValueError("TPO_POLICY and TPO_REWARD_MODEL: the model's name comes after the colon")
        if self.reward_file is not None and self.reward_model in (DEMO, SCRIPTED):
            raise ValueError("TPO_REWARD_FILE needs a name for the reward that it defines: set TPO_REWARD_MODEL")

    @property
    def worker_timeout_seconds(self) -> float:
        """Seconds of silence after which a worker counts as dead: the length of two leases."""
        return 2 * self.lease_seconds

    @property
    def default_prompt_set(self) -> str:
        """The prompt set of jobs that name none and run on the policy of these settings."""
        return self.prompt_set_of(self.policy)

    def prompt_set_of(self, policy: str) -> str:
        """Return the prompt set of a policy's jobs that name none. The demo policy understands only `tiny`."""
        return self.prompt_set or ("tiny" if policy == DEMO else "conversation")

    @property
    def stopping(self) -> dict[str, Any]:
        """Stopping parameters of jobs that do not set them."""
        return {"early_stop": self.early_stop, "stop_on_decline": self.stop_on_decline}

    @property
    def max_body_bytes(self) -> int:
        """Largest request body: the longest input, with every character escaped in JSON, plus the other fields."""
        return 12 * self.max_input_characters + 256 * 1024


_BROKER_OPTIONS = {"ssl_ca_certs", "ssl_ca_path", "ssl_certfile", "ssl_keyfile", "ssl_check_hostname", "ssl_cert_reqs"}
"""Query parameters of a broker URL that both Celery and redis-py accept. Others would fail only at their first use."""


def _check_broker(url: str) -> None:
    parts = urlsplit(url)
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    if not re.fullmatch(r"/?[0-9]*", parts.path):
        raise ValueError("TPO_BROKER_URL: its database is not a number, as in redis://host:6379/0")
    if options and (parts.scheme != "rediss" or not options.keys() <= _BROKER_OPTIONS):
        raise ValueError(
            f"TPO_BROKER_URL: it takes rediss:// with {', '.join(sorted(_BROKER_OPTIONS))}, and no other option"
        )
    if options.get("ssl_cert_reqs", "required") not in ("none", "optional", "required"):
        raise ValueError("TPO_BROKER_URL: ssl_cert_reqs is none, optional or required")
    for name in ("ssl_ca_certs", "ssl_ca_path", "ssl_certfile", "ssl_keyfile"):
        if name in options and not Path(options[name]).exists():
            raise ValueError(f"TPO_BROKER_URL: {name} names {options[name]}, which does not exist")


def _holds_certificates(file: Path) -> bool:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(file)
    except (OSError, ValueError):
        return False
    return True


def format_errors(error: ValidationError) -> str:
    """Format the errors of the environment: each variable by name, without its value, which may be a secret."""
    return "; ".join(_explained(e) for e in error.errors(include_url=False, include_input=False))


def _explained(error: ErrorDetails) -> str:
    message = error["msg"].removeprefix("Value error, ")
    return f"TPO_{'_'.join(map(str, error['loc'])).upper()}: {message}" if error["loc"] else message


def check_server_url(name: str, address: str) -> None:
    """Check the URL of a model's server. Raises ValueError, naming the setting, if it is not valid."""
    try:
        parts = urlsplit(address)
        _ = parts.port
    except ValueError:
        raise ValueError(f"{name} is not a valid address") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{name} must start with http:// or https:// and name a host")
    if parts.username is not None or parts.password is not None:
        raise ValueError(f"{name} must hold no user or password: use the setting for the API key")
    if parts.query or parts.fragment:
        raise ValueError(f"{name} must contain neither a query nor a fragment")


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@cache
def settings() -> Settings:
    """Return the settings of this process. Raises pydantic.ValidationError, which names the variable."""
    return Settings()
