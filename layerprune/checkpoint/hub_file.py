"""A file of a Hub repo that has not been fetched: its size is asked for, its bytes are read by ranges."""

from __future__ import annotations

import errno
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePath
from typing import Any

from layerprune.errors import one_line

PARTIAL_CONTENT = 206  # HTTP status of an answer that is the range asked for and not the whole file
TIMEOUT = 30  # seconds without a byte, before an attempt counts as failed


@dataclass(frozen=True)
class HubFile:
    """One file at one commit of a Hub repo; opens for reading like a ``Path``."""

    repo: str
    revision: str  # commit hash
    path: str  # inside the repo

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision[:7]}/{self.path}"

    @property
    def name(self) -> str:
        return PurePath(self.path).name

    def open(self, mode: str = "rb", buffering: int = 0) -> io.RawIOBase:
        """Return a seekable reader, unbuffered whatever is asked; what goes wrong on the way is an ``OSError``."""
        return _Reader(self)

    @cached_property
    def size(self) -> int:
        """Bytes, as the Hub says."""
        from huggingface_hub import get_hf_file_metadata

        with _as_os_error():
            size = get_hf_file_metadata(self._url).size
        if size is None:
            raise OSError(errno.EIO, "the Hub does not say how large it is")
        return int(size)

    def read(self, start: int, length: int) -> bytes:
        """Return bytes [start, start + length); fewer where the file ends. Passing faults are tried again."""
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

        stop = min(start + length, self.size)
        if start >= stop:
            return b""
        headers = {**build_hf_headers(), "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        with _as_os_error(), http_stream_backoff("GET", self._url, headers=headers, timeout=TIMEOUT) as response:
            hf_raise_for_status(response)
            if response.status_code != PARTIAL_CONTENT:
                raise OSError(errno.EIO, "the Hub sends whole files where a range is asked for; fetch the model first")
            return bytes(response.read())

    @cached_property
    def _url(self) -> str:
        from huggingface_hub import hf_hub_url

        return hf_hub_url(self.repo, self.path, revision=self.revision)


File = Path | HubFile  # where a tensor is


@contextmanager
def _as_os_error() -> Iterator[None]:
    """Turn what HTTP can raise into an ``OSError`` of one line."""
    from huggingface_hub.errors import HTTPError  # of the HTTP client that it uses, httpx or httpx2

    try:
        yield
    except (OSError, HTTPError) as error:
        if getattr(error, "errno", None) == errno.EIO:
            raise
        raise OSError(errno.EIO, one_line(error)) from error


class _Reader(io.RawIOBase):
    """A position in a ``HubFile``."""

    def __init__(self, file: HubFile) -> None:
        self.file, self.position = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: 0}[whence]
        self.position = start + offset if whence != io.SEEK_END else self.file.size + offset
        return self.position

    def readinto(self, buffer: Any) -> int:
        data = self.file.read(self.position, len(buffer))
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)
