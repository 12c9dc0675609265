"""The engine: one thread that runs the model for all requests, and lets rows in between passes.

Rows of all requests form one batch. A row that ends makes room at once; new prompts run in a pass
of their own and join before the next token. What a row is answered does not depend on the rows
beside it, but for the rounding of products of another shape: see `docs/serving.md`.
"""

import functools
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from saesteer.checkpoints.errors import UserError
from saesteer.checkpoints.sae_file import SAE
from saesteer.sae.model.generation import stop_ids
from saesteer.sae.model.hooks import HookPoint
from saesteer.sae.model.language_model import LanguageModel, uncompiled
from saesteer.steering.hooking.latent_values import LatentReader
from saesteer.steering.hooking.tracking.finite import NotFiniteError
from saesteer.steering.hooking.tracking.taps import steered_by_this_thread
from saesteer.steering.plans.from_sae import encoder_columns
from saesteer.steering.serving.batch import Batch
from saesteer.steering.serving.caches import CacheKind
from saesteer.steering.serving.config import ServeConfig
from saesteer.steering.serving.generation import (
    DeadlineError,
    Event,
    Failed,
    Finished,
    Generation,
    Row,
    Ticket,
    Token,
)
from saesteer.steering.serving.row_edits import BatchHooks, RowEdits, Watch
from saesteer.steering.serving.sampling import row_processors

T = TypeVar("T")


class BusyError(Exception):
    """As many answers are waiting as may wait."""


class ClosedError(Exception):
    """The engine takes no more requests: it is stopping."""


class Observer:
    """Is told what the engine does; this one does not listen."""

    def pass_done(self, rows: int, tokens: int, seconds: float, prompts: bool) -> None:
        """A pass has run `tokens` tokens of `rows` rows; `prompts`: of their prompts."""

    def request_begun(self, waited: float) -> None:
        """A request's first row has left the queue after `waited` seconds."""

    def request_ended(self, how: str) -> None:
        """A request is over: `finished`, `failed`, `late` or `cancelled`."""


