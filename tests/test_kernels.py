"""The table of kernels: that it says what the sources say, and that everything else follows from it."""

import dataclasses
import re
import subprocess
import sys

import pytest
from conftest import ROOT
from host_cuda.build import with_headers

from awq_pycuda import provenance
from awq_pycuda.backends.choose import settle_variants
from awq_pycuda.backends.cuda.toolchain import find_toolchain
from awq_pycuda.errors import InputError
from awq_pycuda.kernels import bench_table, table
from awq_pycuda.kernels.launches import ONLY
from awq_pycuda.kernels.variant import MAX_INT, Argument, Device, Kernel, Parameter, Source, Variant
from awq_pycuda.paths import resource_dir
from awq_pycuda.quant.format import Format

sys.path.insert(0, str(ROOT / "tools"))
import compile_kernels

CUDA = resource_dir("cuda")
H100, NEWER = Device((9, 0), 227 * 1024, 80 << 30), Device((10, 0), 227 * 1024, 180 << 30)
SIGNATURE = re.compile(r'extern "C" __global__ void (?:__\w+__\([^)]*\) )*(\w+)\( ?([^)]*)\)')
BLOCKED = table.find("dequantizeTiled", "blocked")
ALL = (*table.VARIANTS, *bench_table.VARIANTS)


def test_the_table_needs_neither_pycuda_nor_numpy():
    script = "import sys; import awq_pycuda.kernels.table; print({'numpy', 'pycuda', 'hydra'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "set()\n"


def test_every_kernel_of_the_sources_is_in_the_table_with_its_arguments():
    declared = {}
    for path in CUDA.glob("*.cu"):
        for entry, arguments in SIGNATURE.findall(re.sub(r"\s+", " ", with_headers(path))):
            plain = re.sub(r"\bconst | ?__restrict__", "", arguments.strip())
            declared[path.name, entry] = tuple(plain.split(", "))
    listed = {
        (variant.file, kernel.entry): tuple(f"{each.type} {each.name}" for each in kernel.arguments)
        for variant in ALL
        for kernel in variant.kernels
    }
    assert listed == declared


PASS = ("accum_stats", "search_diag", "compute_scale_b", "quantize_awq", "dequantizeTiled", "relu")


def test_what_a_kernel_reads_early_the_one_before_it_does_not_write():
    """Of the stage before in a pass any may be the last that is launched."""
    early = 0
    for variant in table.VARIANTS:
        stage_before = table.variants(PASS[PASS.index(variant.stage) - 1]) if variant.stage in PASS else {}
        for index, kernel in enumerate(variant.kernels):
            before = [(variant.file, variant.kernels[index - 1].entry)]
            if index == 0:
                before = [(each.file, other.entry) for each in stage_before.values() for other in each.kernels]
            early += len(kernel.early) * len(before)
            for file, entry in before:
                assert written(file, entry).isdisjoint(kernel.early), (kernel.entry, entry)
    assert early


def written(file, entry):
    """The arrays that a kernel may write."""
    declared = dict(SIGNATURE.findall(re.sub(r"\s+", " ", with_headers(CUDA / file))))[entry]
    return {each.split()[-1] for each in declared.split(", ") if "*" in each and "const" not in each}


def test_every_kernel_of_a_stage_waits_for_its_turn():
    """At once, but for those of which the machine code tells, in test_machine_code.py."""
    later = set()
    for file in {variant.file for variant in table.VARIANTS}:
        text = re.sub(r"\s+", " ", with_headers(CUDA / file))
        kernels = SIGNATURE.finditer(text)
        later |= {(file, kernel[1]) for kernel in kernels if not text.startswith(" { in_turn();", kernel.end())}
    assert later == {
        *((file, "split_digits") for file in ("matmul_digits.cu", "matmul_digits_mma.cu")),
        ("matmul_digits.cu", "dequantizeTiled"),
        ("search_output_digits.cu", "square_products"),
        ("search_narrow.cu", "row_errors"),
        ("search_groups.cu", "group_errors"),
        *(("search_rows.cu", entry) for entry in ("row_maxima", "column_errors")),
    }


