"""The schema of a benchmark's file as data; writer, reader and docs/bench.md follow from this table."""

from __future__ import annotations

from dataclasses import replace

from awq_pycuda.results import schema
from awq_pycuda.results.entries import Entry, entry_of

NAME = "awq_pycuda_bench"
VERSION = 3

ROWS = "/rows"
SAMPLES = "/samples"
GOALS = "/goals"
_ROW = ("row",)
_OF_RUNS = ("created", "backend", "device", "versions", "git_commit", "git_dirty", "kernels_sha256")

TABLE: tuple[Entry, ...] = (
    Entry("/@schema", f"`{NAME}`", "str"),
    Entry("/@schema_version", f"the version of this layout, {VERSION}", "i8"),
    *(each for each in schema.TABLE if each.parent == "/" and each.name in _OF_RUNS),
    Entry("/@options", "JSON: what was to be measured, part by part, and the keys that hold for all of it", "str"),
    Entry("/@error", "only where it could not go on: type and message", "str", presence="optional"),
    Entry("/@flush", "how the cache was emptied before a cold sample", "str"),
    Entry("/@flush_effect", "time to read a small array after the flush, over the time without; must be above 1", "f8"),
    Entry("/@absent", "JSON list: what could not be measured here, and why", "str"),
    Entry(ROWS, "a row per way to compute something, shape and state of the cache"),
    Entry(f"{ROWS}/row", "index of the row", "i8", _ROW),
    Entry(f"{ROWS}/case", "`ceiling`, `kernels`, `pass` or the name of a model", "str", _ROW),
    Entry(f"{ROWS}/stage", "stage of the pipeline; of a ceiling its name, of a pass `pass`", "str", _ROW),
    Entry(f"{ROWS}/variant", "which of the stage's kernels, or how a ceiling was measured", "str", _ROW),
    Entry(f"{ROWS}/by", "whose code: `awq_pycuda`, or a peer such as `torch eager`", "str", _ROW),
    Entry(f"{ROWS}/tokens", "M", "i8", _ROW),
    Entry(f"{ROWS}/out_features", "N", "i8", _ROW),
    Entry(f"{ROWS}/in_features", "K", "i8", _ROW),
    Entry(f"{ROWS}/candidates", "scales that a search compares", "i8", _ROW),
    Entry(f"{ROWS}/group_size", "input channels of a group; 0: all of a row", "i8", _ROW),
    Entry(f"{ROWS}/cache", "`cold`: emptied before each sample; `warm`: right after another launch", "str", _ROW),
    Entry(f"{ROWS}/read", "bytes that must be read", "f8", _ROW, "bytes"),
    Entry(f"{ROWS}/written", "bytes that must be written", "f8", _ROW, "bytes"),
    Entry(f"{ROWS}/operations", "operations that must be done", "f8", _ROW),
    Entry(f"{ROWS}/unit", "what does them, and so which ceiling counts", "str", _ROW),
    Entry(f"{ROWS}/passes", "how many operations of that unit each of them takes", "i8", _ROW, since=2),
    Entry(f"{ROWS}/error", "worst error against float64; NaN where nothing was compared", "f8", _ROW),
    Entry(f"{ROWS}/tolerance", "the most that it may be", "f8", _ROW),
    Entry(f"{ROWS}/state", "`timed`; `failed`: not right, so there are no samples", "str", _ROW),
    Entry(f"{ROWS}/reason", "why it failed", "str", _ROW),
    Entry(f"{ROWS}/stopped", "`noise`: it was certain enough; `time`: the time was up", "str", _ROW),
    Entry(f"{ROWS}/noise", "half of the median's 95 % interval as a share of the median", "f8", _ROW),
    Entry(f"{ROWS}/limit_us", "its bytes or its operations at the ceilings, whichever takes longer", "f8", _ROW, "us"),
    Entry(
        f"{ROWS}/floor_us",
        "what no time can be below: the same less what the cache may keep, and less what ceilings vary",
        "f8",
        _ROW,
        "us",
    ),
    Entry(SAMPLES, "every sample, in the order taken within its row"),
    Entry(f"{SAMPLES}/sample", "index of the sample", "i8", ("sample",)),
    Entry(f"{SAMPLES}/of_row", "the row that it is of", "i8", ("sample",)),
    Entry(f"{SAMPLES}/us", "time of one launch", "f8", ("sample",), "us"),
    Entry(
        f"{SAMPLES}/late",
        "1 where the device waited for the launch, so that its cost is in the time",
        "i1",
        ("sample",),
    ),
    *(
        Entry(f"{SAMPLES}/{name}", f"{what}, right after; NaN where nothing told it", "f8", ("sample",), units)
        for name, units, what in schema.TOLD
    ),
    Entry(GOALS, "the figures that were to be reached; of `case=goals`, else empty", since=3),
    Entry(f"{GOALS}/figure", "index of the figure", "i8", ("figure",), since=3),
    Entry(f"{GOALS}/what", "what was to be measured", "str", ("figure",), since=3),
    Entry(
        f"{GOALS}/quantity",
        "what of it counts: `time`, in us; `limit`, as a share of it; `speedup`, the peer's time over it; `error`, "
        "over the peer's; `link`, the bytes that it reads at that ceiling, as a share of its time",
        "str",
        ("figure",),
        since=3,
    ),
    Entry(
        f"{GOALS}/bound",
        "the most that `time` and `error` may be, the least that others must be; NaN: no goal, it is told beside them",
        "f8",
        ("figure",),
        since=3,
    ),
    Entry(f"{GOALS}/peer", "what it is held against: a peer or ceiling; empty without", "str", ("figure",), since=3),
    Entry(f"{GOALS}/row", "the row that has it; -1 where it was not measured", "i8", ("figure",), since=3),
    Entry(f"{GOALS}/peer_row", "the row of the peer or ceiling; -1 for none", "i8", ("figure",), since=3),
    *(replace(each, since=1) for each in schema.TABLE if each.path == schema.DIGEST),
)


def entry(path: str) -> Entry:
    """The entry of this path.

    Raises:
        KeyError: there is none.
    """
    return entry_of(TABLE, path, "a benchmark")
