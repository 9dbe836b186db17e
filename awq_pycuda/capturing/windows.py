"""Runs windows of token ids through a model: how long they may be, and why one fails."""

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers

from awq_pycuda.capturing.fault import Fault, one_line
from awq_pycuda.capturing.tracking import BeyondTable, Watch

# Names under which configurations keep the longest window.
_LIMITS = (
    "max_position_embeddings",
    "n_positions",
    "n_ctx",
    "max_seq_len",
    "max_seq_length",
    "max_sequence_length",
    "seq_len",
    "seq_length",
    "context_length",
    "max_text_len",
    "max_text_length",
    "max_text_positions",
    "max_target_positions",
    "model_max_length",
)
# Arguments of a forward that are no input of another kind than token ids.
_TECHNICAL = re.compile(r"mask|embeds|position|cache|past|output|return|labels|mems|type_ids|^use_|logits|^kwargs$")


@dataclass(frozen=True)
class Window:
    """The longest window, in tokens with the special ones; ``why`` it is shorter than what was asked for, or None."""

    length: int
    why: str | None


def run_window(model: Any, ids: list[int]) -> None:
    """Run one window as a batch of one, without padding; what a model draws at random is the same every time."""
    torch.manual_seed(0)
    tensor = torch.tensor([ids])
    accepted = inspect.signature(model.forward).parameters
    # Some models, such as FNet, know no mask.
    masks = {"attention_mask": torch.ones_like(tensor)} if "attention_mask" in accepted else {}
    with torch.no_grad():
        model(input_ids=tensor, **masks)


def plain_ids(model: Any, tokenizer: Any) -> list[int]:
    """Ids that any text may hold: none of the special or added tokens, such as one that stands for an image."""
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    rows = _token_rows(model)
    ids = sorted(set(tokenizer.get_vocab().values()) - special)
    ids = [index for index in ids if rows is None or index < rows]
    if len(ids) < 2:
        raise Fault("model", f"its tokenizer has {len(ids)} tokens beside special ones that the model knows")
    return ids


def draw_ids(ids: list[int], count: int, seed: int) -> list[int]:
    """So many of the ids, drawn at random, the same for the same seed."""
    return [int(index) for index in np.random.default_rng(seed).choice(ids, count)]


def check_ids(model: Any, tokenizer: Any, windows: list[list[int]]) -> None:
    """Refuse a text with a token that the model's table does not hold. Raises `Fault`."""
    rows = _token_rows(model)
    highest = max(map(max, windows))
    if rows is not None and highest >= rows:
        token = tokenizer.convert_ids_to_tokens(highest)
        what = f"its tokenizer gives the token id {highest} ({token!r}), and its token table has {rows} rows"
        raise Fault("model", what, "a tokenizer and a model of one vocabulary")


def _token_rows(model: Any) -> int | None:
    """Rows of the table that token ids index; None where the model has none, such as one that hashes."""
    try:
        return int(model.get_input_embeddings().weight.shape[0])
    except (AttributeError, NotImplementedError):
        return None


def find_window(model: Any, tokenizer: Any, wanted: int, special: int) -> Window:
    """The longest window up to ``wanted`` tokens that tokenizer, configuration and the model itself allow.

    A configuration may say nothing, or count positions that no token can have; so the window is tried on the model,
    and shortened where it fails for its length. Raises `Fault` where windows of any length fail.
    """
    ids = plain_ids(model, tokenizer)
    least = special + 1
    limits = [limit for limit in _told_limits(model, tokenizer) if limit.length < wanted]
    window = min(limits, key=lambda limit: limit.length, default=Window(wanted, None))
    if window.length < least:
        raise Fault("model", f"{window.why} leaves a window no token of the text beside {special} special ones")
    error = _try(model, ids, window.length)
    while isinstance(error, BeyondTable):
        shorter = window.length - (error.index - error.rows + 1)
        if shorter < least:
            break
        window = Window(shorter, f"{error.name} has {error.rows} rows")
        error = _try(model, ids, window.length)
    if error is None:
        return window
    if _of_memory(error) or window.length == least or _try(model, ids, least) is not None:
        raise explain(error, model, window.length) from error
    works, fails = least, window.length
    while fails - works > 1:
        middle = (works + fails) // 2
        failure = _try(model, ids, middle)
        works, fails = (middle, fails) if failure is None else (works, middle)
        error = failure or error
    return Window(works, f"longer ones fail ({type(error).__name__}: {one_line(error)})")


def _told_limits(model: Any, tokenizer: Any) -> Iterator[Window]:
    for value, why in [(tokenizer.model_max_length, "the tokenizer's model_max_length"), *_configured(model)]:
        # "No limit" is told as None, -1, 0, or as a number beyond any window.
        if isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
            yield Window(int(value), f"{why} is {int(value)}")


def _configured(model: Any) -> Iterator[tuple[Any, str]]:
    """The limits in the configurations of the model and of those parts of it that hold its token table."""
    try:
        table = model.get_input_embeddings()
    except NotImplementedError:
        table = None
    for module in model.modules():
        holds = module is model or any(part is table for part in module.modules())
        if isinstance(module, transformers.PreTrainedModel) and holds:
            for name in _LIMITS:
                yield getattr(module.config, name, None), f"{name} of its configuration"


def _try(model: Any, ids: list[int], length: int) -> Exception | None:
    """Run a window of that length; the exception is returned that it ends in."""
    try:
        with Watch(model, {}, lambda name: None):
            run_window(model, draw_ids(ids, length, seed=0))
    except Exception as error:
        # Whatever a model's code raises.
        return error
    return None


def diagnose(error: Exception, model: Any, ids: list[int]) -> Fault:
    """The reason why a window failed, told by running it again with every operation looked at."""
    try:
        with Watch(model, {}, lambda name: None):
            run_window(model, ids)
    except BeyondTable as closer:
        error = closer
    except Exception:
        pass  # the first failure stands
    return explain(error, model, len(ids))


def explain(error: Exception, model: Any, length: int) -> Fault:
    """Say why a window of so many tokens failed."""
    if isinstance(error, BeyondTable):
        return Fault("model", f"fails on a window of {length} tokens: it asks for {error}")
    if _of_memory(error):
        return Fault("tokens", f"a window of {length} tokens does not fit into memory", "fewer")
    reason = f"{type(error).__name__}: {one_line(error)}"
    missing = _missing_input(error, model)
    if missing is None:
        return Fault("model", f"fails on a window of {length} tokens ({reason})")
    return Fault("model", f"asks for {missing} beside the text ({reason})", "models that need only token ids")


def _of_memory(error: Exception) -> bool:
    words = str(error)
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and ("can't allocate memory" in words or "not enough memory" in words)
    )


def _missing_input(error: Exception, model: Any) -> str | None:
    """The input that a failed forward lacked: one that the exception names, or None that the frames show as absent."""
    words = str(error)
    for name in inspect.signature(model.forward).parameters:
        if name != "input_ids" and not _TECHNICAL.search(name) and re.search(rf"\b{name}\b", words):
            return name
    trace = error.__traceback__
    found = None
    while trace is not None:
        module = trace.tb_frame.f_locals.get("self")
        if trace.tb_frame.f_code.co_name == "forward" and isinstance(module, transformers.PreTrainedModel):
            name = module.main_input_name
            if name != "input_ids" and trace.tb_frame.f_locals.get(name) is None:
                found = name
        trace = trace.tb_next
    if found is None and model.config.is_encoder_decoder and isinstance(error, ValueError):
        return "decoder_input_ids"
    return found
