"""Pages of shards whose lines are read singly, so that a part of a shard can be verified without the rest.

A shard of such a kind (`ShardKind.paged`) is hashed in pages of `Manifest.page_size` bytes, the last of which may be
shorter. The hashes of all pages, in the order of the manifest's files, are the tensor of the `page_hashes` shard.
"""

import hashlib
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy
from huggingface_hub.utils import WeakFileLock

from ..errors import BankError
from .files import LARGEST_HEADER, FileMark, StoredTensor, file_mark, read_layout, refuse_link
from .schema import LARGEST_PAGE, SMALLEST_PAGE, ShardFile


__all__ = ["Lines", "PartialShard", "check_pages", "hash_pages", "line_spans", "page_hashes", "page_size",
           "read_lines"]  # fmt: skip

Lines = numpy.ndarray[Any, numpy.dtype[Any]]  # (lines, bytes of a line) uint8
Read = Callable[[int, int, Callable[[bytes], None]], None]  # (start, end, called with each part)

_REQUESTS = 16  # at a time; each is a few kilobytes, so that most of its time is waiting
_RUN = 1 << 23  # bytes of neighbouring pages that are asked for together, at most
_QUERY = 1000  # lines that a query reads
_BINARY = getattr(os, "O_BINARY", 0)  # of Windows


def page_size(total: int) -> int:
    """Return the page size for shards of this many bytes together: a power of two.

    Pages of p bytes cost 32/p of the shards for their hashes, and each of q lines half a page too much before and
    after its bytes in either of two tensors: 32·total/p + 2·q·p is least at p = 4·sqrt(total/q).
    """
    best = 4 * math.sqrt(total / _QUERY)
    return min(max(1 << round(math.log2(max(best, 1))), SMALLEST_PAGE), LARGEST_PAGE)


def hash_pages(path: Path, page: int) -> bytes:
    """Return the sha256 of every page of a file, 32 bytes each, one after the other."""
    with open(path, "rb") as file:
        return b"".join(hashlib.sha256(part).digest() for part in iter(lambda: file.read(page), b""))


def page_hashes(shards: Iterable[tuple[ShardFile, Path]], pages: range) -> Lines:
    """Return the hashes of a range of pages, (pages, 32) uint8, from verified shards of page hashes."""
    parts = [numpy.zeros((0, 32), numpy.uint8)]
    for file, path in shards:
        first, last = max(pages.start - file.first, 0), min(pages.stop - file.first, file.lines)
        if first < last:
            parts.append(read_lines(path, read_layout(path)["page_hashes"], range(first, last)))
    return numpy.concatenate(parts)


def check_pages(path: Path, hashes: Lines, page: int) -> None:
    """Compare the pages of a shard on disk with their hashes, (pages, 32) uint8.

    Raises:
        BankError: naming the file and the first page that differs.
    """
    actual = numpy.frombuffer(hash_pages(path, page), numpy.uint8).reshape(-1, 32)
    differs = (actual != hashes).any(1)
    if differs.any():
        wrong = int(differs.argmax())
        raise BankError(
            f"{path.name}: page {wrong} has sha256 {actual[wrong].tobytes().hex()[:16]}... and page_hashes says "
            f"{hashes[wrong].tobytes().hex()[:16]}.... The bank could not be read in parts. Build it again"
        )


