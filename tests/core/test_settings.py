"""Settings: defaults, refused values, and secrets that are never shown."""

import os
from pathlib import Path

import pytest
from pydantic import ValidationError

from tpo.settings import Settings, is_loopback

SECRET = "correct-horse-battery"


@pytest.fixture(autouse=True)
def _no_other_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [n for n in os.environ if n.startswith("TPO_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def test_defaults_stay_on_this_machine() -> None:
    settings = Settings()
    assert settings.database_url.get_secret_value() == "sqlite:///.tpo/tpo.db"
    assert settings.broker_url.get_secret_value() == "redis://127.0.0.1:6379/0"
    assert is_loopback(settings.host)
    assert is_loopback(settings.flower_host)
    assert (settings.policy, settings.reward_model, settings.default_prompt_set) == ("demo", "demo", "tiny")


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"TPO_DATABASE_URL": "mysql://127.0.0.1/tpo"}, "TPO_DATABASE_URL must start with"),
        ({"TPO_DATABASE_URL": "postgresql://127.0.0.1/tpo"}, r"postgresql\+psycopg://"),
        ({"TPO_BROKER_URL": "amqp://127.0.0.1"}, "TPO_BROKER_URL must start with redis"),
        ({"TPO_HOST": "0.0.0.0"}, "set TPO_API_KEY or TPO_REQUIRE_KEY, or bind to 127.0.0.1"),
        ({"TPO_HOST": "tpo.example"}, "set TPO_API_KEY"),
        ({"TPO_API_KEY": "short"}, "at least 16"),
        ({"TPO_FLOWER_HOST": "::"}, "set TPO_FLOWER_BASIC_AUTH"),
        ({"TPO_FLOWER_BASIC_AUTH": "user:short"}, "8 characters"),
        ({"TPO_CONCURRENCY": "0"}, "concurrency"),
        ({"TPO_LEASE_SECONDS": "0"}, "lease_seconds"),
        ({"TPO_MAX_ATTEMPTS": "0"}, "max_attempts"),
        ({"TPO_PORT": "70000"}, "port"),
        ({"TPO_DEVICE": "abacus"}, "device"),
        ({"TPO_MAX_SAMPLE_SIZE": "65"}, "max_sample_size"),
        ({"TPO_EARLY_STOP": '{"patience": 0}'}, "early_stop.patience"),
        ({"TPO_DATABASE_URL": "postgresql+psycopg://u:word@h:port/db"}, "TPO_DATABASE_URL: its port"),
        ({"TPO_DATABASE_URL": "sqlite:///"}, "must name a file"),
        ({"TPO_DATABASE_URL": "sqlite:///:memory:"}, "must name a file"),
        ({"TPO_BROKER_URL": "redis://:word@h:notaport/0"}, "TPO_BROKER_URL: its port"),
        ({"TPO_BROKER_URL": "redis://:word@h/main"}, "TPO_BROKER_URL: its database is not a number"),
        ({"TPO_BROKER_URL": "redis://:word@h/0?db=1"}, "TPO_BROKER_URL: it takes rediss:// with ssl_ca_certs"),
        ({"TPO_BROKER_URL": "rediss://h/0?socket_timeout=1"}, "and no other option"),
        ({"TPO_BROKER_URL": "rediss://h/0?ssl_cert_reqs=no"}, "ssl_cert_reqs is none, optional or required"),
        ({"TPO_BROKER_URL": "rediss://h/0?ssl_ca_certs=/no/ca"}, "ssl_ca_certs names /no/ca, which does not exist"),
        ({"TPO_BROKER_URL": "sentinel://h:26379"}, "Redis Sentinel is not supported"),
        ({"TPO_OPENAI_URL": "vllm:8000"}, "TPO_OPENAI_URL must start with http"),
        ({"TPO_OPENAI_URL": "http://user:word@vllm:8000/v1"}, "must hold no user or password"),
        ({"TPO_REWARD_URL": "http://vllm:notaport"}, "TPO_REWARD_URL is not a valid address"),
        ({"TPO_REWARD_URL": "http://vllm/?key=1"}, "neither a query nor a fragment"),
        ({"TPO_POLICY": "openai:"}, "the model's name comes after the colon"),
        ({"TPO_REWARD_MODEL": "sglang:"}, "the model's name comes after the colon"),
        ({"TPO_OPENAI_EXTRA_BODY": "top_k=20"}, "openai_extra_body\n.*must be a JSON object"),
        ({"TPO_OPENAI_EXTRA_BODY": '{"seed": 1}'}, "openai_extra_body\n.*seed cannot be set here"),
        ({"TPO_SERVER_API_KEYS": "[1]"}, "must be a JSON object"),
        ({"TPO_REWARD_FILE": "quality.toml"}, "TPO_REWARD_FILE needs a name .* set TPO_REWARD_MODEL"),
        ({"TPO_PROMPT_SET": "nope"}, "TPO_PROMPT_SET: no such prompt_set; there are conversation"),
    ],
)
def test_unsafe_values_are_refused(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValidationError, match=message):
        Settings()


