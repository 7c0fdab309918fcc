"""``depthprune COMMAND ... --dry-run``: what the command will take, without doing any of it."""

from __future__ import annotations

import functools
import inspect
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table

from depthprune.influence.registry import METRICS
from depthprune.names import unknown_name
from depthprune.prediction.commands import COUNTED
from depthprune.prediction.rate import Rate, measured_rate
from depthprune.prediction.shape import Shape, open_shape
from depthprune.prediction.work import Work
from depthprune.replacements.registry import REPLACEMENTS
from depthprune.search.registry import check_search
from depthprune.sites import KINDS, check_kinds

FLAG = "--dry-run"
COUNTS = ("sequence_length", "batch_size", "sequences", "samples", "prompts", "repeats", "devices", "num_nodes")
MAKES_LATER = ("export", "benchmark")  # commands whose model another command makes
GIB = 2**30


def predicting(name: str, command: Callable[..., int | None], rate: float | None) -> Callable[..., int | None]:
    """A command that is predicted instead of run, with the same settings, which its room's ``check`` looks at first.

    Args:
        name: its name.
        command: the command.
        rate: see :func:`predict`.
    """
    defaults = {
        parameter.name: parameter.default
        for parameter in inspect.signature(command).parameters.values()
        if parameter.default is not inspect.Parameter.empty
    }

    @functools.wraps(command)
    def predicted(**settings: Any) -> int | None:
        whole = defaults | settings
        if check := getattr(sys.modules[command.__module__], "check", None):
            check(whole)
        return predict(name, whole, rate)

    return predicted


def predict(command: str, settings: Mapping[str, Any], rate: float | None = None) -> int:
    """Count what a command does, and print how long it takes and what it needs.

    Args:
        command: its name.
        settings: its settings.
        rate: operations that one device does in a second; measured if not given.

    Raises:
        ValueError: the command runs no model, or the model's shape is not known.
    """
    if command not in COUNTED:
        raise ValueError(
            f"`depthprune {command}` runs no model, so that there is nothing to predict: leave {FLAG} out."
        )
    is_lightning = "trainer" in settings
    model = settings["model"]
    place = model if is_lightning else settings
    name = place["base"] if is_lightning else model
    try:
        shape = open_shape(name, place.get("revision"), place.get("dtype", "auto"))
    except ValueError as error:
        if command not in MAKES_LATER or "Unknown model" not in str(error):
            raise
        raise ValueError(
            f"{name} is not there yet, so its shape is not known: name the model that it will be made from, such as "
            "--model smollm2-135m-instruct-q4, which takes at least as much."
        ) from error
    _check(settings["data"] if is_lightning else settings)
    accelerator, devices = _devices(settings["trainer"] if is_lightning else settings)
    work = Work(devices=devices)
    COUNTED[command](work, shape, settings)
    data = settings["data"] if is_lightning else settings
    speed = _speed(shape, data, accelerator, rate)
    _show(command, shape, work, speed, accelerator, settings)
    return 0


def _check(settings: Mapping[str, Any]) -> None:
    """Refuse numbers and names that the command would refuse later.

    Raises:
        ValueError: there is one.
    """
    for name, value in settings.items():
        least = 2 if name == "sequence_length" else 1
        is_count = name in COUNTS or name.endswith(("_sequences", "_questions", "_tokens"))
        if is_count and isinstance(value, int) and value < least:
            raise ValueError(f"{name} is {value}: set it to {least} or more.")
    for name in ("metrics", "kinds"):
        if settings.get(name) is not None and not settings[name]:
            raise ValueError(f"{name} names nothing: name some, or leave it out.")
    kinds = settings.get("kinds") or [settings.get("kind", KINDS[0])]
    check_kinds(kinds if not isinstance(kinds, Mapping) else [kind for some in kinds.values() for kind in some])
    for metric in settings["metrics"] or () if "metrics" in settings else ():
        if metric not in METRICS:
            raise unknown_name("metric", metric, METRICS)
    replacement = settings.get("replacement") or "none"
    if replacement not in ("none", *REPLACEMENTS):
        raise unknown_name("replacement", replacement, ["none", *REPLACEMENTS])
    if "positions" in settings:
        check_search(settings["method"], settings["positions"], settings["seed"])


