"""Starts an instance as a program of its own."""

from shared.settings import InstanceSettings, tame_threads


def main(role: str) -> None:
    """Runs an instance that starts in `role`; returns when it has drained, exits with 1 when it cannot serve."""
    tame_threads()
    from shared.instance.process import serve  # not before the threads are tame
    from shared.process import run_service

    run_service(InstanceSettings, serve, overrides={"role": role})
