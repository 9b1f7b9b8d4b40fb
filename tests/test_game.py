"""The main job from end to end on Ray: any number of actors, kills, full disks, broken nets, all rules."""

import dataclasses
import gc
import io
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
import torch
import webdataset
from helpers import start_and_kill
from PIL import Image
from scipy.stats import spearmanr
from torch.utils.data import DataLoader

from miner import demo
from miner.actors import PoolShards
from miner.build import finish, prepare, run_job, write_arrays_pool
from miner.cluster import Crew
from miner.config import Config, Data, Game, Machines, Selection
from miner.errors import MinerError, UsageError
from miner.exclude import exclude
from miner.images import png
from miner.inputs import duplicates
from miner.mining import Mined, Mining, mine
from miner.pool import Pool
from miner.progress import Display
from miner.rates import OneProcess
from miner.rays import connect
from miner.recipe import Recipe
from miner.run_dir import RunDir
from miner.subset import load_subset
from miner.tars import TarWriter
from miner.weights import TABLE, load_weights
from trainers.actor import Trainer
from trainers.checkpoint import load_net, save_checkpoint
from trainers.config import PretrainConfig
from trainers.data import load_id
from trainers.image_set import ImageSet

COUNTS = (500, 502, 498)  # images a shard; the second holds a repeated and a broken one
TWIN, BROKEN = 300, 301
GAMMAS = (0.1, 0.01)


