"""The ranks of a run: the processes that torchrun starts to work on it together.

Without torchrun this process is the only rank, and torch.distributed is not imported here.
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
PATIENCE = timedelta(minutes=30)  # how long ranks wait for one another, for example during a download
ROLL_CALL = 3.0  # seconds; a rank that is alive answers within them
# Words in the error of a rank that lost another one.
LOST = ("gloo", "NCCL", "onnection", "peer", "roken pipe", "ocket")

rank, world = 0, 1  # the number of this rank, and how many ranks there are
_store = None  # torchrun's key-value store, in which ranks leave messages for one another


def begin(fault):
    """Join the other ranks if torchrun started several. Raise `fault` if something else has set RANK.

    A run that ended with a fault, or because its time was up, ends again at once when torchrun restarts it.
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
    # The store outlives a restart, so each attempt has keys of its own.
    _store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)
    _store.set(f"at {rank}", f"{platform.node()} {os.getpid()}")
    dist.init_process_group(backend, store=_store, rank=rank, world_size=world, timeout=PATIENCE)


def part_ways():
    """Make each rank a run of its own from here on."""
    global rank, world
    rank, world = 0, 1


def end():
    """Leave the other ranks when the work is done."""
    if _store is not None:
        dist.destroy_process_group()


def on_machine():
    """Return the number of this rank on this machine, and how many ranks this machine has."""
    return (int(os.environ.get(name, one)) for name, one in (("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)))


# ---------------------------------------------------------------- work that is shared


def part(batch):
    """Return this rank's rows of a batch. If they cannot be shared equally, the first ranks get one more."""
    return batch if world == 1 else batch.tensor_split(world)[rank]


class PartGenerator(torch.Generator):
    """A generator of one random number for each image of a batch; this rank's images begin at `first`."""

    first = 0


def part_of(generator, images):
    """Return this rank's PartGenerator, in the state of `generator`, for a batch of so many images."""
    made, (share, more) = PartGenerator(), divmod(images, world)
    made.set_state(generator.get_state())
    made.first = rank * share + min(rank, more)
    return made


def first_rank(function):
    """Have only the first rank call `function`: one rank prints and writes. It may be a context manager."""

    @functools.wraps(function)
    def alone(*args, **options):
        return contextlib.nullcontext() if rank else function(*args, **options)

    return alone


def take_over(tensors):
    """Copy these tensors from the first rank to every other one, in place."""
    for tensor in tensors if world > 1 else ():
        dist.broadcast(tensor, 0)


def total(tensor):
    """Sum a tensor over the ranks, in place, and return it."""
    if world > 1:
        dist.all_reduce(tensor)
    return tensor


def gather(value):
    """Return a list of the values of all ranks."""
    values = [value] * world
    if world > 1:
        dist.all_gather_object(values, value)
    return values


def agree(*values):
    """Return the largest of each value over the ranks, so that all ranks decide alike."""
    if world == 1:
        return values
    said = torch.tensor([int(value) for value in values])
    dist.all_reduce(said, dist.ReduceOp.MAX)
    return said.tolist()


@contextlib.contextmanager
def one_first():
    """Within it one rank of each machine goes first; the others wait until it has left."""
    local, _ = on_machine()
    if local:
        agree(0)
    yield
    if not local:
        agree(0)


def check_same(what, value, fault):
    """Raise `fault` on every rank unless all have the same dict `value`; the message calls it `what`."""
    first, *others = gather(value)
    for number, other in enumerate(others, 1):
        if names := [name for name in first if other.get(name) != first[name]]:
            shown = f"{names[0]} {other.get(names[0])}, not {first[names[0]]}"[:200]
            raise fault(f"rank {number} has other {what} than rank 0: {shown}; give all ranks the same")


def own_device(name, fault):
    """Return the device that `--device` means to this rank: ranks on one machine have a GPU each."""
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
    """Return a file for `path` in torchrun's folder, which outlives restarts; None without torchrun."""
    errors = os.environ.get("TORCHELASTIC_ERROR_FILE")
    name = hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()
    return Path(errors).parents[2] / name if errors else None


def note_save(path):
    """Note that this run has saved to `path`: if torchrun restarts it, it goes on from there."""
    if mark := _mark(path):
        mark.touch()


def restarted(path):
    """Whether torchrun has restarted this run since it saved to `path`."""
    mark = _mark(path)
    return mark is not None and mark.exists()


def last_words(status, message, error):
    """Return the exit status and the message of a rank that ends with `error`; only one rank has a message.

    A rank that lost another one, or was told to stop, looks for ranks that were killed: they do not answer.
    A rank that lost another one takes over the status of the rank that has the message.
    """
    if world == 1:
        return _ended(status), message
    for signum in SIGNALS:  # torchrun ends the ranks that are left
        signal.signal(signum, signal.SIG_IGN)
    lost = isinstance(error, RuntimeError) and any(word in str(error) for word in LOST)
    with contextlib.suppress(RuntimeError):  # the launcher may be gone, and its store with it
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
    """Note for `begin` that the run ended with a fault, or because its time was up; return `status`."""
    if 1 < status < 128 and (end := _mark("end")):
        end.write_text(str(status))
    return status


def _missing():
    """Return the numbers of the ranks that ended without an answer."""
    deadline = time.monotonic() + ROLL_CALL
    while silent := [number for number in range(world) if not _store.check([f"here {number}"])]:
        # A rank may also be silent because it waits for one on a third machine.
        gone = [number for number in silent if _process_ended(number, time.monotonic() > deadline)]
        if gone or time.monotonic() > deadline:
            return gone
        time.sleep(0.05)
    return []


def _process_ended(number, elsewhere):
    """Return whether the process of a rank has ended; `elsewhere` for a rank on another machine."""
    machine, pid = _store.get(f"at {number}").decode().split()
    if machine != platform.node():
        return elsewhere
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    return False
