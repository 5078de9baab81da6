"""Variables of Kubernetes for services that share the prefix of the settings."""

import logging

import pytest

from tpo.service_links import _warn
from tpo.settings import Settings


def link_variables(service: str, port: int) -> dict[str, str]:
    """Return the variables that Kubernetes sets for a service with one port."""
    name, address = service.upper().replace("-", "_"), "10.0.0.1"
    return {
        f"{name}_SERVICE_HOST": address,
        f"{name}_SERVICE_PORT": str(port),
        f"{name}_PORT": f"tcp://{address}:{port}",
        f"{name}_PORT_{port}_TCP": f"tcp://{address}:{port}",
        f"{name}_PORT_{port}_TCP_PROTO": "tcp",
        f"{name}_PORT_{port}_TCP_PORT": str(port),
        f"{name}_PORT_{port}_TCP_ADDR": address,
    }


@pytest.fixture(autouse=True)
def clear_warnings() -> None:
    _warn.cache_clear()


@pytest.mark.parametrize("service", ["tpo", "tpo-api", "tpo-flower", "tpo-broker", "tpo-webhook", "tpo-max-iterations"])
def test_settings_ignore_service_links(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, service: str
) -> None:
    variables = link_variables(service, 8000)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with caplog.at_level(logging.WARNING):
        assert Settings() == Settings()
    [warning] = caplog.messages
    assert all(name in warning for name in variables)
    assert "Kubernetes" in warning
    assert "enableServiceLinks: false" in warning


def test_settings_keep_real_values(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    for name, value in link_variables("tpo-api", 9000).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TPO_PORT", "9001")
    monkeypatch.setenv("TPO_OPENAI_URL", "http://10.0.0.1:8000/v1")
    found = Settings()
    assert (found.port, found.openai_url) == (9001, "http://10.0.0.1:8000/v1")
    assert len(caplog.messages) == 1


def test_links_of_other_services_are_ignored_silently(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name, value in link_variables("other", 8000).items():
        monkeypatch.setenv(name, value)
    assert Settings().port == Settings.model_fields["port"].default
    assert caplog.messages == []
