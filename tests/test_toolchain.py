import subprocess
import sys
from pathlib import Path

import pytest

from awq_pycuda.backends.cuda.toolchain import Toolchain, find_toolchain
from awq_pycuda.errors import InputError

# Stands for nvcc: prints its version, or the preprocessed question whether its toolkit has cuRAND.
NVCC = """\
#!/bin/sh
if [ "$1" = --version ]; then echo "Cuda compilation tools, release 13.0, V{version}"; else echo "{answer}"; fi
"""


@pytest.fixture(autouse=True)
def bare_machine(monkeypatch, tmp_path):
    """No toolkit anywhere: what a test puts somewhere is all there is."""
    for name in ("NVCC", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.setattr(sys, "path", [])


def make_nvcc(path: Path, version: str = "13.0.88", curand: bool = True) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(NVCC.format(version=version, answer="curand_found" if curand else ""))
    path.chmod(0o755)
    return str(path)


def make_pypi_curand(site: Path) -> str:
    include = site / "nvidia" / "cu13" / "include"
    include.mkdir(parents=True)
    (include / "curand_kernel.h").touch()
    return str(include)


def test_nvcc_named_by_path(monkeypatch, tmp_path):
    nvcc = make_nvcc(tmp_path / "my tools" / "nvcc-13")
    monkeypatch.setenv("NVCC", nvcc)
    assert find_toolchain() == Toolchain(nvcc, "13.0.88", ())


def test_nvcc_named_by_program_name(monkeypatch, tmp_path):
    nvcc = make_nvcc(tmp_path / "nvcc-13")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("NVCC", "nvcc-13")
    assert find_toolchain().nvcc == nvcc


@pytest.mark.parametrize("name", ["CUDA_HOME", "CUDA_PATH"])
def test_toolkit_folder_named(monkeypatch, tmp_path, name):
    nvcc = make_nvcc(tmp_path / "cuda" / "bin" / "nvcc")
    monkeypatch.setenv(name, str(tmp_path / "cuda"))
    assert find_toolchain().nvcc == nvcc


def test_nvcc_among_python_packages(monkeypatch, tmp_path):
    nvcc = make_nvcc(tmp_path / "nvidia" / "cu13" / "bin" / "nvcc", version="13.0.48")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "other"), str(tmp_path)])
    assert find_toolchain() == Toolchain(nvcc, "13.0.48", ())


def test_order_of_the_places(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    found = [make_nvcc(tmp_path / "nvidia" / "cu13" / "bin" / "nvcc")]
    assert find_toolchain().nvcc == found[-1]
    for name, place in (("PATH", "bin"), ("CUDA_PATH", "path"), ("CUDA_HOME", "home"), ("NVCC", "mine/nvcc")):
        folder = tmp_path / place
        found.append(make_nvcc({"PATH": folder / "nvcc", "NVCC": folder}.get(name, folder / "bin" / "nvcc")))
        monkeypatch.setenv(name, str(folder))
        assert find_toolchain().nvcc == found[-1]


def test_folder_without_nvcc_is_passed_over(monkeypatch, tmp_path):
    nvcc = make_nvcc(tmp_path / "nvcc")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "only the runtime"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_toolchain().nvcc == nvcc


def test_missing_curand_headers_come_from_python_packages(monkeypatch, tmp_path):
    nvcc = make_nvcc(tmp_path / "nvcc", curand=False)
    include = make_pypi_curand(tmp_path / "site")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site")])
    assert find_toolchain() == Toolchain(nvcc, "13.0.88", ("-isystem", include))


def assert_one_line(error: pytest.ExceptionInfo[InputError], *parts: str) -> None:
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_no_nvcc_says_what_to_install():
    with pytest.raises(InputError) as error:
        find_toolchain()
    assert_one_line(error, "nvcc", "make setup-cuda", "requirements-cuda-toolkit.txt")


def test_no_curand_headers_says_what_to_install(monkeypatch, tmp_path):
    make_nvcc(tmp_path / "nvcc", curand=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError) as error:
        find_toolchain()
    assert_one_line(error, str(tmp_path / "nvcc"), "curand_kernel.h", "make setup-cuda")


def test_named_nvcc_that_is_not_there(monkeypatch, tmp_path):
    make_nvcc(tmp_path / "nvcc")
    monkeypatch.setenv("PATH", str(tmp_path))  # another one is no substitute for the one asked for
    monkeypatch.setenv("NVCC", "/nowhere/nvcc")
    with pytest.raises(InputError) as error:
        find_toolchain()
    assert_one_line(error, "NVCC=/nowhere/nvcc")


@pytest.mark.parametrize(
    ("script", "complaint"),
    [
        ("#!/bin/sh\necho Usage: something else\n", "not nvcc"),
        ("#!/bin/sh\necho 'no host compiler' >&2\nexit 1\n", "no host compiler"),
        ("#!/nowhere/interpreter\n", "cannot be run"),
    ],
)
def test_nvcc_that_does_not_work(monkeypatch, tmp_path, script, complaint):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(script)
    nvcc.chmod(0o755)
    monkeypatch.setenv("NVCC", str(nvcc))
    with pytest.raises(InputError) as error:
        find_toolchain()
    assert_one_line(error, str(nvcc), complaint)


def test_real_nvcc_compiles_curand(monkeypatch, tmp_path):
    """With whatever this machine has, if it has anything."""
    monkeypatch.undo()
    try:
        toolchain = find_toolchain()
    except InputError as error:
        pytest.skip(str(error))
    source = tmp_path / "uses_curand.cu"
    source.write_text("#include <curand_kernel.h>\n__global__ void f(curandStatePhilox4_32_10_t* s) { curand(s); }\n")
    command = [toolchain.nvcc, *toolchain.flags, "-cubin", "-arch=sm_90", "-o", tmp_path / "out.cubin", source]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
