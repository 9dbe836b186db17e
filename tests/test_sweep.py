"""Sweeps: jobs that fail alone, studies that go on, two sweeps at once, and the same results from every launcher."""

import json
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress

import h5py
import hydra
import numpy as np
import psutil
import pytest
from conftest import TINY_SWEEP, files_under, found, start
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from result_files import editing

from awq_pycuda.paths import resource_dir
from awq_pycuda.results.status import read_status
from awq_pycuda.sweeps import composition, hosts, isolation
from awq_pycuda.sweeps.launchers import LAUNCHERS


def test_jobs_that_fail_or_die_leave_the_others_alone_and_are_run_again(cli, environment, tmp_path):
    trouble = {"seed_7": "raise", "seed_20": "raise", "seed_33": "memory", "seed_41": "SIGKILL", "seed_59": "SIGSEGV"}
    runs = environment(**trouble)
    code, out, err = cli(*TINY_SWEEP, "seed=range(0,60)", "study=sixty")
    assert (code, err) == (1, "")
    reasons = {
        7: "RuntimeError: planted",
        20: "RuntimeError: planted",
        33: "MemoryError",
        41: "the job's process ended by SIGKILL (the system sends it when memory runs out)",
        59: "the job's process ended by SIGSEGV",
    }
    failed = out[out.index("\nFailed") :]
    for seed, reason in reasons.items():
        assert re.search(rf"^ {seed} +{re.escape(reason)}", failed, re.MULTILINE)
    assert "60 jobs: 55 complete, 5 failed; results in outputs/sixty" in out
    by_seed = found(tmp_path / "work" / "outputs" / "sixty")
    assert sorted(by_seed) == list(range(60))
    for seed, (status, error) in by_seed.items():
        assert status == ("failed" if seed in reasons else "complete")
        assert error.startswith(reasons.get(seed, ""))
    assert "Fatal Python error: Segmentation fault" in by_seed[59][1]
    assert set(runs().values()) == {1}

    environment()
    code, out, _ = cli(*TINY_SWEEP, "seed=range(0,60)", "study=sixty")
    assert code == 0
    assert "60 jobs: 5 complete, 55 skipped" in out
    assert runs() == {seed: 2 if seed in reasons else 1 for seed in range(60)}
    assert {status for status, _ in found(tmp_path / "work").values()} == {"complete"}


def wait_for(condition):
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_killed_sweep_goes_on_where_it_was(environment, tmp_path):
    runs = environment()
    folder = tmp_path / "work"
    sweep = (*TINY_SWEEP, "seed=range(0,16)", "study=killed")
    process = start(folder, *sweep)
    wait_for(lambda: len(list(folder.rglob("results.h5"))) >= 5)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate()
    psutil.wait_procs(workers, timeout=10)
    assert not any(worker.is_running() for worker in workers)

    def files():
        return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.rglob("results.h5")}

    before = files()
    assert 5 <= len(before) < 16
    assert {status for status, _ in found(folder).values()} == {"complete"}
    (folder / "outputs" / "killed").joinpath(*next(iter(before)).parts[-2:-1], ".results.h5.1.tmp").touch()

    out, err = start(folder, *sweep).communicate()
    assert err == ""
    assert f"16 jobs: {16 - len(before)} complete, {len(before)} skipped" in out
    assert before.items() <= files().items()
    assert not list(folder.rglob(".results.h5.*.tmp"))
    assert sorted(found(folder)) == list(range(16))
    assert {status for status, _ in found(folder).values()} == {"complete"}
    # Only the job that was cut off may have begun twice.
    assert sum(runs().values()) <= 17


def test_a_killed_sweep_leaves_no_process_of_joblib_s(environment, tmp_path):
    runs = environment(seed_1="sleep")
    launcher = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    process = start(tmp_path / "work", *TINY_SWEEP, "seed=0,1", *launcher)
    wait_for(lambda: runs() == {0: 1, 1: 1})
    processes = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate(timeout=300)  # they have its stdout
    assert psutil.wait_procs(processes, timeout=10)[1] == []


