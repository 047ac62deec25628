"""The command `pdserve` as a user runs it: in an empty folder, with wrong input, with Ctrl-C, and killed."""

import json
import os
import shlex
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from shared.addresses import credentials
from shared.settings import DEMO_MODEL
from tests.harness import TIMEOUT_S, free_port, wait_until

PDSERVE = str(Path(sys.executable).with_name("pdserve"))


class Up:
    """A `pdserve up` in a process group of its own, as a terminal starts it."""

    def __init__(self, folder: Path, *arguments: str, environment: dict[str, str] | None = None) -> None:
        self.folder = folder
        self.port = free_port()
        self.output = folder / "up.out"
        self.family: set[int] = set()
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                [PDSERVE, "up", "--port", str(self.port), *arguments],
                cwd=folder,
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env=os.environ | (environment or {}),
            )

    @property
    def said(self) -> str:
        return self.output.read_text()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def wait_for(self, words: str) -> "Up":
        wait_until(lambda: words in self.said or self.process.poll() is not None)
        assert words in self.said, self.said
        self.family = descendants(self.process.pid)
        return self

    def ready(self) -> "Up":
        return self.wait_for("ready in")

    def control_c(self) -> None:
        """What a terminal does: SIGINT to the whole foreground process group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def ended(self) -> int:
        """Waits for the end of all of it; the exit code."""
        code = self.process.wait(TIMEOUT_S)
        wait_until(lambda: not alive(self.family))
        return code


def descendants(pid: int) -> set[int]:
    """All processes that came of this one."""
    parents = {}
    for line in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(line.parent.name)] = int(line.read_text().rsplit(")", 1)[1].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {pid}


def alive(pids: set[int]) -> set[int]:
    """Those of the processes that run still; a zombie does not."""
    running = set()
    for pid in pids:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if state != "Z":
            running.add(pid)
    return running


def run(*arguments: str, folder: Path, stdin: str = "", **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [PDSERVE, *arguments],
        cwd=folder,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        env=os.environ | environment,
    )


@pytest.fixture
def start_up(tmp_path: Path) -> Iterator[Callable[..., Up]]:
    started: list[Up] = []

    def start(*arguments: str, **environment: str) -> Up:
        started.append(Up(tmp_path, *arguments, environment=environment))
        return started[-1]

    yield start
    for up in started:
        up.process.kill()
        up.process.wait()


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """One that the tests share which only look at it."""
    shared = Up(tmp_path_factory.mktemp("up")).ready()
    yield shared
    shared.control_c()
    assert shared.ended() == 0


def test_the_line_that_it_prints_can_be_pasted(up: Up) -> None:
    [line] = [line for line in up.said.splitlines() if line.strip().startswith("curl ")]
    command = shlex.split(line)
    url, body = command[1], command[command.index("-d") + 1]
    answer = httpx.post(url, content=body, headers={"content-type": "application/json"}, timeout=60, trust_env=False)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["message"]["content"]


def test_status(up: Up) -> None:
    table = run("status", folder=up.folder).stdout
    assert "group default: demo, 1 prefill, 1 decode" in table
    status = json.loads(run("status", "--json", folder=up.folder).stdout)
    assert [group["name"] for group in status["groups"]] == ["default"]
    assert {one["role"] for one in status["instances"]} == {"prefill", "decode"}
    for one in status["instances"]:
        assert one.keys() >= {"id", "role", "group", "state", "epoch", "pid", "host"}
        assert one["id"] in table
        assert one["pid"] in up.family


def test_status_from_elsewhere(up: Up, tmp_path: Path) -> None:
    nats_url = json.loads((up.folder / ".pdserve" / "up.json").read_text())["nats_url"]
    status = json.loads(run("status", "--json", "--nats", nats_url, folder=tmp_path).stdout)
    assert len(status["instances"]) == 2
    nobody = run("status", folder=tmp_path)
    assert nobody.returncode == 1
    assert "no `pdserve up` runs in this folder" in nobody.stderr


def test_the_nats_urls_are_private_and_serve_a_client(up: Up) -> None:
    run_file, client = up.folder / ".pdserve" / "up.json", up.folder / ".pdserve" / "nats" / "client.url"
    for path in (run_file, client):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    operator_url = json.loads(run_file.read_text())["nats_url"]
    for url in (operator_url, client.read_text().strip()):
        password = credentials(url).password
        assert password
        assert password not in up.said
        assert not any(password in path.read_text() for path in (up.folder / ".pdserve" / "logs").iterdir())
    command = [
        sys.executable,
        str(Path(__file__).parents[2] / "examples" / "nats_client.py"),
        client.read_text().strip(),
        "What is a list?",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout.rstrip().endswith("tokens]"), done.stderr
    status = run("status", "--nats", client.read_text().strip(), folder=up.folder)
    assert status.returncode == 1, "a client sees no status"


def test_chat(up: Up) -> None:
    talked = run(
        "chat", "--max-tokens", "8", "--temperature", "0", folder=up.folder, stdin="Hello\n/new\nWho are you?\n"
    )
    assert talked.returncode == 0, talked.stderr
    assert "demo at" in talked.stdout
    assert talked.stdout.count("> ") >= 3
    assert "error" not in talked.stdout


def test_chat_with_nobody(tmp_path: Path) -> None:
    talked = run("chat", "--url", f"http://127.0.0.1:{free_port()}", folder=tmp_path)
    assert talked.returncode == 1
    assert "nothing answers at" in talked.stderr


def test_a_second_one_in_the_same_folder_is_refused(up: Up) -> None:
    second = run("up", "--port", str(free_port()), folder=up.folder)
    assert second.returncode == 1
    assert "runs in this folder already" in second.stderr
    assert run("status", folder=up.folder).returncode == 0


def test_a_port_in_use_is_refused_before_anything_starts(up: Up, tmp_path: Path) -> None:
    second = run("up", "--port", str(up.port), folder=tmp_path)
    assert second.returncode == 1
    assert f"127.0.0.1:{up.port} cannot be used (Address already in use)" in second.stderr
    assert "Traceback" not in second.stderr
    assert not (tmp_path / ".pdserve").exists()


def broken_model(folder: Path, kind: str) -> str:
    model = folder / kind
    if kind != "missing":
        model.mkdir()
        for file in Path(DEMO_MODEL).iterdir():
            if file.suffix == ".json":
                (model / file.name).write_bytes(file.read_bytes())
    if kind == "broken":
        (model / "config.json").write_text("{not json")
    return str(model)


@pytest.mark.parametrize(
    ("kind", "sentence"), [("missing", "no such folder"), ("weightless", "no weights"), ("broken", "not JSON")]
)
def test_a_model_that_cannot_be_served_is_named(tmp_path: Path, kind: str, sentence: str) -> None:
    model = broken_model(tmp_path, kind)
    refused = run("up", "--port", str(free_port()), "--model", model, folder=tmp_path)
    assert refused.returncode == 1
    assert model in refused.stderr
    assert sentence in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "environment", "sentence"),
    [
        (["--redis", "redis://127.0.0.1:1"], {}, "no Redis answers at redis://127.0.0.1:1"),
        (["--nats", "nats://127.0.0.1:1"], {}, "Cannot connect to NATS at nats://127.0.0.1:1"),
        ([], {"PDSERVE_HTTP_PROT": "1"}, "did you mean PDSERVE_HTTP_PORT"),
        ([], {"PDSERVE_DECODE_SLOTS": "none"}, "PDSERVE_DECODE_SLOTS='none' cannot be used"),
        (["--prefill", "0"], {}, "not a number of 1 or more"),
        (["--dtype", "int3"], {}, "invalid choice: 'int3'"),
    ],
)
def test_wrong_input_gets_a_sentence(
    tmp_path: Path, arguments: list[str], environment: dict[str, str], sentence: str
) -> None:
    refused = run("up", "--port", str(free_port()), *arguments, folder=tmp_path, **environment)
    assert refused.returncode in (1, 2)
    assert sentence in refused.stderr
    assert "Traceback" not in refused.stderr


def test_control_c_while_it_loads(start_up: Callable[..., Up]) -> None:
    up = start_up().wait_for("loading")
    up.control_c()
    assert up.ended() == 0


def test_control_c_in_the_middle_of_a_stream(start_up: Callable[..., Up]) -> None:
    """The stream goes on to its end while everything drains."""
    up = start_up().ready()
    body = {"model": "demo", "prompt": "A list", "max_tokens": 300, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{up.url}/v1/completions", json=body, timeout=60, trust_env=False) as answer:
        lines = answer.iter_lines()
        assert next(lines).startswith("data: ")
        up.control_c()
        said = [line for line in lines if line]
    assert said[-1] == "data: [DONE]"
    assert json.loads(said[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
    assert up.ended() == 0
    assert "ended" in up.said


def test_a_kill_of_the_parent_leaves_nobody(start_up: Callable[..., Up]) -> None:
    up = start_up().ready()
    assert len(up.family) >= 6
    up.process.kill()
    up.ended()


def test_an_instance_that_dies_is_started_again(start_up: Callable[..., Up]) -> None:
    up = start_up().ready()
    before = json.loads(run("status", "--json", folder=up.folder).stdout)
    [decode] = [one for one in before["instances"] if one["role"] == "decode"]
    os.kill(decode["pid"], signal.SIGKILL)
    body = {"model": "demo", "prompt": "A list", "max_tokens": 4}
    wait_until(lambda: "decode-0 died (-9)" in up.said)
    answer = httpx.post(f"{up.url}/v1/completions", json=body, timeout=60, trust_env=False)
    assert answer.status_code == 200, answer.text
    up.family |= descendants(up.process.pid)
    up.control_c()
    assert up.ended() == 0


def test_version(tmp_path: Path) -> None:
    assert run("--version", folder=tmp_path).stdout.startswith("pdserve 0.")
