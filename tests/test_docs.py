"""The documents: their commands run and print what is shown, their links lead somewhere, and no block is left out."""

import json
import re
import sys
from pathlib import Path

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import renew_docs
from renew_docs import Block, alike, all_alike, comparable, parse, picture_alike, unparse

from awq_pycuda.config import ALLOWED
from awq_pycuda.config_text import plain
from awq_pycuda.sweeps.hydra_errors import groups

DOCUMENTS = renew_docs.documents()
NAMES = [str(path.relative_to(ROOT)) for path in DOCUMENTS]


@pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES)
def test_every_block_is_run_or_says_why_not(document):
    text = document.read_text(encoding="utf-8")
    assert unparse(parse(text)) == text
    # Whatever looks like a command in a block of another kind would be neither run nor marked.
    assert len([part for part in parse(text) if isinstance(part, Block)]) == len(
        re.findall(r"^```\w+$|^<!-- renewed by: ", text, re.MULTILINE)
    )


@pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES)
def test_commands_print_what_is_shown(document):
    assert renew_docs.check(document, quick=True) == []


def anchors(path):
    """The anchors that GitHub gives the headings of a document."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES)
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        path = (document.parent / name).resolve() if name else document
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target


def rows(name, heading):
    """The rows of the first table under a heading, as lists of cells."""
    text = (ROOT / "docs" / name).read_text(encoding="utf-8").split(f"## {heading}\n")[1]
    lines = [line for line in text.split("\n## ")[0].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[2:]]


def test_every_key_is_documented_with_its_default(compose):
    composed = plain(compose("inputs=outliers"))
    composed["inputs"] |= plain(compose("inputs=file", "inputs.path=layers.h5"))["inputs"]
    documented = {}
    for keys, default, *_ in rows("config.md", "Keys"):
        for key, value in zip(re.findall(r"`([^`]+)`", keys), re.split(", ", default), strict=False):
            documented[key] = value.strip("`")
    assert set(documented) == (set(ALLOWED) - {"inputs.kind"}) | {"hydra.run.dir"}
    for key, value in documented.items():
        if key in ("study", "tokens", "inputs.path", "hydra.run.dir"):
            continue  # these depend on others, or on the time
        node = composed
        for part in key.split("."):
            node = node[part]
        shown = re.sub(r"\.0\b", "", json.dumps(node)).replace('"', "").replace(" ", "")
        assert shown == value, key


def test_every_group_and_option_is_documented():
    documented = {row[0].strip("`"): set(re.findall(r"`(\w+)`", row[1])) for row in rows("config.md", "Groups")}
    known = {group: set(options) for group, options in groups().items() if group != "experiment"}
    known["matmul"] = {"auto"}  # the others are in the table of kernels
    assert set(documented) == set(known)
    for group, options in documented.items():
        assert known[group] <= options, group


def test_the_layout_names_every_module():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("| module | holds |")[1].split("\n\n")[0]
    named = {
        name for row in text.splitlines() for name in re.findall(r"`([^`]+)`", row.split("|")[1] if "|" in row else "")
    }
    package = ROOT / "awq_pycuda"
    modules = {path.stem for path in package.glob("*.py")} - {"__init__"}
    assert named == modules | {f"{path.parent.name}/" for path in package.glob("*/__init__.py")}


def test_what_is_said_of_minilm_is_what_its_table_says():
    page = (ROOT / "docs" / "real-layers.md").read_text(encoding="utf-8")
    removed = [float(value) for value in re.findall(r"^ \d\..* (-?[\d.]+) %$", page, re.MULTILINE)]
    median = float(re.search(r"^error removed ([\d.]+) %", page, re.MULTILINE)[1])
    better, same, worse = (
        sum(rule(value) for value in removed) for rule in (lambda v: v > 0, lambda v: v == 0, lambda v: v < 0)
    )
    assert f"AWQ helps {better} layers, leaves {same} at RTN and hurts {worse}," in page.replace("\n", " ")
    readme = (ROOT / "README.md").read_text(encoding="utf-8").replace("\n", " ")
    assert f"in half of the layers AWQ removes at least {median:.0f} % of RTN's output error" in readme
    assert f"in one {max(removed):.0f} %; two get slightly worse" in readme
    assert len(removed) == 36
    assert worse == 2


def test_what_is_said_of_smollm2_is_what_its_table_says():
    page = (ROOT / "experiments" / "gain.md").read_text(encoding="utf-8")
    table = page.split("evaluation_tables.py recipes outputs/truth/evaluation.h5 -->")[1].split("<!-- end -->")[0]
    cells = (line.split(" | ") for line in table.splitlines() if line.startswith("| `"))
    kl = {row[0].strip("| `"): float(row[2].split()[0]) for row in cells}
    readme = (ROOT / "README.md").read_text(encoding="utf-8").replace("\n", " ")
    (said,) = re.findall(
        r"RTN costs ([\d.]+) nats, AWQ ([\d.]+), with its clipping ([\d.]+); RTN at int8 ([\d.]+)", readme
    )
    names = ("rtn_int4_g128", "awq_int4_g128", "awq_clip_int4_g128", "rtn_int8_row")
    assert [float(each) for each in said] == [pytest.approx(kl[name], rel=0.03) for name in names]
    assert f"in {len(kl)} recipes" in readme


# --- the tool -----------------------------------------------------------------------------------------------------

RUN = """Error
 layer  gamma  RTN dB  error removed
 000     0.25   50.23         21.4 %
Stage times in ms (median of 3)
 layer  relu
 000    0.038
