"""``depthprune benchmark``: how fast a pruned model is, and how much memory it takes, beside the unpruned one."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedModel

from depthprune.configuration import as_data
from depthprune.devices import start_fabric
from depthprune.evaluation.benchmark import check_loads, loads_of, measure
from depthprune.evaluation.cost import parameters_in_use
from depthprune.figures import write_figure
from depthprune.files import make_folder, write_json
from depthprune.loading import load, parse_dtype
from depthprune.origin import origin
from depthprune.progress import tracked
from depthprune.report.benchmark import benchmark_figure, benchmark_report, console_table
from depthprune.report.html import write_page
from depthprune.trusted import has_code, load_trusted

VERSION = 1
MOST_REPEATS = 10_000


def benchmark(
    model: str,
    against: str,
    output: str | None = None,
    batch_sizes: Sequence[int] = (1, 4),
    prompt_tokens: Sequence[int] = (128, 512),
    new_tokens: int = 32,
    repeats: int = 7,
    dtype: str = "auto",
    attn_implementation: str | None = None,
    accelerator: str = "auto",
    trust_remote_code: bool = False,
) -> None:
    """Measure a pruned model and the unpruned one by turns, in one process.

    For every batch size and length of the prompt: time to the first token, tokens per second of reading and writing,
    bytes of the cache, and memory beside the weights.

    Args:
        model: a pruned model's folder, also an exported one; also without the flag: depthprune benchmark FOLDER.
        against: the unpruned model: an embedded name, a hub name or a folder.
        output: folder for benchmark.html, .md, .json and .png; nothing is written if not given.
        batch_sizes: sequences at once.
        prompt_tokens: tokens of each prompt.
        new_tokens: tokens that are written behind the first one.
        repeats: how often, after one turn that does not count.
        dtype: auto (as saved), bfloat16, float16 or float32.
        attn_implementation: as in transformers, such as eager.
        accelerator: as in Lightning: auto, cpu, gpu.
        trust_remote_code: run the modelling file of a folder, as exports in the format custom-code have one.
    """
    config = as_data(dict(locals()))
    check(config)
    loads = loads_of(batch_sizes, prompt_tokens, new_tokens)
    folder = None if output is None else make_folder(output)
    device = start_fabric(accelerator).device
    models = {}
    for side, name in (("model", model), ("against", against)):
        models[side] = _opened(name, dtype, attn_implementation, trust_remote_code)
        torch.nn.Module.to(models[side], device)
        check_loads(models[side].config, loads)
    dtypes = [str(each.dtype).removeprefix("torch.") for each in models.values()]
    if len(set(dtypes)) > 1:
        raise ValueError(
            f"{model} is saved in {dtypes[0]} and {against} in {dtypes[1]}, so that what is measured would not be the "
            "pruning: name one dtype for both, such as --dtype bfloat16."
        )
    sizes = {
        side: {
            "parameters": parameters_in_use(each),
            "bytes": sum(parameter.nbytes for parameter in each.parameters()),
        }
        for side, each in models.items()
    }
    rows = []
    for each in loads:
        watch = partial(tracked, label=f"{each.batch_size} x {each.prompt_tokens} tokens")
        found = measure(models, each, repeats, watch, counts_memory=True)
        rows.append({"load": asdict(each), **{side: asdict(measured) for side, measured in found.items()}})
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    machine = f"{name}, {torch.get_num_threads()} threads, {str(models['model'].dtype).removeprefix('torch.')}"
    content = {
        "depthprune_benchmark": VERSION,
        "config": config,
        "machine": machine,
        "weights": sizes,
        "rows": rows,
        **origin(),
    }
    Console().print(console_table(content))
    if folder is not None:
        write_json(folder / "benchmark.json", content)
        write_figure(benchmark_figure(content), folder / "benchmark.png")
        write_page(folder / "benchmark.md", benchmark_report(content), content)
        print(f"Wrote benchmark.html, .md, .json and .png to {folder}.")


def check(settings: Mapping[str, Any]) -> None:
    """Refuse settings that are out of range, before anything is opened.

    Args:
        settings: of the command, by name.

    Raises:
        ValueError: one is.
    """
    if not 1 <= settings["repeats"] <= MOST_REPEATS:
        raise ValueError(f"repeats is {settings['repeats']}: set it to 1 to {MOST_REPEATS}.")
    if not settings["batch_sizes"] or not settings["prompt_tokens"]:
        raise ValueError("batch_sizes and prompt_tokens need a number each.")
    loads_of(settings["batch_sizes"], settings["prompt_tokens"], settings["new_tokens"])
    parse_dtype(settings["dtype"])


def _opened(name: str, dtype: str, attn_implementation: str | None, trust_remote_code: bool) -> PreTrainedModel:
    """A model as :func:`depthprune.load` opens it, or one that has code of its own."""
    if has_code(name):
        if not trust_remote_code:
            raise ValueError(
                f"{name} has a modelling file of its own, which is run only where it is trusted: add "
                "--trust_remote_code true."
            )
        return load_trusted(name, parse_dtype(dtype), attn_implementation)
    return load(name, dtype=dtype, attn_implementation=attn_implementation)[0]
