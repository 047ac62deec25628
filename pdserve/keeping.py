"""The children of `pdserve up` while it serves: started again when they die, more when asked for, and the end."""

import time
from itertools import count

from pdserve.children import Child, wait_for_exit
from pdserve.forked import Forked
from pdserve.provisioning import Wanted
from pdserve.servers import Servers
from pdserve.wishes import Wishes
from shared import settings
from shared.groups import DEFAULT

WATCH_S = 0.2
QUICK_DEATH_S = 5.0
MAX_PAUSE_S = 10.0


def say(text: str) -> None:
    print(text, flush=True)


class Asked:
    """How many times we were asked to end."""

    def __init__(self) -> None:
        self.times = 0

    def __bool__(self) -> bool:
        return self.times > 0


class Starter:
    """Starts spares that the controller asks for, and ends those that it gives back."""

    def __init__(self, wishes: Wishes, children: list[Child], nats_url: str) -> None:
        self._children = children
        self._model_of = next(child for child in children if isinstance(child, Forked))
        self._max = max(wishes.max_instances, len(wishes.places))
        self._numbers = count()
        self._wanted = Wanted(nats_url, self._room)

    def _room(self) -> int:
        return self._max - sum(isinstance(child, Forked) for child in self._children)

    def _is_wished_away(self, child: Child, processes: list[tuple[str, int]]) -> bool:
        is_ours = isinstance(child, Forked) and bool(child.settings.get("on_demand"))
        return is_ours and (settings.hostname(), child.pid) in processes

    def close(self) -> None:
        self._wanted.close()

    def look(self) -> list[Child]:
        """Carries out what is wished by now; the children that were started."""
        started: list[Child] = []
        while (wish := self._wanted.next()) is not None:
            for child in [one for one in self._children if self._is_wished_away(one, wish.end)]:
                self._children.remove(child)
                child.terminate()
                say(f"{child.name} is given back")
            for _ in range(wish.start):
                name = f"on-demand-{next(self._numbers)}"
                like = self._model_of
                settings_ = {**like.settings, "role": "spare", "group": DEFAULT, "on_demand": True}
                child = Forked(name, settings_, like.log.with_name(f"{name}.log"), like.context)
                child.start()
                say(f"{name} is started, as the controller asks")
                self._children.append(child)
                started.append(child)
        return started


def watch(children: list[Child], servers: Servers, asked: Asked, starter: Starter) -> None:
    """Starts again what dies, at once the first time and with growing pauses if it keeps dying."""
    started = {child.name: time.monotonic() for child in children}
    pause_s = dict.fromkeys(started, 0.0)
    due: dict[str, float] = {}
    last_sentence = ""
    while not asked:
        now = time.monotonic()
        for sentence in servers.restart_dead():
            if sentence != last_sentence:
                say(sentence)
            last_sentence = sentence
        for child in starter.look():
            started[child.name], pause_s[child.name] = now, 0.0
        for child in children:
            if child.name in due:
                if now >= due[child.name]:
                    del due[child.name]
                    child.start()
                    started[child.name] = now
            elif (code := child.exit_code()) is not None:
                quick = now - started[child.name] < QUICK_DEATH_S
                pause_s[child.name] = min(MAX_PAUSE_S, 2 * pause_s[child.name] + 0.5) if quick else 0.0
                due[child.name] = now + pause_s[child.name]
                when = f"in {pause_s[child.name]:.1f} s" if pause_s[child.name] else "now"
                say(f"{child.name} died ({code}) and is started again {when} (log: {child.log})")
        time.sleep(WATCH_S)


def end(children: list[Child], asked: Asked, patience_s: float) -> None:
    """Ends children, the gateway first so that it can end what it has with the instances still there."""
    waves: list[list[Child]] = [
        [child for child in children if child.name == "gateway"],
        [child for child in children if isinstance(child, Forked)],
        [child for child in children if child.name == "controller"],
    ]
    for wave in waves:
        for child in wave:
            child.terminate()
        deadline = time.monotonic() + patience_s
        while (alive := wait_for_exit(wave, 0.1)) and time.monotonic() < deadline and asked.times < 2:
            pass
        for child in alive:
            say(f"{child.name} is killed: {'asked twice' if asked.times >= 2 else 'it does not end'}")
            child.kill()
        wait_for_exit(wave, 5.0)
