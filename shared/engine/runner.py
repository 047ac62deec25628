"""One thread in which the engine computes, and the way to it from the event loop and back."""

import asyncio
import queue
import threading
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Self

from shared.engine.engine import AnyEngine
from shared.engine.scheduler import StepPlan
from shared.engine.sequence import FailedSequence, NewToken, Sequence
from shared.errors import ContextTooLong, InvalidRequest


class _Stop:
    """Tells the thread to end."""


class _Remove:
    def __init__(self, request_ids: list[str], done: asyncio.Future[None]) -> None:
        self.request_ids = request_ids
        self.done = done


class EngineRunner:
    """Runs an engine in its own thread, as an async context manager. All methods belong to the event loop.

    Args:
        engine: nobody else may touch it meanwhile.
        on_tokens: called in the event loop with the tokens of each step that generated some.
        on_crash: called in the event loop, once, if a step raised. The thread has ended then.
        on_prefill_step: called in the event loop when a step has begun that computes tokens of prompts.
        on_failed: called in the event loop with the sequences that a step has failed, and that have left the engine.
    """

    def __init__(
        self,
        engine: AnyEngine,
        on_tokens: Callable[[list[NewToken]], None],
        on_crash: Callable[[Exception], None],
        on_prefill_step: Callable[[], None] = lambda: None,
        on_failed: Callable[[list[FailedSequence]], None] = lambda failed: None,
    ) -> None:
        self._engine = engine
        self._engine.on_step = self._step_began
        self._on_tokens = on_tokens
        self._on_crash = on_crash
        self._on_prefill_step = on_prefill_step
        self._on_failed = on_failed
        self._commands: queue.SimpleQueue[Sequence | _Remove | _Stop] = queue.SimpleQueue()
        self._removals: set[asyncio.Future[None]] = set()
        self._crashed = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._thread.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._commands.put(_Stop())
        await asyncio.shield(asyncio.to_thread(self._thread.join))
        self._resolve_removals()

    def add(self, sequence: Sequence) -> None:
        """Hand a sequence to the engine; never blocks. After a crash this does nothing: `on_crash` has told the owner.

        Raises:
            InvalidRequest: a token id or a bias is outside of the vocabulary.
            ContextTooLong: prompt and answer are more than the model can take.
        """
        check(sequence, self._engine.loaded.vocab_size, self._engine.loaded.max_position_embeddings)
        self._commands.put(sequence)

    async def remove(self, request_ids: Iterable[str]) -> None:
        """Take sequences out. On return the engine uses their blocks no more, and no more tokens of theirs are to come.

        Unknown ids are no error: a sequence may have finished meanwhile.
        """
        if self._crashed or not self._thread.is_alive():
            return
        done = self._loop.create_future()
        self._removals.add(done)
        self._commands.put(_Remove(list(request_ids), done))
        await done

    def _run(self) -> None:
        try:
            while self._obey():
                tokens = self._engine.step()
                if tokens:
                    self._loop.call_soon_threadsafe(self._on_tokens, tokens)
                failed = self._engine.take_failed()
                if failed:
                    self._loop.call_soon_threadsafe(self._on_failed, failed)
        except Exception as error:  # noqa: BLE001 - the thread's edge: whatever it was, the loop learns of it
            self._loop.call_soon_threadsafe(self._crash, error)

    def _step_began(self, plan: StepPlan) -> None:
        if plan.prefills:
            self._loop.call_soon_threadsafe(self._on_prefill_step)

    def _obey(self) -> bool:
        """Carry out what has been asked for, waiting while there is no work; False to end."""
        while not self._engine.has_work or not self._commands.empty():
            command = self._commands.get()
            if isinstance(command, _Stop):
                return False
            if isinstance(command, Sequence):
                self._engine.add(command)
            else:
                for request_id in command.request_ids:
                    self._engine.remove(request_id)
                self._loop.call_soon_threadsafe(self._resolve, command.done)
        return True

    def _resolve(self, done: asyncio.Future[None]) -> None:
        self._removals.discard(done)
        if not done.done():
            done.set_result(None)

    def _resolve_removals(self) -> None:
        for done in list(self._removals):
            self._resolve(done)

    def _crash(self, error: Exception) -> None:
        self._crashed = True
        self._resolve_removals()
        self._on_crash(error)


def check(sequence: Sequence, vocab_size: int, max_position_embeddings: int) -> None:
    """Refuse what would fail in the middle of a step, and take the other requests down with it.

    Raises:
        InvalidRequest: a token id or a bias is outside of the vocabulary.
        ContextTooLong: prompt and generated tokens are more than the model can take.
    """
    sampling = sequence.sampling
    for param, ids in (
        ("prompt", sequence.token_ids),
        ("logit_bias", sampling.logit_bias.keys()),
        ("stop_token_ids", sampling.stop_token_ids),
    ):
        if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
            raise InvalidRequest(f"token ids go from 0 to {vocab_size - 1} with this model", param=param)
    if sequence.num_kv_tokens > max_position_embeddings:
        raise ContextTooLong(
            f"prompt and answer come to {sequence.num_kv_tokens} tokens, and the model takes {max_position_embeddings}"
        )
