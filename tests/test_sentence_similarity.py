"""The tool that tells what recipes do to an encoder's sentences."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from tiny_models import WORDS, bert  # noqa: F401

sys.path.insert(0, str(ROOT / "tools"))
import sentence_similarity as similarity

from awq_pycuda.bootstrap import Bootstrap
from awq_pycuda.capturing.loading import load
from awq_pycuda.options import serve

PASSAGES = [[2, *range(4 + 3 * passage, 9 + 3 * passage), 3] for passage in range(6)]


@pytest.fixture(scope="module")
def model(bert: Path):  # noqa: F811
    return load(bert).model


def test_an_embedding_is_the_mean_over_all_tokens_of_length_1(model):
    threads = torch.get_num_threads()
    found = similarity.embed(model, PASSAGES)
    assert torch.get_num_threads() == threads
    with torch.no_grad():
        hidden = model(torch.tensor([PASSAGES[2]])).last_hidden_state[0].numpy().astype(np.float64)
    mean = hidden.sum(axis=0) / len(PASSAGES[2])
    np.testing.assert_allclose(found[2], mean / np.sqrt(np.sum(mean**2)), rtol=1e-12)


def test_a_line_of_the_table_by_hand():
    before = np.array([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    after = np.array([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
    name, bits, mean, _, worst, kept = similarity.row("r", 4.28, before, after, Bootstrap([1, 1, 1]))
    # 1 - cos of the second is 1 - 0.96; it was nearest to the third, and is to the first now, which is nearest to it.
    assert (name, bits, worst, kept) == ("`r`", "4.28", "40", "66.7 %")
    assert float(mean) == pytest.approx(40 / 3, rel=0.01)
    assert similarity.row("r", 4.28, before, before, Bootstrap([1, 1, 1]))[2:] == ["0", "0 to 0", "0", "100.0 %"]


@pytest.fixture
def command(bert: Path, tmp_path, capfd):  # noqa: F811
    """The tool on a tiny BERT with these recipes; its exit code, lines and errors."""
    (tmp_path / "text").write_text(" ".join(WORDS[index * 7 % len(WORDS)] for index in range(400)))
    (tmp_path / "recipes.yaml").write_text(
        "eight: [convention=llm_awq, quant=per_row, clip=none]\n"
        "three: [convention=llm_awq, quant.bits=3, gamma_grid=rtn, clip=none]\n"
        "first: {layers: {'layer.0': eight, '.*': original}}\n"
    )
    given = {name: str(tmp_path / name) for name in ("text", "out")}
    given |= {"model": str(bert), "recipes": str(tmp_path / "recipes.yaml")}
    given |= {"calibration": "24", "tokens": "50", "window": "12"}

    def run(**changed):
        code = serve([f"{key}={value}" for key, value in (given | changed).items()], "", similarity.work)
        out, err = capfd.readouterr()
        return code, out.splitlines(), err.splitlines()

    return run


def test_recipes_are_told_in_their_order_and_taken_up_again(command):
    code, lines, err = command()
    assert code == 0, err
    cells = [line.strip("| ").split(" | ") for line in lines[2:5]]
    assert [each[0] for each in cells] == ["`eight`", "`three`", "`first`"]
    eight, three, first = (float(each[2]) for each in cells)
    assert 0 < first < eight < three
    assert float(cells[0][1]) == float(cells[2][1]) > 8 > float(cells[1][1])
    assert lines[-1].startswith("bert")
    again = command()
    assert again[1] == lines


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": "./nowhere"}, "error: model=./nowhere: is no folder; allowed: a folder with config.json"),
        ({"tokens": "500"}, "error: text="),
        ({"tokens": "10"}, "error: tokens=10: make 1 window of up to 12 tokens"),
        ({"recipes": "no_such"}, "error: recipes=no_such: no such file, folder or name"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(command, changed, message):
    code, lines, err = command(**changed)
    assert (code, lines, len(err)) == (2, [], 1)
    assert err[0].startswith(message)
