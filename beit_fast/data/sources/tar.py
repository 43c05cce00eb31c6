"""Where the members of a tar archive lie; `tarfile` finds them at a tenth of the speed and reads less of them.

Every length that an archive claims is checked before it moves anything: damage is one line, never a loop.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import NamedTuple

Read = Callable[[int, int], bytes]

_BLOCK = 512
_MAX_EXTENDED = 1 << 20  # of long names and pax records
_NO_DATA = b"123456"  # links, devices, folders and pipes, whatever size they claim
_RECORD = re.compile(rb"(\d{1,7}) ([^=]+)=")


class Member(NamedTuple):
    """A file within an archive."""

    name: str
    offset: int
    size: int


def members_of(read: Read, end: int, path: str) -> tuple[list[Member], list[tuple[str, str]]]:
    """The files of a v7, POSIX, GNU or pax archive, links to files of it included.

    Args:
        read: gives up to so many bytes (second argument) of the archive from a position (first) on.
        end: its size.
        path: its name, for messages.

    Returns:
        The files in order, and (kind, name) of everything else but folders.

    Raises:
        ValueError: the archive is damaged, in one line that names it.
    """
    base_name = os.path.basename(path)
    members: list[Member] = []
    links: list[tuple[int, str, str]] = []  # index among the members, name, target
    skipped: list[tuple[str, str]] = []
    records: dict[str, str] = {}
    offset = 0
    while offset < end:
        head = read(offset, _BLOCK)
        if not head.strip(b"\0"):
            break
        if len(head) < _BLOCK or not (head[257:262] == b"ustar" or _checksum_holds(head)):
            raise ValueError(f"{path}: not an (uncompressed) tar archive, or damaged, at byte {offset} of {end}")
        where, kind = f"{path}: damaged at byte {offset}", head[156:157]
        size = _number(head[124:136], where)
        data = offset + _BLOCK
        if kind in b"LKxg":
            if not 0 <= size <= min(_MAX_EXTENDED, end - data):
                raise ValueError(f"{where}: an extended header of {size} bytes")
            content = read(data, size)
            if kind in b"LK":
                records["path" if kind == b"L" else "linkpath"] = os.fsdecode(content.rstrip(b"\0"))
            elif kind == b"x":
                records |= _pax_records(content, where)
            offset = _next_block(data + size)
            continue
        name = records.get("path") or _name(head)
        if "size" in records:
            size = int(records["size"]) if records["size"].isdigit() else -1
        if kind in _NO_DATA:
            size = 0
        if kind == b"S":
            data = _behind_sparse_map(read, head, data, end)
        if size < 0:
            raise ValueError(f"{where}: {name} claims a negative size")
        if data + size > end:
            raise ValueError(f"{path}: cut off at byte {end} (a member needs {data + size}); fetch the shard again")
        shown = f"{base_name}:{name}"
        if kind in b"12":
            target = records.get("linkpath") or os.fsdecode(head[157:257].split(b"\0", 1)[0])
            base = os.path.dirname(name) if kind == b"2" else ""
            links.append((len(members), name, os.path.normpath(os.path.join(base, target))))
        elif kind == b"S" or any(key.startswith("GNU.sparse.") for key in records):
            skipped.append(("sparse member", shown))
        elif kind in b"0\0" + b"7" and not name.endswith("/"):
            members.append(Member(name, data, size))
        elif kind not in b"0\0" + b"57":
            skipped.append((f"member of type {kind.decode('latin1')!r}", shown))
        records = {}
        offset = _next_block(data + size)
    _resolve(members, links, skipped, base_name)
    return members, skipped


def _resolve(
    members: list[Member], links: list[tuple[int, str, str]], skipped: list[tuple[str, str]], archive: str
) -> None:
    """Put links to files of the archive, also through other links, in among the members."""
    if not links:
        return
    files = {os.path.normpath(member.name): member for member in members}
    targets = {os.path.normpath(name): target for _, name, target in links}
    for index, name, target in reversed(links):
        for _ in links:
            if target in files:
                break
            target = targets.get(target, target)
        if target in files:
            members.insert(index, files[target]._replace(name=name))
        else:
            skipped.append(("link to nothing in the archive", f"{archive}:{name}"))


def _next_block(offset: int) -> int:
    return (offset + _BLOCK - 1) // _BLOCK * _BLOCK


def _name(head: bytes) -> str:
    name, prefix = head[:100].split(b"\0", 1)[0], head[345:500].split(b"\0", 1)[0]
    is_posix = head[257:263] == b"ustar\0"
    return os.fsdecode(prefix + b"/" + name if is_posix and prefix else name)


def _number(field: bytes, where: str) -> int:
    """An octal number, or GNU's signed one of base 256."""
    if field[0] & 0x80:
        return int.from_bytes(
            bytes([field[0] if field[0] == 0xFF else field[0] & 0x7F]) + field[1:], "big", signed=True
        )
    text = field.split(b"\0", 1)[0].strip()
    if text and not re.fullmatch(rb"[0-7]+", text):
        raise ValueError(f"{where}: the size of a member is {text!r}")
    return int(text or b"0", 8)


def _checksum_holds(head: bytes) -> bool:
    """Whether the sum of the header is the one it states: all that a v7 header has to show."""
    text = head[148:156].split(b"\0", 1)[0].strip()
    if not re.fullmatch(rb"[0-7]+", text):
        return False
    return int(text, 8) == sum(head[:148]) + 8 * 32 + sum(head[156:])


def _behind_sparse_map(read: Read, head: bytes, data: int, end: int) -> int:
    """Where the data of a GNU sparse member begins: its map may go on in blocks behind the header."""
    more = head[482]
    while more and data < end:
        block = read(data, _BLOCK)
        more, data = block[504] if len(block) == _BLOCK else 0, data + _BLOCK
    return data


def _pax_records(data: bytes, where: str) -> dict[str, str]:
    """Records `length key=value\\n` of a pax extended header."""
    records, offset = {}, 0
    while offset < len(data):
        match = _RECORD.match(data, offset)
        stop = offset + int(match[1]) if match else 0
        if match is None or not match.end() < stop <= len(data) or data[stop - 1 : stop] != b"\n":
            raise ValueError(f"{where}: a pax record of wrong length ({data[offset : offset + 20]!r})")
        records[match[2].decode("latin1")] = os.fsdecode(data[match.end() : stop - 1])
        offset = stop
    return records
