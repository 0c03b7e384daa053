"""The one place that writes files.

A file is written under a name of its own beside its target, brought to the disk, and renamed, so that the
target is replaced whole or not at all. It has the permissions that an ordinary `open` gives, or those of the
file it replaces. A FIFO, a device or a folder is never replaced.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, TextIO, TypeAlias

Content: TypeAlias = bytes | str | Callable[[Path], object]
"""Of a file: bytes, text (written as UTF-8), or a function that writes it to the path it is given."""

_TEMPORARY = re.compile(r"\.loopmdm-[0-9a-f]{16}\.tmp")
_DESCRIPTOR_FOLDER = re.compile(r"/dev/fd|/proc/(\d+)(/task/\d+)?/fd")
_MOST_LINKS = 40
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFLNK: "a link",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a block device",
    stat.S_IFSOCK: "a socket",
}


class WriteError(OSError):
    """A file could not be written; what was there before is intact."""

    def __str__(self) -> str:
        return str(self.strerror)


def write_file(path: str | os.PathLike[str], content: Content) -> None:
    """Write the file that a user has named.

    A link stays a link, and the file it leads to is replaced. A FIFO, a character device and an open
    descriptor of this process (/dev/stdout) are written into, as by an ordinary `open`.

    Raises:
        WriteError: the file cannot be written (full disk, permissions, a folder, a block device, a socket);
            no partial file is left.
    """
    target = Path(path)
    try:
        check_target(target)
        through = _open_special(target)
        if through is not None:
            _write_through(through, content)
            return
        if target.is_symlink():
            target = Path(os.path.realpath(target))
    except OSError as error:
        raise _failure(target, error) from error
    write_files({target: content})


def write_files(contents: Mapping[Path, Content]) -> None:
    """Write files whose names this package has chosen, all of them or none.

    A link with such a name is replaced and its target left alone; anything else that is no regular file is
    refused before anything is written.

    Raises:
        WriteError: as `write_file`.
    """
    staged: list[tuple[Path, Path]] = []
    target = next(iter(contents))
    try:
        for target in contents:
            target.parent.mkdir(parents=True, exist_ok=True)
            _check_replaceable(target)
        for target, content in contents.items():
            temporary = temporary_path(target.parent)
            staged.append((temporary, target))
            _create(temporary, target)
            _fill(temporary, content)
            _finish(temporary, target)
        for temporary, target in staged:
            os.replace(temporary, target)
        for folder in {target.parent for target in contents}:
            sync(folder)
    except OSError as error:
        raise _failure(target, error) from error
    finally:
        for temporary, _ in staged:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def staging_folder(folder: Path) -> Iterator[Path]:
    """A new folder to write files in; at the end of the `with` block they replace those of `folder`.

    A failure, or a kill at any moment before the first is renamed, leaves the previous files as they were.

    Raises:
        OSError: a file cannot be written, or would replace what is no regular file.
    """
    staging = temporary_path(folder)
    staging.mkdir(parents=True)
    try:
        yield staging
        written = sorted(staging.iterdir())
        for path in written:
            _check_replaceable(folder / path.name)
            _finish(path, folder / path.name, _new_mode(staging))
        for path in written:
            os.replace(path, folder / path.name)
        sync(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def temporary_path(folder: Path) -> Path:
    """A name in `folder` that no other process uses."""
    return folder / f".loopmdm-{secrets.token_hex(8)}.tmp"


def remove_leftovers(folder: Path) -> None:
    """Remove what killed writers have left in a folder that no other process writes into."""
    for path in folder.iterdir():
        if not _TEMPORARY.fullmatch(path.name):
            continue
        if stat.S_ISDIR(path.lstat().st_mode):
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def open_append(path: Path) -> TextIO:
    """Open a text file to append to, one line at a time handed to the system; links are not followed.

    Raises:
        WriteError: it is no regular file, or cannot be opened.
    """
    try:
        _check_replaceable(path, links=False)
        # Without O_NONBLOCK a FIFO put there meanwhile would hang.
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        raise _failure(path, error) from error
    return open(descriptor, "a", buffering=1, encoding="utf-8")


def check_target(path: str | os.PathLike[str]) -> None:
    """Raise an `OSError` now if `write_file` could not write this path later, as far as can be known."""
    number = _descriptor(Path(path))
    if number is not None:
        if fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(None, "it is open for reading only")
        return
    mode = _mode(Path(path), follow=True)
    if mode is not None and stat.S_IFMT(mode) not in (stat.S_IFREG, stat.S_IFIFO, stat.S_IFCHR):
        raise OSError(None, f"it is {_kind(mode)}, expected a file to write")
    if mode is not None and not os.access(path, os.W_OK):
        raise PermissionError(None, "it is write-protected")
    if mode is None or stat.S_ISREG(mode):
        folder = next(parent for parent in Path(os.path.realpath(path)).parents if parent.exists())
        if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(None, f"{folder} is not a folder that can be written to")


def refuse_files(folder: str | os.PathLike[str], names: Sequence[str], writer: str) -> None:
    """Raise a `ValueError` if `writer`, which begins in a folder, would replace what has these names."""
    found = [name for name in names if os.path.lexists(Path(folder, name))]
    if found:
        raise ValueError(
            f"{Path(folder)} holds {', '.join(found)}, which {writer} would replace; choose another folder"
        )


def kind_of(path: Path) -> str | None:
    """What stands at a path, such as "a link"; None for a regular file or nothing."""
    mode = _mode(path, follow=False)
    return None if mode is None or stat.S_ISREG(mode) else _kind(mode)


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_replaceable(path: Path, *, links: bool = True) -> None:
    """links: whether a link may be replaced."""
    mode = _mode(path, follow=False)
    if mode is None or (links and stat.S_ISLNK(mode)):
        return
    if not stat.S_ISREG(mode):
        raise OSError(None, f"it is {_kind(mode)}, expected a regular file")
    if not os.access(path, os.W_OK):
        raise PermissionError(None, "it is write-protected")


def _mode(path: Path, *, follow: bool) -> int | None:
    try:
        return os.stat(path, follow_symlinks=follow).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None


def _kind(mode: int) -> str:
    return _KINDS.get(stat.S_IFMT(mode), "no regular file")


def _descriptor(path: Path) -> int | None:
    """The open descriptor of this process that a path such as /dev/stdout leads to."""
    for _ in range(_MOST_LINKS):
        folder = os.path.realpath(path.parent)
        match = _DESCRIPTOR_FOLDER.fullmatch(folder)
        if match and path.name.isdecimal() and match[1] in (None, str(os.getpid())):
            return int(path.name)
        if not path.is_symlink():
            return None
        path = Path(folder, os.readlink(path))
    return None


def _open_special(path: Path) -> BinaryIO | None:
    """What is to be written into where it stands; None for what is replaced, or new."""
    number = _descriptor(path)
    if number is not None:
        # Opened by its path, a regular file behind it would be cut, and a socket cannot be opened at all.
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                stream.flush()
        return open(os.dup(number), "wb")
    mode = _mode(path, follow=True)
    if mode is None or stat.S_ISREG(mode):
        return None
    return open(os.open(path, os.O_WRONLY | os.O_NOCTTY | os.O_CLOEXEC), "wb")


def _write_through(file: BinaryIO, content: Content) -> None:
    with file:
        if isinstance(content, str):
            content = content.encode()
        if isinstance(content, bytes):
            file.write(content)
            return
        with tempfile.TemporaryDirectory() as folder:
            content(Path(folder, "content"))
            with Path(folder, "content").open("rb") as written:
                shutil.copyfileobj(written, file)


def _create(temporary: Path, target: Path) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    os.close(os.open(temporary, flags, 0o666))
    # Not readable to more people than the file is that it replaces, while it is written.
    mode = _mode(target, follow=False)
    if mode is not None and stat.S_ISREG(mode):
        temporary.chmod(stat.S_IMODE(mode) & 0o777 | stat.S_IRUSR | stat.S_IWUSR)


def _fill(temporary: Path, content: Content) -> None:
    mode = _new_mode(temporary)
    if isinstance(content, str):
        content = content.encode()
    if isinstance(content, bytes):
        temporary.write_bytes(content)
    else:
        content(temporary)
        temporary.chmod(mode)  # a function may put another file there (safetensors, with mode 0600)


def _new_mode(path: Path) -> int:
    """The permissions that a new file got, by the umask and the folder."""
    return stat.S_IMODE(path.stat().st_mode) & 0o666


def _finish(temporary: Path, target: Path, new_mode: int | None = None) -> None:
    """Permissions and owner of what is replaced, or `new_mode`; then everything to the disk."""
    replaced = None
    with contextlib.suppress(FileNotFoundError):
        replaced = os.stat(target, follow_symlinks=False)
    if replaced is not None and stat.S_ISREG(replaced.st_mode):
        with contextlib.suppress(OSError):  # who may not give files away owns what is written
            os.chown(temporary, replaced.st_uid, replaced.st_gid)
        temporary.chmod(stat.S_IMODE(replaced.st_mode) & 0o777)
    elif new_mode is not None:
        temporary.chmod(new_mode)
    sync(temporary)


def _failure(target: Path, error: OSError) -> WriteError:
    reason = error.strerror or error
    return WriteError(error.errno, f"cannot write {target}: {reason}; no partial file is left")