@pytest.mark.parametrize(
    "url", ["redis://h", "redis://:word@h:1/15", f"rediss://h/0?ssl_cert_reqs=none&ssl_ca_certs={__file__}"]
)
def test_broker_url_accepts_redis_urls(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("TPO_BROKER_URL", url)
    assert Settings().broker_url.get_secret_value() == url


@pytest.mark.parametrize("word", ["none", "optional", "required"])
def test_broker_url_accepts_spelling_of_celery(monkeypatch: pytest.MonkeyPatch, word: str) -> None:
    monkeypatch.setenv("TPO_BROKER_URL", f"rediss://h/0?ssl_cert_reqs=CERT_{word.upper()}")
    assert Settings().broker_url.get_secret_value() == f"rediss://h/0?ssl_cert_reqs={word}"


def test_api_key_allows_public_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TPO_HOST", "0.0.0.0")
    monkeypatch.setenv("TPO_API_KEY", SECRET)
    assert Settings().host == "0.0.0.0"


def test_secrets_are_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TPO_API_KEY", SECRET)
    monkeypatch.setenv("TPO_BROKER_URL", f"redis://:{SECRET}@127.0.0.1:6379/0")
    monkeypatch.setenv("TPO_DATABASE_URL", f"postgresql+psycopg://me:{SECRET}@127.0.0.1/tpo")
    monkeypatch.setenv("TPO_FLOWER_BASIC_AUTH", f"user:{SECRET}")
    monkeypatch.setenv("TPO_OPENAI_API_KEY", SECRET)
    monkeypatch.setenv("TPO_REWARD_API_KEY", SECRET)
    monkeypatch.setenv("TPO_SERVER_API_KEYS", f'{{"judge": "{SECRET}"}}')
    assert SECRET not in repr(Settings()) + str(Settings()) + Settings().model_dump_json()
    monkeypatch.setenv("TPO_BROKER_URL", f"amqp://:{SECRET}@127.0.0.1")
    monkeypatch.setenv("TPO_FLOWER_BASIC_AUTH", f"{SECRET}{SECRET}")
    monkeypatch.setenv("TPO_OPENAI_URL", f"https://user:{SECRET}@host/v1")
    monkeypatch.setenv("TPO_SERVER_API_KEYS", f'{{"judge": {SECRET}}}')
    with pytest.raises(ValidationError) as raised:
        Settings()
    assert SECRET not in str(raised.value)


def test_default_prompt_set_follows_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TPO_POLICY", "some/model")
    assert Settings().default_prompt_set == "conversation"
    monkeypatch.setenv("TPO_PROMPT_SET", "separate")
    assert Settings().default_prompt_set == "separate"


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_is_loopback_accepts_local_hosts(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org", ""])
def test_is_loopback_rejects_reachable_hosts(host: str) -> None:
    assert not is_loopback(host)
