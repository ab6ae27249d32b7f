"""The ledger of claims, results/claims.json, as the table in results/README.md.

    python -m evaluation.claims

A claim is one published number. It has a `source`, a `network` and a `measure`; the `command` that measures
it here; what that found, `ours`, and what a `stronger` attack on the same network found; the `verdict`, and
`why`.
"""

import argparse
import itertools
import json
from pathlib import Path

import cli
import utils

LEDGER = Path(__file__).resolve().parent.parent / "results" / "claims.json"
HEAD = ("Source", "Network", "Published", "Ours (95 % interval)", "Verdict")


def table(claims):
    """Return the claims as a Markdown table; neighbours of one network with one verdict share a row."""
    rows = [HEAD, ["---"] * len(HEAD)]
    same = ("source", "network", "verdict", "why")
    for (source, network, verdict, why), group in itertools.groupby(
        claims, key=lambda claim: tuple(claim[name] for name in same)
    ):
        group = list(group)
        published = " · ".join(f"{claim['measure']} {claim['published']}" for claim in group)
        found = " · ".join(_found(claim) for claim in group if claim["ours"])
        rows.append([source, network, published, found, f"**{verdict}**: {why}"])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _found(claim):
    return ", ".join(
        f"{found['title']} {found['accuracy']:.2f} ({found['low']:.2f} to {found['high']:.2f})"
        for found in (claim["ours"], claim.get("stronger"))
        if found
    )


def main(argv=()):
    cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(argv)
    utils.say(table(json.loads(LEDGER.read_text(encoding="utf-8"))["claims"]))


if __name__ == "__main__":
    cli.leave_with_status(main)
