"""A comparison, step by step: what is there already, the classifiers, the selections, the cells, the table.

Classifiers and cells are Ray tasks, selections run one after another, each thing is done only once. What fails is
written down and leaves the rest alone.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray

from miner.config import Config, Data, Output
from miner.errors import MinerError, UsageError
from miner.inputs import check_sizes, eligible, open_pool, work
from miner.pool import Pool, resolve
from miner.progress import Display
from miner.rays import connect
from miner.run_dir import RunDir, write_json
from miner.subset import load_subset
from pipelines.compare_cells import (
    NO_COST,
    ROWS,
    SCHEMA,
    SIZE,
    Job,
    absolute,
    do_cell,
    fingerprints,
    flagged,
    in_parallel,
    judged,
    one_line,
    open_id,
    scores_of,
    write_table,
)
from pipelines.compare_config import Compare
from pipelines.compare_matrix import CE, UNIVERSAL, Cell, Mine, Theta0, expand, named, plan, recipe
from pipelines.compare_selectors import mining_config
from trainers.config import TrainConfig
from trainers.training import train

COST, FAILED = "cost.json", "failed.json"


class Comparison:
    """A comparison, opened: everything was looked at once, so that little can fail after hours of work.

    ``run`` does what is missing; then ``results`` is the table and ``failed`` says in a line each what went wrong.
    Raises UsageError and MinerError for flags, sets and pools that cannot be used.
    """

    def __init__(self, config: Compare) -> None:
        self.config, self.matrix = config, expand(config)
        self.out = config.out.absolute()
        self.ids = {name: open_id(absolute(spec)) for name, spec in named("--id", config.id).items()}
        self.pools = {name: self.open_pool(spec) for name, spec in named("--pool", config.pool).items()}
        far_near = (("far", config.far), ("near", config.near), ("noise", config.noise))
        self.sets = tuple((group, absolute(spec)) for group, specs in far_near for spec in specs)
        self.judges = fingerprints(self.sets)
        self.runs: tuple[str, ...] = ()  # cells of this and of earlier commands
        self.failed: dict[str, str] = {}
        self.results = SCHEMA.empty_table()
        for mine in self.matrix.mines:
            if not mine.sources:
                check_sizes(self.mining(mine), eligible(self.pools[mine.pool]))

    def open_pool(self, spec: str) -> Pool:
        """The pool; the demo's is drawn into --out once."""
        demo = Config(output=Output(str(self.out)))
        pool = open_pool(demo) if spec == "demo" else Pool.open(resolve(spec))
        if self.config.flag and not flagged(pool, self.config.flag).any():
            raise UsageError(f"--flag {self.config.flag}: no class of {pool.path}/pool.json carries it")
        return pool

    def plan(self) -> str:
        """What there is to do and what it costs, in words."""
        images = {name: found.images for name, found in self.ids.items()}
        return plan(self.config, self.matrix, images, {name: eligible(pool) for name, pool in self.pools.items()})

    def run(self) -> None:
        """Do everything that is missing. Raises MinerError for an --out with other settings."""
        self.begin()
        connect(self.config.address)
        with Display() as display:
            self.train_theta0s(display)
        for mine in self.matrix.mines:
            needs = [source.name for source in mine.sources] or [mine.theta0.name]
            if not self.blocked(mine.name, needs):
                self.select(mine)
        self.refuse_other_subsets()
        with Display() as display:
            self.do_cells(display)
        done = [self.out / run / ROWS for run in self.runs]
        self.results = pa.concat_tables([self.results, *(pq.read_table(path) for path in done if path.exists())])
        write_table(self.out / "results.parquet", self.results)

    def complain(self) -> None:
        """MinerError when something failed."""
        count = sum(cell.name in self.failed for cell in self.matrix.cells)
        if self.failed:
            raise MinerError(
                f"{count} of {len(self.matrix.cells)} cells failed; {self.out / FAILED} says why; "
                "the same command tries only those again"
            )

    # --- what is there already -----------------------------------------------------------------------------------

    def begin(self) -> None:
        """Write matrix.json, unless --out holds what was made with other settings."""
        path, config = self.out / "matrix.json", self.config
        before: list[dict[str, Any]] = []
        fixed = {"images": config.budget, "epochs": config.epochs, "lr": config.lr, "flag": config.flag} | self.judges
        if path.exists() and (self.out / "theta0").exists():
            known = json.loads(path.read_text())
            old, before = known["fixed"], known["cells"]
            names = [name for name in {**old, **fixed} if old.get(name) != fixed.get(name)]
            other = "; ".join(f"{name}: {old.get(name)} there, {fixed.get(name)} now" for name in names)
            if other:
                raise MinerError(f"{self.out}: holds a comparison with other settings ({other}); choose another --out")
        for theta in self.matrix.thetas:
            self.finished(theta)
        for mine in self.matrix.mines:
            folder = self.out / mine.name
            if not mine.sources and (folder / "config.json").exists():
                facts = {"pool": self.pools[mine.pool].fingerprint, "id": self.ids[mine.id].fingerprint}
                RunDir(folder).begin(self.mining(mine).mining() | facts, resume=False)
        cells = [cell.columns | {"run": cell.name, "subset": cell.subset} for cell in self.matrix.cells]
        plain = json.loads(json.dumps(asdict(config), default=str))
        listed = {cell["run"]: cell for cell in (*before, *cells)}  # what other commands made here counts too
        self.runs = tuple(listed)
        write_json(path, {"config": plain, "fixed": fixed, "cells": list(listed.values())})
        (self.out / FAILED).unlink(missing_ok=True)

    def finished(self, thing: Theta0 | Cell) -> bool:
        """Whether this training is over. Raises MinerError when it was another one."""
        path = self.out / thing.name / "summary.json"
        if not path.exists():
            return False
        done, asked = json.loads(path.read_text()), self.training(thing)
        same = done["recipe"] == json.loads(json.dumps(asdict(asked.recipe)))
        if not same or done["id_fingerprint"] != self.ids[thing.id].fingerprint:
            raise MinerError(
                f"{path.parent}: was trained by another recipe or on other ID images; choose another --out"
            )
        return True

    def refuse_other_subsets(self) -> None:
        """MinerError for a trained cell whose outliers are not the subset (or pool) that is there now."""
        for cell in self.matrix.cells:
            if cell.method == CE or not self.finished(cell) or (cell.mine and cell.mine.name in self.failed):
                continue
            trained = json.loads((self.out / cell.name / "summary.json").read_text())["outliers"]["fingerprint"]
            subset = load_subset(self.out / cell.subset).recipe if cell.subset else None
            if trained != (subset["fingerprint"] if subset else self.pools[cell.pool].fingerprint):
                raise MinerError(f"{self.out / cell.name}: was trained on other outliers than are there now; remove it")

    def blocked(self, name: str, needs: Iterable[str]) -> bool:
        """Whether something that ``name`` needs has failed; then so has it."""
        why = next((f"{need}: {self.failed[need]}" for need in needs if need in self.failed), None)
        if why:
            self.fail(name, why)
        return why is not None

    def fail(self, name: str, why: str) -> None:
        """Write a failure down."""
        self.failed[name] = why
        write_json(self.out / FAILED, self.failed)

    # --- theta_0 and cells ---------------------------------------------------------------------------------------

    def training(self, thing: Theta0 | Cell) -> TrainConfig:
        """The training of a classifier or a cell."""
        known = self.ids[thing.id]
        method = thing.method if isinstance(thing, Cell) else None
        start = self.out / thing.theta0.name / "checkpoint.safetensors" if isinstance(thing, Cell) else None
        outliers = None
        if isinstance(thing, Cell) and method != CE:
            outliers = str(self.out / thing.subset) if thing.subset else self.pools[thing.pool].path
        return TrainConfig(
            method=method or CE,  # type: ignore[arg-type]
            id=known.spec,
            outliers=outliers,
            ood=tuple(spec for group, spec in self.sets if group != "noise"),
            allow_overlap=self.config.allow_overlap,
            model=thing.model,  # type: ignore[arg-type]
            checkpoint=str(start) if start else None,
            seed=thing.seed,
            threads=1,
            out=self.out / thing.name,
            recipe=recipe(self.config, method, known.images),
        )

    def train_theta0s(self, display: Display) -> None:
        """The classifiers that are missing."""
        missing = [theta for theta in self.matrix.thetas if not self.finished(theta)]
        images = {theta.name: self.ids[theta.id].images * self.config.epochs for theta in missing}
        self.tasks(train, {theta.name: self.training(theta) for theta in missing}, images, 0, "classifiers", display)

    def do_cells(self, display: Display) -> None:
        """The cells that are missing."""
        jobs, spent = {}, 0
        for cell in self.matrix.cells:
            if judged(self.out / cell.name / ROWS, scores_of(cell, self.config.methods)):
                spent += self.config.budget
            elif not self.blocked(cell.name, [cell.theta0.name, *([cell.mine.name] if cell.mine else [])]):
                jobs[cell.name] = self.job(cell)
        self.tasks(do_cell, jobs, dict.fromkeys(jobs, self.config.budget), spent, "cells", display)

    def job(self, cell: Cell) -> Job:
        """One cell, ready to travel."""
        cost = json.loads((self.out / cell.mine.name / COST).read_text()) if cell.mine else dict.fromkeys(NO_COST, 0.0)
        scores = scores_of(cell, self.config.methods)
        return Job(cell, self.training(cell), self.pools[cell.pool].path, self.sets, self.config.flag, cost, scores)

    def tasks(
        self,
        function: Callable[[Any], Any],
        calls: Mapping[str, Any],
        images: Mapping[str, int],
        spent: int,
        phase: str,
        display: Display,
    ) -> None:
        """``function`` of every call as Ray tasks, with progress in ``images``; failures are written down."""
        display.phase(phase, spent + sum(images.values()), spent)
        for done, (name, error) in enumerate(in_parallel(function, calls, self.config.jobs), 1):
            if error:
                self.fail(name, error)
                display.say(f"{name}: {error}")
            display.advance(images[name], note=f"{done} of {len(calls)} {phase}")

    # --- selections ----------------------------------------------------------------------------------------------

    def mining(self, mine: Mine, gammas: tuple[float, ...] | None = None) -> Config:
        """The mining run of a selection."""
        data = Data(
            pool=self.pools[mine.pool].path,
            id=self.ids[mine.id].spec,
            model=mine.model,  # type: ignore[arg-type]
            checkpoint=str(self.out / mine.theta0.name / "checkpoint.safetensors"),
            size=SIZE,
            seed=mine.seed,
        )
        return mining_config(mine.selector, data, gammas or self.config.gamma, self.out / mine.name)

    def select(self, mine: Mine) -> None:
        """Mine (or pool rankings), if a subset is missing; a failure is written down."""
        there = {path.parent.name for path in (self.out / mine.name).glob("subset-*/subset.json")}
        gammas = {f"subset-{gamma:g}": gamma for gamma in self.config.gamma}
        if gammas.keys() <= there and (self.out / mine.name / COST).exists():
            return
        gammas |= {name: float(name.removeprefix("subset-")) for name in there}
        Display().say(f"{self.matrix.mines.index(mine) + 1} of {len(self.matrix.mines)}: {mine.name}")
        try:
            cost = self.pool_sources(mine, gammas.values()) if mine.sources else self.mine(mine, gammas.values())
        except (MinerError, ray.exceptions.RayError) as error:
            self.fail(mine.name, one_line(error))
            return
        if not (self.out / mine.name / COST).exists():  # what other gammas cost later is nothing
            write_json(self.out / mine.name / COST, cost)

    def mine(self, mine: Mine, gammas: Iterable[float]) -> dict[str, float]:
        """One mining run, on all machines; its cost."""
        from miner.mining import mine as run

        config = self.mining(mine, tuple(gammas))
        summary = run(config).summary
        seconds = summary["seconds"]
        game, n = config.game, summary["n"]
        if game.rule == "uniform" and not config.guarded:  # it does score the pool, but nothing comes of it
            return dict.fromkeys(NO_COST, 0.0) | {"selection_seconds": seconds["rank"] + seconds["export"]}
        sweeps, _, forwards = work(replace(config, game=replace(game, rounds=summary["rounds"])), n)
        played = sum(record["seconds"] for record in RunDir(self.out / mine.name).metrics())  # also before a resume
        spent = seconds["decode"] + max(seconds["game"], played) + seconds["rank"] + seconds["export"]
        return dict(zip(NO_COST, (float(sweeps * n), float(forwards), round(spent, 2)), strict=True))

    def pool_sources(self, mine: Mine, gammas: Iterable[float]) -> dict[str, float]:
        """One ranking from those of several ID sets; its cost is theirs."""
        from miner.universal import pool_runs

        runs = [self.out / source.name for source in mine.sources]
        how = next(how for how in UNIVERSAL if mine.selector.endswith(f"@{how}"))
        pool_runs(runs, how, tuple(gammas), self.out / mine.name)
        costs = [json.loads((run / COST).read_text()) for run in runs]
        return {name: sum(cost[name] for cost in costs) for name in NO_COST}
