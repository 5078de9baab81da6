"""The environment, read once, in one class that refuses unsafe values. Every variable starts with `TPO_`."""

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
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from tpo.core import prompts
from tpo.core.state import MAX_ITERATIONS, MAX_SAMPLE_SIZE, EarlyStop

DEMO = "demo"
"""Name of the policy and of the reward model that ship with the project."""

SCRIPTED = "scripted"
"""Name of the deterministic fake of both."""

OPENAI = "openai:"
"""What comes before the name of a policy behind an OpenAI-compatible server."""

REMOTE_REWARDS = ("vllm:", "vllm-pooling:", "sglang:")
"""What comes before the name of a reward model behind HTTP."""

_OWN_FIELDS = frozenset(
    {"model", "messages", "n", "seed", "stream", "temperature", "top_p", "max_tokens", "max_completion_tokens", "stop"}
)
"""Of a request's body: what the loop says is not for settings to change."""


def _json_object(value: object) -> object:
    """JSON out of the environment; what is wrong with it is said without quoting it, for it may hold keys."""
    if not isinstance(value, str):
        return value
    try:
        found = json.loads(value or "{}")
    except ValueError:
        raise ValueError("must be a JSON object") from None
    if not isinstance(found, dict):
        raise ValueError("must be a JSON object")
    return found


def check_extra_body(fields: dict[str, Any]) -> dict[str, Any]:
    """The same, where it says nothing that is each job's to say. Raises ValueError."""
    if own := _OWN_FIELDS & fields.keys():
        raise ValueError(f"{', '.join(sorted(own))} cannot be set here: each job says it")
    return fields


