"""Which of several processes this one is, as torchrun, Lightning or SLURM tell it in the environment."""

import os
import time

_RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID")
_COUNTS = ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS")  # the latter of what `srun` starts, not of a shell in an allocation


def share() -> tuple[int, int]:
    """Index and number of the processes that `torchrun` has started, which share the work; 0 and 1 without it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def wait_for_all() -> None:
    """Wait until all processes that `torchrun` has started are here; without it, return at once.

    As soon as one process ends with a failure `torchrun` stops the others, whatever they have left to do.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    from torch.distributed.rendezvous import rendezvous

    store, _, processes = next(rendezvous("env://"))
    arrived = store.add("bcoskit", 1)
    while arrived < processes:
        time.sleep(0.2)
        arrived = store.add("bcoskit", 0)


def is_first() -> bool:
    """Whether this process tells of what all of them do."""
    return all(os.environ.get(name, "0") == "0" for name in _RANKS)


def started() -> int:
    """How many processes a launcher has started; 1 without one."""
    return max(int(os.environ.get(name, 1)) for name in _COUNTS)
