"""Put on PYTHONPATH by tests: plants trouble in the worker process of a sweep, by the seed of the job.

PLANT is a JSON object from seeds to what shall happen. RUNS names a file that gets the seed of every job begun; SPANS,
if set, one that gets the GPU, the process, the begin and the end in seconds of every job.
"""

import json
import os
import signal
import sys
import time

if "awq_pycuda.sweeps.worker" in sys.orig_argv and "RUNS" in os.environ:
    from awq_pycuda.engine.pipeline import Pipeline

    trouble = json.loads(os.environ.get("PLANT", "{}"))
    run = Pipeline.run

    def fault_in_third_layer(backend):
        from pycuda.compiler import SourceModule

        from awq_pycuda.backends.cuda.early import toolchain

        faulty = 'extern "C" __global__ void fault() { *reinterpret_cast<volatile int*>(16) = 1; }'
        kernel = SourceModule(faulty, nvcc=toolchain().nvcc, no_extern_c=True).get_function("fault")
        relu, calls = backend.relu, iter(range(100))

        def relu_or_fault(*arguments):
            if next(calls) == 2:
                kernel(block=(1, 1, 1), stream=backend.stream)
            relu(*arguments)

        backend.relu = relu_or_fault

    def run_or_fail(self, *arguments):
        seed = self.spec.layers[0].weight.seed  # of uniform numbers
        with open(os.environ["RUNS"], "a") as runs:
            runs.write(f"{seed}\n")
        what = trouble.get(str(seed))
        if what == "raise":
            raise RuntimeError("planted")
        if what == "memory":
            raise MemoryError
        if what == "sleep":
            time.sleep(600)
        if what is not None and what.startswith("SIG"):
            os.kill(os.getpid(), signal.Signals[what])
        if what == "fault":
            fault_in_third_layer(self.backend)
        begin = time.monotonic()
        run(self, *arguments)
        if "SPANS" in os.environ:
            with open(os.environ["SPANS"], "a") as spans:
                gpu = self.backend.device()["pci_bus_id"]
                spans.write(json.dumps([gpu, os.getpid(), begin, time.monotonic()]) + "\n")

    Pipeline.run = run_or_fail
