"""What nvcc makes of the kernels, read from the cubin: the instructions that a variant claims, and no spills."""

import struct
import subprocess
from collections import Counter

import pytest

from awq_pycuda.backends.cuda.toolchain import find_toolchain
from awq_pycuda.errors import InputError
from awq_pycuda.kernels import table
from awq_pycuda.kernels.variant import IN_TURN, Variant
from awq_pycuda.paths import resource_dir

# The low 12 bits of an instruction of 16 bytes, on sm_80 to sm_90.
FFMA, IMMA, IGMMA, VIMNMX3, REDUX, LOAD_LOCAL, STORE_LOCAL = 0x223, 0x237, 0x9F1, 0x20F, 0x3C4, 0x983, 0x387
LOAD, COPY, STORE = 0x981, 0xFAE, 0x986  # of global memory
WAIT, LET_NEXT = 0x82E, 0x82D  # for the kernel before, and for the next to be placed


def opcodes(cubin: bytes, kernel: str) -> list[int]:
    """The opcodes of a kernel's code, in its order."""
    sections, size, count, names = *struct.unpack_from("<Q", cubin, 40), *struct.unpack_from("<3H", cubin, 58)
    headers = [struct.unpack_from("<IIQQQQ", cubin, sections + i * size) for i in range(count)]
    start = headers[names][4]
    for name, *_, offset, length in headers:
        text = cubin[start + name : cubin.index(b"\0", start + name)].decode()
        if text == f".text.{kernel}":
            code = cubin[offset : offset + length]
            return [word & 0xFFF for word, _ in struct.iter_unpack("<2Q", code)]
    raise AssertionError(f"no kernel {kernel}")


def wait_in_turn(cubin: bytes, variant: Variant) -> None:
    """The compiler may move a load to where it likes: none may stand before the wait but those that the table knows."""
    for kernel in variant.kernels:
        found = opcodes(cubin, kernel.entry)
        assert LET_NEXT in found[found.index(WAIT) :], kernel.entry
        before = {*found[: found.index(WAIT)]}
        assert before.isdisjoint({STORE} if kernel.early else {STORE, LOAD, COPY}), kernel.entry


PRODUCTS = [
    # One step a row, tiles of two sizes: halves by four times 32 channels; groups: halves; a fourth digit of all three.
    ("digits", (9, 0), {IGMMA: 2 * 4 * 2 + 2 + 3, IMMA: 0}),
    ("digits_mma", (8, 0), {IGMMA: 0, IMMA: 2 * 4 * (3 + 1)}),  # 32 x 32 by three digits, and by the fourth
    ("digits_mma", (9, 0), {IGMMA: 0, IMMA: 2 * 4 * (3 + 1)}),
    ("blocked", (9, 0), {IGMMA: 0, IMMA: 0}),
]


# Four products of digits by four times 32 channels; 32 x 32 of each.
SQUARES = [
    ("digits", (9, 0), {IGMMA: 4 * 4, IMMA: 0}),
    ("digits_mma", (8, 0), {IGMMA: 0, IMMA: 4 * 2 * 4}),
]


def compiled(stage, name, capability, folder):
    """The cubin of a variant with the first values of its macros."""
    try:
        toolchain = find_toolchain()
    except InputError as error:
        pytest.skip(str(error))
    variant = table.find(stage, name)
    source = variant.source(variant.defaults())
    cubin = folder / "kernel.cubin"
    command = [toolchain.nvcc, *toolchain.flags, "-cubin", f"-arch={source.arch(capability)}", "-o", str(cubin)]
    subprocess.run([*command, *source.flags(), str(resource_dir("cuda") / source.file)], check=True)
    return cubin.read_bytes()


@pytest.mark.parametrize(
    ("stage", "entry", "name", "capability", "claimed"),
    [
        *(("dequantizeTiled", "dequantizeTiled", *product) for product in PRODUCTS),
        *(("search_output", "square_products", *squares) for squares in SQUARES),
    ],
)
def test_the_products_use_the_instructions_they_claim(tmp_path, stage, entry, name, capability, claimed):
    cubin = compiled(stage, name, capability, tmp_path)
    found = Counter(opcodes(cubin, entry))
    assert {code: found[code] for code in claimed} == claimed
    assert found[FFMA] > 0
    assert (found[LOAD_LOCAL], found[STORE_LOCAL]) == (0, 0)
    if capability >= IN_TURN:
        wait_in_turn(cubin, table.find(stage, name))


SEARCHES = [
    ("narrow", {"row_errors": (REDUX, 4 * 5)}),  # the largest of a warp for four rows and 5 candidates
    # 8 x 5 maxima of 16 channels, two at a time; the error of two rows, 12 candidates and 4 channels, and its square.
    ("rows", {"row_maxima": (VIMNMX3, 8 * 5 * 16 // 2), "column_errors": (FFMA, 2 * 12 * 4 * 2)}),
    ("groups", {"group_errors": (REDUX, 2 * 10)}),  # the largest of a warp for two rows and 10 candidates
]


@pytest.mark.parametrize(("name", "claimed"), SEARCHES)
def test_the_searches_use_the_instructions_they_claim(tmp_path, name, claimed):
    cubin = compiled("search_diag", name, (9, 0), tmp_path)
    for kernel, (code, least) in claimed.items():
        found = Counter(opcodes(cubin, kernel))
        assert found[code] >= least, kernel
        assert (found[LOAD_LOCAL], found[STORE_LOCAL]) == (0, 0), kernel
    wait_in_turn(cubin, table.find("search_diag", name))
