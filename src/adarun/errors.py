"""Every error adarun raises on purpose: one sentence that says what is wrong and what to do, and an exit code.

AdarunError            1    something adarun needs is not there
├── UsageError         2    the command line asks for what cannot be done
├── Diverged           1    a log's decisions come out otherwise when they are repeated
├── WorkersFailed      1    the script failed; torch's report says where
└── HubLost            1    raised in a worker: it can no longer know what the other workers do
    └── NotExact       1    raised in a worker: going on would not learn what torchrun would
"""


class AdarunError(Exception):
    """Base of the tree; printed in one place, `cli.app.main`, without a traceback."""

    exit_code = 1


class UsageError(AdarunError):
    """The user asked for something that cannot be; nothing was started."""

    exit_code = 2


class Diverged(AdarunError):
    """A run's log was replayed, and a decision came out otherwise."""


class WorkersFailed(AdarunError):
    """At least one worker failed and no restart was left."""


class HubLost(AdarunError):
    """The launcher's socket is gone or refused us, so the plan for the next step cannot be known."""


class NotExact(HubLost):
    """The script does what an uneven split would turn into a different update."""
