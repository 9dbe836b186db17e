"""How the modules of the package hang together: no circles, and who may load whom."""

import ast
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter

import pytest
from conftest import ROOT

PACKAGE = "awq_pycuda"


@cache
def modules():
    """Every module of the package, by name."""
    paths = {path.relative_to(ROOT).with_suffix(""): path for path in (ROOT / PACKAGE).rglob("*.py")}
    return {".".join(name.parts).removesuffix(".__init__"): path for name, path in paths.items()}


def imports(source, known):
    """The known modules that a source imports, wherever in it, also in functions and for type checking alone."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                if whole in known or node.module in known:
                    yield whole if whole in known else node.module


@cache
def graph():
    """By module: the others that it imports."""
    found = {name: set(imports(path.read_text(encoding="utf-8"), modules())) for name, path in modules().items()}
    return {name: others - {name} for name, others in found.items()}


def by_wing(edges):
    """The same between packages within the package; a module that is in none of them stands for itself."""

    def wing(name):
        return ".".join(name.split(".")[:2])

    found = {}
    for name, others in edges.items():
        found.setdefault(wing(name), set()).update(wing(other) for other in others)
    return {name: others - {name} for name, others in found.items()}


@pytest.mark.parametrize("wings", [False, True])
def test_no_imports_go_in_a_circle(wings):
    edges = by_wing(graph()) if wings else graph()
    assert sum(map(len, edges.values())) > len(edges)
    TopologicalSorter(edges).prepare()  # which raises an error that names the circle


def test_a_circle_would_be_told():
    known = {"p", "p.a", "p.b", "p.b.c"}
    sources = {
        "p.a": "def late():\n    from p.b import c\n",
        "p.b.c": "if TYPE_CHECKING:\n    import p.a\n",
        "p": "",
        "p.b": "",
    }
    edges = {name: set(imports(source, known)) for name, source in sources.items()}
    assert edges == {"p.a": {"p.b.c"}, "p.b.c": {"p.a"}, "p": set(), "p.b": set()}
    for circle in (edges, by_wing(edges)):
        with pytest.raises(CycleError):
            TopologicalSorter(circle).prepare()


def loaded(statement):
    """The modules of the package that a statement loads in a fresh process."""
    script = f"import sys\n{statement}\nprint(*(name for name in sys.modules if name.partition('.')[0] == '{PACKAGE}'))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(done.stdout.split())


def test_the_reader_loads_itself_the_schema_and_what_opens_a_file():
    parts = (
        "results",
        "results.reader",
        "results.opened",
        "results.schema",
        "results.entries",
        "results.verified",
        "hdf5",
    )
    own = {f"awq_pycuda.{part}" for part in parts}
    assert loaded("import awq_pycuda.results.reader") == {"awq_pycuda", *own}


def test_the_schema_loads_what_it_is_made_of_alone():
    assert loaded("import awq_pycuda.results.schema") == {
        "awq_pycuda",
        "awq_pycuda.results",
        "awq_pycuda.results.entries",
        "awq_pycuda.results.schema",
        "awq_pycuda.results.verified",
    }


FORMATS = {"quant.format", "choices", "quant.packing", "quant.step_types"}


def test_the_result_file_knows_what_was_found_and_nothing_of_how_a_run_is_made():
    own = {name for name in modules() if name.startswith("awq_pycuda.results.")}
    others = set().union(*(graph()[name] for name in own)) - own
    ground = ("hdf5", "hdf5_worker", "names", "provenance", "temporary")
    allowed = (*ground, "quant.clipping", "quant.format", "quant.metrics", "quant.quantized", "quant.search")
    assert others <= {f"awq_pycuda.{name}" for name in allowed}


def test_the_analysis_knows_results_and_nothing_of_runs():
    """Of what it reaches, `results` is all that speaks of runs; the rest is common ground."""
    reached, left = set(), {name for name in modules() if name.startswith("awq_pycuda.analysis.")}
    assert left
    while left:
        name = left.pop()
        reached.add(name)
        left |= graph()[name] - reached
    others = {name.removeprefix("awq_pycuda.") for name in reached if ".analysis." not in name}
    of_results = {
        "results.explained",
        "results.reader",
        "results.files",
        "results.opened",
        "results.schema",
        "hdf5",
        "hdf5_worker",
    }
    of_results |= {
        "results.bench_reader",
        "results.bench_record",
        "results.bench_schema",
        "results.conditions",
        "results.entries",
        "results.evaluation_reader",
        "results.evaluation_record",
        "results.evaluation_schema",
        "results.verified",
        "kernels.work",
    }
    of_layers = {"layers.files", "layers.rows", "layers.sources"}  # a prediction is made of a layer file
    assert others <= of_results | of_layers | FORMATS | {"bootstrap", "errors", "names", "spread"}


def test_the_number_of_host_threads_is_handed_on_by_nobody():
    """`parallel.use_threads` sets it, the user gives it to the config or to `quantize`."""
    takes = {
        f"{name}.{node.name}"
        for name, path in modules().items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and "threads" in {given.arg for given in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]}
    }
    takes -= {"awq_pycuda.parallel._pool"}
    assert takes == {"awq_pycuda.parallel.use_threads", "awq_pycuda.library.quantize"}


def test_a_config_goes_a_straight_way():
    """What takes part in a run is given what the config asks of it, not the config: `engine.spec` derives that once."""
    takes = {
        name.removeprefix("awq_pycuda.")
        for name, path in modules().items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module == "awq_pycuda.config"
        if "Config" in {alias.name for alias in node.names}
    }
    # What composes runs and sends them on their way, a command line's and a recipe's.
    before_a_run = ("sweeps.", "evaluating.")
    of_a_run = {name for name in takes if not name.startswith(before_a_run)}
    assert of_a_run == {"config_text", "library", "engine.execution", "engine.spec", "layers.inputs"}
