"""Windows run through a causal language model, such that neither threads nor order change a digit.

Every window is a batch of its own, and runs on one thread of PyTorch's: sums are then always made in one order.
"""

from __future__ import annotations

import functools
import inspect
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed, wait
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch

from awq_pycuda.capturing.fault import Fault
from awq_pycuda.capturing.windows import explain
from awq_pycuda.evaluating.windows import Window

T = TypeVar("T")
Item = TypeVar("Item")
# Of the largest logit: roundings of a batch with another token in it are below, what a token behind does is above.
_ROUNDING = 1e-4


class Runner:
    """Runs windows through a causal language model, several at a time; a context manager, for it needs threads.

    The logits of the original are not kept, since they are the largest of all arrays: they are made again of its last
    hidden states, by what the model does behind its base model (head, scale, softcap). `try_on` finds out whether that
    gives them bit for bit; where it does not, `keep` keeps them.

    Args:
        causal: the model, on the CPU.
        base: its base model.
        workers: windows that run at a time; a GPU runs one.
        device: where it runs, such as `cpu` or `cuda`.

    Attributes:
        causal: the model.
        base: its base model.
        device: where it runs.
        workers: windows that run at a time. `try_on` leaves one where they would see each other: where the model draws
            at random, or changes its buffers as it runs.
        vocabulary: tokens that a distribution is over, as soon as one window was tried.
        seconds: that the window tried took by the base model, and in all.
        said: what is to be said of how the model runs, line by line.
    """

    def __init__(self, causal: Any, base: Any, workers: int, device: str = "cpu") -> None:
        self.causal, self.base, self.device = causal, base, device
        self.workers = workers if device == "cpu" else 1
        self.vocabulary = 0
        self.seconds = (0.0, 0.0)
        self.said: list[str] = []
        self._accepted = {model: set(inspect.signature(model.forward).parameters) for model in (causal, base)}
        self._of_thread = threading.local()
        self._draws = False
        self._output: Callable[[Any], Any] = lambda hidden: (hidden,)  # as the base model gives its last hidden states
        self._kept: dict[int, Any] | None = None
        self._trunk: Any = None  # what the head takes its hidden states from

    def __enter__(self) -> Runner:
        try:
            self.causal.to(self.device)
        except torch.OutOfMemoryError as error:
            self.causal.to("cpu")
            raise Fault("device", "the model does not fit into the GPU's memory", "cpu") from error
        self._threads = torch.get_num_threads()
        torch.set_num_threads(1)
        self._pool = ThreadPoolExecutor(self.workers, "window", torch.set_num_threads, (1,))
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        if self._trunk is not None:
            del self._trunk.forward
        self.causal.to("cpu")
        torch.set_num_threads(self._threads)

    @contextmanager
    def on_host(self) -> Iterator[None]:
        """Within it the model is on the CPU, where layers are captured."""
        self.causal.to("cpu")
        try:
            yield
        finally:
            self.causal.to(self.device)

    def try_on(self, window: Window) -> None:
        """Finds out on one window how this model may be run.

        Raises:
            Fault: it fails, or tokens are predicted from those behind them.
        """
        buffers = self._buffers()
        self._trunk = self._find_trunk(window)
        self._trunk.forward = self._handing_back(self._trunk.forward)
        torch.manual_seed(0)
        state = torch.get_rng_state()
        logits = self.logits(window)
        self.vocabulary = logits.shape[1]
        self._draws = not torch.equal(torch.get_rng_state(), state)
        if self._draws or self._buffers() != buffers:
            self.workers = 1
            why = "draws at random" if self._draws else "changes its buffers as it runs"
            self.said.append(f"windows run one after the other: the model {why}")
        self._refuse_foresight(window, logits)
        kind = type(self._of_thread.seen)
        if not issubclass(kind, tuple):
            self._output = lambda hidden: kind(last_hidden_state=hidden)
        begin = time.perf_counter()
        hidden = self.hidden(window)
        middle = time.perf_counter()
        try:
            again = self.logits_of(window, hidden)
        except Fault:
            again = None
        self.seconds = (middle - begin, time.perf_counter() - begin)
        if again is None or not torch.equal(again, logits):
            self._kept = {}
            self.said.append("the original's logits are kept: its head makes them of more than the last hidden states")

    def _refuse_foresight(self, window: Window, logits: Any) -> None:
        """Refuses a model in which another last token changes what is predicted before it."""
        ids = [*window.ids]
        last = window.stop - 1
        ids[last] = (ids[last] + 1) % self.vocabulary
        others = self.logits(replace(window, ids=ids))
        # Of numbers that are none nothing follows: where the model has such, that is told of them.
        if (others - logits).abs().max() > _ROUNDING * logits.abs().max():
            what = "is no causal language model: it predicts tokens from those behind them"
            raise Fault("model", what, "causal language models, which predict each token from those before it")

    def keep(self, windows: Sequence[Window], on_done: Callable[[], None] = lambda: None) -> list[Any]:
        """The last hidden states of the model as it is now, which is the original: (tokens, width) float32 each."""

        def run(window: Window) -> Any:
            if self._kept is None:
                return self.hidden(window)
            self._kept[window.first] = self.logits(window).cpu()
            return self._of_thread.seen[0][0].cpu()

        return self.each(run, windows, on_done)

    def hidden(self, window: Window) -> Any:
        """A window's last hidden states, (tokens, width) float32 on the CPU; all of its tokens, special ones too."""
        return self._call(self.base, window)[0][0].cpu()

    def logits(self, window: Window) -> Any:
        """Of the model as it is now, (tokens predicted, vocabulary) float32, where the model is."""
        return self._rows(window, self._call(self.causal, window))

    def logits_of(self, window: Window, hidden: Any) -> Any:
        """The same of the original, of which these are the last hidden states."""
        if self._kept is not None:
            return self._kept[window.first].to(self.device)
        self._of_thread.given = self._output(hidden[None].to(self.device))
        try:
            return self._rows(window, self._call(self.causal, window))
        finally:
            self._of_thread.given = None

    def each(
        self, function: Callable[[Item], T], items: Sequence[Item], on_done: Callable[[], None] = lambda: None
    ) -> list[T]:
        """What a function makes of each item, in their order, so many at a time as there are workers.

        Args:
            function: of an item, from any thread.
            items: the items.
            on_done: told, in the caller's thread, of each that is done.

        Raises:
            Exception: the first of the function's; none of the items left is begun then, nor after a signal.
        """
        if self.workers == 1:
            found = []
            for item in items:
                found.append(function(item))
                on_done()
            return found
        futures: list[Future[T]] = [self._pool.submit(function, item) for item in items]
        try:
            for future in as_completed(futures):
                future.result()
                on_done()
        finally:
            for future in futures:
                future.cancel()
            wait(futures)
        return [future.result() for future in futures]

    def _find_trunk(self, window: Window) -> Any:
        """The base model, or the part of it that is run in its place, such as a decoder; all layers are within it.

        Raises:
            Fault: it runs in several parts, so that nothing can be told from its head.
        """
        ran: list[Any] = []
        with ExitStack() as stack:
            for module in self.base.modules():
                stack.callback(module.register_forward_pre_hook(lambda module, _args: ran.append(module)).remove)
            self.logits(window)
        inside = set(ran[0].modules()) if ran else set()
        if not ran or any(module not in inside for module in ran):
            raise Fault("model", "runs its base model in parts", "models whose base model runs as a whole")
        return ran[0]

    def _rows(self, window: Window, output: Any) -> Any:
        return output.logits[0, window.start - 1 : window.stop - 1].float()

    def _call(self, model: Any, window: Window) -> Any:
        ids = torch.tensor([window.ids], device=self.device)
        # Some models know no mask; what a cache keeps is of use to no other window.
        more = {"attention_mask": torch.ones_like(ids), "use_cache": False}
        if self._draws or self.device != "cpu":  # what is drawn on a GPU leaves the CPU's state as it is
            torch.manual_seed(0)
        try:
            with torch.no_grad():
                return model(
                    input_ids=ids, **{name: value for name, value in more.items() if name in self._accepted[model]}
                )
        except Exception as error:
            # Whatever a model's code raises.
            fault = explain(error, self.causal, len(window.ids))
            if fault.key == "tokens":  # of a capture, whose windows are as long as possible
                fault = Fault("window", fault.what, "shorter ones")
            raise fault from error

    def _handing_back(self, forward: Any) -> Any:
        """The trunk's forward, which gives a thread the hidden states that it has brought, where it has."""

        @functools.wraps(forward)
        def run(*args: Any, **kwargs: Any) -> Any:
            given = getattr(self._of_thread, "given", None)
            if given is None:
                given = self._of_thread.seen = forward(*args, **kwargs)
            return given

        return run

    def _buffers(self) -> list[tuple[str, int, int]]:
        return [(name, buffer.data_ptr(), buffer._version) for name, buffer in self.causal.named_buffers()]