class Settings(BaseSettings):
    """What a process is told about its surroundings."""

    model_config = SettingsConfigDict(env_prefix="TPO_", extra="ignore", hide_input_in_errors=True)

    database_url: SecretStr = Field(
        SecretStr("sqlite:///.tpo/tpo.db"), description="sqlite:///FILE or postgresql+psycopg://…"
    )
    broker_url: SecretStr = Field(SecretStr("redis://127.0.0.1:6379/0"), description="redis://… (Redis or Valkey)")

    policy: str = Field(
        DEMO, description="demo, scripted, a folder, a name on the Hugging Face Hub, or openai:MODEL (docs/backends.md)"
    )
    reward_model: str = Field(
        DEMO,
        description="demo, scripted, a folder or a name on the Hub (a sequence classifier with one label), vllm:MODEL, "
        "vllm-pooling:MODEL, sglang:MODEL, or what TPO_REWARD_FILE describes",
    )
    prompt_set: str | None = Field(None, description="default prompt set of jobs that name none")
    device: Literal["auto", "cuda", "mps", "cpu"] = Field(
        "auto", description="of local models: cuda, mps or cpu; auto: the first of these that is there"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="of a local policy: float32, bfloat16 or float16; auto: float32 on a CPU, else bfloat16, "
        "or float16 where cuda has no bfloat16",
    )
    reward_dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="of a local reward model: float32, bfloat16 or float16, whose scores are coarser"
    )
    batch_rows: int = Field(512, ge=1, description="responses that the policy writes at once, over all jobs")
    cache_gib: float | None = Field(
        None, gt=0, description="memory for the policy's keys and values; default: what a GPU has left, 2 on a CPU"
    )
    prefill_tokens: int | None = Field(
        None, ge=1, description="prompt tokens read between two written ones; default: 4096 on a GPU, 512 on a CPU"
    )
    engine_fallback: bool = Field(
        False, description="true: a policy that the engine cannot serve runs one request at a time, by generate"
    )
    threads: int | None = Field(None, ge=1, description="CPU threads of torch; default: all cores")
    scripted_latency: float = Field(0.0, ge=0, description="seconds that each call of the scripted back end takes")
    scripted_log: Path | None = Field(None, description="file to which the scripted back end appends a line a call")

    openai_url: str | None = Field(
        None, description="of the server behind TPO_POLICY=openai:MODEL, with its /v1: http://host:8000/v1"
    )
    openai_api_key: SecretStr | None = Field(None, min_length=1, description="sent to it as a bearer token")
    openai_samples: Literal["batched", "separate"] = Field(
        "batched",
        description="one request with n; apart: one for each sample, with a seed and a token count of its own",
    )
    openai_max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = Field(
        "max_tokens", description="what the server calls the most tokens of an answer"
    )
    openai_extra_body: Annotated[
        dict[str, Any], NoDecode, BeforeValidator(_json_object), AfterValidator(check_extra_body)
    ] = Field({}, description="JSON object that is added to every request, such as chat_template_kwargs, top_k or stop")
    reward_url: str | None = Field(
        None,
        description="of the server behind TPO_REWARD_MODEL=vllm:MODEL, vllm-pooling:MODEL or sglang:MODEL, without /v1",
    )
    reward_api_key: SecretStr | None = Field(None, min_length=1, description="sent to it as a bearer token")
    reward_in_unit_interval: bool = Field(
        False, description="true: its raw scores do lie between 0 and 1; else such a server is refused for its sigmoid"
    )
    reward_task: Literal["classify", "token_classify"] = Field(
        "classify", description="of vllm-pooling:MODEL; token_classify: the score stands at the last token"
    )
    reward_tokenizer: str | None = Field(
        None, description="of sglang:MODEL, a folder or a name on the Hub; default: the model's name"
    )
    reward_file: Path | None = Field(
        None, description="TOML that says which parts the reward has; TPO_REWARD_MODEL is then its name"
    )
    server_api_keys: Annotated[dict[str, SecretStr], NoDecode, BeforeValidator(_json_object)] = Field(
        {}, description="JSON object of keys by name, for the servers that TPO_REWARD_FILE names"
    )
    remote_connect_seconds: float = Field(5.0, gt=0, description="to connect to a model's server")
    remote_read_seconds: float = Field(300.0, gt=0, description="silence of a model's server that ends a try")
    remote_call_seconds: float = Field(900.0, gt=0, description="a whole model call with all its tries and pauses")
    remote_tries: int = Field(6, ge=1, description="of one request that a model's server took and did not answer well")
    remote_connections: int = Field(256, ge=1, description="most connections to one model's server")
    remote_start_seconds: float = Field(300.0, gt=0, description="how long a start waits for a model's server")

    concurrency: int = Field(16, ge=1, le=1024, description="jobs that one worker runs at once")
    lease_seconds: float = Field(30.0, gt=0, description="a worker that is silent for so long has lost its jobs")
    sweep_seconds: float = Field(5.0, gt=0, description="how often lost doorbells and leases are looked for")
    renotify_seconds: float = Field(15.0, gt=0, description="a job queued for so long is rung for again")
    priority_seconds: float = Field(
        60.0, gt=0, description="a wait of so long outweighs one point of priority: nothing waits for ever"
    )
    drain_seconds: float = Field(20.0, gt=0, description="time that SIGTERM leaves to running model calls")
    max_attempts: int = Field(
        3, ge=1, description="a job fails after so many attempts in a row without a recorded model call"
    )

    host: str = Field("127.0.0.1", description="address that the API binds to")
    port: int = Field(8000, ge=1, le=65535, description="of the API")
    api_key: SecretStr | None = Field(
        None, min_length=16, description="clients send it as a bearer token; 16 characters or more"
    )
    require_key: bool = Field(False, description="true: no request without a key, also before the first one is made")
    flower_host: str = Field("127.0.0.1", description="address that Flower binds to")
    flower_port: int = Field(5555, ge=1, le=65535, description="of Flower")
    flower_basic_auth: SecretStr | None = Field(
        None, description="user:password of Flower; the password has 8 characters or more"
    )

    max_sample_size: int = Field(
        MAX_SAMPLE_SIZE, ge=1, le=MAX_SAMPLE_SIZE, description="the largest sample_size that a job may ask for"
    )
    max_iterations: int = Field(
        MAX_ITERATIONS, ge=0, le=MAX_ITERATIONS, description="the largest max_iterations that a job may ask for"
    )
    max_input_characters: int = Field(200_000, ge=1, description="of all messages of a job together")
    early_stop: EarlyStop | None = Field(
        None, description='of jobs that say nothing of it, as JSON: {"patience": 2, "min_gain": 0.1}; default: none'
    )
    stop_on_decline: bool = Field(
        False, description="of jobs that say nothing of it: whether they end when an iteration's mean reward falls"
    )

    max_jobs_in_flight: int | None = Field(None, ge=0, description="of one tenant; default: no limit")
    max_jobs_per_minute: int | None = Field(None, ge=0, description="of one tenant; default: no limit")
    max_jobs_running: int | None = Field(
        None, ge=0, description="of one tenant at the same time, the others wait; default: no limit"
    )
    idempotency_hours: float = Field(24.0, gt=0, description="how long an Idempotency-Key is remembered")
    retention_days: float | None = Field(
        None, gt=0, description="jobs that ended so long ago are deleted with all their texts; default: never"
    )

    wait_seconds: float = Field(
        300.0, gt=0, le=590, description="how long a chat completion, or a response not in the background, waits"
    )
    max_file_bytes: int = Field(200_000_000, ge=1, description="largest file that can be uploaded")
    max_batch_lines: int = Field(50_000, ge=1, description="most requests of one batch")
    batch_jobs: int = Field(100, ge=1, description="most jobs of one batch that wait or run at the same time")

    webhook_timeout_seconds: float = Field(10.0, gt=0, le=60, description="what a receiver gets to answer")
    webhook_retry_seconds: float = Field(
        5.0, gt=0, description="after the first failure; each further pause is four times as long, up to 4 hours"
    )
    webhook_retry_hours: float = Field(24.0, gt=0, description="a delivery that is older is given up")
    webhook_slots: int = Field(16, ge=1, le=256, description="deliveries that the maintenance worker sends at once")
    webhook_allow_private: bool = Field(
        False, description="true: also deliver to addresses that are not public, those of this machine among them"
    )
    webhook_ca_file: Path | None = Field(
        None, description="certificate authorities (PEM) that webhooks may have, beside the system's"
    )

    @model_validator(mode="after")
    def _safe(self) -> Self:
        database_url, broker_url = self.database_url.get_secret_value(), self.broker_url.get_secret_value()
        if not database_url.startswith(("sqlite:///", "postgresql+psycopg://")):
            raise ValueError("TPO_DATABASE_URL must start with sqlite:/// or postgresql+psycopg://")
        if not broker_url.startswith(("redis://", "rediss://")):
            raise ValueError("TPO_BROKER_URL must start with redis:// or rediss://")
        for name, url in (("DATABASE", database_url), ("BROKER", broker_url)):
            try:
                _ = urlsplit(url).port
            except ValueError:
                raise ValueError(f"TPO_{name}_URL: its port is not a number from 0 to 65535") from None
        _check_broker(broker_url)
        if database_url.removeprefix("sqlite:///") in ("", ":memory:"):
            raise ValueError("TPO_DATABASE_URL must name a file: all processes share it")
        if self.webhook_ca_file is not None and not _holds_certificates(self.webhook_ca_file):
            raise ValueError("TPO_WEBHOOK_CA_FILE: no file of certificates (PEM) that can be read")
        if self.prompt_set is not None and self.prompt_set not in prompts.names():
            raise ValueError(f"TPO_PROMPT_SET: no such prompt_set; there are {', '.join(prompts.names())}")
        self._check_remote()
        if self.api_key is None and not self.require_key and not is_loopback(self.host):
            raise ValueError(
                f"TPO_HOST={self.host} is open to others: set TPO_API_KEY or TPO_REQUIRE_KEY, or bind to 127.0.0.1"
            )
        if self.flower_basic_auth and not re.fullmatch("[^:]+:.{8,}", self.flower_basic_auth.get_secret_value()):
            raise ValueError("TPO_FLOWER_BASIC_AUTH must be user:password, the password of 8 characters or more")
        if self.flower_basic_auth is None and not is_loopback(self.flower_host):
            raise ValueError(
                f"TPO_FLOWER_HOST={self.flower_host} is open to others: set TPO_FLOWER_BASIC_AUTH, or bind to 127.0.0.1"
            )
        return self

    def _check_remote(self) -> None:
        for name, address in (("OPENAI_URL", self.openai_url), ("REWARD_URL", self.reward_url)):
            if address is not None:
                check_server_url(f"TPO_{name}", address)
        if self.policy == OPENAI or self.reward_model in REMOTE_REWARDS:
            raise ValueError("TPO_POLICY and TPO_REWARD_MODEL: the model's name comes after the colon")
        if self.reward_file is not None and self.reward_model in (DEMO, SCRIPTED):
            raise ValueError("TPO_REWARD_FILE needs a name for what it describes: set TPO_REWARD_MODEL")

    @property
    def worker_timeout_seconds(self) -> float:
        """The silence after which a worker counts as dead: it has missed two leases."""
        return 2 * self.lease_seconds

    @property
    def default_prompt_set(self) -> str:
        """The set of jobs that name none and run on this environment's policy."""
        return self.prompt_set_of(self.policy)

    def prompt_set_of(self, policy: str) -> str:
        """The set of a policy's jobs that name none: the shipped models have their own language."""
        return self.prompt_set or ("tiny" if policy == DEMO else "conversation")

    @property
    def stopping(self) -> dict[str, Any]:
        """The parameters by which jobs end early that say nothing of it."""
        return {"early_stop": self.early_stop, "stop_on_decline": self.stop_on_decline}

    @property
    def max_body_bytes(self) -> int:
        """The largest request: any allowed input, every character escaped as JSON allows, and the rest."""
        return 12 * self.max_input_characters + 256 * 1024


