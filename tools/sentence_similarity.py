"""What recipes do to an encoder's sentences: how near its embeddings stay to the original's, as a Markdown table.

    python tools/sentence_similarity.py model=FOLDER text=FILE recipes=truth out=FOLDER

For models without a language model's head, such as all-MiniLM-L6-v2, which `python -m awq_pycuda.evaluate` refuses.
Recipes are searched as there, on the text's first tokens. The passages behind them are embedded: the mean of the last
hidden states over a passage's tokens, normalised.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from awq_pycuda.bootstrap import Bootstrap
from awq_pycuda.capturing.fault import Fault
from awq_pycuda.capturing.given import check_given, model_option, text_option
from awq_pycuda.capturing.loading import load
from awq_pycuda.capturing.text import find_around, hash_text
from awq_pycuda.evaluating.recipes import parse, tokens_needed
from awq_pycuda.options import REQUIRED, SYNTAX, describe, nonempty, option, serve, whole
from awq_pycuda.options import parse as parse_options
from awq_pycuda.results.evaluation_schema import CALIBRATION_NAME

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line sets."""

    model: str = model_option()
    text: str = text_option()
    recipes: str = option(
        "NAME", "recipes, as evaluate takes them", "a file of recipes, or one's name", nonempty, REQUIRED
    )
    out: str = option("FOLDER", "for the layer file and the recipes' results", "a folder", nonempty, REQUIRED)
    calibration: int = option(
        "NUMBER", "tokens that recipes are searched on", "whole numbers of at least 1", whole(minimum=1), 512
    )
    tokens: int = option(
        "NUMBER", "tokens behind them to embed", "whole numbers that make at least two windows", whole(minimum=1), 8192
    )
    window: int = option(
        "NUMBER", "tokens of a passage, with the special ones", "whole numbers of at least 2", whole(minimum=2), 64
    )


USAGE = f"""\
Usage: python tools/sentence_similarity.py model=FOLDER text=FILE recipes=NAME out=FOLDER [key=value ...]

{describe(Options)}
{SYNTAX}"""


def embed(model: Any, passages: Sequence[list[int]]) -> Array:
    """(P, D) embeddings of length 1; each passage runs by itself, on one thread: the same digits on any cores."""
    import torch

    means = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            for ids in passages:
                hidden = model(input_ids=torch.tensor([ids])).last_hidden_state[0]
                means.append(hidden.double().mean(dim=0).numpy())
    finally:
        torch.set_num_threads(threads)
    found: Array = np.array(means)
    found /= np.linalg.norm(found, axis=1, keepdims=True)
    return found


def nearest(embeddings: Array) -> NDArray[np.intp]:
    """(P,) for each passage the other one that is most like it."""
    alike = embeddings @ embeddings.T
    np.fill_diagonal(alike, -np.inf)
    places: NDArray[np.intp] = alike.argmax(axis=1)
    return places


def row(name: str, bits: float, before: Array, after: Array, bootstrap: Bootstrap) -> list[str]:
    """A recipe's line of the table."""
    # Half the squared distance of vectors of length 1 is 1 - cos, without the cancellation.
    lost = np.square(before - after).sum(axis=1) / 2
    low, high = map(float, bootstrap.interval(lost))
    kept = np.mean(nearest(before) == nearest(after))
    figures = (
        f"{1e3 * float(bootstrap.mean(lost)):.3g}",
        f"{1e3 * low:.3g} to {1e3 * high:.3g}",
        f"{1e3 * lost.max():.3g}",
    )
    return [f"`{name}`", f"{bits:.2f}", *figures, f"{100 * kept:.1f} %"]


HEADER = ["recipe", "bits", "1 − cos, in 10⁻³", "95 % interval", "worst passage", "nearest passage stays"]


def compare(options: Options) -> list[str]:
    """The table, with a line beneath that says what was embedded; the recipe at work is told on stderr.

    Raises:
        InputError: something given cannot be used.
        Fault: model and text do not yield what is asked for.
        RunFailed: a recipe's run failed.
    """
    text, out = Path(options.text), Path(options.out)
    recipes = parse(options.recipes, options.calibration)
    text_hash = hash_text(text)
    loaded = load(Path(options.model))
    # Only now: these need PyTorch, and `load` says what to do where it is missing.
    from awq_pycuda.capturing.windows import check_ids, find_window
    from awq_pycuda.capturing.writing import model_name
    from awq_pycuda.evaluating.calibration import calibrate, hash_model, plan_of
    from awq_pycuda.evaluating.places import places_of, replaced
    from awq_pycuda.evaluating.quantized import made
    from awq_pycuda.evaluating.windows import cut

    model = loaded.model
    around = find_around(text, loaded.tokenizer)
    window = find_window(model, loaded.tokenizer, max(options.window, len(around) + 1), len(around))
    needed = tokens_needed(recipes, options.calibration)
    parts = cut(text, loaded.tokenizer, around, window.length, needed, 0, options.tokens)
    passages = [each.ids for each in parts.evaluation]
    check_ids(model, loaded.tokenizer, [*parts.calibration, *passages])
    plan = plan_of(loaded, around, window.length)
    out.mkdir(parents=True, exist_ok=True)
    origin = {
        "model": model_name(Path(options.model)),
        "model_type": model.config.model_type,
        "model_sha256": hash_model(model),
        "text_sha256": text_hash,
    }
    calibration = calibrate(loaded, plan, parts.calibration, around, window, out / CALIBRATION_NAME, origin)
    bootstrap = Bootstrap([len(each) for each in passages])
    places = places_of(model, plan)
    before = embed(model, passages)
    rows = []
    for number, recipe in enumerate(recipes, 1):
        print(f"{number} of {len(recipes)}: {recipe.name}", file=sys.stderr, flush=True)
        quantized = made(recipe, calibration, out / "recipes")
        with replaced(places, quantized.weight):
            after = embed(model, passages)
        figures = quantized.layers.values()
        weights = [places[path].shape[0] * places[path].shape[1] for path in quantized.layers]
        bits = float(np.average([each.bits for each in figures], weights=weights))
        rows.append(row(recipe.name, bits, before, after, bootstrap))
    lines = [f"| {' | '.join(line)} |" for line in (HEADER, ["---"] * len(HEADER), *rows)]
    what = f"{len(passages)} passages of {window.length} tokens; {len(places)} layers, searched on {calibration.tokens}"
    return [*lines, "", f"{origin['model']}: {what} other tokens."]


def work(arguments: Sequence[str]) -> int:
    """The command; its exit code."""
    options, _ = parse_options(Options, arguments)
    try:
        check_given(options.model, options.text)
        lines = compare(options)
    except Fault as fault:
        raise fault.worded(options) from fault
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(serve(sys.argv[1:], USAGE, work))
