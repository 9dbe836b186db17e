#!/usr/bin/env bash
# Installs a lock into the environment of a Python, and says how much that is before it begins.
#   tools/install.sh PYTHON LOCK WHAT [pip options]
set -euo pipefail
python=$1 lock=$2 what=$3
shift 3

echo "installing $what: $(sed -n '1s/^# //p' "$lock")"
# Whatever is built from source is built by the setuptools that locks/build.txt names. Byte code is left to the first
# import: to compile all of it is three quarters of the work, 33 of 45 s for a run's packages, and most is never imported.
set -- "$python" -m pip install --disable-pip-version-check --retries 2 --require-hashes --no-build-isolation \
    --use-pep517 --no-compile "$@" -r "$lock"
if [ -t 1 ]; then
    "$@"
else
    # A log gets a line per file in place of a bar that moves.
    "$@" | { grep --line-buffered -E '^ *(Downloading|Building wheel|Installing collected)' || true; }
fi
