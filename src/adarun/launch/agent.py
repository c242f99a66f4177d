"""Starts a job the way torchrun does, with a hub beside it.

torch's own code parses, checks, rendezvouses, starts, watches, restarts and signals; adarun only puts its agent where
`launch_agent` makes one.
"""

from __future__ import annotations

import functools
import os
import signal
import time
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from typing import Any, NoReturn
from unittest import mock

import torch.distributed.run as torchrun
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import LogsSpecs
from torch.distributed.elastic.multiprocessing import SignalException as SignalException  # noqa: PLC0414 - the command line may not import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, record
from torch.distributed.elastic.rendezvous import rendezvous_handler_registry
from torch.distributed.launcher import api

from adarun.errors import AdarunError, UsageError, WorkersFailed
from adarun.events import WorkersEnded, WorkersStarted
from adarun.hub import Hub
from adarun.launch.knobs import Setting, arguments_with, environment_of
from adarun.worker.attach import attach

Log = Callable[[WorkersEnded], None]


class Agent(LocalElasticAgent):
    """torch's agent, which tells the hub when a worker group comes and goes."""

    def __init__(self, *args: Any, hub: Hub, log: Log, settings: Sequence[Setting], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._hub = hub
        self._log = log
        self._settings = settings
        self._arguments = self._worker_group.spec.args
        self._attempt = -1
        if settings:
            self._logs_specs = LogsSpecsByAttempt(self._logs_specs, self)

    @property
    def attempt(self) -> int:
        """How often the workers were started before."""
        return self._attempt

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        # torch's workers of all attempts share one store, where the last attempt's addresses still stand: a worker that reads
        # one before it is overwritten fails to connect, or hangs. Made to forget it, the handler sets up a new one.
        for name in ("_bootstrap_store_info", "_shared_tcp_store_server"):
            if hasattr(worker_group.spec.rdzv_handler, name):
                setattr(worker_group.spec.rdzv_handler, name, None)
        super()._rendezvous(worker_group)

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        self._attempt += 1
        os.environ["ADARUN_ATTEMPT"] = str(self._attempt)
        if self._hub.tuner is not None:
            setting = self._settings[self._hub.tuner.current]
            os.environ.update(environment_of(setting))
            worker_group.spec.args = arguments_with(setting, self._arguments)
        workers = worker_group.workers
        self._hub.workers_started(
            WorkersStarted(
                attempt=self._attempt,
                ranks=[worker.global_rank for worker in workers],
                world_size=workers[0].world_size,
                num_nodes=worker_group.group_world_size or 1,
                group_rank=worker_group.group_rank or 0,
                at=time.time(),
            )
        )
        started: dict[int, Any] = super()._start_workers(worker_group)
        return started

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result: RunResult = super()._monitor_workers(worker_group)
        if result.state is WorkerState.HEALTHY and self._hub.take_restart():
            # As after a change of membership: not a failure, so no restart is charged.
            self._log(WorkersEnded(attempt=self._attempt, state="RETUNED", at=time.time()))
            self._restart_workers(worker_group)
        if result.state.name != "HEALTHY":
            self._log(WorkersEnded(attempt=self._attempt, state=result.state.name, at=time.time()))
        return result


class LogsSpecsByAttempt(LogsSpecs):
    """Gives each attempt its folder: torch counts only those after a failure, and empties the folder of a number it had."""

    def __init__(self, original: Any, agent: Agent) -> None:
        self.__dict__.update(original.__dict__)
        self._original, self._agent = original, agent

    @property
    def root_log_dir(self) -> str:
        """Where all logs are."""
        return str(self._original.root_log_dir)

    def reify(self, envs: dict[int, dict[str, str]]) -> Any:
        """The files of the attempt that starts now."""
        count = {"TORCHELASTIC_RESTART_COUNT": str(self._agent.attempt)}
        return self._original.reify({rank: {**env, **count} for rank, env in envs.items()})


class Parser(ArgumentParser):
    """torch's parser, with its errors as ours."""

    def error(self, message: str) -> NoReturn:
        """Say it in one sentence, without the whole usage."""
        raise UsageError(f"{message}; see adarun run --help")


def configure(arguments: list[str]) -> tuple[Any, Any, list[str]]:
    """What torchrun would launch for these arguments: its config, its entry point and the entry point's arguments.

    Raises:
        UsageError: torch refuses them.
    """
    parser = torchrun.get_args_parser()
    parser.__class__ = Parser
    parser.prog = "adarun run"
    launched: list[Any] = []

    def catch(config: Any, entrypoint: Any) -> Callable[..., None]:
        return lambda *args: launched.extend((config, entrypoint, list(args)))

    with mock.patch.object(torchrun, "elastic_launch", catch):
        try:
            torchrun.run(parser.parse_args(arguments))  # type: ignore[no-untyped-call]
        except (ValueError, AssertionError, RuntimeError) as error:
            raise UsageError(f"{error}; see adarun run --help") from None
    config, entrypoint, entrypoint_args = launched
    # torch finds this out only when the job is under way.
    if config.rdzv_backend not in (backends := rendezvous_handler_registry._registry):
        raise UsageError(
            f"there is no rendezvous backend {config.rdzv_backend}; torch has {', '.join(sorted(backends))}"
        )
    return config, run_script_path if entrypoint is torchrun.run_script_path else entrypoint, entrypoint_args


def run_script_path(script: str, *arguments: str) -> None:
    """`--run-path`: torch was imported before this process knew its rank, so it is attached here."""
    attach()
    torchrun.run_script_path(script, *arguments)


def launch(configured: tuple[Any, Any, list[str]], hub: Hub, log: Log, settings: Sequence[Setting] = ()) -> None:
    """Run the job to its end, the workers under the one of `settings` that the hub names.

    Raises:
        WorkersFailed: torch's report of the failure.
        SignalException: the launcher was told to stop, and stopped the workers.
        AdarunError: the rendezvous failed.
    """
    config, entrypoint, arguments = configured
    os.environ["ADARUN_HUB"] = str(hub.path)
    agent = functools.partial(Agent, hub=hub, log=log, settings=settings)
    try:
        with mock.patch.object(api, "LocalElasticAgent", agent):
            record(api.launch_agent)(config, entrypoint, arguments)
    except ChildFailedError as error:
        raise WorkersFailed(str(error).strip()) from None
    except (ValueError, OSError, RuntimeError, AssertionError, LookupError) as error:
        raise AdarunError(f"the job could not be started: {type(error).__name__}: {error}") from error


def exit_code_of(error: SignalException) -> int:
    """A shell's exit code for a process that a signal ended."""
    return 128 + int(signal.Signals(error.sigval))
