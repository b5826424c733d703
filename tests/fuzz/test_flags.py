"""Random command lines: each is understood as a slow reader understands it, or refused in one sentence.

Nothing is computed: the functions of the commands are replaced by one that records its arguments; those of the commands
that take a model then run with a model that does not exist.
"""

import contextlib
import re
import types

import pytest
from hypothesis import strategies as st

from kdjax import cli
from kdjax.commands.settings import read
from kdjax.errors import UserError
from kdjax.training import checks
from tests.fuzz.runs import end_of, fuzz

COMMANDS = cli._parser()[0]._subparsers._group_actions[0].choices
WORDS = (
    "",
    "x",
    "0",
    "1",
    "-3",
    "2.5",
    "1e3",
    "nan",
    "99999999999999999999",
    "a,b",
    "1,2",
    "val",
    "ä",
    "a b",
    "=",
    "None",
    "True",
)
# Settings of the quickstart of every type, with values and whether they fit.
SETTINGS = {
    "steps": [("800", 800), ("-1", -1), ("1.5", None), ("x", None), ("True", None), ("", None), ("1e3", None)],
    "optimizer.lr": [("0.1", 0.1), ("1", 1.0), ("1e-3", 1e-3), ("x", None), ("True", None), ("0.1,0.2", None)],
    "twin": [("True", True), ("false", False), ("1", None), ("yes", None)],
    "data.image_size": [("64,96", (64, 96)), ("(64, 96)", (64, 96)), ("64,", (64,)), ("x", None), ("nan,1", None)],
    "data.augment.hsv": [("1,2,3", (1, 2, 3)), ("0.5,", (0.5,)), ("x", None), ("None", None), ("((1,2),3)", None)],
    "optimizer.drops": [("3,", (3,)), ("x", ("x",)), ("{}", ({},))],  # refused by the check of the settings
    "data.root": [("a b", "a b"), ("", ""), ("1", "1"), ("a=b", "a=b")],
    "data": [("1", None)],
    "stepz": [("800", None)],
    "optimizer.lr.x": [("1", None)],
    "data.image_sise": [("1,2", None)],
}  # fmt: skip
NEEDS_A_MODEL = ("predict", "evaluate", "latency", "export")


def line(draw) -> tuple[str, list[str], dict | None]:
    """A command, its arguments, and what the slow reader makes of them; None: they must be refused."""
    command = draw(st.sampled_from(sorted(COMMANDS)))
    arguments, values, fits = [], {}, True
    for action in COMMANDS[command]._actions:
        if action.dest == "help":
            continue
        required = action.required and draw(st.integers(0, 15)) > 0
        given_ = required or draw(st.integers(0, 2)) == 0
        if action.nargs == 0:
            values[action.dest] = given_
            arguments += [action.option_strings[0]] * given_
            continue
        if not given_:
            values[action.dest] = action.default
            fits = fits and not action.required
            continue
        if action.dest == "config":
            word, value = "quickstart", "quickstart"
        elif action.choices and draw(st.integers(0, 5)):
            word = value = draw(st.sampled_from(list(action.choices)))
        else:
            word = draw(st.sampled_from(WORDS))
            value = typed(word, action.type)
            fits = fits and value is not None and (not action.choices or word in action.choices)
        many = action.nargs == "+" or type(action).__name__ == "_AppendAction"
        values[action.dest] = [value] if many else value
        if action.option_strings:
            arguments.append(f"{action.option_strings[0]}={word}")
        else:
            fits = fits and (not word.startswith("-") or word == "-3")  # a flag, but not a number
            arguments.insert(0, word)
    overrides = {}
    if command in cli.OVERRIDABLE:
        for name in draw(st.lists(st.sampled_from(list(SETTINGS)), max_size=3, unique=True)):
            word, overrides[name] = draw(st.sampled_from(SETTINGS[name]))
            arguments.append(f"--config.{name}={word}")
        values["overrides"] = overrides
        fits = fits and all(value is not None for value in overrides.values())
    if any(not text or re.fullmatch(r"--(?!config\.)[\w-]+=", text) for text in arguments):
        fits = False  # a path or a flag without a value
    slip = draw(st.sampled_from(["none"] * 5 + ["twice", "unknown", "misspelt", "more", "empty"]))
    flags = [text for text in arguments if text.startswith("--")]
    if slip == "twice" and flags:
        arguments.append(draw(st.sampled_from(flags)))
        fits = fits and command == "latency" and arguments[-1].startswith("--model=")
        if fits:
            values["models"] = [*values["models"], arguments[-1].partition("=")[2]]
    elif slip == "unknown":
        arguments.append(draw(st.sampled_from(["--x", "--x=1", "--config.x=1", "-z", "--config"])))
        fits = False
    elif slip == "misspelt" and flags and " " not in "".join(flags):  # with a space it would be a file
        place = arguments.index(draw(st.sampled_from(flags)))
        name, equals, value = arguments[place].partition("=")
        arguments[place] = f"{name}z{equals}{value}"
        fits = False
    elif slip == "more" and command not in ("predict", "import-weights"):  # which take files
        arguments.append("more")
        fits = False
    elif slip == "empty":
        command, fits = draw(st.sampled_from(["", "trainn", "--train"])), False
    return command, arguments, values if fits else None


