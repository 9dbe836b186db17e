"""The schema of an evaluation's file as data; writer, reader and docs/evaluation.md follow from this table."""

from __future__ import annotations

from dataclasses import replace

from awq_pycuda.results import schema
from awq_pycuda.results.entries import Better, Entry, entry_of

NAME = "awq_pycuda_evaluation"
VERSION = 1
FILE_NAME = "evaluation.h5"
CALIBRATION_NAME = "calibration.h5"  # the layer file beside it that recipes are searched on

RECIPES = "/recipes"
WINDOWS = "/windows"
TOKENS = "/tokens"
LAYERS = "/layers"
ALONE = "/alone"
_RECIPE = ("recipe",)
_OF_TOKENS = ("recipe", "token")
_OF_LAYERS = ("recipe", "layer")
_OF_RUNS = ("created", "backend", "device", "versions", "git_commit", "git_dirty", "kernels_sha256")


def _figure(name: str, what: str, better: Better) -> tuple[Entry, ...]:
    """A figure of each recipe with the ends of its interval."""
    path = f"{RECIPES}/{name}"
    return (
        Entry(path, what, "f8", _RECIPE, better=better),
        Entry(f"{path}_low", "lower end of its 95 % interval, by windows drawn again", "f8", _RECIPE),
        Entry(f"{path}_high", "upper end of the same", "f8", _RECIPE),
    )


