"""Many seeds: the same settings trained once for each seed, one after another or on different ranks."""

import dataclasses
import functools
import time

import cli
import data
import distributed
from utils import UsageError

from .files import claim


def each_seed(main):
    """Have `main(config)` train with each of `config.seeds` in turn; with none, call it once as it is."""

    @functools.wraps(main)
    def train(config):
        if not config.seeds:
            return main(config)
        distributed.check_same("options", {**cli.config_dict(config), "data_dir": None}, UsageError)
        runs = [config.of_seed(seed) for seed in dict.fromkeys(config.seeds)]
        if config.seeds_per_rank:
            runs = of_this_rank(runs, config)
        for run in runs:  # before the first one begins
            claim(run)
        began = time.monotonic()
        for run in runs:
            # The clocks of the ranks differ: the first one's counts.
            left = config.max_minutes and max(config.max_minutes - (time.monotonic() - began) / 60, 1e-9)
            main(dataclasses.replace(run, max_minutes=distributed.gather(left)[0]))

    return train


def of_this_rank(runs, config):
    """Return the runs that this rank trains; from here on it trains alone. Raises UsageError."""
    if len(runs) < distributed.world:
        raise UsageError(f"--seeds-per-rank: {len(runs)} seeds for {distributed.world} ranks; begin fewer")
    with distributed.one_first():  # which may download
        data.load(config.dataset, config.data_dir, limit=1, splits=("test",))
    runs = runs[distributed.rank :: distributed.world]
    distributed.part_ways()
    return runs