def build_pool(folder: Path, labelled: bool) -> Pool:
    images, labels = demo.pool_arrays()
    encoded = [png(image) for image in images[: sum(COUNTS)]]
    encoded[COUNTS[0] + TWIN] = encoded[7]
    encoded[COUNTS[0] + BROKEN] = encoded[8][:200]  # a PNG that was cut off
    folder.mkdir(parents=True)
    first = 0
    for shard, count in enumerate(COUNTS):
        with TarWriter(folder / f"part-{shard}.tar") as tar:
            for i in range(first, first + count):
                tar.write(f"{i:06d}.png", encoded[i])
                if labelled:
                    tar.write(f"{i:06d}.cls", str(labels[i]).encode())
        first += count
    if labelled:
        (folder / "classes.json").write_text(json.dumps(demo.FAMILIES))
    recipe = Recipe("tars", (str(folder),))
    plan = prepare(recipe, str(folder))
    for job in plan.jobs:
        run_job(str(folder), job)
    return finish(recipe, str(folder), "mixed", plan)


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Pool:
    return build_pool(tmp_path_factory.mktemp("pools") / "mixed", labelled=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One short training of the classifier for all runs."""
    before = torch.get_num_threads()
    id_set = load_id("demo")
    trainer = Trainer("small", id_set, seed=0, game=Game(batch=32))
    report = trainer.pretrain(PretrainConfig(epochs=3, batch=64, lr=0.1))
    torch.set_num_threads(before)
    path = tmp_path_factory.mktemp("net") / "small.safetensors"
    meta = {"model": "small", "classes": list(id_set.classes), "accuracy": report["accuracy"]}
    save_checkpoint(path, trainer.net, meta)
    return path


@pytest.fixture(scope="module")
def _ray() -> Iterator[None]:
    connect(None)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def base(_ray: None, pool: Pool, checkpoint: Path) -> Config:
    """Three short rounds on one pool actor and one trainer; a training step could be shared by two."""
    return Config(
        data=Data(pool=pool.path, checkpoint=checkpoint, seed=3),
        game=Game(rounds=3, steps=4, batch=32, parts=2),
        selection=Selection(gamma=GAMMAS, exclude_near_id=0.01),  # no class of the demo's pool is very near
        machines=Machines(pool_actors=1, trainers=1),
    )


def change(config: Config, out: Path, **values: Any) -> Config:
    """``config`` with another run directory and other settings, each given by its own name."""
    parts = {}
    for part in ("data", "game", "selection", "machines", "output"):
        old = getattr(config, part)
        known = {field.name for field in dataclasses.fields(old)}
        parts[part] = dataclasses.replace(old, **{k: values.pop(k) for k in known & values.keys()})
    assert not values
    return dataclasses.replace(config, **parts | {"output": dataclasses.replace(parts["output"], out=out)})


def failure(config: Config) -> MinerError:
    """The error that a run ends with, let go of its traceback: that would keep the run's actors alive."""
    try:
        mine(config)
    except MinerError as error:
        found = type(error)(str(error))
    else:
        raise AssertionError("the run went through")
    gc.collect()
    assert "\n" not in str(found)
    return found


def contents(run: Path) -> dict[str, bytes]:
    """Every byte that a user gets: subsets and weights table."""
    paths = [p for top in ("subset-*", "weights") for p in run.glob(f"{top}/*")]
    assert len(paths) == 2 * 4 + len(COUNTS)
    return {str(path.relative_to(run)): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def messages() -> Counter[str]:
    """How often all pool actors were asked for each thing in the undisturbed run."""
    return Counter()


@pytest.fixture(scope="module")
def plain(base: Config, messages: Counter[str], tmp_path_factory: pytest.TempPathFactory) -> Mined:
    """The undisturbed run that others are compared with."""
    each = Crew.each

    def counted(crew: Crew, method: str, *args: Any, **options: Any) -> list[Any]:
        messages[method] += 1
        return each(crew, method, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Crew, "each", counted)
        return mine(change(base, tmp_path_factory.mktemp("plain") / "run"))


# --- what a run leaves ---


def test_a_run_leaves_weights_of_the_whole_pool(plain: Mined, pool: Pool) -> None:
    table = load_weights(plain.run)
    assert table.schema.equals(TABLE)
    assert table.schema.metadata[b"pool_fingerprint"] == pool.fingerprint.encode()
    index = pool.index(["uid", "key", "shard", "row", "label"])
    assert table.select(index.column_names).equals(index)
    reason = np.array(table["excluded_by"].to_pylist(), dtype=object)
    assert [table["key"][int(i)].as_py() for i in np.flatnonzero(reason == "duplicate")] == ["000800"]
    assert [table["key"][int(i)].as_py() for i in np.flatnonzero(reason == "decode")] == ["000801"]
    near = reason == "near-id"
    assert 0.02 < near.mean() < 0.9
    eligible = np.equal(reason, None)
    record = plain_records(plain)[0]
    assert record["near_id_excluded"] == near.sum()
    cosine, label = table["nn50_id_cosine"].to_numpy(), table["label"].to_numpy()
    for family in np.unique(label):  # a class goes as a whole, by its mean
        members = (label == family) & (near | eligible)
        assert near[members].all() or eligible[members].all()
        assert near[members].all() == (cosine[members].astype(np.float64).mean() > record["near_id_cosine"])
    weight = table["weight"].to_numpy()
    assert weight[eligible].mean() == pytest.approx(1.0, rel=1e-5)
    assert (weight[~eligible] == 0).all()
    assert weight[eligible].min() > 0
    assert sorted(table["rank"].drop_null().to_pylist()) == list(range(eligible.sum()))
    assert table["rank"].is_valid().to_numpy().tolist() == eligible.tolist()
    assert (table["visits"].to_numpy()[eligible] == 3).all()
    assert plain.summary["excluded"] == {
        "exclude-list": 0,
        "duplicate": 1,
        "decode": 1,
        "near-id": int(near.sum()),
        "id-duplicate": 0,
    }
    assert len(plain.summary["undecodable"]) == 1
    assert "000801" in plain.summary["undecodable"][0]
    assert [line["round"] for line in plain_records(plain)] == [0, 1, 2]


def plain_records(run: Mined) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (run.run / "metrics.jsonl").read_text().splitlines()]


def test_a_round_takes_a_dozen_messages_to_each_pool_actor(plain: Mined, messages: Counter[str]) -> None:
    """Besides blocks of images and scores, whose number is that of the images over 4,096."""
    once = ("open_sweep", "close_sweep", "class_sums", "update", "normalise", "snapshot")
    assert {name: messages[name] for name in once} == dict.fromkeys(once, 3)
    assert messages["sums"] == 6
    assert messages["draw"] == 2  # after the last round nobody trains
    assert messages["capped"] <= 3 * 4
    assert messages.total() <= 3 * 12 + 10


def test_harder_images_weigh_more(plain: Mined) -> None:
    table = load_weights(plain.run)
    kept = table.filter(table["excluded_by"].is_null())
    weight, loss = kept["weight"].to_numpy(), kept["loss_mean"].to_numpy()
    assert np.corrcoef(np.log(weight), loss)[0, 1] > 0.9


def test_subsets_are_exact_nested_and_hold_the_pool_bytes(plain: Mined, pool: Pool) -> None:
    large, small = (load_subset(path) for path in plain.subsets)
    assert (len(large), len(small)) == (150, 15)
    assert small.uids == large.uids[:15]
    assert len(set(large.uids)) == 150
    index = pool.index(["uid", "shard", "row"]).to_pylist()
    places = {row["uid"]: (row["shard"], row["row"]) for row in reversed(index)}
    for i in range(0, 150, 10):
        shard, row = places[large.uids[i]]
        assert large.encoded(i) == pool.read(shard, [row])[0]
    table = load_weights(plain.run)
    expected = table.filter(table["rank"].is_valid()).sort_by("rank")["uid"].to_pylist()[:150]
    assert large.uids == expected
    assert sum(large.recipe["classes"].values()) == 150


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves its file to the collector
def test_a_subset_is_read_by_tarfile_webdataset_and_torch(plain: Mined) -> None:
    folder = plain.subsets[0]
    subset = load_subset(folder)
    images = [subset.encoded(i) for i in range(len(subset))]
    tars = [str(folder / tar["name"]) for tar in subset.recipe["tars"]]
    with tarfile.open(tars[0]) as tar:
        plain_images = [tar.extractfile(m).read() for m in tar if m.name.endswith(".png")]
    assert plain_images == images
    samples = list(webdataset.WebDataset(tars, shardshuffle=False, empty_check=False))
    assert [sample["png"] for sample in samples] == images
    assert [json.loads(sample["json"])["uid"] for sample in samples] == subset.uids
    assert [int(sample["cls"]) for sample in samples] == subset.manifest["label"].to_pylist()
    pixels = [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in images]
    for loader in (
        DataLoader(subset, batch_size=20),
        DataLoader(subset, batch_size=20, num_workers=2, multiprocessing_context="spawn"),
    ):
        batches = list(loader)
        found = torch.cat([batch for batch, _ in batches]).permute(0, 2, 3, 1).numpy()
        assert (found == np.stack(pixels)).all()
        assert set(torch.cat([labels for _, labels in batches]).tolist()) == {-1}
    streamed = [image.permute(1, 2, 0).numpy() for image, _ in subset.stream()]
    assert (np.stack(streamed) == np.stack(pixels)).all()
    workers = DataLoader(subset.stream(), batch_size=None, num_workers=2, multiprocessing_context="spawn")
    shared = sorted(image.permute(1, 2, 0).numpy().tobytes() for image, _ in workers)
    assert shared == sorted(image.tobytes() for image in pixels)
    small = load_subset(folder, transform=lambda image: image.resize((8, 8)).size)
    assert small[3] == ((8, 8), -1)


def test_verify_finds_one_flipped_byte_anywhere(plain: Mined, tmp_path: Path) -> None:
    load_subset(plain.subsets[1]).verify()
    names = sorted(path.name for path in plain.subsets[1].iterdir())
    assert names == ["manifest.parquet", "outliers-000000.tar", "sizes.json", "subset.json"]
    for name in names[:2]:
        copy = tmp_path / name
        shutil.copytree(plain.subsets[1], copy)
        subset = load_subset(copy)
        data = bytearray((copy / name).read_bytes())
        data[len(data) // 2] ^= 1
        (copy / name).write_bytes(data)
        with pytest.raises(MinerError, match=name):
            subset.verify()


def test_a_subset_that_was_cut_off_is_refused(plain: Mined, tmp_path: Path) -> None:
    shutil.copytree(plain.subsets[1], tmp_path / "s")
    (tmp_path / "s" / "subset.json").unlink()
    with pytest.raises(MinerError, match=r"subset\.json: missing"):
        load_subset(tmp_path / "s")


# --- the same bytes, however it is run ---


def test_the_number_of_actors_changes_no_byte(plain: Mined, base: Config, tmp_path: Path) -> None:
    """One pool actor and one trainer, or three and two; the killed run below has two and one."""
    slots = ray.cluster_resources()
    if slots.get("GPU", slots["CPU"]) < 2:
        pytest.skip("not enough GPUs or CPUs for two trainers")
    other = mine(change(base, tmp_path / "run", pool_actors=3, trainers=2, resident=True))
    assert other.summary["pool_actors"] == 3
    assert len(other.summary["trainers"]) == 2
    held = [record["blocks_held"] for record in plain_records(other)]
    assert held[:2] == [0, 0]  # what the guard leaves out is not kept
    assert held[2] == sum(-(-shard.count // 4096) for shard in Pool.open(base.data.pool).shards)  # no pixels travel
    assert contents(other.run) == contents(plain.run)


def command(config: Config) -> list[str]:
    """The command line of ``config``."""
    data, game, machines = config.data, config.game, config.machines
    flags = {
        "pool": data.pool,
        "checkpoint": data.checkpoint,
        "seed": data.seed,
        "rounds": game.rounds,
        "steps": game.steps,
        "batch": game.batch,
        "exclude-near-id": config.selection.exclude_near_id,
        "pool-actors": machines.pool_actors,
        "threads": game.threads,
        "parts": game.parts,
        "out": config.output.out,
    }
    gammas = ["--gamma", *map(str, config.selection.gamma)]
    return [sys.executable, "-m", "pipelines.resample", *gammas] + [f"--{k}={v}" for k, v in flags.items()]


def test_a_killed_run_goes_on_to_the_same_bytes(plain: Mined, base: Config, tmp_path: Path) -> None:
    config = change(base, tmp_path / "run", pool_actors=2)
    root = Path(__file__).parent.parent
    mark = tmp_path / "run" / "rounds" / "000000" / "COMMITTED"
    start_and_kill(command(config), root, tmp_path / "log", mark.exists, 600)
    assert not (tmp_path / "run" / "weights").exists()
    rounds = [p.parent.name for p in tmp_path.glob("run/rounds/*/COMMITTED")]
    assert "000000" in rounds
    assert "000002" not in rounds
    begun = mark.stat().st_mtime_ns
    mined = mine(change(config, tmp_path / "run", resume=True))
    assert contents(mined.run) == contents(plain.run)
    assert not mark.exists() or mark.stat().st_mtime_ns == begun  # round 0 was not played again


def test_a_finished_run_gives_another_draw_without_playing(plain: Mined, base: Config, tmp_path: Path) -> None:
    shutil.copytree(plain.run, tmp_path / "run")
    before = load_subset(tmp_path / "run" / "subset-0.1").uids
    again = mine(change(base, tmp_path / "run", gamma=(0.1, 0.05), draw="eq20"))
    assert [path.name for path in again.subsets] == ["subset-0.1", "subset-0.05"]
    assert again.summary["seconds"]["game"] < plain.summary["seconds"]["game"]
    large, small = (load_subset(path) for path in again.subsets)
    assert small.uids == large.uids[: len(small)]
    table = load_weights(again.run)
    weight = table["weight"].to_numpy().astype(np.float64)
    assert weight.tobytes() == load_weights(plain.run)["weight"].to_numpy().astype(np.float64).tobytes()
    for subset, gamma in ((large, 0.1), (small, 0.05)):
        chance = np.minimum(1, gamma * sum(COUNTS) * weight / weight.sum())
        assert abs(len(subset) - chance.sum()) < 5 * np.sqrt((chance * (1 - chance)).sum()) + 1e-9
        assert subset.recipe["clipped_share"] == pytest.approx((chance == 1).sum() / (weight > 0).sum())
    assert large.recipe["draw"] == "eq20"
    assert set(large.uids) != set(before)


def test_rounds_end_once_the_ranking_has_converged(
    plain: Mined, base: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Judged by a sample of the weights: the same on any number of actors and after a stop, even one in the end."""
    monkeypatch.setattr("miner.loop.SAMPLE", 400)
    settings: dict[str, Any] = {"rounds": 9, "converged": 0.999, "strata": 0}
    whole = mine(change(base, tmp_path / "whole", **settings))
    told = [record.get("agreement") for record in plain_records(whole)]
    assert (len(told), whole.summary["rounds"]) == (3, 3)
    assert told[0] is None
    assert told[1] < 0.999 <= told[2] < 1
    assert "train_steps" not in plain_records(whole)[-1]
    assert load_weights(whole.run)["weight"].equals(load_weights(plain.run)["weight"])  # of three rounds in any case
    for left in (2, 3):  # rounds that were committed when the run was cut
        cut = tmp_path / f"cut{left}"
        shutil.copytree(whole.run, cut)
        for made in (f"rounds/{left:06d}", "weights", "subset-0.1", "subset-0.01"):
            shutil.rmtree(cut / made, ignore_errors=True)
        again = mine(change(base, cut, **settings, pool_actors=2))
        assert contents(again.run) == contents(whole.run)
        assert [record.get("agreement") for record in plain_records(again)] == told


def test_what_was_taken_out_of_a_run_stays_out_of_its_further_subsets(
    plain: Mined, base: Config, tmp_path: Path
) -> None:
    shutil.copytree(plain.run, tmp_path / "run")
    gone = dict.fromkeys(load_subset(tmp_path / "run" / "subset-0.1").uids[::5], "opt-out")
    exclude(tmp_path / "run", gone)
    cut = contents(tmp_path / "run")
    again = mine(change(base, tmp_path / "run", gamma=(*GAMMAS, 0.2)))
    shutil.move(again.subsets[2], tmp_path / "subset-0.2")
    assert contents(again.run) == cut
    larger = load_subset(tmp_path / "subset-0.2").uids
    assert len(larger) == int(0.2 * sum(COUNTS))
    assert not set(larger) & set(gone)
    assert again.summary["excluded"]["opt-out"] == len(gone)


# --- every rule ---


@pytest.mark.parametrize("rule", ["paper", "equilibrium", "toploss"])
def test_every_rule_runs_end_to_end(base: Config, tmp_path: Path, rule: str) -> None:
    eta = 0.5 if rule == "paper" else 1.0
    mined = mine(change(base, tmp_path / "run", rule=rule, rounds=2, steps=3, pool_actors=3, eta=eta))
    large, small = (load_subset(path) for path in mined.subsets)
    assert (len(large), len(small)) == (150, 15)
    assert small.uids == large.uids[:15]
    table = load_weights(mined.run)
    kept = table.filter(table["excluded_by"].is_null())
    weight, loss = kept["weight"].to_numpy(), kept["loss_mean"].to_numpy()
    assert weight.mean() == pytest.approx(1.0, rel=1e-5)
    assert spearmanr(weight, loss).statistic > (0.5 if rule == "paper" else 0.9999)
    if rule == "toploss":
        assert mined.summary["subsets"]["subset-0.1"]["count"] == 150
        assert load_subset(mined.subsets[0]).recipe["draw"] == "topk"


def test_reference_goes_on_after_a_stop_with_the_same_bytes(base: Config, tmp_path: Path) -> None:
    settings = {"rule": "reference", "rounds": 3, "steps": 3, "exclude_near_id": 0.0, "strata": 0}
    whole = mine(change(base, tmp_path / "whole", **settings, pool_actors=2))
    shutil.copytree(whole.run, tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "rounds" / "000002")
    for left in ("weights", "subset-0.1", "subset-0.01"):
        shutil.rmtree(tmp_path / "cut" / left)
    again = mine(change(base, tmp_path / "cut", **settings))
    assert contents(again.run) == contents(whole.run)
    assert [len(load_subset(path)) for path in again.subsets] == [150, 15]
    table = load_weights(again.run)
    assert np.ptp(table["weight"].to_numpy()) > 0.01
    assert table["nn_id_row"].null_count == len(table)
    assert table["loss"].null_count > 0  # this rule scores what it draws and no more
    assert table["visits"].to_numpy().sum() == 3 * 3 * 32


def test_uniform_weights_and_a_random_draw_on_a_pool_without_labels(base: Config, tmp_path: Path) -> None:
    bare = build_pool(tmp_path / "bare", labelled=False)
    mined = mine(
        change(base, tmp_path / "run", pool=bare.path, rule="uniform", draw="random", rounds=2, steps=3, gamma=(0.1,))
    )
    subset = load_subset(mined.subsets[0])
    assert len(subset) == 150
    assert subset.manifest["label"].null_count == 150
    assert set(load_weights(mined.run)["weight"].to_pylist()) == {0.0, 1.0}
    assert subset.recipe["classes"] == {}
    with tarfile.open(subset.path / "outliers-000000.tar") as tar:
        assert {name.partition(".")[2] for name in tar.getnames()} == {"png", "json"}


# --- what goes wrong ---


def damaged(checkpoint: Path, path: Path, name: str) -> Path:
    net, meta = load_net(checkpoint, "small", demo.CLASSES)
    dict(net.named_parameters())[name].data.view(-1)[0] = float("nan")
    save_checkpoint(path, net, meta)
    return path


def test_losses_that_are_not_finite_end_the_run_and_name_keys(base: Config, checkpoint: Path, tmp_path: Path) -> None:
    net, _ = load_net(checkpoint, "small", demo.CLASSES)
    trunk, *_, head = [name for name, _ in net.named_parameters()]
    said = {}
    for name in (trunk, head):  # with the trunk broken features are not finite either
        bad = damaged(checkpoint, tmp_path / f"{name}.safetensors", name)
        said[name] = str(failure(change(base, tmp_path / name, checkpoint=bad)))
        assert not list((tmp_path / name).glob("rounds/*/COMMITTED"))
    assert "features are not finite" in said[trunk]
    assert "part-" in said[head]
    assert re.search(r"(500 of 500|502 of 502|500 of 500|498 of 498) losses are not finite", said[head])
    assert re.search(r"keys 00\d{4}, 00\d{4}", said[head])


def test_a_guard_that_leaves_nothing_is_one_line(base: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under ``reference``, which sweeps for the guard alone; every other rule does the same sweep."""
    monkeypatch.setattr("miner.loop.near_id", lambda cosine, label, near: np.ones(len(cosine), bool))
    error = failure(change(base, tmp_path / "run", exclude_near_id=0.01, rule="reference"))
    assert "no image of the pool is left after exclusions (1 duplicate, 1 decode, 1,498 near-id)" in str(error)
    assert "--exclude-near-id" in str(error)


class Here(OneProcess):
    """A crew in this process."""

    check_left = Crew.check_left


def test_a_pool_of_id_images_alone_is_one_line_before_anything_is_fitted(tmp_path: Path) -> None:
    images = load_id("demo").train_images[:40]
    (tmp_path / "pool").mkdir()
    write_arrays_pool(str(tmp_path / "pool"), "id", images, np.zeros(40, np.int64), ("digit",), shard_count=2)
    mining = Mining.__new__(Mining)
    mining.config, mining.dir, mining.display, mining.theta_0 = Config(), RunDir(tmp_path / "run"), Display(), b""
    for known in (39, 40):
        owner, digests = (
            PoolShards(str(tmp_path / "pool"), 32, 0, "poem", 1.0),
            ImageSet("ID", (images[:known],)).digests(),
        )
        mining.pool, mining.crew = owner.pool, Here(owner, 2, mining.display)  # type: ignore[assignment]
        for shard in range(2):
            owner.prepare(shard, np.zeros(0, np.int64), np.unique(digests))
            owner.reset(shard)
        if known == 39:
            mining.crew.check_left()
    with pytest.raises(MinerError, match=r"left after exclusions \(40 id-duplicate\): take another --pool"):
        mining.restored()


def test_decoding_tells_how_far_it_is_where_no_cache_is_shared(
    pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OUTLIER_CACHE", str(tmp_path))
    told: list[str] = []
    mining = Mining.__new__(Mining)
    mining.pool, mining.decoded, mining.repeated = pool, set(), duplicates(pool)[1]
    mining.id_set = load_id("demo")
    owner = PoolShards(pool.path, 32, 0, "hedge", 1.0)

    def prepare(shard: int, repeated: np.ndarray, digests: np.ndarray) -> list[str]:
        told.append(f"shard {shard}")
        return owner.prepare(shard, repeated, digests)

    method = SimpleNamespace(remote=lambda *args: lambda: prepare(*args))
    mining.crew = SimpleNamespace(  # type: ignore[assignment]
        owner=[SimpleNamespace(prepare=method)] * len(COUNTS),
        get=lambda job: job(),
        kept=lambda: told.append("kept"),
    )
    mining.display = Display()
    monkeypatch.setattr(mining.display, "advance", lambda images: told.append(f"{images} images"))
    monkeypatch.setattr("miner.mining.put", lambda value: value)
    each = [[f"shard {shard}", "kept", f"{count} images"] for shard, count in enumerate(COUNTS)]
    mining.prepare()
    assert told == [line for lines in each for line in lines]
    assert [line.partition(" (")[0] for line in mining.undecodable] == ["part-1.tar: 000801"]
    told.clear()
    mining.prepare()  # after a loss
    assert told == [line for lines in each for line in lines if line != "kept"]


def test_a_run_is_not_continued_under_other_settings(plain: Mined, base: Config) -> None:
    before = contents(plain.run)
    error = failure(change(base, plain.run, eta=0.25, steps=5, strata=3))
    assert "game.eta: 1.0 there, 0.25 now" in str(error)
    assert "game.steps: 4 there, 5 now" in str(error)
    assert "guard.strata: None there, 3 now" in str(error)
    assert "game.rounds" not in str(error)
    assert contents(plain.run) == before


def test_resume_insists_on_a_run(base: Config, tmp_path: Path) -> None:
    error = failure(change(base, tmp_path / "none", resume=True))
    assert "no run to resume" in str(error)
    assert not (tmp_path / "none" / "config.json").exists()


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"views": 7}, "--views 7:"),
        ({"gamma": (0.0,)}, "--gamma 0:"),
        ({"gamma": (0.1, 1.5)}, r"--gamma 1.5:"),
        ({"exclude_near_id": 1.0}, "--exclude-near-id 1:"),
        ({"rounds": 0}, "--rounds 0:"),
        ({"converged": 0.0}, "--converged 0:"),
        ({"converged": 0.9, "rule": "reference"}, "--converged 0.9:"),
        ({"steps": 0}, "--steps 0:"),
        ({"strata": -1}, "--strata -1:"),
        ({"pool": "nowhere-at-all"}, "no pool 'nowhere-at-all'"),
        ({"id": "no-such-id"}, "no-such-id"),
    ],
)
def test_senseless_flags_are_refused_before_anything_is_written(
    base: Config, tmp_path: Path, settings: dict[str, Any], text: str
) -> None:
    error = failure(change(base, tmp_path / "run", **settings))
    assert isinstance(error, UsageError)
    assert text in str(error)
    assert not (tmp_path / "run").exists()


def test_a_shard_that_lost_bytes_is_noticed_before_any_work(base: Config, pool: Pool, tmp_path: Path) -> None:
    shutil.copytree(pool.path, tmp_path / "pool")
    path = tmp_path / "pool" / "part-2.tar"
    os.truncate(path, path.stat().st_size - 10_240)
    error = failure(change(base, tmp_path / "run", pool=str(tmp_path / "pool")))
    assert str(path) in str(error)
    assert not (tmp_path / "run").exists()


# --- full disks ---


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """An empty file system of its own that ``mount -o remount`` can enlarge."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "outlier-miner-test", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("cannot mount a tmpfs here")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_disk_that_fills_up(plain: Mined, base: Config, checkpoint: Path, small_disk: Path) -> None:
    def grow(size: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={size}", str(small_disk)], check=True)

    config = change(base, small_disk / "run")
    before = checkpoint.stat().st_size + (plain.run / "frozen.safetensors").stat().st_size
    grow(before + 150_000)  # room for the classifier, strata and scores, but not for the first snapshots
    error = failure(config)
    assert "/rounds/000000/shard-00000" in str(error)
    assert "disk full" in str(error)
    assert "same command again" in str(error)
    assert not list(small_disk.rglob("COMMITTED"))
    assert not list(small_disk.rglob("*.tmp"))
    grow(64 << 20)
    assert contents(mine(config).run) == contents(plain.run)


def test_a_subset_that_does_not_fit_is_written_again(plain: Mined, base: Config, tmp_path: Path) -> None:
    shutil.copytree(plain.run, tmp_path / "run")
    config = change(base, tmp_path / "run")
    tar = tmp_path / "run" / "subset-0.1" / "outliers-000000.tar"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (tar.stat().st_size // 2, hard))
    tar.unlink()  # a subset that is whole would be left alone
    try:
        error = failure(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert f"{tar}: disk full" in str(error)
    with pytest.raises(MinerError, match=r"subset\.json: missing"):
        load_subset(tar.parent)
    assert contents(mine(config).run) == contents(plain.run)
    assert pq.read_table(tar.parent / "manifest.parquet").num_rows == 150