def test_joblib_with_one_process_goes_on_without_the_shell(tmp_path):
    command = f'"{sys.executable}" -m awq_pycuda.run {" ".join(TINY_SWEEP)} "seed=range(0,4)" '
    command += "hydra/launcher=joblib hydra.launcher.n_jobs=1"
    subprocess.run(["sh", "-c", f"{command} >out 2>&1 &"], cwd=tmp_path, check=True)
    wait_for(lambda: (tmp_path / "out").is_file() and "4 jobs: 4 complete" in (tmp_path / "out").read_text())


def test_two_sweeps_of_a_study_share_its_jobs(environment, tmp_path):
    runs = environment()
    folder = tmp_path / "work"
    sweeps = [start(folder, *TINY_SWEEP, "seed=range(0,12)", "study=both") for _ in range(2)]
    outputs = [sweep.communicate() for sweep in sweeps]
    assert [err for _, err in outputs] == ["", ""]
    assert [sweep.returncode for sweep in sweeps] == [0, 0]
    assert runs() == dict.fromkeys(range(12), 1)
    ran = [int(re.search(r"(\d+) complete", out)[1]) for out, _ in outputs if " complete," in out]
    assert sum(ran) <= 12
    assert {status for status, _ in found(folder).values()} == {"complete"}


def test_ctrl_c_stops_the_job_and_the_sweep(environment, tmp_path):
    runs = environment(seed_1="sleep")
    folder = tmp_path / "work"
    process = start(folder, *TINY_SWEEP, "seed=range(0,4)", "study=stopped")
    wait_for(lambda: 1 in runs())
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (130, "")
    assert "4 jobs: 2 not run, 1 complete, 1 interrupted" in out
    assert found(folder) == {0: ("complete", ""), 1: ("failed", "interrupted by SIGINT")}


def test_ctrl_c_while_waiting_for_another_sweep(environment, tmp_path):
    runs = environment(seed_1="sleep")
    folder = tmp_path / "work"
    other = start(folder, *TINY_SWEEP, "seed=1", "study=both")
    wait_for(lambda: 1 in runs())
    process = start(folder, *TINY_SWEEP, "seed=0,1", "study=both")
    while "waiting for 1 jobs" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    other.kill()
    other.communicate()
    assert (process.returncode, err) == (130, "")
    assert "2 jobs: 1 elsewhere, 1 complete" in out


def test_ctrl_c_while_jobs_are_checked_writes_nothing(environment, tmp_path):
    environment()
    folder = tmp_path / "work"
    process = start(folder, *TINY_SWEEP, "seed=0,1")
    parent = psutil.Process(process.pid)
    wait_for(lambda: any("awq_pycuda.sweeps.worker" in child.cmdline() for child in parent.children()))
    (worker,) = parent.children()
    worker.suspend()  # so that the answer is still awaited when the interrupt comes
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    with suppress(psutil.NoSuchProcess):  # on a slow machine it was not asked yet, and is killed
        worker.resume()
    assert process.communicate(timeout=300) == ("", "interrupted before any work\n")
    assert process.returncode == 130
    assert files_under(folder) == []


def test_a_worker_takes_interrupts_only_within_a_job(compose):
    """The threads of NumPy's BLAS took those that the main thread blocks, and it died of them anywhere."""
    config = compose("n=8", "backend=cpu")
    worker = hosts.first().worker(on_gpu=False)
    try:
        for _ in range(2):  # while it starts, and while it waits
            worker._process.send_signal(signal.SIGINT)
            ((_, (answer,)),) = isolation.checked([[config]])
            assert answer.refusal is None
        assert hosts.first().worker(on_gpu=False) is worker
    finally:
        hosts.leave()