def typed(word: str, kind: type | None):
    try:
        return word if kind is None else kind(word)
    except ValueError:
        return None


def check(draw, monkeypatch, folder) -> None:
    command, arguments, wanted = line(draw)
    got: dict = {}

    def run(**chosen) -> int:
        if "overrides" in chosen:  # the function of the study reads the settings itself
            chosen["config"] = read(chosen["config"], chosen.pop("overrides"))
        got.update(chosen)
        return 0

    recorder = types.SimpleNamespace(run=run, main=run)
    with monkeypatch.context() as patched:
        patched.chdir(folder)
        patched.setattr(cli, "importlib", types.SimpleNamespace(import_module=lambda module: recorder))
        code, told = end_of(command, *arguments)
    assert (code == 0) == (wanted is not None), (command, arguments, told)
    config = got.get("config")
    if code == 0:
        compare(got, wanted)
    if code == 0 and command in cli.OVERRIDABLE:
        with contextlib.suppress(UserError):
            checks.check_settings(config)
    if code == 0 and command in NEEDS_A_MODEL:
        arguments = [text for text in arguments if not text.startswith(("--model=", "--out=", "--against="))]
        with monkeypatch.context() as patched:
            patched.chdir(folder)
            code, told = end_of(command, *arguments, "--model=nowhere", f"--out={folder / 'o'}")
            assert code == 2, (command, arguments)


def compare(got: dict, wanted: dict) -> None:
    if "config" in got:
        overrides = wanted.pop("overrides")
        config, untouched = got.pop("config"), read("quickstart")
        wanted.pop("config")
        for name, value in overrides.items():
            assert find(config, name) == value and type(find(config, name)) is type(value)
        for name in SETTINGS:
            if name not in overrides and "." not in name and name in untouched and name != "data":
                assert config[name] == untouched[name]
    assert repr(got) == repr(wanted) or got == wanted  # nan is not equal to itself


def find(config, name: str):
    for part in name.split("."):
        config = config[part]
    return config


@fuzz(40)
def test_some_command_lines(data, monkeypatch, tmp_path):
    check(data.draw, monkeypatch, tmp_path)


@pytest.mark.user_input(
    "Config and flags",
    "200 command lines at random (`make test-all`)",
    "read as a slow reader reads them, or refused in one sentence",
)
@pytest.mark.slow
@fuzz(200)
def test_200_command_lines(data, monkeypatch, tmp_path):
    check(data.draw, monkeypatch, tmp_path)
