"""Rows read from a bank on the Hub by verified byte ranges, against the server of tests/helpers/hub_server.py."""

import hashlib
import json
import pickle
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_fwdattr.bank.bank import ResponseBank
from hf_fwdattr.bank.codes import RowCodes
from hf_fwdattr.bank.files import read_layout
from hf_fwdattr.bank.pages import PartialShard, hash_pages, line_spans, page_size
from hf_fwdattr.bank.schema import ShardFile
from hf_fwdattr.bank.writing import BankContents, write_bank
from hf_fwdattr.errors import BankError
from tests.bank.test_bank import described, written_whole
from tests.bank.test_damage import resign, shard
from tests.helpers.hub_server import TOKEN
from tests.helpers.hub_world import World


NAME = "me/adapter"
ROWS, SIDE = 400, 64
SOME = [7, 300, 301, 7, 399]


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> ResponseBank:
    """A bank of 400 rows of 4,096 numbers in two shards of row codes, hashed in pages of 4 KiB."""
    generator, size = torch.Generator().manual_seed(0), SIDE * SIDE
    fields = described(
        parameters=[{"name": "a.weight", "shape": [SIDE, SIDE]}], dataset={"rows": ROWS}, sources=[],
        source_directions=0, source_scales=[],
    )  # fmt: skip
    contents = BankContents(
        fields, [torch.randn(3, size, generator=generator)], torch.randn(ROWS, 3, generator=generator),
        torch.arange(ROWS), torch.zeros(ROWS, 16, dtype=torch.uint8), torch.full((ROWS,), -1),
        row_codes=RowCodes.of(torch.randn(ROWS, size, generator=generator), 8),
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("bank")
    made = write_bank(folder, contents, shard_size=250 * size)
    assert len(made.manifest.files_of("row_codes")) == 2
    assert made.manifest.page_size == 4096
    return made


def opened(hub: World, bank: ResponseBank, **options: Any) -> ResponseBank:
    """Push a bank and open it from an empty cache."""
    bank.push_to_hub(NAME)
    hub.clean()
    return ResponseBank.from_pretrained(NAME, **options)


def pages_of(bank: ResponseBank, rows: list[int]) -> dict[str, set[int]]:
    """Numbers of the pages, by shard, in which the header and these rows' codes lie."""
    pages: dict[str, set[int]] = {}
    for file in bank.manifest.files_of("row_codes"):
        lines = [row - file.first for row in rows if 0 <= row - file.first < file.lines]
        spans = [(0, 8), *line_spans(read_layout(bank.path(file)).values(), lines)] if lines else []
        pages[file.name] = {number for start, end in spans for number in range(start // 4096, -(-end // 4096))}
    return pages


def bytes_of(bank: ResponseBank, pages: dict[str, set[int]]) -> int:
    sizes = {file.name: file.size for file in bank.manifest.files}
    return sum(min(4096, sizes[name] - 4096 * number) for name in pages for number in pages[name])


def partial_files(hub: World) -> list[Path]:
    return sorted(hub.cache.rglob("fwdattr-pages/*/*.safetensors"))


def test_only_the_pages_of_asked_rows_are_downloaded(hub: World, bank: ResponseBank) -> None:
    remote, pages = opened(hub, bank), pages_of(bank, SOME)
    assert torch.equal(remote.decode_rows(SOME), bank.decode_rows(SOME))
    assert hub.server.sent("row_codes") == bytes_of(bank, pages) < sum(f.size for f in bank.manifest.files) / 20
    runs = sum(number - 1 not in numbers for numbers in pages.values() for number in numbers)
    assert hub.server.count("GET", "row_codes") <= runs + 1  # neighbours share a request
    assert not list(hub.cache.rglob("snapshots/**/row_codes-*"))


def test_pages_are_kept_for_the_next_query(hub: World, bank: ResponseBank) -> None:
    remote = opened(hub, bank)
    remote.decode_rows(SOME)
    before = hub.server.sent("row_codes")
    remote.decode_rows([301, 7])
    again = ResponseBank.from_pretrained(NAME)
    assert torch.equal(again.decode_rows(SOME), bank.decode_rows(SOME))
    assert hub.server.sent("row_codes") == before
    assert torch.equal(again.decode_rows([*SOME, 8]), bank.decode_rows([*SOME, 8]))
    assert hub.server.sent("row_codes") == bytes_of(bank, pages_of(bank, [*SOME, 8]))


def test_whole_shards_are_downloaded_for_all_rows_only(hub: World, bank: ResponseBank) -> None:
    remote = opened(hub, bank)
    first, second = bank.manifest.files_of("row_codes")
    rows = [*range(first.lines), ROWS - 1]
    assert torch.equal(remote.decode_rows(rows), bank.decode_rows(rows))
    assert hub.server.sent(first.name) == first.size
    assert hub.server.sent(second.name) < second.size / 10
    assert [path.name for path in hub.cache.rglob("snapshots/**/row_codes-*")] == [first.name]
    assert torch.equal(torch.cat([block.decode() for block in remote.row_codes()]), bank.decode_rows(range(ROWS)))
    before = hub.server.sent("row_codes")
    assert torch.equal(ResponseBank.from_pretrained(NAME).decode_rows(SOME), bank.decode_rows(SOME))
    assert hub.server.sent("row_codes") == before


def test_wrong_page_is_refused_and_not_kept(hub: World, bank: ResponseBank) -> None:
    """The list of files and bank.json are right; one bit that the server sends is not."""
    remote = opened(hub, bank)
    page = max(pages_of(bank, [300])[bank.manifest.files_of("row_codes")[1].name])

    def flip(path: str, data: bytes) -> bytes:
        at = 4096 * page + 77
        return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :] if "row_codes" in path else data

    hub.server.served = flip
    message = rf"row_codes-\S+-00001\.safetensors: page {page} \(bytes {4096 * page} to \d+\) arrived with sha256 \w+"
    for _ in range(2):
        with pytest.raises(BankError, match=message):
            remote.decode_rows([300])
    hub.server.reset()
    assert torch.equal(remote.decode_rows([300]), bank.decode_rows([300]))


def test_answer_that_breaks_off_is_continued(hub: World, bank: ResponseBank) -> None:
    remote, cuts = opened(hub, bank), list[str]()

    def fault(method: str, path: str) -> int | None:
        if method == "GET" and "row_codes" in path and len(cuts) < 5:
            cuts.append(path)
            return 100
        return None

    hub.server.fault = fault
    assert torch.equal(remote.decode_rows(SOME), bank.decode_rows(SOME))
    assert len(cuts) == 5
    assert hub.server.sent("row_codes") == bytes_of(bank, pages_of(bank, SOME))


@pytest.mark.parametrize("fault", [0, "drop"])
def test_server_that_sends_nothing_is_named(hub: World, bank: ResponseBank, fault: int | str) -> None:
    remote = opened(hub, bank)
    hub.server.fault = lambda method, path: fault if "row_codes" in path else None
    with pytest.raises(
        BankError, match=r"range of bytes 0 to 4096 of fwdattr/row_codes-.* of me/adapter@.*connection"
    ):
        remote.decode_rows([7])
    hub.server.reset()
    assert torch.equal(remote.decode_rows([7]), bank.decode_rows([7]))


def test_server_without_ranges_sends_whole_shards(hub: World, bank: ResponseBank) -> None:
    remote = opened(hub, bank)
    hub.server.ranges = False
    assert torch.equal(remote.decode_rows([7]), bank.decode_rows([7]))
    (shard_in_cache,) = hub.cache.rglob("snapshots/**/row_codes-*")
    assert shard_in_cache.stat().st_size == bank.manifest.files_of("row_codes")[0].size
    assert not partial_files(hub)


def test_storage_on_another_host_gets_no_token_and_its_addresses_expire(hub: World, bank: ResponseBank) -> None:
    hub.server.storage = True
    bank.push_to_hub(NAME, private=True)
    hub.clean()
    hub.log_out()
    remote = ResponseBank.from_pretrained(NAME, token=TOKEN)
    assert torch.equal(remote.decode_rows([7]), bank.decode_rows([7]))
    hub.server.signature += 1
    assert torch.equal(remote.decode_rows([8, 9]), bank.decode_rows([8, 9]))
    assert 0 < hub.server.sent("^/storage/") < bank.manifest.bytes / 10
    with pytest.raises(BankError, match="no such repository, or it is private"):
        ResponseBank.from_pretrained(NAME, force_download=True)


def test_changed_page_in_the_cache_is_not_believed(hub: World, bank: ResponseBank) -> None:
    """Changed while the bank is open or before: downloaded again, and refused by name where only the cache is read."""
    remote = opened(hub, bank)
    remote.decode_rows([7])
    (path,) = partial_files(hub)
    span = max(line_spans([read_layout(path)["codes"]], [7]))

    def damage() -> None:
        with path.open("r+b") as file:
            file.seek(span[0] + 5)
            byte = file.read(1)
            file.seek(span[0] + 5)
            file.write(bytes([byte[0] ^ 4]))

    for reader in (remote, ResponseBank.from_pretrained(NAME)):
        damage()
        before = hub.server.sent("row_codes")
        assert torch.equal(reader.decode_rows([7]), bank.decode_rows([7]))
        assert hub.server.sent("row_codes") == before + 4096
    damage()
    hub.offline()
    for reader in (remote, ResponseBank.from_pretrained(NAME)):
        with pytest.raises(BankError, match=r"range of bytes \d+ to \d+ of fwdattr/row_codes-.* is not in the cache"):
            reader.decode_rows([7])


def test_link_in_place_of_kept_pages_is_refused(hub: World, bank: ResponseBank, tmp_path: Path) -> None:
    remote = opened(hub, bank)
    remote.decode_rows([7])
    (path,) = partial_files(hub)
    path.unlink()
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BankError, match="is a link that leads out of the bank's folder"):
        remote.decode_rows([8])
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("how", ["environment", "argument"])
def test_offline_reads_kept_pages_and_names_others(hub: World, bank: ResponseBank, how: str) -> None:
    opened(hub, bank).decode_rows(SOME)
    if how == "environment":
        hub.offline()
    remote = ResponseBank.from_pretrained(NAME, local_files_only=how == "argument")
    before = len(hub.server.requests)
    assert torch.equal(remote.decode_rows(SOME), bank.decode_rows(SOME))
    with pytest.raises(
        BankError, match=r"range of bytes \d+ to \d+ of fwdattr/row_codes-.*-00000.* is not in the cache"
    ):
        remote.decode_rows([100])
    assert len(hub.server.requests) == before


def test_copy_of_an_open_bank_reads(hub: World, bank: ResponseBank) -> None:
    remote = opened(hub, bank)
    remote.decode_rows([7])
    copy = pickle.loads(pickle.dumps(remote))
    assert torch.equal(copy.decode_rows([7, 8]), bank.decode_rows([7, 8]))


def test_cache_folder_and_forced_download_are_honoured(hub: World, bank: ResponseBank, tmp_path: Path) -> None:
    remote = opened(hub, bank, cache_dir=tmp_path / "mine")
    remote.decode_rows([7])
    assert not partial_files(hub)
    assert len(list((tmp_path / "mine").rglob("fwdattr-pages/*/*.safetensors"))) == 1
    once = hub.server.sent("row_codes")
    forced = ResponseBank.from_pretrained(NAME, cache_dir=tmp_path / "mine", force_download=True)
    assert torch.equal(forced.decode_rows([7]), bank.decode_rows([7]))
    assert hub.server.sent("row_codes") == 2 * once


def test_folder_that_cannot_be_written_is_named(hub: World, bank: ResponseBank, tmp_path: Path) -> None:
    remote = opened(hub, bank)
    (hub.cache / "models--me--adapter" / "fwdattr-pages").write_bytes(b"in the way")
    with pytest.raises(BankError, match=r"fwdattr-pages.* cannot be written .*cache_dir= or HF_HUB_CACHE"):
        remote.decode_rows([7])


def test_threads_that_read_at_once_agree(hub: World, bank: ResponseBank) -> None:
    """Two of them share an open bank; the others have opened their own, as other processes would."""
    shared, failures = opened(hub, bank), []
    expected = bank.decode_rows(range(ROWS))
    readers = [shared, shared, *(ResponseBank.from_pretrained(NAME) for _ in range(2))]

    def read(seed: int, reader: ResponseBank) -> None:
        for step in range(3):
            rows = torch.randint(0, ROWS, (9,), generator=torch.Generator().manual_seed(10 * seed + step)).tolist()
            if not torch.equal(reader.decode_rows(rows), expected[rows]):
                failures.append(rows)

    threads = [threading.Thread(target=read, args=pair) for pair in enumerate(readers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert hub.server.sent("row_codes") < bank.manifest.bytes  # no page twice


PROGRAM = """
import hashlib, json, sys
from hf_fwdattr.bank.inspection import BankFiles
bank = BankFiles.from_pretrained(sys.argv[1])
file, rows = bank.manifest.files_of("row_codes")[0], [int(word) for word in sys.argv[2:]]
for row in rows:
    print(row, *(hashlib.sha256(lines.tobytes()).hexdigest() for _, lines in bank.read_lines(file, [row]).values()))
assert "torch" not in sys.modules
"""


def test_processes_that_read_at_once_agree(hub: World, bank: ResponseBank) -> None:
    opened(hub, bank)
    environment = {"HF_HUB_CACHE": str(hub.cache), "HF_ENDPOINT": hub.server.url, "HF_TOKEN": TOKEN, "PATH": "/bin"}
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, NAME]
    processes = [
        subprocess.Popen([*command, *map(str, rows)], env=environment, cwd=Path(__file__).parents[2], text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for rows in (range(12), range(11, -1, -1))
    ]  # fmt: skip
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    file = bank.manifest.files_of("row_codes")[0]
    expected = {
        " ".join([str(row), *(hashlib.sha256(lines.tobytes()).hexdigest() for _, lines in read.values())])
        for row, read in ((row, bank.read_lines(file, [row])) for row in range(12))
    }
    assert [set(output.splitlines()) for output, _ in outputs] == [expected, expected]
    assert hub.server.sent("row_codes") == bytes_of(bank, pages_of(bank, [*range(12)]))  # shared, not downloaded twice


def forge(hub: World, folder: Path, name: str) -> ResponseBank:
    """Put a folder's files on the Hub as they are, as a forger would, and open them from an empty cache."""
    hub.server.put(name, {f"fwdattr/{path.name}": path.read_bytes() for path in folder.iterdir()})
    hub.clean()
    return ResponseBank.from_pretrained(name)


def rehashed(folder: Path) -> None:
    """Make page hashes fit a changed shard of row codes, and bank.json both."""
    codes, hashes = shard(folder, "row_codes"), shard(folder, "page_hashes")
    resign(folder, codes)
    table = bytearray(hash_pages(codes, json.loads((folder / "bank.json").read_text())["page_size"]))
    save_file({"page_hashes": torch.frombuffer(table, dtype=torch.uint8).view(-1, 32)}, hashes)
    resign(folder, hashes)


BEYOND = b'{"codes":{"dtype":"U8","shape":[10,9],"data_offsets":[0,90]}}'
HEADERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "other shapes": (lambda path: save_file({"codes": torch.zeros(10, 2).byte()}, path), "holds .* bank.json says"),
    "no header": (lambda path: path.write_bytes(b"\xff" * 600), "is not a sound safetensors file .its header claims"),
    "empty": (lambda path: path.write_bytes(b"12"), "row_codes-.* is not a sound safetensors file"),
    "tensors beyond the end": (
        lambda path: path.write_bytes(struct.pack("<Q", 68) + BEYOND.ljust(68)),
        "is not a sound safetensors file",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADERS)
def test_header_of_a_part_is_checked_as_that_of_a_whole_shard(hub: World, tmp_path: Path, name: str) -> None:
    """All hashes fit."""
    folder = tmp_path / "bank"
    written_whole(folder)
    change, message = HEADERS[name]
    change(shard(folder, "row_codes"))
    rehashed(folder)
    remote = forge(hub, folder, NAME)
    with pytest.raises(BankError, match=message):
        remote.decode_rows([1])
    with pytest.raises(BankError, match=message):
        ResponseBank(folder)


def test_page_hashes_are_verified_and_belong_to_their_shards(hub: World, tmp_path: Path) -> None:
    folder = tmp_path / "bank"
    bank = written_whole(folder)
    hashes = shard(folder, "page_hashes")
    remote = opened(hub, bank)
    hub.server.served = lambda path, data: data[:-1] + bytes([data[-1] ^ 1]) if "page_hashes" in path else data
    with pytest.raises(BankError, match=r"page_hashes-.* was changed: its sha256 is"):
        remote.decode_rows([1])
    hub.server.reset()
    table = load_file(hashes)["page_hashes"].clone()
    table[0, 3] ^= 1
    save_file({"page_hashes": table}, hashes)
    resign(folder, hashes)
    damaged = ResponseBank(folder)
    with pytest.raises(BankError, match=r"row_codes-\S+: page 0 has sha256 \w{16}\.\.\. and page_hashes says \w{16}"):
        damaged.push_to_hub(NAME)
    with pytest.raises(BankError, match=r"row_codes-\S+: page 0 .* arrived with sha256"):
        forge(hub, folder, "me/forged").decode_rows([1])


def test_bank_with_page_hashes_is_pushed_saved_inspected(hub: World, tmp_path: Path) -> None:
    bank = written_whole(tmp_path / "bank", shard_size=20)
    assert len(bank.manifest.files_of("row_codes")) > 1
    remote = opened(hub, bank)
    assert remote.inspect().manifest == bank.manifest
    assert torch.equal(remote.decode_rows([9, 0]), bank.decode_rows([9, 0]))
    remote.save_pretrained(tmp_path / "copy")
    copy = ResponseBank.from_pretrained(tmp_path / "copy").inspect()
    assert torch.equal(copy.decode_rows([9, 0]), bank.decode_rows([9, 0]))
    remote.push_to_hub("me/fork")
    hub.clean()
    assert torch.equal(ResponseBank.from_pretrained("me/fork").decode_rows([3]), bank.decode_rows([3]))


def test_page_size_balances_hashes_and_lines() -> None:
    assert page_size(0) == page_size(1 << 20) == 4096
    assert page_size(740_000_000) == 4096
    assert page_size(500 * 10**9) == 1 << 16
    assert page_size(1 << 60) == 1 << 20


def test_neighbouring_pages_share_requests_of_bounded_length(tmp_path: Path) -> None:
    content = bytes(range(256)) * 64 * 1024
    table = torch.frombuffer(
        bytearray(b"".join(hashlib.sha256(content[at : at + 4096]).digest() for at in range(0, len(content), 4096))),
        dtype=torch.uint8,
    )
    asked = []

    def read(start: int, end: int, take: Callable[[bytes], None]) -> None:
        asked.append((start, end))
        for at in range(start, end, 3000):
            take(content[at : min(at + 3000, end)])

    file = ShardFile(name="a", kind="row_codes", size=len(content), sha256="0" * 64, first=0, lines=1)
    partial = PartialShard(tmp_path / "a", file, 4096, table.view(-1, 32).numpy(), read)
    partial.ensure([(0, 5000), (8192, 8193), (20_000, 20_001)])
    assert sorted(asked) == [(0, 12288), (16384, 20480)]
    asked.clear()
    partial.ensure([(0, len(content))])
    assert sorted(asked) == [(12288, 16384), (20480, 20480 + (1 << 23)), (20480 + (1 << 23), len(content))]
    assert (tmp_path / "a").read_bytes() == content
