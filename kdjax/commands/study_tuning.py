"""The tuning of a study: the same number of runs for every row, on images and a seed that the table does not use.

First the twin's learning rate is chosen among `RATES` times the config's; all runs then have the best one. Each row
chooses the weight of its methods among `FACTORS` times theirs or, where a weight is "auto", the share of the gradient
that it holds among `SHARES`. Of K runs the first K entries are tried. The best has the highest AP on the training
images that `config.data.holdout` holds out; of equal ones the first. Runs that fail count as tried.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from kdjax import files
from kdjax.commands import study_runs
from kdjax.commands.study_layout import flags_of, folder_of, read_config, twin_flags, write_caches
from kdjax.commands.study_runs import Failed
from kdjax.commands.study_variants import Options, Variant
from kdjax.errors import UserError
from kdjax.resources import Config
from kdjax.training import optim
from kdjax.training.auto_weight import AUTO

RATES = (1.0, 2.0, 0.5, 4.0, 0.25, 8.0, 0.125)
FACTORS = (1.0, 10.0, 0.1, 10**0.5, 10**-0.5, 100.0, 0.01)
SHARES = (0.3, 0.1, 0.5, 0.2, 0.7, 0.05, 0.9)
MOST = len(RATES)
HOLDOUT = 0.2  # of the training images
SEED = 2_000_000
FILE = "tuned.json"  # in the folder of the study


class Choice(NamedTuple):
    """One value that is tried."""

    value: float
    flags: tuple[str, ...]  # that set it; those of the value that the config has are none


def check(options: Options, config: Config) -> None:
    """Checks the arguments.

    Raises:
      UserError: the number of runs is out of its range, or the table validates on images that are held out.
    """
    if not 0 <= options.tune <= MOST:
        raise UserError(f"--tune must be in 0 .. {MOST}, not {options.tune}")
    if options.tune and config.data.holdout:
        raise UserError("--tune: config.data.holdout is set, but the table must not use these images: set it to 0")


def tune(options: Options, variants: Sequence[Variant]) -> tuple[list[Variant], dict[str, Any]]:
    """Makes the runs of the tuning that are missing.

    Args:
      options: arguments of the command.
      variants: the rows.

    Returns:
      The rows with what was chosen among their flags, in their order, and the content of tuned.json: of each twin and
      row the values that were tried, with their APs, and the one that was chosen.

    Raises:
      UserError: all twins fail.
    """
    # Beside the cache of the table, whose folder may hold nothing else.
    cache = f"{options.cache.rstrip('/')}-tuning" if options.cache else ""
    held = f"--config.data.holdout={HOLDOUT}"
    inside = dataclasses.replace(
        options, workdir=options.workdir / "tuning", first=SEED, seeds=1, flags=[*options.flags, held], cache=cache
    )
    content: dict[str, Any] = {"holdout": HOLDOUT, "seed": SEED, "runs": options.tune, "twins": [], "rows": []}
    rates: dict[tuple[str, ...], Choice] = {}
    for variant in variants:
        if variant.student not in rates:
            alone = variant._replace(methods="", flags=(), shift=0)
            tried = [
                (choice, alone._replace(student=(*alone.student, *choice.flags)))
                for choice in learning_rates(inside, alone)
            ]
            best, told = best_of(inside, tried)
            if best is None:
                raise UserError(f"--tune: the twin, which all runs need, failed: {told[0]['failed']}")
            rates[variant.student] = best
            content["twins"].append({"flags": [*variant.student], "of": "rate", "tried": told, "chosen": best.value})
    at_rate = [one._replace(student=(*one.student, *rates[one.student].flags)) for one in variants]
    write_caches(inside, at_rate, SEED)
    chosen = []
    for variant, before in zip(at_rate, variants, strict=True):
        entry: dict[str, Any] = {"name": variant.name, "rate": rates[before.student].value}
        if variant.methods:
            of, choices = weights(inside, variant)
            tried = [(choice, variant._replace(flags=(*variant.flags, *choice.flags))) for choice in choices]
            best, told = best_of(inside, tried)
            best = best or choices[0]  # it fails in the table too, which names the reason
            entry |= {"of": of, "tried": told, "chosen": best.value}
            variant = variant._replace(flags=(*variant.flags, *best.flags))
        content["rows"].append(entry)
        chosen.append(variant)
        files.write_json(options.workdir / FILE, content, indent=1)
    return chosen, content


def best_of(
    options: Options, tried: Sequence[tuple[Choice, Variant]]
) -> tuple[Choice | None, list[dict[str, float | str]]]:
    """Runs what is to be tried; the best choice, None if all fail, and what is known of each."""
    best, highest, told = None, -1.0, []
    for choice, variant in tried:
        try:
            flags = flags_of(options, variant, SEED)
            ap = study_runs.train(flags, folder_of(options, variant, SEED))["student"]["AP"]
        except Failed as error:
            told.append({"value": choice.value, "failed": str(error)})
            continue
        told.append({"value": choice.value, "AP": ap})
        if best is None or ap > highest:
            best, highest = choice, ap
    return best, told


def learning_rates(options: Options, variant: Variant) -> list[Choice]:
    """The learning rates that a twin tries."""
    config = read_config(twin_flags(options, variant, SEED))
    own = config.optimizer.lr or optim.linear_rule(config)
    rates = [float(f"{own * factor:.4g}") for factor in RATES[: options.tune]]
    return [
        Choice(rate, (f"--config.optimizer.lr={rate}",) if factor != 1 else ())
        for rate, factor in zip(rates, RATES, strict=False)
    ]


def weights(options: Options, variant: Variant) -> tuple[str, list[Choice]]:
    """What a row tries: ("weight", factors of the weights of its methods), or ("share", of the gradient)."""
    config = read_config(flags_of(options, variant, SEED))
    own = {name: config.methods[name].weight for name in variant.methods.split("+")}
    if AUTO in own.values():
        shares, before = SHARES[: options.tune], config.auto_weight.share
        flags = {share: (f"--config.auto_weight.share={share}",) if share != before else () for share in shares}
        return "share", [Choice(share, flags[share]) for share in shares]
    choices = []
    for factor in FACTORS[: options.tune]:
        flags = (f"--config.methods.{name}.weight={float(f'{weight * factor:.4g}')}" for name, weight in own.items())
        choices.append(Choice(float(f"{factor:.4g}"), tuple(flags) if factor != 1 else ()))
    return "weight", choices


def shown(entry: Mapping[str, Any]) -> str:
    """What was chosen for a row, as text: "rate 0.004, weight × 0.3162"."""
    chosen = f"{entry.get('chosen', 1.0):g}"
    of_row = {"weight": f", weight × {chosen}", "share": f", share {chosen}"}
    return f"rate {entry['rate']:g}" + of_row.get(entry.get("of", ""), "")