TABLE: tuple[Entry, ...] = (
    Entry("/@schema", f"`{NAME}`", "str"),
    Entry("/@schema_version", f"the version of this layout, {VERSION}", "i8"),
    Entry("/@status", "`complete` or `failed`; a failed one has the recipes and layers that were finished", "str"),
    Entry("/@error", "only if failed: type and message", "str", presence="optional"),
    *(each for each in schema.TABLE if each.parent == "/" and each.name in _OF_RUNS),
    Entry("/@options", "JSON: the command's keys", "str"),
    Entry("/@model", "name of the model's folder or file", "str"),
    Entry("/@model_type", "its architecture", "str"),
    Entry("/@model_sha256", "over names, shapes and values of its parameters", "str"),
    Entry("/@text_sha256", "of the text's bytes", "str"),
    Entry("/@calibration_sha256", "of the ids of the calibration's tokens, as int64", "str"),
    Entry("/@evaluation_sha256", "of the ids of the evaluation's tokens, as int64", "str"),
    Entry(
        "/@calibration_tokens", "tokens that recipes were searched on: the text's first, with the special ones", "i8"
    ),
    Entry("/@skipped_tokens", "tokens of the text behind them that nothing ran on", "i8"),
    Entry("/@evaluation_tokens", "tokens of the text behind these that recipes were evaluated on", "i8"),
    Entry("/@predicted_tokens", "those of them with a token before them in their window", "i8"),
    Entry("/@window", "tokens of a window, with the tokenizer's special ones", "i8"),
    Entry("/@vocabulary", "tokens that a distribution is over", "i8"),
    Entry("/@parameters", "numbers of the model, those shared counted once", "i8"),
    Entry("/@linear_parameters", "weights of the layers that recipes may replace", "i8"),
    Entry("/@seed", "of the draws of windows for the intervals", "i8"),
    Entry("/@said", "JSON list: what became of every calibration token, and what of the model is left as it is", "str"),
    # The scales stand above the groups, for each serves several.
    Entry("/recipe", "index of the recipe; 0 is the original model", "i8", _RECIPE),
    Entry("/window", "index of the window", "i8", ("window",)),
    Entry("/token", "index of the token predicted, window after window", "i8", ("token",)),
    Entry("/layer", "index of the layer, in the order in which they run", "i8", ("layer",)),
    Entry(RECIPES, "what a recipe is, its size, and what it does to the model"),
    Entry(f"{RECIPES}/name", "`original`, then each recipe's name", "str", _RECIPE),
    Entry(
        f"{RECIPES}/config", "the resolved config of its run as YAML; empty for `original` and mixtures", "str", _RECIPE
    ),
    Entry(
        f"{RECIPES}/overrides", "JSON list: what it gives its run; empty for `original` and mixtures", "str", _RECIPE
    ),
    Entry(
        f"{RECIPES}/mixture", "JSON: the recipe of each layer; empty where one recipe is that of all", "str", _RECIPE
    ),
    Entry(f"{RECIPES}/config_hash", "of its run's config, or of the mixture; empty for `original`", "str", _RECIPE),
    Entry(f"{RECIPES}/results", "path of its run's file from this one's folder; empty without", "str", _RECIPE),
    Entry(
        f"{RECIPES}/bits",
        "mean bits of a weight of the layers, with steps and zero points; layers left as they are count as stored: 32",
        "f8",
        _RECIPE,
    ),
    Entry(f"{RECIPES}/linear_bytes", "size of the layers' weights, counted alike", "f8", _RECIPE, "bytes"),
    *_figure(
        "kl", "mean over the tokens of KL(P||Q), P the original's distribution and Q the recipe's, in nats", "lower"
    ),
    *_figure("kl_reverse", "mean of KL(Q||P), in nats", "lower"),
    *_figure("perplexity", "exp of the mean of -log Q(token)", "lower"),
    *_figure("top1", "share of the tokens at which P and Q find the same token the likeliest", "higher"),
    Entry(f"{RECIPES}/search_s", "time of its run; 0 where its file was there already", "f8", _RECIPE, "s"),
    Entry(f"{RECIPES}/evaluate_s", "time of the forward passes and of comparing", "f8", _RECIPE, "s"),
    Entry(WINDOWS, "the windows that the evaluation's text was cut into; each runs by itself"),
    Entry(f"{WINDOWS}/first_token", "index of its first token in the text", "i8", ("window",)),
    Entry(f"{WINDOWS}/tokens", "tokens predicted in it", "i8", ("window",)),
    Entry(TOKENS, "every token predicted"),
    Entry(f"{TOKENS}/of_window", "the window that it is of", "i8", ("token",)),
    Entry(f"{TOKENS}/id", "the token that the text has there", "i8", ("token",)),
    Entry(f"{TOKENS}/nll", "-log P(token) of the original, in nats", "f8", ("token",)),
    Entry(f"{TOKENS}/kl", "KL(P||Q), in nats", "f8", _OF_TOKENS),
    Entry(f"{TOKENS}/kl_reverse", "KL(Q||P), in nats", "f8", _OF_TOKENS),
    Entry(f"{TOKENS}/nll_recipe", "-log Q(token), in nats", "f8", _OF_TOKENS),
    Entry(f"{TOKENS}/top1", "1 where P and Q find the same token the likeliest, else 0", "i1", _OF_TOKENS),
    Entry(LAYERS, "the layers that recipes may replace, and what each recipe makes of each"),
    Entry(f"{LAYERS}/name", "path of the module in the base model", "str", ("layer",)),
    Entry(f"{LAYERS}/in_features", "K", "i8", ("layer",)),
    Entry(f"{LAYERS}/out_features", "N", "i8", ("layer",)),
    Entry(
        f"{LAYERS}/bits", "bits of a weight, with steps and zero points; 32 where it is left as it is", "f8", _OF_LAYERS
    ),
    Entry(f"{LAYERS}/output_sqnr_db", "of its run; NaN where there is none", "f8", _OF_LAYERS, "dB"),
    Entry(f"{LAYERS}/rtn_output_sqnr_db", "that of RTN in its run; NaN where there is none", "f8", _OF_LAYERS, "dB"),
    Entry(f"{LAYERS}/gamma", "exponent chosen; NaN where there is none", "f8", _OF_LAYERS),
    Entry(
        ALONE,
        "what one recipe costs where a single layer is replaced",
        presence="optional",
        note="; with `alone`",
    ),
    Entry(f"{ALONE}/@recipe", "index of the recipe", "i8"),
    Entry(
        f"{ALONE}/kl",
        "mean of KL(P||Q) over the window's tokens with that layer alone replaced; NaN where it was not reached",
        "f8",
        ("layer", "window"),
    ),
    Entry(f"{ALONE}/kl_reverse", "that of KL(Q||P)", "f8", ("layer", "window")),
    Entry(f"{ALONE}/nll", "that of -log Q(token)", "f8", ("layer", "window")),
    Entry(
        f"{ALONE}/stream",
        "squared error of the residual stream behind the layer's block, as a share of its square, mean over all tokens "
        "of the window; NaN for a layer in no block",
        "f8",
        ("layer", "window"),
    ),
    *(replace(each, since=1) for each in schema.TABLE if each.path == schema.DIGEST),
)


def entry(path: str) -> Entry:
    """The entry of this path.

    Raises:
        KeyError: there is none.
    """
    return entry_of(TABLE, path, "an evaluation")
