"""Files that are either whole or absent: write to a temporary name, fsync, rename."""

from __future__ import annotations

import hashlib
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def atomic_path(target: Path, mode: int | None = None) -> Iterator[Path]:
    """Yield a temporary path in the target's folder; on success it replaces the target durably.

    The folder is made if it is missing. On an exception the temporary file goes and the target stays. The result
    has the permissions ``mode``; where None, permissions and owner of the file that it replaces (the owner only if
    this account may give files away), and a new file follows the umask. The temporary file is never open to more
    accounts than the result.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    replaced = _status(target) if mode is None else None
    # Not the whole name: a name as long as the file system allows leaves no room for more.
    temporary = target.with_name(f".{target.name[:32]}.{secrets.token_hex(8)}.part")
    new = mode is None and replaced is None
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666 if new else 0o600))
    try:
        yield temporary
        if replaced:
            with suppress(PermissionError):
                os.chown(temporary, replaced.st_uid, replaced.st_gid)
            mode = stat.S_IMODE(replaced.st_mode)
        if mode is not None:
            temporary.chmod(mode)
        sync_path(temporary)
        temporary.replace(target)
        sync_path(target.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_atomically(target: Path, data: bytes | str) -> None:
    """Replace ``target`` by ``data`` (text as UTF-8), durably and never half-written."""
    with atomic_path(target) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


def sync_path(path: Path) -> None:
    """Flush a file or a folder to the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_file(path: Path) -> str:
    """The hexadecimal SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except FileNotFoundError:
        return None
