"""Byte ranges of a file on the Hub, over HTTP with the session, retries and credentials of huggingface_hub."""

import threading
import time
from collections.abc import Callable
from urllib.parse import urljoin, urlsplit

import httpx2
from huggingface_hub import constants, get_hf_file_metadata
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff


__all__ = ["ByteRanges", "RangesUnsupported"]

_TRIES = 5  # requests in a row that bring no byte, as in huggingface_hub's own downloads
_EXPIRED = (401, 403, 404, 410)  # answers of a storage whose signed address is too old


class RangesUnsupported(Exception):
    """The server answers a request for a range with the whole file."""


class ByteRanges:
    """Reader of byte ranges of one file.

    The address in the storage (LFS or Xet) to which the Hub redirects is asked for once, and again when it has
    expired. Credentials go to the Hub alone. Several threads may read at once.

    Args:
        url (`str`): address of the file on the Hub, from `hf_hub_url`.
        token: as in `hf_hub_download`.
    """

    def __init__(self, url: str, token: str | bool | None):
        self._url, self._token = url, token
        self._lock = threading.Lock()
        self._location: str | None = None

    def read(self, start: int, end: int, take: Callable[[bytes], None]) -> None:
        """Read the bytes from `start` to `end`, in order; an answer that breaks off is continued where it ended.

        Args:
            take: called with each part as it arrives.

        Raises:
            RangesUnsupported: the server answers with the whole file; nothing of it was read.
            HfHubHTTPError, httpx2.HTTPError: the server refuses, or the connection failed several times.
        """
        tries, renewed = 0, False
        while start < end:
            location = self._address()
            received, failure, expired = self._read_part(location, start, end, take)
            start += received
            if expired and not renewed:
                renewed = True
                self._renew(location)
                continue
            if start >= end:
                return
            tries = 0 if received else tries + 1
            if tries > _TRIES:
                raise failure or httpx2.RemoteProtocolError("the answer holds fewer bytes than were asked for")
            time.sleep(1)

    def _read_part(
        self, location: str, start: int, end: int, take: Callable[[bytes], None]
    ) -> tuple[int, httpx2.TransportError | None, bool]:
        """Make one request; return the bytes received, what broke the answer off, and whether the address expired."""
        headers = build_hf_headers(token=self._token)
        if urlsplit(location).netloc != urlsplit(self._url).netloc:
            headers.pop("authorization", None)
        headers |= {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
        received = 0
        with http_stream_backoff(
            "GET", location, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
        ) as response:
            if location != self._url and response.status_code in _EXPIRED:
                return 0, None, True
            hf_raise_for_status(response)
            if response.status_code != 206:
                raise RangesUnsupported
            try:
                for part in response.iter_raw():
                    wanted = part[: end - start - received]
                    take(wanted)
                    received += len(wanted)
                    if len(wanted) < len(part):
                        break  # more than was asked for
            except httpx2.TransportError as error:
                return received, error, False
        return received, None, False

    def _address(self) -> str:
        with self._lock:
            if self._location is None:
                metadata = get_hf_file_metadata(self._url, token=self._token, retry_on_errors=True)
                self._location = urljoin(self._url, metadata.location)
            return self._location

    def _renew(self, expired: str) -> None:
        with self._lock:
            if self._location == expired:
                self._location = None
