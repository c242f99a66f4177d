"""How adarun gets into a training process: an entry point that torch calls at the end of `import torch`."""

from __future__ import annotations

import os
import socket
import sys


def autoload() -> None:
    """Attach if adarun started this process as a worker. Never raises: that would break `import torch`."""
    # A process that a worker starts (a data-loader child, a tool) inherits the environment and with it this mark.
    if "ADARUN_HUB" not in os.environ or "RANK" not in os.environ:
        return
    if os.environ.get("ADARUN_ATTACHED", str(os.getpid())) != str(os.getpid()):
        return
    attach()


def attach() -> None:
    """Attach this process to the hub; on any error warn once and leave the process as it was."""
    try:
        _attach()
    except Exception as error:  # whatever it is, the user's job must run
        sys.stderr.write(
            f"adarun: could not attach to this worker, it runs unadapted ({type(error).__name__}: {error})\n"
        )


def _attach() -> None:
    # Imported here: in every other process that imports torch this module must cost nothing.
    import atexit  # noqa: PLC0415

    import torch  # noqa: PLC0415

    from adarun.events import Hello  # noqa: PLC0415
    from adarun.worker.client import Client  # noqa: PLC0415
    from adarun.worker.observe import Observer  # noqa: PLC0415
    from adarun.worker.training import Training  # noqa: PLC0415

    if not torch.distributed.is_available():
        raise RuntimeError("this build of torch has no torch.distributed")
    env = os.environ
    hello = Hello(
        rank=int(env["RANK"]),
        local_rank=int(env.get("LOCAL_RANK", "0")),
        world_size=int(env["WORLD_SIZE"]),
        num_nodes=int(env.get("GROUP_WORLD_SIZE", "1")),
        attempt=int(env.get("ADARUN_ATTEMPT", "0")),
        pid=os.getpid(),
        host=socket.gethostname(),
        device="cuda" if torch.version.cuda else "cpu",
        torch=str(torch.__version__),
    )
    observer = Observer(hello.rank)
    client = Client(env["ADARUN_HUB"], hello, observer.drain)
    env["ADARUN_ATTACHED"] = str(os.getpid())
    sync = None
    if (knobs := env.get("ADARUN_SYNC", "")) and hello.world_size > 1:
        # Few ask for it, and it loads half of torch.distributed.
        from adarun.worker.sync import Synchroniser  # noqa: PLC0415

        sync = Synchroniser(client, hello.rank, hello.world_size, compress="compress" in knobs)
    training = Training(
        client,
        observer,
        hello,
        adapt=env.get("ADARUN_ADAPT", "on"),
        batchnorm=env.get("ADARUN_BATCHNORM", "freeze"),
        loss_reduction=env.get("ADARUN_LOSS_REDUCTION", "mean"),
        sync=sync,
    )
    training.install()
    atexit.register(training.close)
    os.register_at_fork(after_in_child=training.detach)