class Engine:
    """Runs requests. `start` it, `submit` requests from any thread, and `stop` it.

    Args:
        sae: the SAE whose latents requests may watch, and where it reads.
        saes: SAEs of plans whose methods or gates read latents.
        force: run plans that were made for other weights.
        clock: gives seconds; deadlines are compared with it.
    """

    def __init__(
        self,
        lm: LanguageModel,
        config: ServeConfig,
        *,
        sae: tuple[SAE, HookPoint] | None = None,
        saes: Sequence[SAE] = (),
        force: bool = False,
        observer: Observer | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.lm, self.config, self.clock = lm, config, clock
        self._sae, self._saes, self._force = sae, list(saes), force
        self._observer = observer or Observer()
        self._kind = CacheKind(lm)
        self._hooks = BatchHooks()
        self._ends = stop_ids(lm)
        self._processors = row_processors(lm)
        self._batches: list[Batch] = []
        self._waiting: deque[Row] = deque()
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._wake = threading.Condition()
        self._closing = self._aborting = False
        self._thread = threading.Thread(target=self._work, name="saesteer-engine", daemon=True)

    # --- for other threads ---

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether it works."""
        return self._thread.is_alive()

    @property
    def running(self) -> int:
        """Rows that are being answered."""
        return sum(len(batch.rows) for batch in list(self._batches))

    @property
    def waiting(self) -> int:
        """Rows that wait for a place."""
        return len(self._waiting)

    def submit(self, request: Generation, listener: Callable[[Event], None]) -> Ticket:
        """Put a request into the queue; `listener` is called with what becomes of it.

        Raises BusyError when the queue is full, ClosedError when the engine is stopping.
        """
        ticket = Ticket(request, listener, self.clock())
        count = len(request.prompts) * request.n
        with self._wake:
            if self._closing or not self.alive:
                raise ClosedError
            if self.running + self.waiting + count > self.config.max_batch + self.config.queue:
                raise BusyError
            ticket.open_rows = count
            self._waiting.extend(
                Row(self.lm, ticket, choice, self._processors) for choice in range(count)
            )
            self._wake.notify()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Forget a request; its rows leave before the next pass."""
        with self._wake:
            ticket.cancelled.set()
            self._wake.notify()

    def call(self, function: Callable[[], T]) -> "Future[T]":
        """Run a function that needs the model, between two passes; all rows wait meanwhile."""
        future: Future[T] = Future()
        with self._wake:
            if self._closing or not self.alive:
                raise ClosedError
            self._calls.append((function, future))
            self._wake.notify()
        return future

    def stop(self, timeout: float | None = None) -> None:
        """Take no more requests, finish those that are there, and leave the model as it was.

        After `timeout` seconds what is left is given up.
        """
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread.ident is None:
            return
        self._thread.join(timeout)
        if self._thread.is_alive():
            with self._wake:
                self._aborting = True
                self._wake.notify()
            self._thread.join()

    # --- the engine's thread ---

    def _work(self) -> None:
        name = self.lm.name
        with torch.inference_mode(), steered_by_this_thread(uncompiled(self.lm.model), name):
            try:
                if self._sae is not None:
                    self._hooks.watch([self._sae[1]])
                while self._wait():
                    self._one_round()
            finally:
                self._give_up()
                self._hooks.close()

    def _wait(self) -> bool:
        """Sleep until there is something to do; False when all is done and the engine closes."""
        with self._wake:
            while not (self._waiting or self._calls or self._batches or self._closing):
                self._wake.wait()
            busy = bool(self._waiting or self._calls or self._batches)
            return not self._aborting and (busy or not self._closing)

    def _one_round(self) -> None:
        """Everything between two tokens, and the passes that give them."""
        self._run_calls()
        self._let_go()
        rows = self._admit()
        if rows:
            self._begin(rows)
        for batch in list(self._batches):
            self._guarded(batch, batch.step, prompts=False)
        self._batches = [batch for batch in self._batches if batch.rows]

    def _run_calls(self) -> None:
        while self._calls:
            function, future = self._calls.popleft()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function())
                except Exception as error:
                    future.set_exception(error)

    def _let_go(self) -> None:
        """Drop rows whose request was cancelled, has failed, or is late."""
        now = self.clock()
        with self._wake:
            waiting = list(self._waiting)
        for row in [*waiting, *(row for batch in self._batches for row in batch.rows)]:
            ticket = row.ticket
            if not ticket.over and ticket.cancelled.is_set():
                self._end(ticket, "cancelled")
            elif not ticket.over and now > ticket.request.deadline:
                ticket.tell(Failed(DeadlineError()))
                self._end(ticket, "late")
        with self._wake:
            self._waiting = deque(row for row in self._waiting if not row.ticket.over)
        for batch in self._batches:
            gone = {number for number, row in enumerate(batch.rows) if row.ticket.over}
            if gone:
                batch.drop(gone)
        self._batches = [batch for batch in self._batches if batch.rows]

    def _admit(self) -> list[Row]:
        """The first of the waiting rows, as many as there is room for."""
        admitted: list[Row] = []
        longest = max((row.longest for batch in self._batches for row in batch.rows), default=0)
        running = self.running
        widest = 0
        with self._wake:
            while self._waiting:
                row = self._waiting[0]
                count = running + len(admitted) + 1
                longest = max(longest, row.longest)
                widest = max(widest, len(row.prompt))
                prompts = (len(admitted) + 1) * widest
                if (
                    count > self.config.max_batch
                    or (count > 1 and count * longest > self.config.cache_tokens)
                    or (admitted and prompts > self.config.prefill_tokens)
                ):
                    break
                admitted.append(self._waiting.popleft())
        now = self.clock()
        for row in admitted:
            if not row.ticket.started:
                row.ticket.started = True
                self._observer.request_begun(now - row.ticket.arrived)
        return admitted

    def _begin(self, rows: Sequence[Row]) -> None:
        """Run prompts, and let their rows join the others."""
        ready = [row for row in rows if self._prepare(row)]
        if not ready:
            return
        groups = [ready] if self._kind.joins else [[row] for row in ready]
        for group in groups:
            batch = Batch(self.lm, self._kind, self._hooks)
            self._guarded(batch, functools.partial(batch.begin, group), prompts=True)
            if not batch.rows:
                continue
            if self._kind.joins and self._batches:
                self._batches[0].join(batch)
            else:
                self._batches.append(batch)

    def _prepare(self, row: Row) -> bool:
        """Make the edits of a row; False where its request cannot be run so."""
        request = row.ticket.request
        if row.ticket.over:
            return False
        try:
            if request.plans:
                row.edits = RowEdits(self.lm, request.plans, row.prompt, self._saes, self._force)
                self._hooks.watch(row.edits.points)
                ids = torch.tensor([row.prompt.token_ids], device=self.lm.device)
                row.edits.begin_pass(ids, 0)
            if request.watched:
                row.watch = self._watch(tuple(request.watched))
        except Exception as error:
            self._fail(row.ticket, error)
            return False
        return True

    def _watch(self, ids: tuple[int, ...]) -> Watch:
        assert self._sae is not None
        sae, point = self._sae
        columns = encoder_columns(sae, ids)
        scaling = sae.spec.normalize_activations if sae.spec.scales_tokens else "none"
        reader = LatentReader(ids, columns, None if columns else sae, normalization=scaling)
        return Watch(point, reader)

    def _guarded(
        self, batch: Batch, run: Callable[[], Float[Tensor, "rows vocabulary"]], *, prompts: bool
    ) -> None:
        """A pass of a batch and what follows from it; an error ends its requests alone."""
        try:
            begun = self.clock()
            logits = run()
            tokens = sum(len(row.prompt) if prompts else 1 for row in batch.rows)
            count = len(batch.rows)
            self._take_tokens(batch, logits)
            self._observer.pass_done(count, tokens, self.clock() - begun, prompts)
        except Exception as error:
            for row in batch.rows:
                self._fail(row.ticket, error)
            batch.drop(set(range(len(batch.rows))))

    def _take_tokens(self, batch: Batch, logits: Float[Tensor, "rows vocabulary"]) -> None:
        """Give each row its next token, and let those go that end with it."""
        low, high = logits.aminmax(dim=-1)
        finite = (low.isfinite() & high.isfinite()).tolist()
        likeliest = logits.argmax(dim=-1).tolist()
        gone = set()
        for number, row in enumerate(batch.rows):
            if row.ticket.over:
                gone.add(number)
            elif not finite[number]:
                self._fail(row.ticket, _not_finite(self.lm))
                gone.add(number)
            elif self._one_more(row, logits[number], likeliest[number]):
                gone.add(number)
        if gone:
            batch.drop(gone)

    def _one_more(self, row: Row, logits: Float[Tensor, " vocabulary"], likeliest: int) -> bool:
        """Add a token to a row and tell of it; whether the row has ended."""
        request = row.ticket.request
        token, logprobs = likeliest, None
        if not row.sampler.is_plain:
            token, logprobs = row.sampler.choose(logits, row.tokens)
        if request.measured:
            row.log_p.append(float(logits[token] - logits.logsumexp(dim=-1)))
        activations, on_prompt = self._activations(row)
        if token in self._ends and not request.ignore_end:
            self._finish(row, "stop", Token(row.choice, row.text.finish(), None, "", 0, None,
                                            activations, on_prompt))  # fmt: skip
            return True
        row.new.append(token)
        text, piece = row.text.add(token)
        reason = None
        if row.text.stopped:
            reason = "stop"
        elif len(row.new) >= request.max_new_tokens:
            reason, rest = "length", row.text.finish()
            text, piece = text + rest, piece or rest
        last = Token(
            row.choice, text, token, piece, len(row.new) - 1, logprobs, activations, on_prompt
        )
        if reason is None:
            row.ticket.tell(last)
            return False
        self._finish(row, reason, last)
        return True

    def _activations(
        self, row: Row
    ) -> tuple[tuple[tuple[int, tuple[float, ...]], ...], tuple[tuple[float, ...], ...]]:
        """What the last pass says of the watched latents: at the answer's last token, or at those
        of the prompt."""
        if row.watch is None or not row.watch.seen:
            return (), ()
        values = [tuple(line) for line in row.watch.seen.pop().tolist()]
        row.watch.seen.clear()
        if row.new:
            return ((len(row.new) - 1, values[0]),), ()
        return (), tuple(values)

    def _finish(self, row: Row, reason: str, last: Token) -> None:
        """Tell of a row's last token and of its end."""
        ticket = row.ticket
        ticket.tell(last)
        plain = self._plain_nats(row) if ticket.request.measured else None
        ticket.tell(Finished(row.choice, reason, row.facts(plain)))
        ticket.open_rows -= 1
        if ticket.open_rows == 0:
            self._end(ticket, "finished")

    def _plain_nats(self, row: Row) -> float | None:
        """Mean of -log p of the answer's tokens for the unsteered model, in nats."""
        if not row.new:
            return None
        ids = torch.tensor([row.tokens], device=self.lm.device)
        mask = torch.ones_like(ids)
        given = self._kind.arguments(self._kind.new(), ids, mask)
        given.pop("logits_to_keep", None)
        logits = uncompiled(self.lm.model)(**given).logits[0, -len(row.new) - 1 : -1].float()
        log_p = torch.log_softmax(logits, dim=-1)
        return -float(log_p.gather(1, ids[0, -len(row.new) :, None]).mean())

    def _fail(self, ticket: Ticket, error: Exception) -> None:
        if not ticket.over:
            ticket.tell(Failed(error))
            self._end(ticket, "failed")

    def _end(self, ticket: Ticket, how: str) -> None:
        ticket.over = True
        self._observer.request_ended(how)

    def _give_up(self) -> None:
        """Tell every request that is left that it will not be answered."""
        with self._wake:
            self._closing = True
            rows = [*self._waiting, *(row for batch in self._batches for row in batch.rows)]
            self._waiting.clear()
            calls = list(self._calls)
            self._calls.clear()
        self._batches = []
        for row in rows:
            self._fail(row.ticket, ClosedError())
        for _, future in calls:
            future.set_exception(ClosedError())


def _not_finite(lm: LanguageModel) -> UserError:
    kind = str(lm.dtype).removeprefix("torch.")
    return NotFiniteError(
        f"steered so, {lm.name} gives outputs that are infinite or not numbers: the dose is more "
        f"than {kind} can hold; lower `scale`"
    )
