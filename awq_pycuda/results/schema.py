"""The schema of results.h5 as data: writer, reader, analysis and docs/results.md follow from this one table.

A metric is added by an entry here, with `since` the schema version that first has it: files of earlier versions are
then read without it, and files of that version or a later one are damaged where it is missing.
"""

from __future__ import annotations

from collections.abc import Iterator

from awq_pycuda.results.entries import Entry, entry_of
from awq_pycuda.results.verified import VERIFIED

NAME = "awq_pycuda"
VERSION = 7
FILE_NAME = "results.h5"

LAYER = "/layers/000"  # stands for every layer
METRICS = f"{LAYER}/metrics"
VERIFY = f"{LAYER}/verify"
TIMINGS = "/timings"
DIGEST = "/sha256"
CONDITIONS = f"{TIMINGS}/conditions"
# What a GPU tells beside its times: name, unit and meaning.
TOLD = (
    ("sm_clock", "MHz", "clock of the multiprocessors"),
    ("power", "W", "power of the board"),
    ("temperature", "degC", "temperature of the GPU"),
    ("throttle_reasons", "1", "NVML's reasons for a clock below the highest, as bits"),
)
_ALL = "; with `baselines=all`"
_BOTH = "baselines=all` and `inputs.holdout"


def _errors(of: str, what: str, key: str, since: int = 5) -> tuple[Entry, Entry]:
    """The output's error and SQNR in a further sense, which files have whose config has this key."""
    path, note = f"{METRICS}/@{of}output", f"; with `{key}`"
    return (
        Entry(f"{path}_mse", f"mean of (y - ŷ)² {what}", "f8", (), "1", "optional", since, "lower", note),
        Entry(f"{path}_sqnr_db", f"SQNR {what}", "f8", (), "dB", "optional", since, "higher", note),
    )


