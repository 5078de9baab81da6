"""What crosses the wire, but for a job's submission (`tpo.jobs.submission`) and OpenAI's shapes (`tpo.openai`)."""

from api.schemas.errors import *  # noqa: F403
from api.schemas.jobs import *  # noqa: F403
from api.schemas.server import *  # noqa: F403
