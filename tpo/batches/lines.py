"""Lines of a batch's input file, and what they ask for."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol

from tpo.batches.tables import BatchLine
from tpo.core.errors import InvalidInputError
from tpo.jobs.submission import Submit
from tpo.jobs.view import JobView

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class RawLine(NamedTuple):
    """One line of a file."""

    text: bytes | None
    """Without its end; None if it is too long to be held."""
    size: int
    """Bytes, its end included."""
    ended: bool = True
    """False for a piece of a line that is too long, if more of it follows."""

    @property
    def content(self) -> bytes:
        """The text without a byte order mark."""
        return (self.text or b"").removeprefix(_BYTE_ORDER_MARK)

    @property
    def is_blank(self) -> bool:
        """Return True if the line is empty, so that it is not a request."""
        return self.text is not None and not self.content.strip()


class LineRequest(Protocol):
    """A line that requests a job."""

    @property
    def custom_id(self) -> str:
        """The id that the client gave to the line."""
        ...

    def submission(self) -> Submit:
        """Return the job that the line asks for. Raises InvalidInputError, which names a field of the line."""
        ...

    def with_request_names(self, error: InvalidInputError) -> InvalidInputError:
        """Return an error about the submission under the name that its field has in the line."""
        ...


class RefusedLine(NamedTuple):
    """A line that asks for no job, and why."""

    custom_id: str | None
    error: InvalidInputError


class LineFormat(Protocol):
    """The format of a batch's files: reads requests from its input, writes results to its output."""

    def parse(self, line: RawLine, endpoint: str) -> LineRequest | RefusedLine:
        """Read one line of the input."""
        ...

    def render(self, endpoint: str, line: BatchLine, job: JobView | None) -> bytes:
        """Write one line of the output or of the errors, with its end."""
        ...


def split_lines(parts: Iterable[bytes], longest: int, *, inside_line: bool = False) -> Iterator[RawLine]:
    """Split a stream of bytes into lines. Holds no more than a part and one line of at most `longest` bytes.

    A line that is too long comes in pieces, one for each part, so that a caller can stop within it; all but the last
    piece have `ended` False. With `inside_line` the stream begins within such a line.
    """
    kept, size, too_long = bytearray(), 0, inside_line
    for part in parts:
        if too_long and size and part:
            yield RawLine(None, size, ended=False)
            size = 0
        at = 0
        while at < len(part):
            end = part.find(b"\n", at)
            stop = len(part) if end < 0 else end
            size += stop - at
            too_long = too_long or len(kept) + stop - at > longest
            if too_long:
                kept.clear()
            else:
                kept += part[at:stop]
            at = stop
            if end >= 0:
                yield RawLine(None if too_long else bytes(kept), size + 1)
                kept, size, too_long, at = bytearray(), 0, False, stop + 1
    if size:
        yield RawLine(None if too_long else bytes(kept), size)
