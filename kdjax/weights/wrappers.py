"""The weights of one network inside what programs store around them: nested dicts, prefixes, averages, distillers."""

import re
import warnings
from collections.abc import Mapping
from typing import Any, TypeVar

from kdjax.errors import UserError

T = TypeVar("T")

# Modules that PyTorch puts around another one. The names in _ANYWHERE are PyTorch's own; a network may have its own
# part called "module", so that this one is removed at the beginning only.
_ANYWHERE = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
_AROUND = re.compile(rf"(?:^module\.)|(?:(?:^|(?<=\.))(?:{'|'.join(_ANYWHERE)})\.)")
# Where checkpoints keep the weights, and where their moving average: of two the first is taken.
_WEIGHTS = ("state_dict", "model_state_dict", "model")
_AVERAGES = ("ema_state_dict", "state_dict_ema", "model_ema", "ema_model", "ema")
# mmengine swaps the two when it saves, so that the first is the average.
_SWAPPED = {"state_dict", "ema_state_dict"}
_ROLES = {"student": ("architecture", "student"), "teacher": ("teacher",)}
_PAIR = ("architecture", "student", "teacher", "distiller")
_HEADS = ("class_embed", "bbox_embed")
# Counters of averaged models.
_COUNTERS = ("steps", "n_averaged")
_DEPTH, _ENTRIES = 20, 1_000_000


def flatten(tree: Mapping[Any, Any], kind: type) -> dict[str, Any]:
    """The values of one kind in nested dicts, by names that are joined by dots; everything else is left out.

    Args:
      tree: dicts in dicts, as a checkpoint of PyTorch.
      kind: of the values.

    Raises:
      UserError: a dict holds itself, the dicts are nested too deep or hold too much, or two values have one name.

    Example:
      >>> flatten({"state_dict": {"a.weight": 1, "b": {0: 2}}, "epoch": "3"}, int)
      {'state_dict.a.weight': 1, 'state_dict.b.0': 2}
    """
    flat: dict[str, Any] = {}
    seen = 0

    def visit(node: Mapping[Any, Any], prefix: str, above: tuple[int, ...]) -> None:
        nonlocal seen
        if id(node) in above:
            raise UserError(f"{prefix[:-1]} is a dict that holds itself")
        if len(above) == _DEPTH:
            raise UserError(f"its dicts are nested more than {_DEPTH} deep")
        for key, value in node.items():
            seen += 1
            if seen > _ENTRIES:
                raise UserError(f"its dicts have more than {_ENTRIES:,} entries")
            name = f"{prefix}{key}"
            if isinstance(value, dict):
                visit(value, f"{name}.", (*above, id(node)))
            elif isinstance(value, kind):
                if name in flat:
                    raise UserError(f"two arrays have the name {name}")
                flat[name] = value

    visit(tree, "", ())
    return flat


def unwrap(state: Mapping[str, T], network: str | None = None) -> dict[str, T]:
    """The weights of one network, under names without the wrappers around it.

    Wrappers are removed as often as they occur: `module.`, `_orig_mod.` and others of PyTorch, and the names under
    which checkpoints keep weights (`state_dict`, `model`, ...) or their moving average (`ema`, `model_ema`, ...). What
    lies beside the weights (an optimizer, another network) is left out.

    Args:
      state: name -> array.
      network: "student" or "teacher", for the state of a distiller that holds both; None leaves such a pair as it is.

    Raises:
      UserError: two arrays have one name without their wrappers.

    Warns:
      UserWarning: the weights and an average of them are stored, and it is not known which is better.

    Example:
      >>> unwrap({"state_dict.model._orig_mod.conv.weight": 1, "optimizer.lr": 2})
      {'conv.weight': 1}
    """
    if network not in (None, *_ROLES):
        raise UserError(f"network must be student or teacher, not {network!r}")
    while True:
        state = _renamed(state)
        groups = _groups(state)
        holder = next((name for name in _WEIGHTS if name in groups), None)
        if holder is None and any(name in groups for name in _PAIR):
            if network is None:
                return state
            state = _of_network(groups, network)
            continue
        averages = [name for name in _AVERAGES if name in groups]
        beside = {name for name in state if _first(name) not in averages}
        if holder is None and averages and beside & set(groups[averages[0]]):
            state = {name: state[name] for name in state if name in beside}  # the weights themselves are not wrapped
            _tell("without a prefix", averages)
            continue
        chosen = holder or next(iter(averages), None)
        if chosen is None:
            return state
        others = [name for name in (*_WEIGHTS, *_AVERAGES) if name in groups and name != chosen]
        if others and not {chosen, *others} <= _SWAPPED:
            _tell(f"under {chosen!r}", others)
        # transformers keeps heads beside its `model`; they are its weights too.
        heads = {f"{name}.{rest}": value for name in _HEADS for rest, value in groups.get(name, {}).items()}
        state = groups[chosen] | (heads if chosen == "model" else {})


def _tell(taken: str, others: list[str]) -> None:
    warnings.warn(
        f"the file holds weights {taken} and under {', '.join(map(repr, others))}: those {taken} are taken",
        stacklevel=4,
    )


def _first(name: str) -> str:
    return re.split("[./]", name, maxsplit=1)[0]


def _groups(state: Mapping[str, T]) -> dict[str, dict[str, T]]:
    """The arrays by the first part of their names; those whose name has one part only are in the group ""."""
    groups: dict[str, dict[str, T]] = {}
    for name, value in state.items():
        first = _first(name)
        group, rest = (first, name[len(first) + 1 :]) if len(first) < len(name) else ("", name)
        groups.setdefault(group, {})[rest] = value
    return groups


def _renamed(state: Mapping[str, T]) -> dict[str, T]:
    """The state without modules around others, counters, and the averages that mmdetection 2 keeps as buffers."""
    renamed: dict[str, T] = {}
    for name, value in state.items():
        inner = name
        while (shorter := _AROUND.sub("", inner)) != inner:
            inner = shorter
        if inner in renamed:
            raise UserError(f"two arrays have the name {inner} when their wrappers are removed")
        renamed[inner] = value
    buffers = {f"ema_{name.replace('.', '_')}" for name in renamed}
    return {name: value for name, value in renamed.items() if name not in _COUNTERS and name not in buffers}


def _of_network(groups: Mapping[str, dict[str, T]], network: str) -> dict[str, T]:
    """The student or the teacher of a distiller; for the student, also a teacher that is alone.

    Raises:
      UserError: there is no teacher.
    """
    found = {role: {k: v for part in parts for k, v in groups.get(part, {}).items()} for role, parts in _ROLES.items()}
    present = [role for role, group in found.items() if group]
    if network == "teacher" and present == ["student"]:
        raise UserError("it holds a student, and no teacher beside it: leave --network out")
    chosen = found[network if network in present else present[0]] if present else {}
    # The rest of a distiller (the other network, adapters) is not the detector's; anything else is kept.
    others = {
        f"{first}.{rest}" if first else rest: value
        for first, group in groups.items()
        if first not in _PAIR
        for rest, value in group.items()
    }
    return chosen | others