def test_a_sweep_with_stdin_stdout_and_stderr_closed(environment, tmp_path):
    environment()
    command = [sys.executable, "-m", "awq_pycuda.run", *TINY_SWEEP, "seed=0,1"]
    subprocess.run(["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *command], cwd=tmp_path, check=True)
    assert sorted(found(tmp_path)) == [0, 1]


@pytest.mark.parametrize("attribute", ["schema", "schema_version"])
def test_a_file_of_another_schema_is_no_result(cli, tmp_path, attribute):
    sweep = (*TINY_SWEEP, "seed=1", "study=foreign")
    assert cli(*sweep)[0] == 0
    (path,) = (tmp_path / "work").rglob("results.h5")
    with editing(path) as file:
        file.attrs[attribute] = 99
    code, out, _ = cli(*sweep)
    assert code == 0
    assert "1 jobs: 1 complete" in out
    assert found(tmp_path / "work") == {1: ("complete", "")}


def content(path):
    """Every dataset but the times, and every attribute but what differs from process to process."""
    parts = {}

    def visit(name, node):
        if not name.startswith(("timings", "sha256")):
            parts[name] = {key: str(value) for key, value in node.attrs.items() if "DIMENSION" not in key}
            parts[name]["/data"] = node[()].tobytes() if isinstance(node, h5py.Dataset) else b""

    with h5py.File(path) as file:
        file.visititems(visit)
        parts["/"] = {key: str(file.attrs[key]) for key in file.attrs if key != "created"}
        parts["/"]["config"] = re.sub("study: .*", "", parts["/"]["config"])
        parts["/"]["overrides"] = [part for part in json.loads(parts["/"]["overrides"]) if "study" not in part]
    return parts


VARIANTS = {
    "joblib": ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2"),
    "ray": ("hydra/launcher=ray",),
    "submitit_local": ("hydra/launcher=submitit_local", "hydra.launcher.timeout_min=5"),
}


@pytest.mark.parametrize("launcher", VARIANTS)
def test_every_launcher_gives_the_same_results_and_survives_failing_jobs(cli, environment, tmp_path, launcher):
    runs = environment(seed_2="raise", seed_4="SIGKILL")
    # Large enough for the BLAS to split its products over threads.
    sweep = ("-m", "n=200", "layers=2", "timing=once", "backend=cpu", "inputs=outliers", "seed=range(0,6)")
    assert cli(*sweep, "study=basic")[0] == 1
    process = start(tmp_path / "work", *sweep, f"study={launcher}", *VARIANTS[launcher])
    out, err = process.communicate()
    assert process.returncode == 1, err
    assert "6 jobs: 4 complete, 2 failed" in out
    assert runs() == dict.fromkeys(range(6), 2)
    outputs = tmp_path / "work" / "outputs"
    for path in (outputs / "basic").rglob("results.h5"):
        assert content(path) == content(outputs / launcher / path.parent.name / path.name)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("-m", "seed=1,2", "study=../x"), "study=../x"),
        (("-m", "study=a,b"), "study"),
        (("-m", "seed=1,2", "study=sweeps/a,sweeps/b"), "study"),
        (("-m", "seed=1,2", "study=x${seed}"), "study"),
        (("study=x",), "with -m"),
        (("-m", "seed=range(0,0)"), "seed=range(0,0)"),
        (("-m", "experiment=depth,outliers"), "experiment=depth,outliers"),
        (("-m", "seed=1,2", "hydra.sweep.subdir=x"), "hydra.sweep.subdir=x"),
        (("-m", "seed=1,2", "hydra.sweep.dir=/proc/nowhere"), "hydra.sweep.dir=/proc/nowhere"),
        (("-m", "seed=1,2", "hydra/launcher=nope"), "hydra/launcher=nope"),
        (("-m", "seed=1,2", "hydra/launcher=joblib", "hydra.launcher.n_jobs=0"), "hydra.launcher.n_jobs=0"),
    ],
)
def test_bad_sweeps_are_refused_and_write_nothing(cli, tmp_path, arguments, named):
    code, out, err = cli(*arguments, "n=8", "backend=cpu")
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert named in line
    assert "allowed" in line
    assert files_under(tmp_path / "work") == []


