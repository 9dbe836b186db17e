#!/bin/sh
# Builds PyCUDA from source into the environment of the given Python, with nvcc and headers from PyPI where the machine
# has no complete CUDA toolkit, and says whether it works. Needs no driver and no GPU. A second call changes nothing.
#   tools/setup_cuda.sh .venv/bin/python
set -eu

python=$1
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 1' INT TERM

for tool in gcc g++ nm; do
    if ! command -v "$tool" >/dev/null; then
        echo "setup-cuda: $tool is missing; install a C++ compiler and binutils (Debian: apt-get install g++)" >&2
        exit 2
    fi
done

# The folder of the machine's own toolkit, if it is complete. nvcc itself says where it lies: the one on PATH may be a
# link or a script.
machine_toolkit() {
    nvcc=$(PYTHONPATH="$root" "$python" - <<'PYTHON'
from awq_pycuda.errors import InputError
from awq_pycuda.backends.cuda.toolchain import find_toolchain

try:
    toolchain = find_toolchain()
except InputError:
    raise SystemExit(1) from None
if toolchain.flags or toolchain.nvcc.endswith("nvidia/cu13/bin/nvcc"):
    raise SystemExit(1)
print(toolchain.nvcc)
PYTHON
    ) || return 1
    "$nvcc" --dryrun -x c++ -E /dev/null 2>&1 | sed -n 's/^#\$ TOP=//p'
}

if toolkit=$(machine_toolkit) && [ -n "$toolkit" ]; then
    rpath=$toolkit/lib64
else
    "$root/tools/install.sh" "$python" "$root/locks/cuda-toolkit.txt" 'nvcc and the CUDA headers'
    site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("platlib"))')
    toolkit=$site/nvidia/cu13
    # Seen from site-packages/pycuda/_driver.so, so that the environment can be moved.
    rpath='$ORIGIN/../nvidia/cu13/lib'
    ln -s "$toolkit"/lib/libcurand.so.* "$work/libcurand.so"  # PyPI's package has no name to link by
fi

# The driver's library need not be here to link against: an empty one of its name will do. Linkers that drop libraries
# which give no symbol would leave the name out of PyCUDA's module (hence --no-as-needed).
echo | gcc -shared -x c -Wl,-soname,libcuda.so.1 -o "$work/libcuda.so" -
# No cache: pip would hand out a PyCUDA that was built against another toolkit, with that one's library path.
PATH="$toolkit/bin:$PATH" LIBRARY_PATH="$work${LIBRARY_PATH:+:$LIBRARY_PATH}" \
    LDFLAGS="-Wl,--no-as-needed -Wl,-rpath,$rpath" \
    "$root/tools/install.sh" "$python" "$root/locks/cuda.txt" 'PyCUDA, which takes two minutes to build' --no-cache-dir

version=$("$python" -c 'from importlib.metadata import version; print(version("pycuda"))')
if driver=$("$python" -c 'import pycuda.driver as d; print("%d.%d" % divmod(d.get_driver_version() // 10, 100))' \
    2>"$work/error"); then
    echo "PyCUDA $version works with driver $driver"
    exit
fi
if ! grep -q 'libcuda\.so\.1: cannot open shared object file' "$work/error"; then
    echo "setup-cuda: PyCUDA $version is installed but cannot be imported:" >&2
    tail -n 1 "$work/error" >&2
    exit 1
fi
# Proof that only the driver is missing: with a library that has all of the driver's names, the import succeeds.
module=$("$python" -c 'from importlib.util import find_spec
from pathlib import Path
print(*Path(find_spec("pycuda").origin).parent.glob("_driver*.so"))')
nm -D --undefined-only "$module" | sed -n 's/.* U \(cu[A-Z][A-Za-z0-9_]*\).*/int \1(void) { return 0; }/p' |
    gcc -shared -x c -Wl,-soname,libcuda.so.1 -o "$work/libcuda.so.1" -
LD_LIBRARY_PATH="$work${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}" "$python" -c 'import pycuda.driver, pycuda.compiler'
echo "PyCUDA $version is built; importing it needs a driver (libcuda.so.1), which this machine has not"