@pytest.mark.parametrize("variant", ALL, ids=lambda variant: f"{variant.stage}-{variant.name}")
def test_a_source_demands_its_macros_and_says_their_rules(variant):
    text = with_headers(CUDA / variant.file)
    demanded = set(re.findall(r"!defined\((\w+)\)|#ifndef ([A-Z]\w+)", text))
    macros = {*variant.macros, *variant.parameters}
    assert {one or other for one, other in demanded} == macros
    assert {name for name in macros if re.search(rf"static_assert\([^;]*\b{name}\b", text)} == macros
    assert not variant.suffix or variant.capability is not None


def test_variants_of_a_stage_have_one_signature_and_names_of_their_own():
    assert len({(variant.stage, variant.name) for variant in table.VARIANTS}) == len(table.VARIANTS)
    assert {stage for stage in table.stages() if len(table.variants(stage)) > 1} == {*table.KEYS, *table.BY_SIZES}
    # What only those take that can do relu on the way, or more formats.
    more = {"bias", "form", "zero_points", "tensor_scale"}
    for stage in table.stages():
        variants = table.variants(stage).values()
        taken = {frozenset(array for array in variant.arrays() if array.name not in more) for variant in variants}
        assert len(taken) == 1, stage
    for product in table.variants("dequantizeTiled").values():
        assert product.with_relu == ("bias" in {array.name for array in product.arrays()})


ODD_PRODUCT = {"tokens": 77, "out_features": 130, "in_features": 100, "group_size": 100}
LAUNCHES = [
    ("dequantizeTiled", "tiled", 0, {"TILE": 16, "tokens": 77, "out_features": 130}, 5 * 9, (16, 16, 1)),
    ("dequantizeTiled", "blocked", 0, {"TILE": 16, "tokens": 77, "out_features": 130}, 2 * 3, (16, 16, 1)),
    ("dequantizeTiled", "digits", 0, ODD_PRODUCT, 128 + 4, (128, 1, 1)),
    ("dequantizeTiled", "digits", 0, {**ODD_PRODUCT, "tokens": 33 * 128 - 64}, 33 * 128 - 64 + 4, (128, 1, 1)),
    ("dequantizeTiled", "digits", 0, {**ODD_PRODUCT, "tokens": 33 * 128 + 1}, 34 * 128 + 4, (128, 1, 1)),
    ("dequantizeTiled", "digits", 0, {**ODD_PRODUCT, "group_size": 32}, 96 + 4, (128, 1, 1)),
    ("dequantizeTiled", "digits", 1, ODD_PRODUCT, 2 * 2, (384, 1, 1)),
    ("dequantizeTiled", "digits", 1, {**ODD_PRODUCT, "tokens": 4096, "multiprocessors": 15}, 14, (384, 1, 1)),
    ("dequantizeTiled", "digits_mma", 0, ODD_PRODUCT, 128 + 4, (128, 1, 1)),
    ("dequantizeTiled", "digits_mma", 1, ODD_PRODUCT, 2 * 2, (256, 1, 1)),
    ("accum_stats", "deterministic", 0, {"tokens": 130, "in_features": 70}, 3, (1024, 1, 1)),
    ("accum_stats", "deterministic", 1, {"tokens": 130, "in_features": 70}, 0, (256, 1, 1)),
    ("accum_stats", "deterministic", 0, {"tokens": 4100, "in_features": 70}, 3 * 2, (1024, 1, 1)),
    ("accum_stats", "deterministic", 1, {"tokens": 4100, "in_features": 70}, 1, (256, 1, 1)),
    ("accum_stats", "deterministic", 0, {"tokens": 4096, "in_features": 8192}, 256, (512, 1, 1)),
    ("accum_stats", "deterministic", 0, {"tokens": 4096, "in_features": 11008}, 344, (256, 1, 1)),
    ("init", None, 0, {"rows": 4096, "cols": 4096, "multiprocessors": 132}, 16 * 132, (256, 1, 1)),
    ("init", None, 0, {"rows": 41, "cols": 125}, 2, (256, 1, 1)),
    ("matmul_reference", None, 0, {"tokens": 65, "out_features": 64}, 2, (16, 16, 1)),
    ("error_sums", None, 0, {"count": 3}, 1024, (256, 1, 1)),
    ("search_diag", "rows", 0, {"candidates": 7, "makers": 3}, 7 * 3, (1024, 1, 1)),
    ("compute_scale_b", None, 0, {"out_features": 70}, 70, (256, 1, 1)),
    ("compute_scale_b", None, 0, {"out_features": 7000}, 8 * 32, (256, 1, 1)),
]