def test_a_launcher_that_is_not_installed_is_a_clear_error(cli, monkeypatch):
    monkeypatch.setitem(LAUNCHERS, "absent", {})
    code, _, err = cli(*TINY_SWEEP, "hydra/launcher=absent")
    assert code == 2
    assert err == (
        "error: hydra/launcher=absent: not installed; allowed after pip install -r requirements-cluster.txt\n"
    )


@pytest.mark.parametrize(
    "overrides",
    [
        ("tile=8,16", "gamma_grid=day58,awq20", "n=8,12", "tokens=5"),
        ("n=8,12,16,20", "tokens=${n}"),
        ("inputs=outliers,synthetic", "inputs.weight_scale=he", "gammas=[0,1],[0.5]"),
        ("timing=once", "timing.repeats=2,3", "seed=range(0,4)", "quant.group_size=null,4"),
        ("matmul=glob(*)", "search.objective=diag,output"),
        ("inputs=outliers", "inputs.factor_min=${inputs.factor_max}", "inputs.factor_max=10,20", "seed=1,2"),
        ("n=8,12", "tokens=${n},7"),
        ("convention=day58,llm_awq,llm_compressor", "search.formula=null,both"),
        ("seed=1,2,3,4", "threads=${oc.select:layers}"),
    ],
)
def test_planned_jobs_are_what_hydra_composes(overrides):
    composition.register_schemas()
    with hydra.initialize_config_dir(str(resource_dir("conf")), version_base="1.3"):
        fixed = [override for override in overrides if "," not in override and "(" not in override]
        master = hydra.compose("config", fixed, return_hydra_config=True)
        master.hydra.overrides.task = list(overrides)
        master.hydra.job.config_name = "config"
        plan = composition.Plan(master)
        assert len(plan) >= 4
        parser = OverridesParser.create(GlobalHydra.instance().config_loader())
        (batch,) = BasicSweeper.split_arguments(parser.parse_overrides(list(overrides)), None)
        for number, label in enumerate(plan.labels):
            assert plan.overrides(number) == batch[number]
            exact = composition.to_config(hydra.compose("config", [*fixed, *label.split()]))
            exact.study = plan.study
            assert plan.config(number) == plan.job(number).config == exact


@pytest.mark.parametrize("path", sorted(resource_dir("experiments").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_study_composes(path):
    composition.register_schemas()
    with hydra.initialize_config_dir(str(resource_dir("conf")), version_base="1.3"):
        master = hydra.compose("config", [f"experiment={path.stem}"], return_hydra_config=True)
        master.hydra.overrides.task = [f"experiment={path.stem}"]
        master.hydra.job.config_name = "config"
        plan = composition.Plan(master)
        assert {plan.config(number).study for number in range(len(plan))} == {path.stem}
    assert path.stem in (resource_dir("conf") / "config.yaml").read_text()  # --help names it
    assert len(set(plan.labels)) == len(plan) >= 4


def test_a_job_that_died_does_not_overwrite_another_sweep_s_result(tmp_path):
    from awq_pycuda.sweeps.study import claim, store_death

    folder = tmp_path / "study" / "0123"
    folder.mkdir(parents=True)
    with claim(folder) as ours:
        assert ours
        store_death(folder, {}, "died")
    assert read_status(folder) is None
    store_death(folder, {"backend": "cpu"}, "died")
    assert read_status(folder) == ("failed", "died")
    with editing(folder / "results.h5") as file:
        assert file["timings/host_ms"].shape == (0, 6, 0)
        assert np.isnan(file["timings/cold_ms"][()])
        file.attrs["status"] = "complete"
    store_death(folder, {}, "died again")
    assert read_status(folder)[0] == "complete"
