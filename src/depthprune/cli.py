"""The command line. Only the chosen command's room is imported, so that ``depthprune --help`` answers at once."""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from itertools import pairwise
from pathlib import Path

from depthprune.memory import keep_freed_memory

LIGHTNING = {
    "fit": "train replacements (LightningCLI)",
    "validate": "score every domain's tune text under a checkpoint (LightningCLI)",
    "test": "score every domain's test text under a checkpoint (LightningCLI)",
}
COMMANDS = {
    "study": ("depthprune.study:study", "score, prune, recover and report on one model: the main job"),
    "influence": (
        "depthprune.commands.influence:influence",
        "score sites; writes JSON, CSV, PNG and a TensorBoard figure",
    ),
    "prune": ("depthprune.commands.prune:prune", "make a plan from influence or site names, and the pruned model"),
    "search": ("depthprune.commands.search:search", "the best plan under a budget over blocks, attentions and MLPs"),
    "frontier": (
        "depthprune.commands.frontier:frontier",
        "loss and tasks by budget, for one kind of site and several, recovered or not",
    ),
    "evaluate": (
        "depthprune.commands.evaluate:evaluate",
        "score models beside the unpruned one, on tasks and text",
    ),
    "curve": ("depthprune.commands.curve:curve", "held-out loss and task scores by how many sites go, by metric"),
    "tradeoff": ("depthprune.commands.tradeoff:tradeoff", "what a plan made for one task costs on the others"),
    "recommend": ("depthprune.commands.recommend:recommend", "which metric to prune by, from curves and trade-offs"),
    "ablate": ("depthprune.commands.ablate:ablate", "recover the same sites in several ways, on disjoint samples"),
    "report": ("depthprune.commands.report:report", "the reports of several results as one page: report a b"),
    "export": ("depthprune.commands.export:export", "a pruned model as other engines open it, proven the same"),
    "benchmark": (
        "depthprune.commands.benchmark:benchmark",
        "speed, cache and memory beside the unpruned model: benchmark FOLDER --against BASE",
    ),
    "generate": ("depthprune.commands.generate:generate", "write a model's own continuations, to train on"),
    "compare": ("depthprune.commands.compare:compare", "how far influence tables agree: compare a.json b.json"),
    "list": ("depthprune.commands.catalogue:catalogue", "list everything that has a name: models, texts, metrics, ..."),
    "fetch": ("depthprune.commands.fetch:fetch", "fetch embedded models and texts now"),
}
"""Each command's room and function, and its line in the help."""

LISTS = {"compare": "--tables", "recommend": "--results", "report": "--results"}
"""Commands whose files need no flag, and the flag that they stand for."""

AT_ONCE = ("recommend", "report", "export", "benchmark", "compare", "list")
"""Commands that write what they make once it is whole."""

DRY_RUN = "--dry-run"

