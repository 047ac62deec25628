"""From the C++ sources beside this file to a shared library, built once per machine and version of the sources.

It lies in the user's cache folder, under a name that tells sources, compiler and processor apart.
"""

import fcntl
import hashlib
import logging
import os
import platform
import re
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

FOLDER = Path(__file__).parent
SOURCES = ("linear.cpp", "elementwise.cpp", "decode.cpp", "prefill.cpp", "layer.cpp", "draw.cpp")
HEADERS = ("vectors.h", "tile.h", "matrix_tiles.h", "paged.h", "kernels.h")
COMPILE = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-fopenmp", "-fvisibility=default", "-Wno-psabi")
# Without -fopenmp here, the library uses the OpenMP that torch has loaded already, and its threads.
LINK = ("-shared",)
COMPILE_TIMEOUT_S = 120.0

log = logging.getLogger(__name__)


def built_library() -> Path | None:
    """The library's path, built now if it is not there yet; None where there is no compiler or it fails."""
    compiler = find_compiler()
    if compiler is None:
        return None
    try:
        path = cache_folder() / f"kernels-{_key(compiler)}.so"
        with _alone(path):
            if not path.is_file():
                _build(compiler, path)
    except (OSError, subprocess.SubprocessError) as error:
        log.warning(
            "native kernels cannot be built, so torch's are used, more slowly; install g++, or let CXX name one: %s",
            _reason(error),
        )
        return None
    return path


def find_compiler() -> str | None:
    """GCC's C++ compiler: what CXX names, or g++. Others lack its vector shuffles and its OpenMP, which torch has."""
    return next((found for name in (os.environ.get("CXX"), "g++") if name and (found := shutil.which(name))), None)


def cache_folder() -> Path:
    """Where libraries are kept: `pdserve` in the user's cache folder, or in the temporary one if that is read-only.

    What lies there is loaded and run, so it must be a folder of our own that nobody else can write to.
    """
    for folder in _cache_folders():
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            found = folder.lstat()
        except OSError:
            continue
        is_ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022
        if is_ours and os.access(folder, os.W_OK):
            return folder
    raise PermissionError("there is no folder to keep them in that is ours alone; set XDG_CACHE_HOME to one")


def _cache_folders() -> Iterator[Path]:
    with suppress(RuntimeError):  # there may be no home
        yield Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pdserve"
    yield Path(tempfile.gettempdir()) / f"pdserve-{os.getuid()}"


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Several instances start at once, and one of them builds; the lock ends with the process that has it."""
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _build(compiler: str, path: Path) -> None:
    started = time.monotonic()
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        objects = [Path(folder) / f"{source}.o" for source in SOURCES]
        jobs = [
            subprocess.Popen([compiler, *COMPILE, "-c", str(FOLDER / source), "-o", str(into)], stderr=subprocess.PIPE)
            for source, into in zip(SOURCES, objects, strict=True)
        ]
        _finish(jobs)
        library = Path(folder) / path.name
        subprocess.run(
            [compiler, *LINK, *map(str, objects), "-o", str(library)],
            check=True,
            capture_output=True,
            timeout=COMPILE_TIMEOUT_S,
        )
        library.rename(path)
    log.info("native kernels built in %.1f s: %s", time.monotonic() - started, path)


def _finish(jobs: list["subprocess.Popen[bytes]"]) -> None:
    with ExitStack() as stack:
        for job in jobs:
            stack.enter_context(job)
            stack.callback(job.kill)
        for job in jobs:
            _, said = job.communicate(timeout=COMPILE_TIMEOUT_S)
            if job.returncode:
                raise subprocess.CalledProcessError(job.returncode, job.args, stderr=said)


def _key(compiler: str) -> str:
    digest = hashlib.sha256()
    for name in SOURCES + HEADERS:
        digest.update((FOLDER / name).read_bytes())
    version = subprocess.run([compiler, "--version"], check=True, capture_output=True, timeout=COMPILE_TIMEOUT_S)
    digest.update(b"\0".join((version.stdout, " ".join(COMPILE + LINK).encode(), _processor().encode())))
    return digest.hexdigest()[:16]


def _processor() -> str:
    """What `-march=native` goes by: the processor's name and features."""
    try:
        told = Path("/proc/cpuinfo").read_text()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return "\n".join(sorted(set(re.findall(r"^(?:model name|flags|Features|CPU part)\s*:.*$", told, re.MULTILINE))))


def _reason(error: Exception) -> str:
    said = getattr(error, "stderr", None)
    return f"{error}: {said.decode(errors='replace')[-500:]}" if said else str(error)
