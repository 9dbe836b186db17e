"""What only a GPU can show: agreement of the two backends, every kernel for compute-sanitizer, the cubin cache."""

import subprocess
import sys

import h5py
import numpy as np
import pytest
from conftest import files_under, make_backend, same_bits
from test_backends import with_relu
from test_pipeline import Kept
from test_results import result_path

from awq_pycuda.engine.exact_format import code_errors
from awq_pycuda.engine.verify import frobenius_error, relative_error
from awq_pycuda.kernels import table
from awq_pycuda.kernels.variant import Argument, Kernel, Source, Variant
from awq_pycuda.quant.format import Format
from awq_pycuda.quant.quantized import Quantized

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("n", [1, 7, 130, 1000, 1025])
@pytest.mark.parametrize("inputs", ["synthetic", "outliers"])
def test_the_backends_agree(compose, tmp_path, n, inputs, worst):
    config = compose(f"n={n}", "tokens=77", "layers=2", f"inputs={inputs}", "timing=once", "save=full")
    cuda, cpu = Kept("cuda", config), Kept("cpu", config)
    assert same_bits(cuda.x[0], cpu.x[0])
    for w, v in zip(cuda.w, cpu.w, strict=True):
        assert same_bits(w, v)
    # From layer 1 on the activations of the two chains differ by rounding, and where relu leaves little of a channel
    # by much more; so both get the same activations for every layer before their stages are compared.
    path = tmp_path / "layers.npz"
    layers = {f"{i:03d}.weight": w for i, w in enumerate(cuda.w)}
    np.savez(path, **layers, **{f"{i:03d}.activations": x for i, x in enumerate(cuda.x)})
    config = compose("inputs=file", f"inputs.path={path}", "timing=once", "save=full")
    cuda, cpu = Kept("cuda", config), Kept("cpu", config)
    for a, b, w in zip(cuda.layers, cpu.layers, cuda.w, strict=True):
        worst("backends abs_mean", relative_error(a.abs_mean, b.abs_mean), 1e-5)
        worst("backends sq_mean", relative_error(a.sq_mean, b.sq_mean), 1e-5)
        worst("backends s", relative_error(a.search.s, b.search.s), 1e-5)
        worst("backends scale_b", relative_error(a.quantized.steps, b.quantized.steps), 1e-5)
        quantized = Quantized(a.quantized.steps, Format(), codes=b.quantized.codes)
        assert code_errors(quantized, w, a.search.s) == (0, 0)
        # Noise over signal: to 0.01 dB, beside which the products' own rounding counts where nothing else is lost.
        noise, exact = (10 ** (-each.metrics["output_sqnr_db"] / 20) for each in (a, b))
        assert noise == pytest.approx(exact, rel=0.00115, abs=1e-7)


@pytest.mark.parametrize("matmul", table.variants("dequantizeTiled"))
@pytest.mark.parametrize("stats", table.variants("accum_stats"))
def test_sanitize_every_kernel(compose, matmul, stats):
    """A small ragged run of every kernel; `make sanitize` puts it under compute-sanitizer's four tools."""
    variant, tiles = table.find("dequantizeTiled", matmul), table.allowed("dequantizeTiled", "TILE")
    cases = (
        [(7, "null"), (16, 17), (32, "null")] if matmul in tiles else [(16, "null"), (16, 2 * variant.group_multiple)]
    )
    for tile, group in cases:
        overrides = ("n=78", "tokens=45", "layers=2", "search=output", "inputs=outliers", f"quant.group_size={group}")
        config = compose(*overrides, f"tile={tile}", f"matmul={matmul}", f"stats={stats}", "timing=once")
        kept = Kept("cuda", config)
        assert all(np.isfinite(y).all() for y in kept.y)


