"""Variables that Kubernetes sets in each container for each service of the namespace, known as service links.

A service named `tpo` leads to `TPO_PORT=tcp://10.0.0.1:8000` and six more variables, in the form of Docker's links
(https://kubernetes.io/docs/concepts/services-networking/service/#environment-variables).
"""

import logging
import re
from collections.abc import Mapping
from functools import cache

_log = logging.getLogger(__name__)

_NAME = re.compile(
    r"\w+(_SERVICE_HOST|_SERVICE_PORT(_\w+)?|_PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)", re.IGNORECASE
)
_ADDRESS = re.compile(r"(tcp|udp|sctp)://[^/@]+:\d+", re.IGNORECASE)


def without_service_links(variables: Mapping[str, str | None], prefix: str) -> dict[str, str | None]:
    """Return the variables without service links, and log a warning about those with this prefix, once for each set."""
    links = {name for name, value in variables.items() if _NAME.fullmatch(name) or _ADDRESS.fullmatch(value or "")}
    if ours := sorted(name.upper() for name in links if name.upper().startswith(prefix)):
        _warn(tuple(ours))
    return {name: value for name, value in variables.items() if name not in links}


@cache
def _warn(names: tuple[str, ...]) -> None:
    _log.warning(
        "Ignored variables that Kubernetes sets for a service: %s. Set enableServiceLinks: false in the pod, or give "
        "the service another name.",
        ", ".join(names),
    )