SINGLES = {"benchmark": "--model"}
"""The same for commands of one file."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: the command line without the program's name; the process's own if not given.

    Returns:
        The exit code: 0, 1 where a gate of `evaluate` fails, 2 for anything that the user can mend, 130 and 143 for a
        run that was asked to stop.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return 0 if arguments else 2
    command, rest = arguments[0], arguments[1:]
    if command == "--version":
        from importlib.metadata import version

        print(version("depthprune"))
        return 0
    keep_freed_memory()
    from jsonargparse import ArgumentError

    try:
        rest, is_dry, rate = _without_dry_run(rest, command in SINGLES)
        if command in LISTS:
            rest = _with_flag(LISTS[command], rest)
        elif command in SINGLES and rest and not rest[0].startswith("-"):
            rest = [SINGLES[command], *rest]
        if command in LIGHTNING and is_dry:
            from depthprune.prediction.dry_run import predict

            return predict(command, import_module("depthprune.recovery.cli").parsed([command, *rest]), rate)
        if command in LIGHTNING:
            import_module("depthprune.recovery.cli").run(arguments)
        elif command in COMMANDS:
            from jsonargparse import auto_cli

            from depthprune.nulls import refusing_nulls

            room, function = COMMANDS[command][0].split(":")
            chosen = refusing_nulls(getattr(import_module(room), function))
            if is_dry:
                from depthprune.prediction.dry_run import predicting

                chosen = predicting(command, chosen, rate)
            code = auto_cli(
                chosen,
                args=rest,
                prog=f"depthprune {command}",
                as_positional=False,
                exit_on_error=False,
            )
            return code if isinstance(code, int) else 0
        else:
            from depthprune.names import unknown_name

            raise unknown_name("command", command, [*COMMANDS, *LIGHTNING])
    except ArgumentError as error:
        return _refuse(f"{_readable(error.message or str(error), rest)}: see depthprune {command} --help.")
    except (ValueError, OSError) as error:
        if os.environ.get("DEPTHPRUNE_DEBUG"):
            raise
        if isinstance(error, UnicodeDecodeError):
            return _refuse(f"{_config_files(rest) or 'A file'} is not text in UTF-8: name another one.")
        return _refuse(str(error) or repr(error))
    except (KeyboardInterrupt, SystemExit) as leaving:
        # Lightning makes an exit of an interrupt, and an exit without a code of a SIGTERM
        is_interrupt = isinstance(leaving, KeyboardInterrupt) or isinstance(leaving.__context__, KeyboardInterrupt)
        is_sigterm = type(leaving).__name__ == "SIGTERMException"
        if not is_interrupt and not is_sigterm:
            raise
        what = "interrupted" if is_interrupt else "asked to stop"
        rest_of_it = "nothing of it is kept" if command in AT_ONCE else "the same command goes on from what is saved"
        if command == "prune":
            rest_of_it = "with offload the same command goes on from what is saved; otherwise nothing of it is kept"
        print(f"depthprune: {what}; {rest_of_it}.", file=sys.stderr)
        return 128 + int(signal.SIGINT if is_interrupt else signal.SIGTERM)
    except RecursionError:
        return _refuse(f"{_config_files(rest) or 'A file'} is nested too deeply, or refers to itself: correct it.")
    except Exception as error:
        if os.environ.get("DEPTHPRUNE_DEBUG"):
            raise
        return _unexpected(error)
    return 0


def _without_dry_run(arguments: Sequence[str], takes_file: bool = False) -> tuple[list[str], bool, float | None]:
    """The command line without the flag, whether it was there, and the rate that it named.

    Args:
        arguments: the command line.
        takes_file: whether a file or folder may follow that needs no flag, and so is no rate.

    Raises:
        ValueError: what follows it is no rate.
    """
    rest, is_there, rate = list(arguments), False, None
    places = [place for place, part in enumerate(rest) if part.replace("_", "-") == DRY_RUN]
    rest = [part for place, part in enumerate(rest) if place not in places[1:]]  # once is enough
    for place, part in enumerate(rest):
        name, _, value = part.partition("=")
        if name.replace("_", "-") != DRY_RUN:
            continue
        del rest[place]
        follows = rest[place] if place < len(rest) else "-"
        if not value and not follows.startswith("-") and not (takes_file and Path(follows).exists()):
            value = rest.pop(place)
        if value.lower() == "false":
            return rest, False, None
        is_there = True
        if value and value.lower() != "true":
            try:
                rate = float(value)
            except ValueError:
                rate = 0.0
            if not 0 < rate < float("inf"):
                raise ValueError(
                    f"{DRY_RUN} {value!r}: leave it without a value, or give operations a second of one "
                    "device, such as 1.5e14."
                )
        break
    return rest, is_there, rate


def _with_flag(flag: str, arguments: Sequence[str]) -> list[str]:
    """The files that are named without a flag, as the flag that takes a list of them."""
    count = next((place for place, part in enumerate(arguments) if part.startswith("-")), len(arguments))
    flags = list(arguments[count:])
    return [flag, json.dumps(list(arguments[:count])), *flags] if count else flags


def _config_files(arguments: Sequence[str]) -> str:
    """The configuration files of a command line."""
    after = [value for flag, value in pairwise(arguments) if flag in ("--config", "-c")]
    return ", ".join(after + [part.partition("=")[2] for part in arguments if part.startswith("--config=")])


def _readable(message: str, arguments: Sequence[str]) -> str:
    """What the parser complains of, with what to do where its own words do not tell."""
    message = " ".join(message.split()).partition(" Subclass types expect one of")[0].rstrip(". ")
    if message.startswith(("Unexpected config", "Problems parsing config")):
        return f"{_config_files(arguments)} is not a YAML file with a value for each option ({message})"
    for name, example in (("text", "xsum"), ("task", "openbookqa")):
        if ("Unable to load config" in message and name in message) or f'Parser key "{name}": - Expected' in message:
            return f"{message}; a {name} is named by {name}.path, such as --{name}.path {example}"
    if "Sequence'>" in message or "<class 'list'>" in message:
        return f"{message}; a list is written [a, b]"
    return message


def _unexpected(error: Exception) -> int:
    """What is left: settings that a library refuses in its own way, and faults of ours."""
    text = " ".join(str(error).split()) or repr(error)
    places = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    was_parsing = any("jsonargparse" in place for place in places) and not any("nulls.py" in place for place in places)
    if isinstance(error, TypeError) and was_parsing:
        return _refuse(
            f"A setting, or a part of one, is null or of another kind than it should be ({text}): correct it."
        )
    if "home directory" in text:
        return _refuse("A path begins with ~ and the name of a user who has no home here: write it out.")
    of_memory = ("allocate memory", "out of memory", "size calculation overflow")
    if isinstance(error, MemoryError) or any(part in text for part in of_memory):
        return _refuse(f"There is too little memory for this ({text}): make batches or sequences smaller.")
    if type(error).__name__ == "MisconfigurationException" or isinstance(error, ImportError):
        return _refuse(f"{text.rstrip('.')}: change the setting.")
    print(f"depthprune: {type(error).__name__}: {text} (DEPTHPRUNE_DEBUG=1 shows the traceback)", file=sys.stderr)
    return 1


def _refuse(message: str) -> int:
    print(f"depthprune: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _help() -> str:
    lines = [f"  {name:<10} {summary}" for name, (_, summary) in COMMANDS.items()]
    lines += [f"  {name:<10} {summary}" for name, summary in LIGHTNING.items()]
    return "\n".join(
        [
            "usage: depthprune COMMAND [--config FILE] [--OPTION VALUE ...]",
            "",
            "Remove depth from a pretrained causal language model, recover what was lost, see what was forgotten.",
            "",
            "commands:",
            *lines,
            "",
            "Start with:    depthprune study --config configs/study/quickstart.yaml",
            "A command's options, and its whole configuration as YAML:",
            "               depthprune COMMAND --help",
            "               depthprune COMMAND --print_config",
            "What it will take, without doing any of it:",
            "               depthprune COMMAND --config FILE --dry-run",
            "DEPTHPRUNE_DEBUG=1 shows the traceback behind an error.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
