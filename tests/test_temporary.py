"""Files that appear whole or not at all: what killed processes left is removed, what living ones write is not."""

import fcntl
import os
import subprocess
import sys

import pytest

from awq_pycuda.temporary import remove_left, replacing

WRITER = """
import sys
from pathlib import Path
from awq_pycuda.temporary import replacing
with replacing(Path("a.h5")) as temporary:
    temporary.write_bytes(b"half")
    print(temporary.name, flush=True)
    sys.stdin.read()
"""


def start(folder):
    """A process that has written half of a.h5; its temporary file."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", WRITER], cwd=folder, **pipes)
    return process, folder / process.stdout.readline().strip()


def write(folder, content=b"whole"):
    with replacing(folder / "a.h5") as temporary:
        temporary.write_bytes(content)
        assert (folder / "a.h5") != temporary


def test_what_a_killed_process_left_is_removed_by_the_next_one(tmp_path):
    process, left = start(tmp_path)
    with process:
        process.kill()
    assert left.exists()
    write(tmp_path)
    assert os.listdir(tmp_path) == ["a.h5"]
    assert (tmp_path / "a.h5").read_bytes() == b"whole"


def test_what_a_living_process_writes_stays(tmp_path):
    process, temporary = start(tmp_path)
    write(tmp_path)
    remove_left(tmp_path / "a.h5")
    assert temporary.read_bytes() == b"half"
    process.communicate("")
    assert process.returncode == 0
    assert os.listdir(tmp_path) == ["a.h5"]
    assert (tmp_path / "a.h5").read_bytes() == b"half"


def test_the_number_of_a_living_process_protects_nothing(tmp_path):
    """It was used again since, or is of another machine that shares the folder."""
    for number in (1, os.getppid(), "another"):
        (tmp_path / f".a.h5.{number}.tmp").touch()
    write(tmp_path)
    assert os.listdir(tmp_path) == ["a.h5"]


def test_one_number_on_two_machines_is_written_one_after_the_other(tmp_path):
    """The file is there, held by the lock of the other; once that has renamed it, this one makes its own."""
    taken = tmp_path / f".a.h5.{os.getpid()}.tmp"
    taken.write_bytes(b"theirs")
    script = f"""
import fcntl, os, sys
held = os.open({str(taken)!r}, os.O_RDWR)
fcntl.flock(held, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.readline()
os.replace({str(taken)!r}, {str(tmp_path / "a.h5")!r})
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", script], **pipes) as other:
        assert other.stdout.readline() == "held\n"
        other.stdin.write("go\n")
        other.stdin.flush()
        write(tmp_path, b"ours")
    assert other.returncode == 0
    assert (tmp_path / "a.h5").read_bytes() == b"ours"


def test_other_files_stay(tmp_path):
    kept = {".b.h5.1.tmp", ".a.h5.tmp", "a.h5.1.tmp", ".a.h5"}
    for name in kept:
        (tmp_path / name).touch()
    write(tmp_path)
    assert set(os.listdir(tmp_path)) == {"a.h5", *kept}


def test_a_name_that_looks_like_a_pattern(tmp_path):
    left = tmp_path / ".[ab].h5.1.tmp"
    left.touch()
    with replacing(tmp_path / "[ab].h5"):
        assert not left.exists()


def test_a_pipe_of_such_a_name_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / ".a.h5.1.tmp")
    write(tmp_path)
    assert (tmp_path / "a.h5").read_bytes() == b"whole"


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    """Files are written, and what was left stays: nothing tells whose it is."""

    def none(*_):
        raise OSError(95, "Operation not supported")

    (tmp_path / ".a.h5.1.tmp").touch()
    monkeypatch.setattr(fcntl, "flock", none)
    write(tmp_path)
    assert set(os.listdir(tmp_path)) == {"a.h5", ".a.h5.1.tmp"}


def test_an_error_leaves_what_was_there(tmp_path):
    (tmp_path / "a.h5").write_bytes(b"before")
    with pytest.raises(IsADirectoryError), replacing(tmp_path / "a.h5"):
        tmp_path.read_bytes()
    assert os.listdir(tmp_path) == ["a.h5"]
    assert (tmp_path / "a.h5").read_bytes() == b"before"
