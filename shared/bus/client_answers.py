"""The answers of the NATS API that a gateway owes or has finished: found by key, or by the client's inbox and id."""

import asyncio
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field

from shared.bus.reply_inbox import ReplyInbox
from shared.errors import InvalidRequest, RequestError

LINGER_S = 15.0
"""How long a finished answer is kept, as its last message may have to be sent again after a reconnect."""
MAX_FINISHED_ANSWERS = 8192
"""Beyond these, the ones that finished first are dropped."""
MAX_EARLY_CANCELS = 8


@dataclass(slots=True, eq=False)
class Answer:
    """An answer to a client.

    Attributes:
        key: ours: unique everywhere, and nobody can guess it.
        id: the client's name for it, or the key.
        has_started: whether its task runs: only then can cancelling the task end it with an error.
        ended_by: the error that ends it, from outside its task.
        has_ended: whether its terminal message is on its way, from here or from another gateway: nothing may follow.
        is_finished: whether its task is done with it.
        early_cancels: ids that its client has cancelled before the request was read, and so before its id was known.
    """

    key: str
    id: str
    inbox: ReplyInbox
    task: asyncio.Task[None] | None = None
    has_started: bool = False
    ended_by: RequestError | None = None
    has_ended: bool = False
    is_finished: bool = False
    early_cancels: list[str] = field(default_factory=list)

    def end(self, error: RequestError) -> None:
        """Ends it with an error, unless it has ended."""
        if not self.has_ended and self.ended_by is None:
            self.ended_by = error
            if self.task is not None and self.has_started:
                self.task.cancel()


def new_key() -> str:
    return f"gen-{secrets.token_hex(12)}"


class ClientAnswers:
    """All answers of a gateway. Ids belong to an inbox, so that no client can occupy another's."""

    def __init__(self) -> None:
        self._answers: dict[str, Answer] = {}
        self._by_client: dict[tuple[str, str], Answer] = {}
        """Unfinished ones by inbox and id."""
        self._unread: dict[str, Answer] = {}
        """By inbox, those whose request is still being parsed."""
        self._finished: dict[str, asyncio.TimerHandle] = {}
        """In the order in which they finished, and what will drop them."""

    def __iter__(self) -> Iterator[Answer]:
        return iter(list(self._answers.values()))

    def __len__(self) -> int:
        return len(self._answers)

    @property
    def num_open(self) -> int:
        """Returns the answers that are not finished."""
        return len(self._answers) - len(self._finished)

    def get(self, key: str) -> Answer | None:
        """Returns an answer, be it finished or not."""
        return self._answers.get(key)

    def open(self, key: str, inbox: ReplyInbox) -> Answer:
        """Adds an answer, and returns it."""
        answer = Answer(key, key, inbox)
        self._answers[key] = answer
        return answer

    def expect_id(self, answer: Answer) -> None:
        """Collects cancels of an answer whose request is still being parsed."""
        self._unread[answer.inbox.subject] = answer

    def name(self, answer: Answer, client_id: str | None) -> bool:
        """Gives an answer its client's name for it. Returns whether the client has cancelled it by that name already.

        Raises:
            InvalidRequest: an open answer at the same inbox has that id.
        """
        self._read(answer)
        if client_id is None:
            return False
        name = (answer.inbox.subject, client_id)
        if name in self._by_client:
            raise InvalidRequest(f"A request with the id {client_id} is open: use another id.", param="id")
        answer.id = client_id
        self._by_client[name] = answer
        return client_id in answer.early_cancels

    def cancelled(self, cancelled_id: str, inbox: str | None) -> Answer | None:
        """Returns the open answer that a client's cancel is for. Ids can be guessed, so they count with their inbox."""
        answer = self._answers.get(cancelled_id)
        if answer is None and inbox is not None:
            answer = self._by_client.get((inbox, cancelled_id))
            unread = self._unread.get(inbox)
            if answer is None and unread is not None and len(unread.early_cancels) < MAX_EARLY_CANCELS:
                unread.early_cancels.append(cancelled_id)
        return None if answer is None or answer.is_finished else answer

    def finish(self, answer: Answer) -> None:
        """Marks an answer as finished, and keeps it for a while."""
        answer.is_finished = True
        self._read(answer)
        if self._by_client.get((answer.inbox.subject, answer.id)) is answer:
            del self._by_client[answer.inbox.subject, answer.id]
        if answer.key in self._answers and answer.key not in self._finished:
            timer = asyncio.get_running_loop().call_later(LINGER_S, self._drop, answer.key)
            self._finished[answer.key] = timer
        while len(self._finished) > MAX_FINISHED_ANSWERS:
            self._drop(next(iter(self._finished)))

    def _read(self, answer: Answer) -> None:
        if self._unread.get(answer.inbox.subject) is answer:
            del self._unread[answer.inbox.subject]

    def _drop(self, key: str) -> None:
        self._finished.pop(key).cancel()
        self._answers.pop(key).inbox.close()
