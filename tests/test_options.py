"""The options of analyze, compare and capture: every way to write them, every refusal, and what `--help` says."""

import signal
from dataclasses import dataclass, fields
from pathlib import Path

import pytest

from awq_pycuda import __version__, analyze, capture, options
from awq_pycuda.errors import InputError
from awq_pycuda.options import REQUIRED, describe, nonempty, option, parse, serve, share, whole, words
from awq_pycuda.signals import Stopped


@dataclass(frozen=True, kw_only=True)
class Options:
    out: str = option("FOLDER", "where to", "a folder", nonempty, REQUIRED)
    row_limit: int = option("NUMBER", "how many", "whole numbers of at least 2", whole(minimum=2), 7)
    part: float = option("SHARE", "how much", "a number from 0 to below 1", share, 0.5)
    kinds: tuple[str, ...] = option("KINDS", "which", "a, b", words("a", "b"), ())


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("out=x", {"out": "x"}),
        ("--out x", {"out": "x"}),
        ("--out=x", {"out": "x"}),
        ("--out a=b", {"out": "a=b"}),
        ("out=a=b", {"out": "a=b"}),
        ("--out -x", {"out": "-x"}),
        ("out=--x", {"out": "--x"}),
        ("out=x row_limit=12", {"out": "x", "row_limit": 12}),
        ("--row-limit 12 --out x", {"out": "x", "row_limit": 12}),
        ("--row_limit=12 --out x", {"out": "x", "row_limit": 12}),
        ("out=x part=.25", {"out": "x", "part": 0.25}),
        ("out=x --part 1e-3", {"out": "x", "part": 0.001}),
        ("out=x kinds=b,a,b", {"out": "x", "kinds": ("b", "a")}),
    ],
)
def test_every_way_to_write_a_key(arguments, expected):
    assert parse(Options, arguments.split(" ")) == (Options(**expected), [])


def test_what_exists_is_a_path_whatever_its_name():
    for name in ("n=64", "outt=x", "a b", "compare"):
        Path(name).mkdir()
    Path("out=y").touch()
    found, paths = parse(Options, ["n=64", "out=y", "outt=x", "--part", "0.1", "compare", "a b"], "files")
    assert (found.out, found.part) == ("y", 0.1)
    assert paths == [Path("n=64"), Path("outt=x"), Path("compare"), Path("a b")]


def test_two_dashes_end_the_keys():
    for name in ("out=y", "--part=1", "--", "-x"):
        Path(name).touch()
    found, paths = parse(Options, ["--out", "x", "--", "out=y", "--part=1", "--", "-x"], "files")
    assert (found.out, paths) == ("x", [Path("out=y"), Path("--part=1"), Path("--"), Path("-x")])


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["n=3"], "n=3: no such key; allowed: out, row_limit, part, kinds"),
        (["OUT=x"], "OUT=x: no such key (did you mean out?); allowed: out, row_limit, part, kinds"),
        (["--row", "2"], "--row: no such key; allowed: out, "),
        (["--row-limits", "2"], "--row-limits: no such key (did you mean row_limit?); allowed: "),
        (["row-limit=2"], "row-limit=2: no such key (did you mean row_limit?); allowed: "),
        (["-o", "x"], "-o: no such key"),
        (["out"], "out: is no key=value; allowed: out, row_limit, part, kinds"),
        (["", "out=x"], "'': is no key=value; allowed: out, row_limit, part, kinds"),
        (["--", "out=x"], "out=x: is no key=value; allowed: out"),
        ([], "out=: is missing; allowed: a folder"),
        (["out="], "out=: is missing; allowed: a folder"),
        (["--out"], "--out: has no value; allowed: a folder"),
        (["--out", "--part", "0"], "--out: has no value; allowed: a folder"),
        (["--out", "--"], "--out: has no value; allowed: a folder"),
        (["out=x", "out=x"], "out=x: is given twice, before as out=x; allowed: once"),
        (
            ["--row-limit=3", "out=x", "row_limit=4"],
            "row_limit=4: is given twice, before as row_limit=3; ",
        ),
        (["out=x", "row_limit=1"], "row_limit=1: is too small; allowed: whole numbers of at least 2"),
        *(
            (["out=x", f"row_limit={value}"], f"row_limit={value}: is no whole number; allowed: ")
            for value in ("1_6", " 4", "4.0", "1e3", "٣", "0x10", "two", "9" * 5000)
        ),
        (["out=x", "row_limit="], "row_limit=: is missing; allowed: whole numbers"),
        *((["out=x", f"part={value}"], f"part={value}: is out of range; ") for value in ("1", "-0.1", "9e999")),
        *((["out=x", f"part={value}"], f"part={value}: is no number; ") for value in ("nan", "inf", "0_1", "½", " 0")),
        (["out=x", "kinds=a,"], "kinds=a,: '' is none; allowed: a, b"),
        (["out=x", "kinds=a,c"], "kinds=a,c: 'c' is none; allowed: a, b"),
    ],
)
def test_refusals(arguments, line):
    with pytest.raises(InputError) as caught:
        parse(Options, arguments)
    assert str(caught.value).startswith(line)