n=8        38.0 %  29.7 to 46.3 %  49.08    4 %
pipeline 2.42 ms (median of 3), cold pass 10 ms
results …/outputs/2026-11-23/00-04-31-997224/results.h5
""".splitlines()


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("0.038", "12.5", True),
        (" layer  relu", " layer    relu", True),
        ("2.42 ms", "31 ms", True),
        ("2026-11-23/00-04-31-997224", "2027-01-02/10-00-00-000001", True),
        ("49.08    4 %", "364.0   46 %", True),
        ("46.3 %", "46.5 %", False),
        ("0.25", "0.5", False),
        ("50.23", "50.24", True),
        ("50.23", "50.25", False),
        ("21.4 %", "21.6 %", False),
        ("21.4 %", "21 %", False),
        ("cold pass", "first pass", False),
        ("relu", "gelu", False),
        ("median of 3)", "median of 4)", False),
    ],
)
def test_times_may_differ_and_figures_may_not(old, new, same):
    changed = "\n".join(RUN).replace(old, new).splitlines()
    assert changed != RUN
    assert all_alike(comparable(RUN), comparable(changed)) == same


@pytest.mark.parametrize(
    ("said", "seen", "same"),
    [
        ("mse 0.312014", "mse 0.312031", True),
        ("mse 0.312014", "mse 0.31217", False),
        ("mse 7.78869e-06", "mse 7.789e-06", True),
        ("mse 7.78869e-06", "mse 7.78869e-05", False),
        ("48.9799  a", "48.98 a", True),
        ("-4.3 %", "4.3 %", False),
        ("12 layers", "13 layers", False),
    ],
)
def test_the_last_place_of_a_figure_may_follow_the_machine(said, seen, same):
    assert alike(said, seen) == same


BAR = '  <rect class="better" x="576.7" y="245.5" height="5.5"><title>dense 5: 2.0 %</title></rect><text x="3">2</text>'


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("245.5", "245.7", True),
        ("2.0 %", "2.1 %", True),
        (">2<", ">3<", True),
        ("245.5", "246.1", False),
        ("2.0 %", "2.2 %", False),
        (">2<", ">4<", False),
        (">2<", "><", False),
        ("dense 5", "dense 6", False),
        ('"better"', '"worse"', False),
        (' x="576.7"', "", False),
    ],
)
def test_a_picture_may_follow_the_last_place_of_its_figures(old, new, same):
    assert BAR.count(old) == 1
    assert picture_alike(BAR, BAR.replace(old, new)) == same


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("```\nls\n```\n", "no language"),
        ("```bash\nls\n```\n", "a block of bash"),
        ("```sh\nls\n", "without its end"),
        ("<!-- renewed by: ls -->\n|a|\n", "without its end"),
        ("<!-- not run: why -->\ntext\n```sh\nls\n```\n", "marks nothing|no block below"),
    ],
)
def test_documents_that_could_hide_a_command_are_refused(text, fault):
    with pytest.raises(ValueError, match=fault):
        parse(text)


DOCUMENT = """# Title

```console
$ echo 3 dB
2 dB
$ sh -c 'echo to stderr >&2; exit 3'
$ echo $?
0
$ echo a \\
    b
```

<!-- slow: minutes -->
```sh
touch slow
```

<!-- not run: never -->
```sh
exit 1
```

```python
value = 5
```

```python
open("made", "w").write(str(value))
```

<!-- renewed by: cat made -->
old
<!-- end -->
"""


@pytest.fixture
def document(monkeypatch, tmp_path):
    """A document in a checkout of its own."""
    for name in renew_docs.COPIED:
        (tmp_path / name).mkdir()
    for name in renew_docs.LINKED:
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.setattr(renew_docs, "ROOT", tmp_path)
    path = tmp_path / "a.md"
    path.write_text(DOCUMENT, encoding="utf-8")
    return path


def test_outputs_are_renewed_in_place_and_then_hold(document):
    told = renew_docs.check(document)
    assert document.read_text(encoding="utf-8") == DOCUMENT
    assert len(told) == 2
    assert "-2 dB\n+3 dB" in told[0]
    assert renew_docs.check(document, write=True) == told
    text = document.read_text(encoding="utf-8")
    assert "$ echo 3 dB\n3 dB\n" in text
    assert "to stderr\n$ echo $?\n3\n$ echo a \\\n    b\na b\n```" in text
    assert "<!-- renewed by: cat made -->\n5\n<!-- end -->" in text
    assert renew_docs.check(document) == []


def test_a_command_that_fails_is_told_and_nothing_is_written(document):
    document.write_text(DOCUMENT.replace("touch slow", "false"), encoding="utf-8")
    (told,) = renew_docs.check(document, write=True)
    assert told.startswith("line 14: exit code 1")
    assert "2 dB" in document.read_text(encoding="utf-8")
    assert len(renew_docs.check(document, quick=True)) == 2  # the slow block is left out


def test_pictures_are_renewed(document, tmp_path):
    document.write_text("```sh\necho drawn > docs/a.svg\n```\n", encoding="utf-8")
    assert renew_docs.check(document) == ["docs/a.svg is drawn otherwise today"]
    assert not (tmp_path / "docs/a.svg").exists()
    renew_docs.check(document, write=True)
    assert (tmp_path / "docs/a.svg").read_text() == "drawn\n"
    assert renew_docs.check(document) == []


def test_python_is_the_interpreter_in_use(tmp_path):
    scratch = renew_docs.Scratch(tmp_path)
    printed = scratch.run(["bash", "-c", "python -c 'import sys, awq_pycuda; print(sys.prefix)'; pwd"])
    assert printed == f"{Path(sys.prefix)}\n…\n"
