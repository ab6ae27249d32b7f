"""The ranks of a run: processes that torchrun begins and that work on it together, or else this one alone.

Without torchrun nothing of torch.distributed is imported here, and each function does what one rank needs.
"""

import contextlib
import functools
import hashlib
import os
import platform
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
PATIENCE = timedelta(minutes=30)  # ranks wait so long for one another, say for a download
ROLL_CALL = 3.0  # seconds in which every rank that is left says so
LOST = ("gloo", "NCCL", "onnection", "peer", "roken pipe", "ocket")  # in errors of ranks that lost another

rank, world = 0, 1  # the number of this rank, and of ranks
_store = None  # what torchrun's ranks tell each other outside the run


def begin(fault):
    """Join the other ranks where torchrun has begun several; raise `fault` for a RANK of another origin.

    A run that ended by a fault, or when its time was up, ends again at once if torchrun restarts it.
    """
    global rank, world, _store, dist
    if (end := _mark("end")) and end.exists():
        sys.exit(int(end.read_text()))
    if "RANK" not in os.environ or os.environ.get("WORLD_SIZE", "1") == "1":
        return
    import torch.distributed as dist
    import torch.distributed.elastic.multiprocessing.errors

    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    try:
        store, rank, world = next(dist.rendezvous("env://", timeout=PATIENCE))
    except ValueError as error:
        raise fault(f"RANK {os.environ['RANK']}: {error}; begin ranks with torchrun, or unset RANK") from None
    # A restart finds what was told before it.
    _store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)
    _store.set(f"at {rank}", f"{platform.node()} {os.getpid()}")
    dist.init_process_group(backend, store=_store, rank=rank, world_size=world, timeout=PATIENCE)


def part_ways():
    """From here on each rank is a run of its own."""
    global rank, world
    rank, world = 0, 1


def end():
    """Leave the other ranks after work that is done."""
    if _store is not None:
        dist.destroy_process_group()


def on_machine():
    """(The number of this rank, and of ranks, on this machine)."""
    return (int(os.environ.get(name, one)) for name, one in (("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)))


# ---------------------------------------------------------------- work that is shared


def part(batch):
    """This rank's rows of a batch; the first ranks have one more where they cannot all have as many."""
    return batch if world == 1 else batch.tensor_split(world)[rank]


class PartGenerator(torch.Generator):
    """A generator of the random numbers of a batch, in which this rank's images begin at number `first`."""

    first = 0


def part_of(generator, images):
    """The generator of a batch of so many images as this rank's PartGenerator."""
    made, (share, more) = PartGenerator(), divmod(images, world)
    made.set_state(generator.get_state())
    made.first = rank * share + min(rank, more)
    return made


def first_rank(function):
    """`function` on the first rank; on the others nothing, also as a context: one rank speaks and writes."""

    @functools.wraps(function)
    def alone(*args, **options):
        return contextlib.nullcontext() if rank else function(*args, **options)

    return alone


def take_over(tensors):
    """Have on every rank what the first one has in these tensors."""
    for tensor in tensors if world > 1 else ():
        dist.broadcast(tensor, 0)


def total(tensor):
    """A tensor summed over the ranks, in place."""
    if world > 1:
        dist.all_reduce(tensor)
    return tensor


def gather(value):
    """The value of each rank."""
    values = [value] * world
    if world > 1:
        dist.all_gather_object(values, value)
    return values


def agree(*values):
    """The largest of each value over the ranks: they all act on it at the same point."""
    if world == 1:
        return values
    said = torch.tensor([int(value) for value in values])
    dist.all_reduce(said, dist.ReduceOp.MAX)
    return said.tolist()


@contextlib.contextmanager
def one_first():
    """Within it one rank of each machine is ahead of the others, which wait for its end."""
    local, _ = on_machine()
    if local:
        agree(0)
    yield
    if not local:
        agree(0)


def check_same(what, value, fault):
    """Raise `fault` on every rank unless they all have the same dict `value`; `what` is what to mend."""
    first, *others = gather(value)
    for number, other in enumerate(others, 1):
        if names := [name for name in first if other.get(name) != first[name]]:
            shown = f"{names[0]} {other.get(names[0])}, not {first[names[0]]}"[:200]
            raise fault(f"rank {number} has other {what} than rank 0: {shown}; give all ranks the same")


def own_device(name, fault):
    """What `--device` means to this rank: of several on a machine each has a GPU of its own."""
    local, ranks = on_machine()
    gpus = torch.cuda.device_count()
    if ranks == 1 or not (name.startswith("cuda") or (name == "auto" and gpus)):
        return name
    if ranks > gpus or ":" in name:
        raise fault(
            f"--device {name}: {ranks} ranks need a GPU each, and this machine has {gpus}; --device cpu, or "
            "another --nproc_per_node"
        )
    return f"cuda:{local}"


# ---------------------------------------------------------------- ranks that end


def _mark(path):
    """A file of the present torchrun, whatever its restarts, that stands for `path`; None without one."""
    errors = os.environ.get("TORCHELASTIC_ERROR_FILE")
    name = hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()
    return Path(errors).parents[2] / name if errors else None


def note_save(path):
    """Note that this run has saved to `path`, so that it goes on from there when torchrun restarts it."""
    if mark := _mark(path):
        mark.touch()


def restarted(path):
    """Whether torchrun has restarted this run since it saved to `path`."""
    mark = _mark(path)
    return mark is not None and mark.exists()


def last_words(status, message, error):
    """The exit status and the line of a rank that ends by `error`: one rank has the word for all.

    A rank that lost the others, or was told to stop, calls the roll: one that was killed does not answer. Its
    status is that of the rank with the word.
    """
    if world == 1:
        return _ended(status), message
    for signum in SIGNALS:  # torchrun ends the ranks that are left
        signal.signal(signum, signal.SIG_IGN)
    lost = isinstance(error, RuntimeError) and any(word in str(error) for word in LOST)
    with contextlib.suppress(RuntimeError):  # the launcher, and what is told there, may have gone
        _store.set(f"here {rank}", "")
        if (lost or status > 128) and (gone := _missing()):
            message = (
                f"rank {', '.join(map(str, gone))} of {world} has gone (killed, or out of memory?), so all "
                "stop; --resume goes on from the last save, as torchrun --max-restarts=1 does by itself"
            )
            lost = True
        status = 128 + signal.SIGTERM if lost else status
        if _store.add("told", 1) > 1:
            message, status = "", int(_store.get("end")) if lost else status
        else:
            _store.set("end", str(status))
            if not lost:  # torchrun's own report takes the error from there
                dist.elastic.multiprocessing.errors.get_error_handler().record_exception(error)
    return _ended(status), message


def _ended(status):
    """Note for `begin` that the run has ended by a fault, or when its time was up."""
    if 1 < status < 128 and (end := _mark("end")):
        end.write_text(str(status))
    return status


def _missing():
    """The ranks that have ended without a word."""
    deadline = time.monotonic() + ROLL_CALL
    while silent := [number for number in range(world) if not _store.check([f"here {number}"])]:
        # One that waits for a rank on a third machine is silent, too.
        gone = [number for number in silent if _process_ended(number, time.monotonic() > deadline)]
        if gone or time.monotonic() > deadline:
            return gone
        time.sleep(0.05)
    return []


def _process_ended(number, elsewhere):
    """Whether the process of a rank is no more; `elsewhere` is what is said of one on another machine."""
    machine, pid = _store.get(f"at {number}").decode().split()
    if machine != platform.node():
        return elsewhere
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    return False