def line_spans(tensors: Iterable[StoredTensor], lines: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield start and end of the bytes of these lines in the file, for one tensor after the other."""
    for tensor in tensors:
        for line in lines:
            yield tensor.start + line * tensor.width, tensor.start + (line + 1) * tensor.width


def read_lines(path: Path, tensor: StoredTensor, lines: Sequence[int]) -> Lines:
    """Return lines of a tensor in a mapped file, (lines, bytes of a line) uint8."""
    if not tensor.width or not len(lines):
        return numpy.zeros((len(lines), tensor.width), numpy.uint8)
    try:
        stored = numpy.memmap(path, numpy.uint8, "r", tensor.start, (tensor.shape[0], tensor.width))
    except (OSError, ValueError) as error:
        raise BankError(f"{path} cannot be read ({error}). It was removed or damaged. Open the bank again") from error
    chosen = stored[lines.start : lines.stop] if isinstance(lines, range) and lines.step == 1 else stored[list(lines)]
    return numpy.array(chosen)


class PartialShard:
    """A shard on the Hub of which single pages are on disk, in a sparse file of the shard's own size.

    The hashes decide which pages are there: neither a hole is what its hash says, nor a page that another process has
    half written. So there is no index that could be wrong, and several processes may fill the same file, since each
    writes nothing but verified pages. A page is hashed when this object first needs it, and again after the file was
    changed by others.

    Args:
        path (`Path`): the sparse file; made when the first page is written.
        file (`ShardFile`): the shard.
        page (`int`): bytes of a page.
        hashes: (pages, 32) uint8.
        read: `ByteRanges.read` of the shard; raises BankError where only the cache may be read.
    """

    def __init__(self, path: Path, file: ShardFile, page: int, hashes: Lines, read: Read):
        self.path, self._file, self._page, self._hashes, self._read = path, file, page, hashes, read
        self._lock = threading.Lock()
        self._verified: set[int] = set()
        self._mark: FileMark = None

    @cached_property
    def layout(self) -> dict[str, StoredTensor]:
        """The shard's tensors by name, from its header, after the checks of `read_header`.

        Raises:
            BankError: no sound header, or pages of it that cannot be had.
        """
        self.ensure([(0, min(8, self._file.size))])
        size = 0
        if self.path.is_file():
            with open(self.path, "rb") as file:
                size = min(int.from_bytes(file.read(8), "little"), LARGEST_HEADER)
        self.ensure([(0, min(8 + size, self._file.size))])
        return read_layout(self.path)

    def ensure(self, spans: Iterable[tuple[int, int]]) -> None:
        """Make the sparse file hold these ranges of bytes, every page of them verified.

        Raises:
            BankError: a page is not what its hash says, or cannot be downloaded or written.
            RangesUnsupported: the server answers with whole files only.
        """
        pages: set[int] = set()
        for start, end in spans:
            if start < end:
                pages.update(range(start // self._page, -(-end // self._page)))
        with self._lock:
            refuse_link(self.path)
            if file_mark(self.path) != self._mark:
                self._verified.clear()
            missing = self._missing(sorted(pages - self._verified))
            if missing:
                with self._other_processes_waiting():
                    missing = self._missing(missing)
                    if missing:
                        self._download(missing)
            self._mark = file_mark(self.path)

    @contextmanager
    def _other_processes_waiting(self) -> Iterator[None]:
        """Let one process download at a time, so that ranks that read the same rows share the pages."""
        with ExitStack() as stack:
            with suppress(OSError):  # a folder that cannot be written is named when there is a page to write
                self.path.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(WeakFileLock(self.path.with_suffix(".lock")))
            yield

    def _missing(self, pages: list[int]) -> list[int]:
        """Verify pages that may be in the file; return those that are not."""
        if not pages or not self.path.is_file() or self.path.stat().st_size != self._file.size:
            return pages
        missing = []
        with open(self.path, "rb") as file:
            for number in pages:
                file.seek(number * self._page)
                if self._is_page(number, file.read(self._length(number))):
                    self._verified.add(number)
                else:
                    missing.append(number)
        return missing

    def _download(self, pages: list[int]) -> None:
        """Download pages, neighbours together, and write them into the file."""
        runs = list(_runs(pages, max(1, _RUN // self._page)))
        with ThreadPoolExecutor(min(_REQUESTS, len(runs))) as pool:
            try:
                for done in [pool.submit(self._fetch, run) for run in runs]:
                    done.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _fetch(self, run: range) -> None:
        waiting, number = bytearray(), run.start

        def take(part: bytes) -> None:
            nonlocal number
            waiting.extend(part)
            while number < run.stop and len(waiting) >= self._length(number):
                page = bytes(waiting[: self._length(number)])
                del waiting[: len(page)]
                self._keep(number, page)
                number += 1

        self._read(run.start * self._page, min(run.stop * self._page, self._file.size), take)

    def _keep(self, number: int, page: bytes) -> None:
        """Write a page that was downloaded, if it is what its hash says."""
        start = number * self._page
        if not self._is_page(number, page):
            raise BankError(
                f"{self._file.name}: page {number} (bytes {start} to {start + len(page)}) arrived with sha256 "
                f"{hashlib.sha256(page).hexdigest()[:16]}... and page_hashes says "
                f"{self._hashes[number].tobytes().hex()[:16]}.... It was changed or damaged. Push the bank again"
            )
        try:
            with open(os.open(self.path, os.O_RDWR | os.O_CREAT | _BINARY, 0o644), "r+b") as file:
                if os.fstat(file.fileno()).st_size != self._file.size:
                    file.truncate(self._file.size)
                file.seek(start)
                file.write(page)
        except OSError as error:
            raise BankError(
                f"{self.path} cannot be written ({error}). A query keeps there what it downloads. Make room, or name "
                "another folder with cache_dir= or HF_HUB_CACHE"
            ) from error
        self._verified.add(number)

    def _length(self, number: int) -> int:
        return min(self._page, self._file.size - number * self._page)

    def _is_page(self, number: int, content: bytes) -> bool:
        return hashlib.sha256(content).digest() == self._hashes[number].tobytes()


def _runs(pages: list[int], longest: int) -> Iterator[range]:
    """Join page numbers in ascending order into ranges of neighbours."""
    start = end = pages[0]
    for number in pages:
        if number > end or number - start >= longest:
            yield range(start, end)
            start = number
        end = number + 1
    yield range(start, end)
