"""Schemas of requests and responses, except job submissions (`tpo.jobs.submission`) and `tpo.openai`."""

from api.schemas.errors import *  # noqa: F403
from api.schemas.jobs import *  # noqa: F403
from api.schemas.server import *  # noqa: F403
