"""Put on PYTHONPATH by tests: plants trouble in the worker process of a sweep, by the seed of the job.

PLANT is a JSON object from seeds to what shall happen; RUNS names a file that gets the seed of every pass begun.
"""

import json
import os
import signal
import sys
import time

if "awq_pycuda.worker" in sys.orig_argv and "RUNS" in os.environ:
    from awq_pycuda.pipeline import Pipeline

    trouble = json.loads(os.environ.get("PLANT", "{}"))
    run = Pipeline.run

    def run_or_fail(self, *arguments):
        seed = self.config.seed
        with open(os.environ["RUNS"], "a") as runs:
            runs.write(f"{seed}\n")
        what = trouble.get(str(seed))
        if what == "raise":
            raise RuntimeError("planted")
        if what == "memory":
            raise MemoryError
        if what == "sleep":
            time.sleep(600)
        if what == "fault":
            from planted_kernel import write_to_nowhere

            write_to_nowhere(self.backend)
        if what is not None:
            os.kill(os.getpid(), signal.Signals[what])
        run(self, *arguments)

    Pipeline.run = run_or_fail
