"""The writer of files: whole or not at all, permissions, and what is no regular file."""

from __future__ import annotations

import errno
import os
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from loopmdm_kernels import files
from loopmdm_kernels.files import WriteError, open_append, staging_folder, write_file, write_files

root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make a device")
no_root = pytest.mark.skipif(os.geteuid() == 0, reason="root may write protected files")


@pytest.fixture(params=[0o022, 0o077, 0o002])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def private(path: Path) -> None:
    """As safetensors writes: another file in place of the one that was there, readable to its owner only."""
    path.unlink()
    path.write_bytes(b"made")
    path.chmod(0o600)


@pytest.mark.parametrize("content", ["made", b"made", private, lambda path: path.write_text("made")])
def test_a_new_file_has_the_permissions_of_an_ordinary_open(
    tmp_path: Path, umask: int, content: files.Content
) -> None:
    write_file(tmp_path / "new", content)
    write_files({tmp_path / "a/b/new": content})
    with staging_folder(tmp_path / "staged") as folder:
        write_files({folder / "new": content})
    (tmp_path / "ordinary").write_text("")
    for path in (tmp_path / "new", tmp_path / "a/b/new", tmp_path / "staged/new"):
        assert path.read_bytes() == b"made" and mode(path) == mode(tmp_path / "ordinary") == 0o666 & ~umask


@pytest.mark.parametrize("kept", [0o600, 0o640, 0o664, 0o755])
@pytest.mark.parametrize("content", ["made", private])
def test_a_replaced_file_keeps_its_permissions(tmp_path: Path, kept: int, content: files.Content) -> None:
    path = tmp_path / "file"
    for write in (
        lambda: write_file(path, content),
        lambda: write_files({path: content}),
        lambda: staged(tmp_path, content),
    ):
        path.write_text("before")
        path.chmod(kept)
        write()
        assert path.read_bytes() == b"made" and mode(path) == kept


def staged(folder: Path, content: files.Content) -> None:
    with staging_folder(folder) as staging:
        write_files({staging / "file": content})