@pytest.mark.parametrize(("stage", "name", "index", "sizes", "blocks", "threads"), LAUNCHES)
def test_launches(stage, name, index, sizes, blocks, threads):
    variant = table.find(stage, name)
    values = variant.complete({"multiprocessors": 8, **sizes}) if stage == "accum_stats" else sizes
    values = {"multiprocessors": 8, **variant.macros, **values}
    kernel = variant.kernels[index]
    assert (kernel.grid(values), kernel.threads(values)) == (blocks, threads)


def test_scratch_follows_the_chunks():
    variant = table.find("accum_stats", "deterministic")
    (nbytes,) = variant.scratch.values()
    assert nbytes(variant.complete({"tokens": 6200, "in_features": 70})) == 16 * 3 * 70


def test_sizes_follow_from_the_shapes():
    shapes = {"x": (77, 130), "wq": (65, 130), "inv_s": (130,), "scale_b": (65, 5), "y": (77, 65)}
    sizes = {"tokens": 77, "out_features": 65, "in_features": 130, "groups": 5}
    assert BLOCKED.sizes(shapes) == sizes
    assert BLOCKED.sizes({**shapes, "wq": (65, 6)}) == sizes
    error_sums = table.find("error_sums")
    assert error_sums.complete(error_sums.sizes({"reference": (7, 9), "value": (9, 7)}))["count"] == 63
    with pytest.raises(ValueError, match=r"x is of shape \(7, 7, 7\); the kernel needs \[tokens, in_features\]"):
        BLOCKED.sizes({**shapes, "x": (7, 7, 7)})


SEARCHES = [
    # Blocks for 132 multiprocessors: as many as run at a time, one or two on each.
    (4096, 4096, 4096, "rows", {"CHUNK": 20, "COLUMNS": 4, "rows_of_block": 125, "blocks": 4 * 33, "makers": 4}),
    (8192, 8192, 8192, "rows", {"CHUNK": 20, "COLUMNS": 4, "rows_of_block": 249, "blocks": 8 * 33, "makers": 6}),
    (1024, 2048, 2048, "rows", {"CHUNK": 10, "COLUMNS": 2, "rows_of_block": 32, "blocks": 4 * 32, "parts": 16}),
    (1024, 1024, 1024, "narrow", {"CHUNK": 10, "rows_of_block": 8, "blocks": 128}),
    (130, 36, 36, "narrow", {"CHUNK": 10, "rows_of_block": 4, "blocks": 33}),
    (5632, 1024, 1024, "narrow", {"CHUNK": 10, "rows_of_block": 44, "blocks": 128}),
    (5633, 1024, 1024, "rows", {"CHUNK": 20, "COLUMNS": 4}),
    (8192, 256, 256, "rows", {}),
    (130, 1024, 128, "groups", {"CHUNK": 10, "COLUMNS": 4, "rows_of_block": 9, "blocks": 15}),
    (130, 576, 128, "groups", {"COLUMNS": 4}),  # the last group is not full
    (130, 576, 64, "groups", {"CHUNK": 20, "COLUMNS": 2}),
    (130, 1025, 1025, "any", {"CHUNK": 7}),
    (130, 1024, 16, "any", {"blocks": 1040}),
    (130, 1022, 128, "any", {}),
]


@pytest.mark.parametrize(("out_features", "in_features", "group_size", "name", "expected"), SEARCHES)
def test_the_sizes_decide_how_scales_are_searched(out_features, in_features, group_size, name, expected):
    sizes = {"out_features": out_features, "in_features": in_features, "group_size": group_size, "candidates": 20}
    able = {}
    for variant in table.candidates("search_diag"):
        values = variant.complete({**sizes, "QMAX": 127})
        if variant.obstacle(values, H100) is None:
            able[variant.name] = values
    assert next(iter(able)) == name
    assert expected.items() <= able[name].items()
    assert "any" in able


