"""Processes that torchrun and SLURM start, on one machine and as if on two, give what one process gives."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from depthprune.influence.table import InfluenceTable
from tests.command_line import LENGTH, Workshop, fit_settings, read_checkpoint, run, write_config

pytestmark = pytest.mark.filterwarnings("ignore")


def free_port() -> int:
    with socket.socket() as asked:
        asked.bind(("127.0.0.1", 0))
        return int(asked.getsockname()[1])


def together(commands: Sequence[Sequence[object]], environments: Sequence[Mapping[str, str]]) -> str:
    """Run commands at the same time; what they printed."""
    started = [
        subprocess.Popen(
            [*map(str, command)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        )
        for command, environment in zip(commands, environments, strict=True)
    ]
    try:
        said = [process.communicate(timeout=300) for process in started]
    finally:
        for process in started:
            process.kill()
    for process, (_, errors) in zip(started, said, strict=True):
        assert process.returncode == 0, errors[-3000:]
    return "".join(out for out, _ in said)


def by_torchrun(arguments: Sequence[object], nodes: int) -> str:
    """One machine with two processes, or two with one each."""
    port = free_port()
    flags = ["--nnodes", nodes, "--nproc_per_node", 2 // nodes, "--master_addr", "127.0.0.1", "--master_port", port]
    start = [sys.executable, "-m", "torch.distributed.run", *flags]
    commands = [[*start, "--node_rank", node, "-m", "depthprune", *arguments] for node in range(nodes)]
    return together(commands, [{}] * nodes)


def by_slurm(arguments: Sequence[object], nodes: int) -> str:
    """What srun sets for the two processes of a job."""
    port = str(free_port())
    each = 2 // nodes
    names = ",".join(["127.0.0.1"] * nodes)
    environments = [
        {
            **{"SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "depthprune", "SLURM_NTASKS": "2", "SLURM_NNODES": str(nodes)},
            **{"SLURM_NODELIST": names, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank % each)},
            **{"SLURM_NODEID": str(rank // each), "SLURM_NTASKS_PER_NODE": str(each)},
            **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
        }
        for rank in range(2)
    ]
    return together([[sys.executable, "-m", "depthprune", *arguments]] * 2, environments)


LAUNCHERS = {
    "torchrun": lambda arguments: by_torchrun(arguments, 1),
    "torchrun on two nodes": lambda arguments: by_torchrun(arguments, 2),
    "SLURM on two nodes": lambda arguments: by_slurm(arguments, 2),
}
LAYOUT = {"torchrun": (2, 1)}  # devices and nodes; one device on each of two nodes otherwise


@pytest.mark.parametrize("launcher", ["torchrun", "SLURM on two nodes"])
def test_scoring(launcher: str, workshop: Workshop, tmp_path: Path) -> None:
    arguments: list[object] = ["influence", "--model", workshop.model, "--text.path", workshop.text]
    arguments += ["--sequence_length", LENGTH, "--sequences", 7, "--batch_size", 2, "--accelerator", "cpu"]
    assert run(*arguments, "--output", tmp_path / "one") == 0
    devices, nodes = LAYOUT.get(launcher, (1, 2))
    flags = ["--devices", devices, "--num_nodes", nodes, "--strategy", "ddp", "--output", tmp_path / "two"]
    said = LAUNCHERS[launcher]([*arguments, *flags])
    assert said.count("Wrote influence.html") == 1
    one, two = (InfluenceTable.load(tmp_path / name / "influence.json") for name in ("one", "two"))
    assert two.provenance == one.provenance
    for metric in one.metrics:
        assert two[metric] == pytest.approx(one[metric], rel=1e-5)


@pytest.mark.parametrize("launcher", ["torchrun on two nodes", "SLURM on two nodes"])
def test_fit(launcher: str, workshop: Workshop, tmp_path: Path) -> None:
    found = {}
    for name, processes in (("one", 1), ("two", 2)):
        settings = fit_settings(workshop, tmp_path / name, dropout=0.0)
        settings["data"]["batch_size"] = 4 // processes
        devices, nodes = LAYOUT.get(launcher, (1, 2)) if processes == 2 else (1, 1)
        settings["trainer"] |= {"devices": devices, "num_nodes": nodes, "accelerator": "cpu"}
        settings["trainer"] |= {"strategy": "ddp"} if processes == 2 else {}
        arguments = ["fit", "--config", write_config(tmp_path / f"{name}.yaml", settings)]
        if processes == 2:
            LAUNCHERS[launcher](arguments)
        else:
            assert run(*arguments) == 0
        last = sorted((tmp_path / name).rglob("*.ckpt"), key=lambda path: path.stat().st_mtime)[-1]
        found[name] = read_checkpoint(last)
    one, two = (found[name]["state_dict"] for name in ("one", "two"))
    assert set(one) == set(two)
    for key in one:
        assert two[key].allclose(one[key], atol=1e-5), key