TABLE: tuple[Entry, ...] = (
    # The run.
    Entry("/@schema", f"`{NAME}`", "str"),
    Entry("/@schema_version", f"the version of this layout, {VERSION}", "i8"),
    Entry("/@status", "`complete` or `failed`; a failed run has the layers and passes that were finished", "str"),
    Entry("/@error", "only if failed: type and message, or how the job's process ended", "str", presence="optional"),
    Entry("/@created", "when it was written: ISO 8601, UTC", "str"),
    Entry("/@overrides", "JSON list, as given on the command line", "str"),
    Entry("/@config", "the resolved config as YAML", "str"),
    Entry("/@config_hash", "SHA-256 of the config without `study`, independent of key order", "str"),
    Entry(
        "/@inputs_sha256", "SHA-256 of the layer file", "str", (), "1", "optional", 7, note="; of an evaluation's runs"
    ),
    Entry("/@backend", "`cuda` or `cpu`", "str"),
    Entry(
        "/@device",
        "JSON. GPU: name, capability, memory, its bus width, multiprocessors, L2, clocks, PCI address, the driver's "
        "CUDA version, and the kernel of each stage that has several. CPU: name, threads, memory",
        "str",
    ),
    Entry(
        "/@versions",
        "JSON: this package, Python, libraries; with the GPU PyCUDA, cuda-bindings and nvcc, on the CPU the BLAS",
        "str",
    ),
    Entry("/@git_commit", "of the checkout; empty for an installed package", "str"),
    Entry("/@git_dirty", "whether the checkout had changes; false for an installed package", "bool"),
    Entry(
        "/@kernels_sha256",
        "over names and contents of `cuda/*.cu*`, and their constants in the table of kernels",
        "str",
    ),
    # A layer.
    Entry("/layers", "the finished layers", presence="optional", note="; a failed run may have none"),
    Entry(LAYER, "a layer: `000` is the first"),
    Entry(f"{LAYER}/@name", "the module's path where the layer file gives one, else the number", "str"),
    Entry(f"{LAYER}/@tokens", "how many tokens it saw", "i8"),
    Entry(f"{LAYER}/@in_features", "K", "i8"),
    Entry(f"{LAYER}/@out_features", "N", "i8"),
    Entry(f"{LAYER}/in_features", "index of the input channel", "i8", ("in_features",)),
    Entry(f"{LAYER}/out_features", "index of the output channel", "i8", ("out_features",)),
    Entry(
        f"{LAYER}/group",
        "index of the group of input channels",
        "i8",
        ("group",),
        presence="optional",
        note="; with `quant.group_size`",
    ),
    Entry(
        f"{LAYER}/byte",
        "index of the byte of a row of packed codes",
        "i8",
        ("byte",),
        presence="optional",
        since=5,
        note="; with `save=full` and codes of less than 8 bits",
    ),
    # Its activations. Their own units are unknown: they are whatever the layer's inputs are measured in.
    Entry(f"{LAYER}/stats", "the activations by input channel"),
    Entry(f"{LAYER}/stats/abs_mean", "mean of |x| over the tokens", "f4", ("in_features",)),
    Entry(f"{LAYER}/stats/sq_mean", "mean of x^2 over the tokens", "f4", ("in_features",)),
    Entry(
        f"{LAYER}/stats/abs_max",
        "largest |x| over the tokens",
        "f4",
        ("in_features",),
        presence="optional",
        since=6,
        note="; with `baselines=all` or `search.statistic=abs_max`",
    ),
    # Its search.
    Entry(f"{LAYER}/search", "the search for the scales"),
    Entry(
        f"{LAYER}/search/gamma",
        "exponent of the statistic, of each candidate in the order searched",
        "f8",
        ("gamma",),
        note="; 0 with neither `duo` nor a `beta` above 0 is RTN",
    ),
    Entry(f"{LAYER}/search/error", "the objective of each candidate", "f8", ("gamma",)),
    Entry(
        f"{LAYER}/search/unclipped_error",
        "the objective of each candidate without clipping, where `error` is with it",
        "f8",
        ("gamma",),
        presence="optional",
        since=5,
        note="; with `clip.joint=true`",
    ),
    Entry(
        f"{LAYER}/search/beta",
        "exponent of the weights' statistic, which divides",
        "f8",
        ("gamma",),
        presence="optional",
        since=5,
        note="; with `search.formula=gamma_beta`",
    ),
    Entry(
        f"{LAYER}/search/duo",
        "1 where 1 - gamma is the exponent of the weights' statistic, which divides, else 0",
        "i1",
        ("gamma",),
        presence="optional",
        since=5,
        note="; with `search.formula` `duo` or `both`",
    ),
    Entry(
        f"{LAYER}/search/error_by_max",
        "the objective of each candidate with abs_max for the statistic and nothing clipped",
        "f8",
        ("gamma",),
        presence="optional",
        since=6,
        note=_ALL,
    ),
    Entry(f"{LAYER}/search/@chosen_by_max", "where `error_by_max` is lowest", "i8", (), "1", "optional", 6, note=_ALL),
    Entry(f"{LAYER}/search/@chosen", "index of the candidate with the lowest error", "i8", since=5),
    Entry(f"{LAYER}/search/@gamma_chosen", "exponent of the lowest error", "f8", better="neither"),
    Entry(f"{LAYER}/search/@error_chosen", "the objective of the chosen candidate", "f8"),
    Entry(f"{LAYER}/search/@error_rtn", "the objective of plain round-to-nearest, unclipped", "f8"),
    Entry(f"{LAYER}/search/@objective", "what the errors are errors of: `diag` or `output`", "str"),
    Entry(
        f"{LAYER}/search/@shares_s_with",
        "the other layers that have these scales, such as `001 002`: the errors are of all of their outputs, and each "
        "of these layers has the same search",
        "str",
        presence="optional",
        since=6,
        note="; with `share=inputs`",
    ),
    # Its scales.
    Entry(f"{LAYER}/scales", "what was chosen"),
    Entry(f"{LAYER}/scales/s", "AWQ scale per input channel", "f4", ("in_features",)),
    Entry(
        f"{LAYER}/scales/scale_b",
        "quantization step per output channel (and group)",
        "f4",
        ("out_features", "group"),
    ),
    Entry(
        f"{LAYER}/scales/zero_point",
        "zero point per output channel (and group)",
        "f4",
        ("out_features", "group"),
        presence="optional",
        since=5,
        note="; without `quant.symmetric`: the code of 0, or with `quant.zero_point=float` the weight of code 0",
    ),
    Entry(
        f"{LAYER}/scales/tensor_scale",
        "what steps are times, in E4M3",
        "f4",
        presence="optional",
        since=5,
        note="; with `quant.step_dtype=e4m3`: `2 · scale_b · tensor_scale` is a number of that type",
    ),
    # Its clipping.
    Entry(f"{LAYER}/clip", "where the weights were clipped after they were scaled", presence="optional", since=5),
    Entry(f"{LAYER}/clip/tried", "share of a group's largest magnitude that is kept", "f8", ("tried",), since=5),
    Entry(
        f"{LAYER}/clip/error",
        "mean over tokens and outputs of the sum of the groups' squared errors, all groups at this share",
        "f8",
        ("tried",),
        since=5,
    ),
    Entry(f"{LAYER}/clip/ratio", "the share that was chosen", "f4", ("out_features", "group"), since=5),
    Entry(f"{LAYER}/clip/@clipped_fraction", "share of the groups of all rows that are clipped", "f8", since=5),
    Entry(f"{LAYER}/clip/@error_chosen", "the error with each group at its own share", "f8", since=5),
    # Its figures of merit.
    Entry(METRICS, "figures of merit, see below"),
    Entry(f"{METRICS}/@output_mse", "mean of (y - ŷ)²", "f8", presence="complete", better="lower"),
    Entry(
        f"{METRICS}/@output_sqnr_db", "10·log10(Σy² / Σ(y - ŷ)²)", "f8", (), "dB", presence="complete", better="higher"
    ),
    Entry(
        f"{METRICS}/@rtn_output_mse",
        "mean of (y - ŷ)² of round-to-nearest",
        "f8",
        presence="complete",
        better="lower",
        note=": s = 1, through the same kernels",
    ),
    Entry(
        f"{METRICS}/@rtn_output_sqnr_db",
        "SQNR of round-to-nearest",
        "f8",
        (),
        "dB",
        presence="complete",
        better="higher",
    ),
    *_errors("max_", "with the scales that max|x| gives", "baselines=all", 6),
    *_errors("unclipped_", "with the same scales and nothing clipped", "clip.enabled=true"),
    Entry(
        f"{METRICS}/@weight_mse",
        "mean of (Wq·scale_b/s - W)²",
        "f8",
        presence="complete",
        better="neither",
        note="; AWQ gives it up for `output_mse`",
    ),
    Entry(
        f"{METRICS}/@saturated_fraction",
        "share of codes at either end of the range",
        "f8",
        presence="complete",
        better="neither",
        note="; every row or group has at least one, unless it is all zero",
    ),
    Entry(
        f"{METRICS}/@propagated_output_mse",
        "ŷ against the chain that is unquantized from its first layer on",
        "f8",
        presence="complete",
        better="lower",
        note="; a layer with activations of its own starts a new chain",
    ),
    *_errors("held_out_", "of AWQ on tokens that nothing was chosen by", "inputs.holdout"),
    *_errors("held_out_rtn_", "of round-to-nearest on tokens that nothing was chosen by", "inputs.holdout"),
    *_errors("held_out_max_", "with the scales that max|x| gives on tokens that nothing was chosen by", _BOTH, 6),
    # Where its error comes from.
    Entry(
        f"{LAYER}/lost",
        "where the output's error comes from, with input channels taken as uncorrelated",
        presence="complete",
        since=5,
    ),
    Entry(
        f"{LAYER}/lost/by_channel", "sq_mean times the sum over outputs of (Ŵ/s - W)^2", "f8", ("in_features",), since=5
    ),
    Entry(
        f"{LAYER}/lost/by_row",
        "Σ_k sq_mean · (Ŵ/s - W)²",
        "f8",
        ("out_features",),
        since=5,
        note="; the same sum as that of `by_channel`",
    ),
    Entry(
        f"{LAYER}/lost/@clipped",
        "of the same sum, the part of weights that were clipped",
        "f8",
        presence="optional",
        since=5,
        note="; with `clip.enabled=true`",
    ),
    # What `verify` found.
    Entry(VERIFY, "with `verify=true`: the worst error of each stage and what was allowed", presence="optional"),
    *(
        entry
        for stage, units, what, since in VERIFIED
        for entry in (
            Entry(f"{VERIFY}/@{stage}", what, "f8", (), units, "optional", since),
            Entry(
                f"{VERIFY}/@{stage}_tolerance", f"the most that `{stage}` may be", "f8", (), units, "optional", since
            ),
        )
    ),
    # Its codes.
    Entry(f"{LAYER}/weights", "with `save=full`", presence="optional"),
    Entry(
        f"{LAYER}/weights/Wq",
        "codes of 8 bits",
        "i1",
        ("out_features", "in_features"),
        presence="optional",
        note=", from -127 to 127 where they are symmetric; with zero points, less 128",
    ),
    Entry(
        f"{LAYER}/weights/Wq_packed",
        "codes of less than 8 bits, the first of a row in its lowest bits",
        "u1",
        ("out_features", "byte"),
        presence="optional",
        since=5,
        note="; of integers plus 2^(bits-1); of FP4 sign, exponent and mantissa",
    ),
    # Times.
    Entry(TIMINGS, "every sample of the measured passes", presence="complete"),
    Entry(
        f"{TIMINGS}/stage",
        "stage of the pipeline, in the order run; without relu where the product does it on the way",
        "str",
        ("stage",),
    ),
    Entry(f"{TIMINGS}/layer", "index of the layer", "i8", ("layer",)),
    Entry(f"{TIMINGS}/repeat", "index of the measured pass", "i8", ("repeat",)),
    Entry(
        f"{TIMINGS}/gpu_ms",
        "time on the stream between the events around the stage, of which each takes about 3 µs; a host stage's is the "
        "time the stream waited for it; NaN without a GPU",
        "f8",
        ("layer", "stage", "repeat"),
        "ms",
    ),
    Entry(
        f"{TIMINGS}/host_ms",
        "time the host spent in the stage; launches return early; NaN where passes were launched as a whole",
        "f8",
        ("layer", "stage", "repeat"),
        "ms",
    ),
    Entry(
        f"{TIMINGS}/pipeline_ms",
        "one whole pass over all layers, host steps and the events between stages included: on the stream, or on the "
        "host's clock without a GPU",
        "f8",
        ("repeat",),
        "ms",
    ),
    Entry(
        f"{TIMINGS}/cold_ms",
        "host time of the first pass with all that precedes it: making inputs, compiling, allocating",
        "f8",
        (),
        "ms",
        note="; NaN if it did not finish",
    ),
    Entry(
        f"{TIMINGS}/launched",
        "how passes were launched: `as a whole`, in one CUDA graph that the device goes through without the host, or "
        "`stage by stage`, and why",
        "str",
        presence="optional",
        since=4,
    ),
    Entry(CONDITIONS, "what the GPU told right after each measured pass", presence="optional", since=3),
    *(Entry(f"{CONDITIONS}/{name}", what, "f8", ("repeat",), units, "optional", since=3) for name, units, what in TOLD),
    # The digest.
    Entry(DIGEST, "SHA-256 of all bytes but these and what datasets with fletcher32 hold", "S64", since=2),
)


def entry(path: str) -> Entry:
    """The entry of this path.

    Raises:
        KeyError: there is none.
    """
    return entry_of(TABLE, path, FILE_NAME)


def under(group: str) -> Iterator[Entry]:
    """The group's own entry, and all below it."""
    return (each for each in TABLE if each.path == group or each.path.startswith(f"{group}/"))


def metrics() -> tuple[Entry, ...]:
    """The figures of merit of a layer, in their order."""
    return tuple(each for each in TABLE if each.parent == METRICS)