@pytest.mark.parametrize(("candidates", "chunk"), [(1, 6), (5, 6), (11, 12), (20, 20), (22, 12), (64, 16), (101, 18)])
def test_a_chunk_of_candidates_leaves_few_places_empty_and_is_not_small(candidates, chunk):
    variant = table.find("search_diag", "rows")
    sizes = {"out_features": 4096, "in_features": 4096, "group_size": 4096, "candidates": candidates}
    assert variant.complete(sizes)["CHUNK"] == chunk


OBSTACLES = [
    (
        *({}, {"in_features": 70, "groups": 4, "group_size": 24}, None),
        "takes groups of one size, only the last smaller, not 4 groups of 24 for 70 channels",
    ),
    ({}, {"in_features": 70, "groups": 3, "group_size": 24}, None, None),
    ({}, {"TILE": 33}, H100, "takes TILE from 1 to 32, not 33"),
    ({}, {"tokens": MAX_INT + 1}, H100, f"takes tokens up to {MAX_INT}, not {MAX_INT + 1}"),
    ({"group_multiple": 32}, {"group_size": 48}, H100, "takes groups of a multiple of 32 input channels, not 48"),
    ({"group_multiple": 32}, {"group_size": 48, "groups": 1, "in_features": 48}, H100, None),
    ({"group_multiple": 32}, {"group_size": 64}, H100, None),
    ({"capability": (9, 0)}, {}, Device((8, 6), 0, 0), "needs a GPU of compute capability 9.0 or later, not 8.6"),
    ({"capability": (9, 0)}, {}, NEWER, None),
    ({"capability": (9, 0), "suffix": "a"}, {}, NEWER, "needs a GPU of compute capability 9.0, not 10.0"),
    ({"capability": (9, 0), "suffix": "a"}, {}, H100, None),
    ({}, {"tokens": MAX_INT, "TILE": 32}, None, None),
]


@pytest.mark.parametrize(("change", "values", "device", "obstacle"), OBSTACLES)
def test_what_a_variant_cannot_do_and_why(change, values, device, obstacle):
    assert dataclasses.replace(BLOCKED, **change).obstacle({"TILE": 16, "ZEROS": 0, **values}, device) == obstacle


def test_more_shared_memory_than_the_device_has():
    kernel = dataclasses.replace(BLOCKED.kernels[0], shared_bytes=lambda v: 1024 * v["TILE"] * v["MICRO"])
    variant = dataclasses.replace(BLOCKED, kernels=(kernel,))
    assert variant.obstacle({"TILE": 16, "ZEROS": 0}, Device((8, 6), 64 * 1024, 8 << 30)) is None
    beyond = "needs 69632 bytes of shared memory in a block, the GPU gives 65536"
    assert variant.obstacle({"TILE": 17, "ZEROS": 0}, Device((8, 6), 64 * 1024, 8 << 30)) == beyond


def test_a_kernel_that_the_device_cannot_run_is_refused_in_one_line(monkeypatch):
    third = dataclasses.replace(BLOCKED, name="tiled", capability=(9, 0), suffix="a", group_multiple=16)
    monkeypatch.setattr(table, "VARIANTS", (table.find("accum_stats"), third, BLOCKED))
    choices = {"accum_stats": "deterministic", "dequantizeTiled": "tiled"}
    for device, why in (((8, 0), "needs a GPU"), ((9, 0), "takes groups of a multiple of 16")):
        with pytest.raises(InputError, match=rf"^matmul\.kernel=tiled: {why}.*; allowed here: blocked$"):
            settle_variants(choices, 16, Format(24), Device(device, 0, 0))
    assert settle_variants(choices, 16, Format(32), H100) == (choices, [])


OLDER, OLDEST = Device((8, 6), 99 * 1024, 24 << 30), Device((7, 5), 64 * 1024, 8 << 30)
NO_GROUPS = "{} takes groups of a multiple of 32 input channels, not 24"
TOO_OLD = "{} needs a GPU of compute capability {}, not {}"
AUTOMATIC = [
    (H100, None, "digits", "auto"),
    (H100, 128, "digits", "auto"),
    (OLDER, 128, "digits_mma", "auto: " + TOO_OLD.format("digits", "9.0", "8.6")),
    (H100, 24, "blocked", f"auto: {NO_GROUPS.format('digits')}; {NO_GROUPS.format('digits_mma')}"),
    (
        *(OLDEST, None, "blocked"),
        f"auto: {TOO_OLD.format('digits', '9.0', '7.5')}; {TOO_OLD.format('digits_mma', '8.0 or later', '7.5')}",
    ),
]