@pytest.mark.parametrize(
    ("tokens", "out_features", "in_features"), [(4300, 300, 200), (257, 9000, 1000), (512, 640, 9000)]
)
@pytest.mark.parametrize("group_size", [None, 64, 128, 480])
@pytest.mark.parametrize("matmul", table.variants("dequantizeTiled"))
def test_products_of_many_tiles(tokens, out_features, in_features, group_size, matmul, worst):
    """Larger than what the other tests share with the host: every kind of tile, with rows of which some are wide."""
    rng, form = np.random.default_rng(3), Format(group_size)
    x = rng.uniform(-1, 1, (tokens, in_features)).astype(np.float32)
    x[: tokens // 2, ::50] *= 300
    codes = rng.integers(-127, 128, (out_features, in_features), np.int8)
    inv_s = rng.uniform(0.2, 4, in_features).astype(np.float32)
    steps = rng.uniform(0.001, 0.01, (out_features, form.groups(in_features))).astype(np.float32)
    with make_backend("cuda", dequantizeTiled=matmul) as backend:
        handles = [backend.empty(x.shape), backend.empty(codes.shape, np.int8), backend.empty(steps.shape)]
        for handle, values in zip(handles, (x, codes, steps), strict=True):
            backend.write(handle, values)
        inverse, y = backend.empty(inv_s.shape), backend.empty((tokens, out_features))
        backend.write(inverse, inv_s)
        quantized, found = Quantized(handles[2], form, codes=handles[1]), []
        for _ in range(2):
            backend.write(y, np.full(y.shape, np.nan, np.float32))
            backend.dequantize_tiled(handles[0], quantized, inverse, y)
            found.append(backend.read(y).copy())
        out = with_relu(backend, handles[0], quantized, inverse, None)
    weights = (
        codes * np.repeat(steps.astype(float), form.size(in_features), axis=1)[:, :in_features] * inv_s.astype(float)
    )
    exact = x.astype(float) @ weights.T
    assert same_bits(*found)
    assert np.array_equal(out, np.maximum(found[0], 0))
    for part in (slice(tokens // 2), slice(tokens // 2, None)):
        most = table.find("dequantizeTiled", matmul).tolerance
        worst(f"{matmul} product of many tiles", frobenius_error(found[0][part], exact[part]), most)


def test_sanitize_vector_paths(compose):
    """Sizes divisible by 4 take the 16-byte paths of quantize_awq and relu."""
    kept = Kept("cuda", compose("n=64", "layers=1", "timing=once"))
    assert np.isfinite(kept.y[0]).all()


def test_a_launcher_refuses_what_its_kernel_would_misread():
    with make_backend("cuda") as backend:
        x, wq = backend.empty((4, 5)), backend.empty((3, 6), np.int8)
        given = Quantized(backend.empty((3, 1)), Format(), codes=wq)
        with pytest.raises(ValueError, match=r"wq is int8\(3, 6\); the kernel needs int8\(3, 5\)"):
            backend.dequantize_tiled(x, given, backend.empty((5,)), backend.empty((4, 3)))
        given = Quantized(backend.empty((3, 3)), Format(group_size=3), codes=backend.empty((3, 5), np.int8))
        with pytest.raises(ValueError, match="only the last smaller, not 3 groups of 3 for 5 channels"):
            backend.dequantize_tiled(x, given, backend.empty((5,)), backend.empty((4, 3)))
        with pytest.raises(ValueError, match="x is int8"):
            backend.accum_stats(backend.empty((4, 5), np.int8), backend.empty((5,)), backend.empty((5,)))
        with pytest.raises(ValueError, match=r"out is float32\(4, 4\); the kernel needs float32\(4, 5\)"):
            backend.relu(x, None, backend.empty((4, 4)))
        with pytest.raises(ValueError, match=r"value is float32\(5, 4\); the kernel needs float32\(4, 5\)"):
            backend.error_sums(x, backend.empty((5, 4)))


REVERSE = """
extern "C" __global__ void reverse(const float* x, float* y, int count) {
    extern __shared__ float values[];
    for (int i = threadIdx.x; i < count; i += blockDim.x) values[i] = x[i];
    __syncthreads();
#if HOPPER
    asm volatile("wgmma.fence.sync.aligned;");  // sm_90a knows it, sm_90 does not
#endif
    for (int i = threadIdx.x; i < count; i += blockDim.x) y[i] = values[count - 1 - i];
}
"""


@pytest.mark.parametrize("suffix", ["", "a"])
def test_an_entry_s_suffix_and_dynamic_shared_memory_reach_compiler_and_launch(monkeypatch, tmp_path, suffix):
    """More than 48 KB of shared memory, which must be asked for, and code that is compiled for one architecture."""
    from awq_pycuda.backends.cuda import jit
    from awq_pycuda.backends.cuda.backend import CudaBackend
    from awq_pycuda.backends.cuda.device import open_gpu

    capability = open_gpu().limits.capability
    if suffix and capability < (9, 0):
        pytest.skip(f"compute capability {capability} has no architecture with a suffix")
    arguments = (Argument("float*", "x", ("count",)), Argument("float*", "y", ("count",)), Argument("int", "count"))
    kernel = Kernel("reverse", arguments, grid=lambda v: 1, shared_bytes=lambda v: 4 * v["COUNT"])
    macros = {"COUNT": 20_000, "HOPPER": int(bool(suffix) and capability == (9, 0))}
    entry = Variant("reverse", "only", "reverse.cu", "", (kernel,), macros, suffix=suffix, capability=capability)
    (tmp_path / "cuda").mkdir()
    (tmp_path / "cuda" / "reverse.cu").write_text(REVERSE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(jit, "resource_dir", lambda name: tmp_path / name)
    monkeypatch.setattr(table, "VARIANTS", (entry,))
    x = np.arange(macros["COUNT"], dtype=np.float32)
    with CudaBackend({}, {}) as backend:
        given, reversed_ = backend.empty(x.shape), backend.empty(x.shape)
        backend.write(given, x)
        backend._run("reverse", x=given, y=reversed_)
        assert same_bits(backend.read(reversed_), x[::-1].copy())
    (source,) = entry.compiled()
    assert source.arch(capability) == "sm_{}{}{}".format(*capability, suffix)
    plain = Source(source.file, source.macros)
    keys = {jit._key("", {}, each.flags(), "13.0", each.arch(capability)) for each in (source, plain)}
    assert len(keys) == (2 if suffix else 1)


def test_the_cubin_cache_is_used_and_whole(compose, monkeypatch, tmp_path):
    from awq_pycuda.backends.cuda import jit
    from awq_pycuda.backends.cuda.device import open_gpu

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    gpu = open_gpu()
    source = Source("relu.cu")
    with gpu.current():
        gpu.modules.pop(source, None)
        jit.load(gpu, [source])
        (cached,) = files_under(tmp_path / "awq_pycuda")
        assert cached.startswith("relu-")
        gpu.modules.pop(source)
        monkeypatch.setattr(jit, "compile", lambda *a, **k: pytest.fail("compiled again"))
        jit.load(gpu, [source])


def test_a_run_on_the_gpu_stores_events(cli):
    code, out, err = cli("n=64", "layers=2", "backend=auto", "verify=true")
    assert code == 0, err
    assert out.startswith("backend cuda (auto: a driver and a device are there)")
    with h5py.File(result_path(out)) as file:
        assert file.attrs["backend"] == "cuda"
        assert np.isfinite(file["timings/gpu_ms"][:]).all()
        assert (file["timings/pipeline_ms"][:] > 0).all()


def test_a_sweep_shares_one_context(cli, tmp_path):
    code, _, err = cli("-m", "n=32,48", "tile=8,16", "layers=1", "backend=cuda")
    assert code == 0, err
    assert len(list(tmp_path.rglob("results.h5"))) == 4


def test_more_than_the_card_holds_is_refused(cli, tmp_path):
    code, _, err = cli("n=99999999", "backend=cuda")
    assert code == 2
    assert "80% of the" in err
    assert files_under(tmp_path / "work") == []


def test_a_failure_in_layer_2_leaves_layers_0_and_1(cli, monkeypatch, tmp_path):
    from awq_pycuda.backends.cuda.backend import CudaBackend

    calls = iter(range(1000))
    quantize = CudaBackend.quantize_awq

    def failing(self, *arguments):
        if next(calls) == 2:
            raise RuntimeError("planted in layer 2")
        quantize(self, *arguments)

    monkeypatch.setattr(CudaBackend, "quantize_awq", failing)
    code, _, err = cli("n=16", "layers=4", "backend=cuda")
    assert code == 1
    assert err.startswith("failed: RuntimeError: planted in layer 2")
    (path,) = tmp_path.rglob("results.h5")
    with h5py.File(path) as file:
        assert file.attrs["status"] == "failed"
        assert list(file["layers"]) == ["000", "001"]
        assert file["layers/001/metrics"].attrs["output_sqnr_db"] > 20


FAULTY = """
import sys
from awq_pycuda import run
from awq_pycuda.backends.cuda.backend import CudaBackend

relu, calls = CudaBackend.relu, iter(range(100))

def faulty(self, y, bias, out):
    if next(calls) == 2:
        y = self.empty(y.shape)
        y.pointer = 16  # nothing is mapped there
    relu(self, y, bias, out)

if "fault" in sys.argv:
    sys.argv.remove("fault")
    CudaBackend.relu = faulty
sys.exit(run.main())
"""


@pytest.mark.parametrize("fault", [False, True])
def test_a_process_ends_cleanly_and_after_an_illegal_address_with_a_failed_result(tmp_path, fault):
    command = [sys.executable, "-c", FAULTY, "n=32", "layers=4", "backend=cuda", *(["fault"] if fault else [])]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == (1 if fault else 0), done.stderr
    (path,) = tmp_path.rglob("results.h5")
    with h5py.File(path) as file:
        assert file.attrs["status"] == ("failed" if fault else "complete")
        assert list(file["layers"])[:2] == ["000", "001"]
        if fault:
            assert "illegal" in file.attrs["error"]
    if not fault:
        assert done.stderr == ""
