"""Where a job's results go: what is the same is not run again, and nothing else counts as the same."""

import dataclasses

import h5py
import numpy as np
from version_1 import write_version_1

from awq_pycuda import provenance
from awq_pycuda.sweeps.study import complete_jobs, job_folder


def test_a_job_s_folder_tells_config_kernels_device_and_backend(compose, monkeypatch, tmp_path):
    config = compose("n=8")
    first = job_folder(tmp_path, config, "cpu", "a device")
    assert first.parent == tmp_path
    assert job_folder(tmp_path, dataclasses.replace(config, study="another"), "cpu", "a device") == first
    folders = {first, job_folder(tmp_path, compose("n=9"), "cpu", "a device")}
    with monkeypatch.context() as patch:
        patch.setattr(provenance, "kernels_sha256", lambda: "others")
        folders.add(job_folder(tmp_path, config, "cpu", "a device"))
    folders.add(job_folder(tmp_path, config, "cpu", "another"))
    folders.add(job_folder(tmp_path, config, "cuda", "a device"))
    assert len(folders) == 5


def test_the_content_of_a_layer_file_counts(compose, tmp_path):
    path = tmp_path / "layers.npz"
    config = compose("inputs=file", f"inputs.path={path}")
    folders = []
    for rows in (1, 2):
        np.savez(path, **{"000.weight": np.ones((rows, 2), np.float32)})
        folders.append(job_folder(tmp_path, config, "cpu", "a device"))
    assert folders[0] != folders[1]


def test_a_file_of_others_in_a_study_is_no_complete_job(tmp_path):
    (tmp_path / "other").mkdir()
    with h5py.File(tmp_path / "other" / "results.h5", "w") as file:
        file.attrs["status"] = "complete"
    assert complete_jobs(tmp_path) == {}
    write_version_1(tmp_path / "one")
    assert list(complete_jobs(tmp_path)) == ["one"]