@pytest.mark.parametrize(("device", "group_size", "name", "why"), AUTOMATIC)
def test_auto_is_the_first_that_can_and_says_why(device, group_size, name, why):
    settled = settle_variants({"dequantizeTiled": "auto"}, 16, Format(group_size), device)
    unused = "" if name == "blocked" else ", which has no tile"
    assert settled == ({"dequantizeTiled": name}, [f"matmul.kernel {name} ({why}){unused}"])


def test_auto_where_none_can():
    with pytest.raises(InputError, match=r"^matmul\.kernel=auto: takes TILE from 1 to 32, not 33; allowed here: back"):
        settle_variants({"dequantizeTiled": "auto"}, 33, Format(), OLDEST)


PLANTED = """
import dataclasses, sys
from awq_pycuda.kernels import bench_table, table
from awq_pycuda.kernels.launches import ONLY
from awq_pycuda.kernels.variant import Parameter

tile = {"TILE": Parameter(range(8, 65, 8), compiled=(8,))}
blocked = table.find("dequantizeTiled", "blocked")
third = dataclasses.replace(blocked, name="third", file="third.cu", help="a third way", parameters=tile)
table.VARIANTS += (third,)
from awq_pycuda import run
sys.exit(run.main())
"""
NAMES = [*table.names("dequantizeTiled")]
OPTIONS = ", ".join(sorted([*NAMES, "third"]))
SMALL = ("backend=cpu", "n=8", "layers=1", "timing=once")


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--help"], 0, f"{table.choices('dequantizeTiled')}, third (a third way)"),
        (["matmul=third", "tile=64", *SMALL], 0, "results "),
        (["matmul=third", "tile=12", *SMALL], 2, ", from 8 to 64 in steps of 8 with matmul.kernel=third\n"),
        (["matmul.kernel=fourth"], 2, f"error: matmul.kernel=fourth: allowed: {', '.join([*NAMES, 'third'])}\n"),
        (
            ["matmul=fourth"],
            2,
            f"error: matmul=fourth: no such option; allowed: {OPTIONS}\n",
        ),
    ],
)
def test_an_entry_of_the_table_is_all_that_config_and_help_need(tmp_path, arguments, code, said):
    command = [sys.executable, "-c", PLANTED, *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert said in done.stdout + done.stderr


def test_the_kernels_hash_tells_their_constants(monkeypatch):
    before = provenance.kernels_sha256()
    changed = dataclasses.replace(BLOCKED, macros={"MICRO": 8})
    monkeypatch.setattr(table, "VARIANTS", tuple(changed if each is BLOCKED else each for each in table.VARIANTS))
    assert provenance.kernels_sha256() != before


# --- make kernels -------------------------------------------------------------------------------------------------


def test_each_entry_is_compiled_for_what_it_runs_on():
    jobs = [str(job) for job in compile_kernels.jobs_for(ALL)]
    assert len(jobs) == len(set(jobs))
    assert {job.split()[0] for job in jobs} == {path.name for path in CUDA.glob("*.cu")}
    assert "matmul_blocked.cu -DMICRO=4 -DTILE=32 -DZEROS=0 sm_90" in jobs
    assert "matmul_blocked.cu -DMICRO=4 -DTILE=4 -DZEROS=1 sm_80" in jobs
    newer = dataclasses.replace(BLOCKED, capability=(9, 0), parameters={"TILE": Parameter(range(1, 33), (8, 9))})
    assert [job.arch for job in compile_kernels.jobs_for([newer])] == ["sm_90", "sm_100"] * 2
    hopper = dataclasses.replace(newer, suffix="a")
    assert [str(job) for job in compile_kernels.jobs_for([hopper])] == [
        f"matmul_blocked.cu -DMICRO=4 -DTILE={tile} sm_90a" for tile in (8, 9)
    ]


def test_a_parameter_can_take_all_that_is_allowed():
    tile = {"TILE": Parameter(range(4, 13, 4), (8,)), "DEPTH": Parameter(range(1, 9), (2, 3))}
    third = dataclasses.replace(BLOCKED, capability=(10, 0), parameters=tile)
    assert [str(job).partition("DEPTH=")[2] for job in compile_kernels.jobs_for([third], "TILE")] == [
        *(f"2 -DMICRO=4 -DTILE={tile} sm_100" for tile in (4, 8, 12)),
        "3 -DMICRO=4 -DTILE=8 sm_100",
    ]
    tiles = {job.source.macros for job in compile_kernels.jobs_for([BLOCKED], "TILE")}
    zeros = [*((tile, 0) for tile in range(1, 33)), (4, 1)]
    assert tiles == {(("MICRO", 4), ("TILE", tile), ("ZEROS", with_them)) for tile, with_them in zeros}


SPILLING = """
extern "C" __global__ void __launch_bounds__(1024, 2) spilling(float* y, int n) {
    float values[64];
    for (int i = 0; i < 64; ++i) values[i] = y[i * n + threadIdx.x];
    for (int round = 0; round < n; ++round) {
#pragma unroll
        for (int i = 0; i < 64; ++i) values[i] = fmaf(values[i], values[(i + 1) % 64], values[(i + 7) % 64]);
    }
    for (int i = 0; i < 64; ++i) y[i * n + threadIdx.x] = values[i];
}
"""


def planted(folder, name, source):
    (folder / f"{name}.cu").write_text(source)
    arguments = (Argument("float*", "y", ("n",)), Argument("int", "n"))
    return Variant(name, ONLY, f"{name}.cu", "", (Kernel(name, arguments, grid=lambda v: 1),), capability=(10, 0))


def test_make_kernels_fails_on_a_spill(capsys, tmp_path):
    try:
        find_toolchain()
    except InputError as error:
        pytest.skip(str(error))
    spilling = planted(tmp_path, "spilling", SPILLING)
    assert compile_kernels.compile_all([spilling], tmp_path) == 1
    out = capsys.readouterr().out
    assert re.search(
        r"^FAILED spilling\.cu sm_100: spilling: 32 registers, 0 B shared, spills: [1-9]\d* B stores", out, re.M
    )
    assert out.endswith("\n0 of 1 compilations passed\n")
    fine = planted(tmp_path, "spilling", SPILLING.replace("(1024, 2)", "(64)"))
    assert compile_kernels.compile_all([fine], tmp_path) == 0
    assert "no spills" in capsys.readouterr().out


NVCC = """\
#!/bin/sh
if [ "$1" = --version ]; then echo "Cuda compilation tools, release 13.0, V13.0.88"; exit; fi
cat <<'SAID'
curand_found
ptxas info    : Compiling entry function 'relu' for 'sm_80'
ptxas info    : Function properties for relu
    16 bytes stack frame, {spills} bytes spill stores, {spills} bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers, 34560 bytes smem
SAID
"""


@pytest.mark.parametrize(("spills", "others", "code"), [(0, [], 0), (12, [], 1), (0, ["stray.cu"], 1)])
def test_make_kernels_fails_on_what_nvcc_says_of_spills_and_on_a_file_without_an_entry(
    capsys, monkeypatch, tmp_path, spills, others, code
):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(NVCC.format(spills=spills))
    nvcc.chmod(0o755)
    monkeypatch.setenv("NVCC", str(nvcc))
    for name in others:
        (tmp_path / name).touch()
    assert compile_kernels.compile_all([table.find("relu")], tmp_path) == code
    out = capsys.readouterr().out
    assert ("FAILED relu.cu" in out) == (spills > 0)
    assert ("FAILED stray.cu: in no entry" in out) == bool(others)


def test_macros_and_suffix_are_part_of_what_is_compiled():
    source = Source("x.cu", (("TILE", 8),), "a")
    assert source.arch((9, 0)) == "sm_90a"
    assert source.flags() == ["-DTILE=8"]
    assert BLOCKED.source({"TILE": 8, "ZEROS": 1, "QMAX": 127, "tokens": 3}) == Source(
        "matmul_blocked.cu", (("MICRO", 4), ("TILE", 8), ("ZEROS", 1))
    )
