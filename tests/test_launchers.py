"""What is asked of a launcher before a sweep starts; tests/test_sweep.py runs sweeps through each."""

import os
import socket

import pytest
from conftest import TINY_SWEEP, files_under


@pytest.fixture
def closed_port():
    """A port of this machine that nothing listens on."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


@pytest.mark.parametrize("key", ["RAY_ADDRESS", "hydra.launcher.ray.init.address"])
@pytest.mark.parametrize("address", ["127.0.0.1:{}", "ray://127.0.0.1:{}", "nowhere"])
def test_an_address_where_no_ray_cluster_answers_is_a_clear_error(
    cli, monkeypatch, tmp_path, closed_port, key, address
):
    """Ray itself tries for many minutes, or ends in a traceback."""
    address = address.format(closed_port)
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    override = () if key == "RAY_ADDRESS" else (f"hydra.launcher.ray.init.address='{address}'",)
    code, out, err = cli(*TINY_SWEEP, "seed=1,2", "hydra/launcher=ray", *override)
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith(f"error: {key}={address}: ")
    assert line.endswith("allowed: the address of a Ray cluster that answers")
    assert "RAY_AUTH_MODE" not in os.environ  # that is for a cluster of one's own
    assert files_under(tmp_path / "work") == []
