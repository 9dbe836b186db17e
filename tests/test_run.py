"""The command: what it prints, where it writes, and how it refuses."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
from conftest import files_under
from test_results import result_path

from awq_pycuda import provenance
from awq_pycuda.backends.cpu import CpuBackend
from awq_pycuda.config import ALLOWED
from awq_pycuda.engine import execution
from awq_pycuda.errors import InputError
from awq_pycuda.kernels.variant import Device
from awq_pycuda.sweeps.hydra_errors import groups

SMALL = ("n=24", "layers=2", "backend=cpu")


def test_a_run_prints_its_summary_and_path(cli, tmp_path):
    code, out, err = cli(*SMALL, "inputs=outliers")
    assert (code, err) == (0, "")
    assert "backend cpu (as asked)" in out
    for heading in ("gamma", "RTN dB", "AWQ dB", "error removed", "dequantize", "Tiled"):
        assert heading in out
    assert "\x1b" not in out
    path = Path(result_path(out))
    assert path.is_file()
    assert path.parent.parent.parent == tmp_path / "work" / "outputs"


def test_auto_says_which_backend_and_why(cli, monkeypatch):
    monkeypatch.setattr("awq_pycuda.backends.choose.why_no_cuda", lambda: "no driver, says the test")
    code, out, _ = cli("n=8", "layers=1")
    assert code == 0
    assert out.splitlines()[0] == "backend cpu (auto: no driver, says the test)"


def test_cuda_without_a_gpu_is_a_clear_error(cli, monkeypatch, tmp_path):
    monkeypatch.setattr("awq_pycuda.backends.choose.why_no_cuda", lambda: "no driver, says the test")
    code, out, err = cli("backend=cuda")
    assert (code, out) == (2, "")
    assert err == "error: backend=cuda: no driver, says the test; allowed here: auto, cpu\n"
    assert files_under(tmp_path / "work") == []


def test_a_sweep_leaves_one_file_per_job(cli, tmp_path):
    code, _, err = cli("-m", *SMALL[1:], "tile=8,16", "n=8,12", "gamma_grid=day58")
    assert code == 0, err
    found = sorted(tmp_path.rglob("results.h5"))
    assert len(found) == 4
    configs = set()
    for path in found:
        with h5py.File(path) as file:
            configs.add(file.attrs["config_hash"])
    assert len(configs) == 4


def test_config_hash_is_of_the_resolved_config(cli):
    hashes = []
    for overrides in (("gammas=[0,0.25,0.5,0.75,1]",), ("gamma_grid=day58", "tokens=24"), ("seed=1",)):
        with h5py.File(result_path(cli(*SMALL, *overrides)[1])) as file:
            hashes.append(file.attrs["config_hash"])
    assert hashes[0] == hashes[1] != hashes[2]


REFUSED = [
    *(f"tile={value}" for value in ("0", "33", "-4", "abc", "1.5", "null")),
    *(f"n={value}" for value in ("0", "-1", "abc", "99999999", "")),
    *(f"layers={value}" for value in ("0", "-2", "abc", "null", "1001", "1000000000")),
    *(f"tokens={value}" for value in ("0", "abc", "null")),
    *(f"gammas={value}" for value in ("[]", "[nan]", "[-1]", "[inf]", "[11]", "[a]", "3", "[0,", "[0,null]")),
    *(f"seed={value}" for value in ("-1", str(2**64), "abc")),
    *(f"{key}=1" for key in ("foo", "+foo", "timing.foo", "+timing.foo", "inputs.path")),
    *("gamma_grid=nope", "inputs=nope", "matmul=nope", "backend=gpu", "stats=fast", "save=all", "verify=maybe"),
    *(
        "timing.repeats=-1",
        "timing.repeats=100001",
        "timing.warmup=-1",
        "timing.warmup=100001",
        "threads=0",
        "search.objective=best",
        "search.normalization=max",
        "search.formula=both_of_them",
        "search.betas=[]",
        "search.clamp=[8,0.125]",
        "search.clamp=[0.5]",
        "search.floor=inf",
        "search.floor=0",
        "search.identity=maybe",
        "convention=awq",
    ),
    *("quant.group_size=0", "quant.group_size=1.5", "quant=null", "~tile", "inputs.kind=file", "tile=8,16"),
    *("inputs=file", "hydra.run.dir=/proc/nowhere", "hydra.run.dir=/dev/null/x"),
    *(f"hydra.run.dir=new/{'long' * 64}", "seed=é", "tile", "--nope", "--info=nope"),
    *("quant=128", "timing=true", "matmul=1.5", "gammas=[${nope}]", 'backend="c\npu"', "n=8\n"),
]


@pytest.mark.parametrize("override", REFUSED)
def test_bad_input_is_one_line_and_writes_nothing(cli, tmp_path, override):
    code, out, err = cli(override)
    assert code == 2, err
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    assert "allowed" in line
    key = override.lstrip("+~").split("=")[0]
    assert ("inputs.path" if override == "inputs=file" else key) in line
    assert files_under(tmp_path / "work") == []


@pytest.mark.parametrize(
    "overrides",
    [("inputs.channels=0",), ("inputs.channels=1.5",), ("inputs.factor_min=0",), ("inputs.factor_min=200",)],
)
def test_bad_outliers(cli, overrides):
    code, _, err = cli("inputs=outliers", *overrides)
    assert code == 2
    assert overrides[0] in err


def test_a_key_of_other_options_is_told_from_an_unknown_one(cli):
    assert "inputs.path=x.h5: not a key of the chosen options" in cli("inputs.path=x.h5")[2]
    assert "inputs.paht=x.h5: no such key; allowed: inputs.path" in cli("inputs.paht=x.h5")[2]


@pytest.mark.parametrize("sweep", [("tile=8,33",), ("tile=8,abc",), ("n=8,12", "gamma_grid=day58,nope")])
def test_one_bad_value_stops_a_sweep_before_it_starts(cli, tmp_path, sweep):
    code, _, err = cli("-m", *SMALL, *sweep)
    assert code == 2
    assert len(err.splitlines()) == 1
    assert files_under(tmp_path / "work") == []


@pytest.mark.parametrize("content", [b"", b"not a layer file", b"\x89HDF\r\n\x1a\n truncated"])
def test_damaged_layer_files(cli, tmp_path, content):
    path = tmp_path / "bad.h5"
    path.write_bytes(content)
    code, _, err = cli("inputs=file", f"inputs.path={path}")
    assert code == 2
    assert err.startswith(f"error: inputs.path={path}: ")
    assert len(err.splitlines()) == 1
    assert files_under(tmp_path / "work") == []


@pytest.mark.parametrize(
    ("tensor", "value", "named"),
    [("weight", np.nan, "weight[2, 3]"), ("activations", np.inf, "activations[2, 3]"), ("bias", -np.inf, "bias[2]")],
)
def test_nan_and_inf_are_refused_with_layer_tensor_and_index(cli, tmp_path, tensor, value, named):
    tensors = {"weight": np.ones((5, 4), "f4"), "activations": np.ones((6, 4), "f4"), "bias": np.ones(5, "f4")}
    tensors[tensor][(2, 3) if tensors[tensor].ndim == 2 else 2] = value
    path = tmp_path / "layers.npz"
    np.savez(path, **{f"000.{name}": data for name, data in tensors.items()})
    code, _, err = cli("inputs=file", f"inputs.path={path}")
    assert code == 2
    assert "layer 0" in err
    assert named in err


def test_layers_that_do_not_chain_are_refused(cli, tmp_path):
    path = tmp_path / "layers.npz"
    np.savez(path, **{"000.weight": np.ones((5, 4), "f4"), "001.weight": np.ones((3, 6), "f4")})
    code, _, err = cli("inputs=file", f"inputs.path={path}")
    assert code == 2
    assert "in_features" in err


def test_help_and_cfg_are_readable(cli, tmp_path):
    code, out, _ = cli("--help")
    assert code in (0, None)
    for word in ("tile=32 layers=6", "timing:", "repeats: 3", "--cfg job"):
        assert word in out
    for group, options in groups().items():
        (line,) = [line for line in out.splitlines() if line.startswith(f"  {group} ")]
        for option in options:
            assert option in line
    code, out, _ = cli("--cfg", "job")
    assert code in (0, None)
    assert "tile: 16" in out
    assert "hydra" not in out
    assert files_under(tmp_path / "work") == []


def test_the_command_works_from_any_folder_as_a_process(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "awq_pycuda.run", *SMALL],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert Path(result_path(done.stdout)).is_file()
    bad = subprocess.run(
        [sys.executable, "-m", "awq_pycuda.run", "tile=abc"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (bad.returncode, bad.stderr) == (2, f"error: tile=abc: allowed: {ALLOWED['tile']}\n")


@pytest.mark.parametrize(
    ("overrides", "bytes_needed"),
    [
        # A layer: W 4 n², Wq n², relu(Y) 4 n². Then X 4 n², trial codes n², Y and four more products 20 n²; for the one
        # thread's block of n² / 4 three float32 that the search keeps, and two float64 in the sums over Y.
        ((), (3 * 9 + 4 + 1 + 20 + 3 + 4) * 1024**2),
        # The weights while they are drawn: once more in float32, and the words of the one thread.
        (("layers=1", "tokens=1"), (5 + 1 + 4 + 2) * 1024**2),
        # The copies of the codes, the image of the file and its bytes.
        (("save=full",), (3 * 9 + 4 + 1 + 20 + 3 + 3 * 3) * 1024**2),
        # The oracle: X, Y and n / 8 rows of weights in float64.
        (("verify=true",), (3 * 9 + 4 + 1 + 20 + 3 + 8 * 2 + 1) * 1024**2),
    ],
)
def test_memory_is_refused_beyond_80_percent_of_what_is_free(cli, monkeypatch, tmp_path, overrides, bytes_needed):
    """Counted by hand, without the vectors: they are below 2 % here."""
    free = SimpleNamespace(total=2**40, available=0)
    monkeypatch.setattr("psutil.virtual_memory", lambda: free)
    free.available = int(bytes_needed / 0.8 * 0.999)
    code, _, err = cli("backend=cpu", "timing=once", "threads=1", *overrides)
    assert code == 2
    assert err.startswith("error: n=1024: needs 0.")
    assert "allowed: up to 80%" in err
    assert files_under(tmp_path / "work") == []
    free.available = int(bytes_needed / 0.8 * 1.02)
    assert cli("backend=cpu", "timing=once", "threads=1", *overrides)[0] == 0


@pytest.mark.parametrize(("where", "arrays"), [("auto", 0), ("host", 3)])
def test_a_device_s_own_memory_is_checked_before_the_host_s(cli, monkeypatch, where, arrays):
    # A CPU backend that says what a GPU's would; the arrays then do not count against the host, the weights do.
    monkeypatch.setattr(CpuBackend, "limits", Device((9, 0), 227 * 1024, 2**40))
    monkeypatch.setattr(CpuBackend, "available_bytes", lambda self: 2**20)
    overrides = ("backend=cpu", "threads=1", "matmul=blocked", "baselines=rtn", f"search.where={where}")
    code, _, err = cli(*overrides)
    assert code == 2
    assert "GiB of the GPU's memory" in err
    monkeypatch.setattr(CpuBackend, "available_bytes", lambda self: 2**40)
    # W and codes of three layers; the blocks of the one thread, more where it searches, and float64 of one.
    needed = (3 * 5 + arrays + 2) * 1024**2
    free = SimpleNamespace(total=2**40, available=int(needed / 0.8 * 0.999))
    monkeypatch.setattr("psutil.virtual_memory", lambda: free)
    code, _, err = cli(*overrides)
    assert code == 2
    assert "GiB of the host's memory" in err
    free.available = int(needed / 0.8 * 1.02)
    assert cli(*overrides, "timing=once")[0] == 0


def test_names_that_look_like_markup_are_printed_as_they_are(cli, tmp_path):
    path = tmp_path / "layers.h5"
    with h5py.File(path, "w") as file:
        file["layers/000/weight"] = np.ones((5, 4), "f4")
        file["layers/000"].attrs["name"] = "x[/] [bold]y"
    code, out, err = cli("inputs=file", f"inputs.path={path}", "backend=cpu", "n=3", "hydra.run.dir='out[red]'")
    assert (code, err) == (0, "")
    assert "x[/] [bold]y" in out
    assert "out[red]/results.h5" in out


def test_the_kernels_hash_is_of_names_and_contents(monkeypatch, tmp_path):
    monkeypatch.setattr(provenance, "resource_dir", lambda name: tmp_path)
    hashes = set()
    for name, content in (("a.cu", "x"), ("a.cu", "y"), ("b.cuh", "y")):
        (tmp_path / name).write_text(content)
        hashes.add(provenance.kernels_sha256())
    assert len(hashes) == 3


def test_a_full_or_closed_stdout_does_not_cost_the_run(tmp_path):
    command = [sys.executable, "-m", "awq_pycuda.run", *SMALL]
    with open("/dev/full", "w") as full:
        subprocess.run(command, cwd=tmp_path, stdout=full, stderr=subprocess.DEVNULL, check=False)
    assert len(list(tmp_path.rglob("results.h5"))) == 1
    reader, writer = os.pipe()
    os.close(reader)
    subprocess.run(command, cwd=tmp_path, stdout=writer, stderr=subprocess.DEVNULL, check=False)
    os.close(writer)
    assert len(list(tmp_path.rglob("results.h5"))) == 2


@pytest.mark.parametrize(("error", "expected"), [(InputError("n=8: gone"), 2), (ValueError("not an input"), 1)])
def test_only_what_the_user_gave_is_bad_input(cli, monkeypatch, error, expected):
    def fail(folder, record):
        raise error

    monkeypatch.setattr(execution, "write", fail)
    code, _, err = cli(*SMALL)
    assert code == expected
    assert "Error executing job" not in err
    assert err.splitlines()[-1] == ("error: n=8: gone" if expected == 2 else "ValueError: not an input")


def test_overrides_on_both_sides_of_a_flag(cli, tmp_path):
    code, _, err = cli(*SMALL, "-m", "tile=4,8")
    assert code == 0, err
    assert len(list(tmp_path.rglob("results.h5"))) == 2


def test_a_sweep_takes_hydra_s_globs_and_ranges(cli, tmp_path):
    code, _, err = cli("-m", *SMALL, "search=glob(*)", "tile=range(4,12,4)")
    assert code == 0, err
    assert len(list(tmp_path.rglob("results.h5"))) == 4