def _devices(settings: Mapping[str, Any]) -> tuple[str, int]:
    """The kind of device, and how many there are."""
    asked, count = str(settings.get("accelerator", "auto")), settings.get("devices", 1)
    has_gpu = torch.accelerator.is_available()
    accelerator = asked if asked != "auto" else ("gpu" if has_gpu else "cpu")
    if isinstance(count, list):
        count = len(count)
    elif isinstance(count, str) and "," in count:
        count = len([part for part in count.split(",") if part.strip()])
    elif not str(count).isdigit():  # auto and -1: all there are
        count = torch.accelerator.device_count() if accelerator != "cpu" and has_gpu else 1
    nodes = int(settings.get("num_nodes") or 1)
    if int(count) < 1 or nodes < 1:
        raise ValueError(f"devices is {count} and num_nodes {nodes}: set both to 1 or more.")
    return accelerator, int(count) * nodes


def _speed(shape: Shape, data: Mapping[str, Any], accelerator: str, rate: float | None) -> Rate:
    if rate is not None:
        return Rate(rate, 0.0, "as it was given")
    has_gpu = torch.accelerator.is_available() and accelerator != "cpu"
    device = torch.accelerator.current_accelerator() if has_gpu else torch.device("cpu")
    assert device is not None
    return measured_rate(shape, int(data.get("batch_size", 1)), int(data.get("sequence_length", 128)), device)


def _show(command: str, shape: Shape, work: Work, rate: Rate, accelerator: str, settings: Mapping[str, Any]) -> None:
    console = Console()
    numbers = f"{shape.parameters / 1e9:.2f}B" if shape.parameters > 1e9 else f"{shape.parameters / 1e6:.1f}M"
    of_dtype = f"{numbers} parameters, {str(shape.dtype).removeprefix('torch.')}"
    print(f"What depthprune {command} will take of {shape.name} ({of_dtype}); nothing is done now.")
    table = Table()
    for column, justify in (("work", "left"), ("tokens", "right"), ("operations", "right"), ("time", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for stage in work.stages:
        table.add_row(
            stage.name, f"{stage.tokens:,.0f}", f"{stage.flops:.2e}", time_text(stage.seconds(rate, work.devices))
        )
    total = sum(stage.seconds(rate, work.devices) for stage in work.stages)
    flops = sum(stage.flops for stage in work.stages)
    table.add_section()
    table.add_row("all", f"{sum(stage.tokens for stage in work.stages):,.0f}", f"{flops:.2e}", time_text(total))
    console.print(table)
    memory = Table()
    memory.add_column("on one device")
    memory.add_column("GiB", justify="right")
    if accelerator == "cpu":
        work.hold({"this program and its libraries": float(psutil.Process().memory_info().rss)})
    for phase, parts in work.memory.items():
        for name, size in parts.items():
            memory.add_row(f"{phase}: {name}" if phase else name, f"{size / GIB:.2f}")
    memory.add_section()
    needed = work.most
    memory.add_row("the most at a time" if len(work.memory) > 2 else "all", f"{needed / GIB:.2f}")
    console.print(memory)
    on = f"{work.devices} devices, each" if work.devices > 1 else "one device"
    print(f"Counted on {on} with {rate.flops:.2e} operations a second ({rate.where}).")
    if accelerator != "cpu" and not torch.accelerator.is_available():
        given = "" if rate.where == "as it was given" else f": say how fast yours is, such as {FLAG} 1.5e14"
        print(f"The settings ask for the accelerator {accelerator}, and there is none here{given}.")
    elif accelerator == "cpu" and needed > (there := psutil.virtual_memory().total):
        print(f"That is more than the {there / GIB:.1f} GiB of memory of this machine.")
    _show_disk(work, settings)
    for sentence in dict.fromkeys(work.left_out):
        print(sentence)
    print("Loading, opening texts and writing are not counted.")


def _show_disk(work: Work, settings: Mapping[str, Any]) -> None:
    if not work.disk:
        return
    output = Path(str(settings.get("output") or ".")).expanduser().absolute()
    free = shutil.disk_usage(next(folder for folder in (output, *output.parents) if folder.exists())).free
    print(f"About {work.disk / GIB:.2f} GiB are written; {free / GIB:.1f} GiB are free where the output goes.")


def time_text(seconds: float) -> str:
    """Seconds as people say them."""
    for size, unit in ((86400.0, "days"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.1f} s" if seconds >= 0.05 else "under 0.1 s"