_BROKER_OPTIONS = {"ssl_ca_certs", "ssl_ca_path", "ssl_certfile", "ssl_keyfile", "ssl_check_hostname", "ssl_cert_reqs"}
"""What both Celery and redis-py take behind a broker's URL; what one of them does not know fails at its first use."""


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


def _holds_certificates(file: Path) -> bool:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(file)
    except (OSError, ValueError):
        return False
    return True


def explained(error: ValidationError) -> str:
    """What is wrong with the environment: each variable by its name, without its value, which may be secret."""
    return "; ".join(_explained(e) for e in error.errors(include_url=False, include_input=False))


def _explained(error: ErrorDetails) -> str:
    message = error["msg"].removeprefix("Value error, ")
    return f"TPO_{'_'.join(map(str, error['loc'])).upper()}: {message}" if error["loc"] else message


def check_server_url(name: str, address: str) -> None:
    """Raise ValueError unless a model's server can be asked at this address."""
    try:
        parts = urlsplit(address)
        _ = parts.port
    except ValueError:
        raise ValueError(f"{name} is not a valid address") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{name} must start with http:// or https:// and name a host")
    if parts.username is not None or parts.password is not None:
        raise ValueError(f"{name} must hold no user or password: a key has a setting of its own")
    if parts.query or parts.fragment:
        raise ValueError(f"{name} must hold neither a query nor a fragment")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach that address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@cache
def settings() -> Settings:
    """This process's settings. Raises pydantic.ValidationError, which names the variable."""
    return Settings()