@pytest.mark.parametrize(
    ("argument", "line"),
    [
        ("gone", "gone: no such file or folder; allowed: files"),
        ("n=65", "n=65: no such key, file or folder; allowed: out"),
        ("folder/n=65", "folder/n=65: no such file or folder; allowed: files"),
        ("--n=64", "--n=64: no such key; allowed: out"),
        ("", "'': no such file or folder; allowed: files"),
    ],
)
def test_refused_paths(argument, line):
    Path("--n=64").mkdir()
    with pytest.raises(InputError, match=line):
        parse(Options, ["out=x", argument], "files")


@pytest.mark.parametrize("command", [Options, analyze.AnalyzeOptions, analyze.CompareOptions, capture.Options])
def test_help_says_everything_of_every_key(command):
    told = " ".join(describe(command).split())
    for key in fields(command):
        placeholder, meaning, allowed = (key.metadata[name] for name in ("placeholder", "meaning", "allowed"))
        assert f"{key.name}={placeholder} {meaning} " in told
        default = "required" if key.default is REQUIRED else f"default: {options.shown(key.default)}"
        assert f" {default}; allowed: {allowed}" in told


def test_help_shows_defaults_as_they_are_given():
    assert describe(Options).splitlines()[:4] == [
        "  out=FOLDER         where to",
        "                     required; allowed: a folder",
        "  row_limit=NUMBER   how many",
        "                     default: 7; allowed: whole numbers of at least 2",
    ]
    assert "default: float32; allowed: float32, float16" in describe(capture.Options)
    assert "default: none; allowed: slower, worse" in describe(analyze.CompareOptions)


@pytest.mark.parametrize("main", [analyze.main, capture.main])
def test_commands_answer_and_refuse_in_the_same_words(main, capsys):
    assert main(["--version"]) == main(["x", "--version"]) == 0
    assert capsys.readouterr() == (f"awq_pycuda {__version__}\n" * 2, "")
    assert main(["--", "--version"]) == 2
    assert main(["outt=two\nlines"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    first, second = err.splitlines()
    assert first.startswith("error: --version: ")
    assert second.startswith("error: outt=two lines: no such key")


@pytest.mark.parametrize(
    ("raised", "code", "line"),
    [
        (InputError("n=0: no; allowed: 1"), 2, "error: n=0: no; allowed: 1\n"),
        (OSError(28, "No space left on device"), 1, "failed: [Errno 28] No space left on device\n"),
        (Stopped(signal.SIGINT), 130, "interrupted by SIGINT\n"),
        (Stopped(signal.SIGTERM), 143, "interrupted by SIGTERM\n"),
    ],
)
def test_what_ends_a_command_gives_its_exit_code(raised, code, line, capsys):
    def work(arguments):
        raise raised

    assert serve([], "", work) == code
    assert capsys.readouterr() == ("", line)