def test_the_content_is_never_more_readable_than_the_file(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_text("before")
    path.chmod(0o600)
    seen = []
    write_file(path, lambda temporary: (seen.append(mode(temporary)), temporary.write_text("after")))
    assert seen == [0o600] and path.read_text() == "after"


@root
def test_a_replaced_file_keeps_its_owner(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("before")
    os.chown(tmp_path / "file", 12345, 23456)
    write_file(tmp_path / "file", "after")
    status = (tmp_path / "file").stat()
    assert (status.st_uid, status.st_gid) == (12345, 23456)


@no_root
def test_a_protected_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("before")
    (tmp_path / "file").chmod(0o444)
    for write in (lambda: write_file(tmp_path / "file", "x"), lambda: write_files({tmp_path / "file": "x"})):
        with pytest.raises(WriteError, match="file: it is write-protected"):
            write()
    assert (tmp_path / "file").read_text() == "before"


def test_links_of_a_user_stay_and_their_targets_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/target").write_text("before")
    (tmp_path / "sub/target").chmod(0o640)
    (tmp_path / "second").symlink_to("sub/target")
    (tmp_path / "link").symlink_to(tmp_path / "second")
    (tmp_path / "dangling").symlink_to("sub/later")
    inode = (tmp_path / "sub/target").stat().st_ino
    write_file(tmp_path / "link", "after")
    write_file(tmp_path / "dangling", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "second").is_symlink()
    assert (tmp_path / "sub/target").read_text() == "after" and mode(tmp_path / "sub/target") == 0o640
    assert (tmp_path / "sub/target").stat().st_ino != inode  # replaced whole, not written over
    assert (tmp_path / "dangling").is_symlink() and (tmp_path / "sub/later").read_text() == "new"
    assert sorted(p.name for p in (tmp_path / "sub").iterdir()) == ["later", "target"]


def test_a_circle_of_links_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(WriteError, match="symbolic links"):
        write_file(tmp_path / "a", "x")


def test_links_with_our_names_are_replaced_and_their_targets_left_alone(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("mine")
    (tmp_path / "run").mkdir()
    for name in ("one", "two"):
        (tmp_path / "run" / name).symlink_to("../target")
    write_files({tmp_path / "run/one": "ours"})
    with staging_folder(tmp_path / "run") as staging:
        write_files({staging / "two": "ours"})
    with pytest.raises(WriteError, match="it is a link"):
        (tmp_path / "run/log").symlink_to("../target")
        open_append(tmp_path / "run/log")
    assert (tmp_path / "target").read_text() == "mine"
    assert not (tmp_path / "run/one").is_symlink() and (tmp_path / "run/two").read_text() == "ours"


@pytest.mark.parametrize("content", ["x" * 200_000, lambda path: path.write_text("x" * 200_000)])
def test_a_fifo_is_written_into(tmp_path: Path, content: files.Content) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("fifo")
    for name in ("fifo", "link"):
        got: list[bytes] = []
        reader = threading.Thread(target=lambda got=got: got.append((tmp_path / "fifo").read_bytes()))
        reader.start()
        write_file(tmp_path / name, content)
        reader.join()
        assert got == [b"x" * 200_000]
    assert stat.S_ISFIFO((tmp_path / "fifo").lstat().st_mode)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fifo", "link"]


def test_a_reader_that_leaves_is_no_broken_standard_output(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    reader = threading.Thread(target=lambda: os.close(os.open(tmp_path / "fifo", os.O_RDONLY)))
    reader.start()
    with pytest.raises(WriteError, match=r"cannot write .*fifo: Broken pipe") as error:
        write_file(tmp_path / "fifo", "x" * 10_000_000)
    reader.join()
    assert not isinstance(error.value, BrokenPipeError) and error.value.errno == errno.EPIPE


@root
@pytest.mark.parametrize("through_link", [False, True])
def test_a_device_is_written_into(tmp_path: Path, through_link: bool) -> None:
    device = tmp_path / "null"
    try:
        os.mknod(device, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        device.read_bytes()
    except OSError:
        pytest.skip("devices cannot be made or used here")
    (tmp_path / "link").symlink_to("null")
    write_file(tmp_path / ("link" if through_link else "null"), "page")
    assert stat.S_ISCHR(device.lstat().st_mode) and (tmp_path / "link").is_symlink()
    with pytest.raises(WriteError, match="null: it is a device"):
        write_files({device: "x"})
    assert stat.S_ISCHR(device.lstat().st_mode)


@root
def test_a_block_device_is_refused(tmp_path: Path) -> None:
    try:
        os.mknod(tmp_path / "disk", 0o666 | stat.S_IFBLK, os.makedev(250, 250))  # of no driver
    except OSError:
        pytest.skip("devices cannot be made here")
    with pytest.raises(WriteError, match="disk: it is a block device, expected a file"):
        write_file(tmp_path / "disk", "x")
    assert stat.S_ISBLK((tmp_path / "disk").lstat().st_mode)


def make_folder(path: Path) -> None:
    path.mkdir()


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


@pytest.mark.parametrize(
    "make, kind", [(os.mkfifo, "FIFO"), (make_folder, "folder"), (make_socket, "socket")]
)
def test_what_is_no_file_is_refused_under_our_names(
    tmp_path: Path, make: Callable[[Path], None], kind: str
) -> None:
    make(tmp_path / "special")
    before = stat.S_IFMT((tmp_path / "special").lstat().st_mode)
    with pytest.raises(WriteError, match=f"special: it is a {kind}, expected a regular file"):
        write_files({tmp_path / "first": "x", tmp_path / "special": "x"})
    with pytest.raises(OSError, match=f"it is a {kind}"), staging_folder(tmp_path) as staging:
        write_files({staging / "first": "x", staging / "special": "x"})
    with pytest.raises(WriteError, match=f"it is a {kind}"):
        open_append(tmp_path / "special")
    if kind != "FIFO":
        with pytest.raises(WriteError, match=f"special: it is a {kind}, expected a file to write"):
            write_file(tmp_path / "special", "x")
        with pytest.raises(OSError, match=f"it is a {kind}"):
            files.check_target(tmp_path / "special")
    assert [p.name for p in tmp_path.iterdir()] == ["special"]
    assert stat.S_IFMT((tmp_path / "special").lstat().st_mode) == before


# The module alone, without the package, whose import takes seconds.
_PRINT_AROUND = """
import runpy, sys
content = "page\\n" if sys.argv[2] == "text" else lambda path: path.write_text("page\\n")
print("before")
runpy.run_path(sys.argv[3])["write_file"](sys.argv[1], content)
print("after")
"""


@pytest.mark.parametrize("content", ["text", "function"])
@pytest.mark.parametrize("to", ["pipe", "file", "socket"])
@pytest.mark.parametrize("path", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "LINK"])
def test_standard_output_by_its_path(tmp_path: Path, path: str, to: str, content: str) -> None:
    """In order with what is printed, whatever standard output is, and nothing is replaced."""
    if not os.path.lexists("/dev/stdout") or not os.path.exists("/proc/self/fd"):
        pytest.skip("no such paths here")
    if path == "LINK":
        (tmp_path / "link").symlink_to("/dev/stdout")
        path = str(tmp_path / "link")
    command = [sys.executable, "-c", _PRINT_AROUND, path, content, files.__file__]
    options: dict[str, Any] = {"check": True, "timeout": 300}
    if to == "pipe":
        got = subprocess.run(command, stdout=subprocess.PIPE, **options).stdout
    elif to == "file":
        with (tmp_path / "out").open("wb") as out:
            subprocess.run(command, stdout=out, **options)
        got = (tmp_path / "out").read_bytes()
    else:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            subprocess.run(command, stdout=theirs.fileno(), **options)
            theirs.close()
            got = ours.recv(1000)
    assert got == b"before\npage\nafter\n"
    assert os.path.islink("/dev/stdout")


def test_an_open_descriptor_that_is_read_only_or_closed_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("before")
    descriptor = os.open(tmp_path / "file", os.O_RDONLY)
    with pytest.raises(WriteError, match="it is open for reading only"):
        write_file(f"/dev/fd/{descriptor}", "x")
    os.close(descriptor)
    with pytest.raises(WriteError, match="cannot write /dev/fd/987"):
        write_file("/dev/fd/987", "x")
    assert (tmp_path / "file").read_text() == "before"


def test_appending(tmp_path: Path) -> None:
    for line in ("a\n", "b\n"):
        with open_append(tmp_path / "log") as file:
            file.write(line)
            assert (tmp_path / "log").read_text().endswith(line)  # handed over at once
    assert (tmp_path / "log").read_text() == "a\nb\n"


def test_a_failure_or_a_kill_leaves_nothing_and_changes_nothing(tmp_path: Path) -> None:
    def fail(error: BaseException) -> Callable[[Path], None]:
        def write(path: Path) -> None:
            path.write_text("half")
            raise error

        return write

    (tmp_path / "one").write_text("old")
    (tmp_path / "two").write_text("old")
    for error in (OSError(errno.ENOSPC, "full"), KeyboardInterrupt(), ValueError("x")):
        with pytest.raises((WriteError, type(error))):
            write_files({tmp_path / "one": "new", tmp_path / "two": fail(error)})
        with pytest.raises(type(error)), staging_folder(tmp_path) as staging:
            (staging / "one").write_text("new")
            raise error
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"one": "old", "two": "old"}


def test_text_that_is_no_unicode_is_refused_before_anything_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    with pytest.raises(UnicodeEncodeError):
        write_file(tmp_path / "file", "lone \ud800")
    assert [p.read_text() for p in tmp_path.iterdir()] == ["old"]


def test_only_what_our_writers_leave_is_removed(tmp_path: Path) -> None:
    foreign = [
        ".partial",
        ".loopmdm-notes.tmp",
        "loopmdm-0123456789abcdef.tmp",
        ".loopmdm-0123456789ABCDEF.tmp",
    ]
    for name in foreign:
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes").write_text("mine")
    folder, file, link = (files.temporary_path(tmp_path) for _ in range(3))
    folder.mkdir()
    (folder / "model.safetensors").write_text("half")
    file.write_text("half")
    link.symlink_to(tmp_path / ".partial")
    files.remove_leftovers(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(foreign)
    assert all((tmp_path / name / "notes").read_text() == "mine" for name in foreign)
