"""`ps-elastic submit`: a training job handed to SLURM."""

from __future__ import annotations

import json
from typing import Any

import click

from ps_elastic.cli import _options
from ps_elastic.cluster import slurm
from ps_elastic.cluster.environment import find_mpi
from ps_elastic.config.load import find_modules, load, no_gpu
from ps_elastic.records.run_dir import new_run_dir, run_dir_for


@click.command("submit")
@_options.configuration
@click.option("--nodes", type=int, required=True, help="Machines.")
@click.option("--tasks-per-node", type=int, required=True, help="Ranks on each; the first of all is the server.")
@click.option("--time", required=True, help="Limit, as SLURM writes it: 00:10:00, 1-12:00:00.")
@click.option("--partition", help="SLURM's partition. [default: SLURM's]")
@click.option("--account", help="SLURM's account. [default: yours]")
@click.option("--run-dir", metavar="DIR", help="The run's folder, seen by all nodes. [default: runs/NAME-UTC]")
@click.option("--template", metavar="FILE", help="Instead of the sbatch.template that comes with ps_elastic.")
@click.option("--dry-run", is_flag=True, help="Print the batch script; make and submit nothing.")
@_options.as_json
def command(
    config: str, overrides: tuple[str, ...], run_dir: str | None, template: str | None, dry_run: bool, as_json: bool,
    **asked: Any,
) -> None:  # fmt: skip
    """Submit the training of CONFIG to SLURM: one server and NODES x TASKS_PER_NODE - 1 workers.

    The job ends with the exit code of the run. Shortly before the time limit SLURM asks the run to stop.
    `scancel --batch --signal=TERM JOB` asks for the same, and a plain scancel kills it.
    """
    settings = load(config, overrides, plugins=False)
    find_modules(settings)
    if note := no_gpu(settings):
        click.echo(f"ps-elastic: {note}: ask SLURM for it in a --template, as by #SBATCH --gres=gpu:1", err=True)
    job = slurm.SlurmJob(
        settings.name, str(slurm.absolute(config)), overrides, run_dir_for(settings.name, run_dir), slurm.absolute("."),
        threads=settings.most_threads, **asked,
    )  # fmt: skip
    text = slurm.sbatch_text(job, find_mpi(), slurm.read_template(template))
    if dry_run:
        document: dict[str, object] = {"job_id": None, "run_dir": str(job.run_dir), "script": None, "text": text}
        click.echo(json.dumps(document) if as_json else text, nl=as_json)
        return
    slurm.require_sbatch()
    job_id, script = slurm.hand_in(new_run_dir(settings.name, str(job.run_dir)), text)
    document = {"job_id": job_id, "run_dir": str(job.run_dir), "script": str(script), "text": text}
    click.echo(json.dumps(document) if as_json else f"job {job_id}, run folder {job.run_dir}")
    click.echo(f"ps-elastic: to end it with a summary: scancel --batch --signal=TERM {job_id}", err=True)
