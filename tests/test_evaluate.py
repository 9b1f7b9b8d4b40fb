"""Evaluation: every figure is that of trainers.metrics on that set, groups stay apart, and bad input is one line."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from inspect import getsource
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers import CPU, QUICK, silent

from miner.errors import MinerError, UsageError
from pipelines import cli, eval_page, evaluate
from pipelines.eval_inputs import prepare
from pipelines.eval_tables import Evaluated, cell, summary
from pipelines.evaluate import EvaluateConfig, write
from pipelines.judge import MEAN, NO_SCORE, judge, judge_corrupted, open_id
from trainers import metrics, models, scores
from trainers.abnormality import save_abnormality, train_abnormality
from trainers.abnormality_config import AbnormalityConfig
from trainers.checkpoint import open_checkpoint, save_checkpoint
from trainers.data import IdSet, load_id
from trainers.fit import pretrain
from trainers.image_set import ImageSet
from trainers.overlap import record
from trainers.sets import open_images

SIZE = 16  # px
OUT = [3, 7]  # classes of "held"


def meta(id_set: IdSet, **more: object) -> dict:
    return {"model": "small", "classes": list(id_set.classes), "id": "demo", "size": SIZE, "method": "ce"} | more


@pytest.fixture(scope="module")
def id_set() -> IdSet:
    return load_id("demo", SIZE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, id_set: IdSet) -> Path:
    """Runs "plain" (trained a little), "reject" (K + 1 outputs), "held" (two classes left out); OOD sets as .npy."""
    path = tmp_path_factory.mktemp("evaluate")
    few = replace(id_set, train_images=id_set.train_images[:640], train_labels=id_set.train_labels[:640])
    nets = {
        "plain": models.create("small", 10),
        "reject": models.create("small", 11),
        "held": models.create("small", 8),
    }
    for net in (nets["plain"], nets["reject"]):
        pretrain(net, few, QUICK, 0, CPU, silent)
    about = {
        "plain": meta(id_set),
        "reject": meta(id_set, reject=True, method="openmix"),
        "held": meta(id_set, classes=[str(c) for c in range(10) if c not in OUT], hold_out=OUT),
    }
    for name, net in nets.items():
        (path / name).mkdir()
        save_checkpoint(path / name / "checkpoint.safetensors", net, about[name])
    for i, name in enumerate(("dim", "bright", "odd <b>|[red]")):
        rng = np.random.default_rng(i)
        pixels = np.clip(rng.integers(0, 256, (130 + 7 * i, SIZE, SIZE, 3)) * (i + 1) // 3, 0, 255)
        np.save(path / f"{name}.npy", pixels.astype(np.uint8))
    return path


def config(folder: Path, *names: str, **more: object) -> EvaluateConfig:
    settings = {"ood": (f"{folder}/dim.npy",), "noise": (), "scores": ("msp", "energy"), "repeats": 3}
    return EvaluateConfig(tuple(folder / name for name in names), **(settings | more))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def full(folder: Path) -> tuple[EvaluateConfig, list[Evaluated], list[Path]]:
    """The plain run, judged and written."""
    near = (f"{folder}/bright.npy", f"{folder}/odd <b>|[red].npy")
    asked = config(folder, "plain", near=near, noise=("gaussian",), seed=5)
    results = evaluate.evaluate(asked)
    return asked, results, write(asked, results)


def table_of(path: Path) -> dict[tuple[str, ...], float]:
    table = pq.read_table(path)
    names = ("checkpoint", "score", "group", "set", "protocol", "metric")
    assert table.schema.names == [*names, "value"]
    assert {str(table.schema.field(name).type) for name in names} == {"string"}
    assert table.schema.field("value").type == pa.float64()
    keys = list(zip(*(table[name].to_pylist() for name in names), strict=True))
    assert len(set(keys)) == len(keys)
    return dict(zip(keys, table["value"].to_pylist(), strict=True))


# --- figures ------------------------------------------------------------------------------------------------------


def test_figures_are_those_of_the_metrics(full: tuple, folder: Path, id_set: IdSet) -> None:
    found = table_of(full[2][0])
    net, _ = open_checkpoint(folder / "plain")
    out = scores.outputs(net, id_set.test_images)
    shares = scores.probabilities(out.logits, 10)
    for name in ("msp", "energy"):
        ours = scores.score(name, out, 10)
        for group, which in (("far", "dim"), ("near", "bright")):
            theirs = scores.score(name, scores.outputs(net, np.load(folder / f"{which}.npy")), 10)
            want = {("full", k): v for k, v in metrics.ood(ours, theirs, rule="first").items()}
            want |= {("1:5", k): v for k, v in metrics.ood_repeated(ours, theirs, 5, 3, rule="closest").items()}
            for key, value in want.items():
                assert found["plain", name, group, which, *key] == pytest.approx(value, abs=1e-12)
        correct = shares.argmax(axis=1) == id_set.test_labels
        for metric, value in metrics.misclassification(shares, id_set.test_labels, ours).items():
            alone = metric in ("accuracy", "ece", "nll", "brier", "mean_confidence")
            assert found["plain", NO_SCORE if alone else name, "id", "demo", "misclassification", metric] == value
        where = ("plain", name, "id", "demo", "rejection")
        assert found[*where, "accuracy_at_10_rejected"] == metrics.accuracy_at(0.1, ours, correct)
        assert found[*where, "accuracy_at_20_rejected"] == metrics.accuracy_at(0.2, ours, correct)
        needed = metrics.rejection_for(0.99, ours, correct)
        np.testing.assert_equal(found[*where, "rejected_for_99_accuracy"], needed)
    for metric, value in metrics.feature_uniformity(out.features, id_set.test_labels).items():
        assert found["plain", NO_SCORE, "id", "demo", "features", metric] == value


def test_no_metric_hides_its_orientation(full: tuple) -> None:
    names = {key[-1] for key in table_of(full[2][0])}
    assert {"fpr95_ood_detected", "fpr95_id_accepted", "fpr95_errors_accepted"} <= names
    assert not {"fpr95", "aupr", "tnr95"} & {name.removesuffix("_std") for name in names}


def test_groups_stay_apart_and_means_are_over_their_sets(full: tuple) -> None:
    found = table_of(full[2][0])
    members = {"near": {"bright", "odd <b>|[red]"}, "far": {"dim"}, "noise": {"gaussian"}}
    assert {(key[2], key[3]) for key in found if key[4] == "full"} == {
        (group, name) for group, names in members.items() for name in names | {MEAN}
    }
    for group, names in members.items():
        for metric in metrics.OOD_METRICS:
            for protocol in ("full", "1:5"):
                values = [found["plain", "msp", group, name, protocol, metric] for name in names]
                assert found["plain", "msp", group, MEAN, protocol, metric] == pytest.approx(np.mean(values))
    assert not any(key[3] == MEAN and key[5].endswith("_std") for key in found)


def test_the_settings_are_in_the_file(full: tuple) -> None:
    about = json.loads(pq.read_schema(full[2][0]).metadata[b"outlier-miner"])
    assert about["settings"]["seed"] == 5
    assert about["checkpoints"]["plain"]["method"] == "ce"


def test_the_same_evaluation_gives_the_same_files(full: tuple, tmp_path: Path) -> None:
    asked, _, paths = full
    again = write(replace(asked, out=tmp_path), evaluate.evaluate(asked))
    assert [path.name for path in again] == ["results.parquet", "results.md", "results.html"]
    assert table_of(again[0]) == table_of(paths[0])
    assert [path.read_bytes() for path in again[1:]] == [path.read_bytes() for path in paths[1:]]


def test_a_reject_class_is_cut_off_before_softmax(folder: Path, id_set: IdSet) -> None:
    results = evaluate.evaluate(config(folder, "plain", "reject", scores=("msp", "reject")))
    assert [list(r.judged.id_scores) for r in results] == [["msp"], ["msp", "reject"]]
    net, _ = open_checkpoint(folder / "reject")
    assert net.head.out_features == 11
    logits = scores.outputs(net, id_set.test_images).logits
    z = np.exp(logits - logits.max(axis=1, keepdims=True))
    judged = results[1].judged
    np.testing.assert_allclose(judged.id_scores["msp"], z[:, :10].max(axis=1) / z[:, :10].sum(axis=1))
    np.testing.assert_allclose(judged.id_scores["reject"], -z[:, 10] / z.sum(axis=1))
    assert (judged.correct == (logits[:, :10].argmax(axis=1) == id_set.test_labels)).all()
    own = metrics.misclassification(scores.probabilities(logits, 10), id_set.test_labels)
    assert judged.values[NO_SCORE, "id", "demo", "misclassification", "nll"] == own["nll"]
    tables = summary(results)  # side by side, and only what has a reject class in the last one
    assert [table.head for table in tables[:2]] == [["", "plain", "reject"], ["", "reject"]]


def test_held_out_classes_are_near_and_not_id(folder: Path, id_set: IdSet) -> None:
    result = evaluate.evaluate(config(folder, "held", near=("held-out",), scores=("msp",)))[0].judged
    net, _ = open_checkpoint(folder / "held")
    left = np.isin(id_set.test_labels, OUT)
    assert 0 < left.sum() < len(left)

    def msp(images: np.ndarray) -> np.ndarray:
        return scores.score("msp", scores.outputs(net, images), 8)

    np.testing.assert_allclose(result.id_scores["msp"], msp(id_set.test_images[~left]))
    np.testing.assert_allclose(result.sets["near", "held-out"]["msp"], msp(id_set.test_images[left]))
    guesses = scores.outputs(net, id_set.test_images[~left]).logits.argmax(axis=1)
    renumbered = id_set.test_labels[~left] - sum(id_set.test_labels[~left] > c for c in OUT)
    assert (result.correct == (guesses == renumbered)).all()


def test_the_judge_works_on_plain_arrays(folder: Path, id_set: IdSet) -> None:
    """Benchmarks call it with sets of their own."""
    net, about = open_checkpoint(folder / "plain")
    images = ImageSet("mine", (np.load(folder / "dim.npy"),))
    told: list[int] = []
    found = judge(net, about, id_set, [("far", images)], ["msp"], 0, repeats=1, on_images=told.append)
    assert found.groups == {"far": ["mine"]}
    assert sum(told) == len(id_set.test_images) + len(images)
    assert np.isnan(found.values["msp", "far", "mine", "1:5", "auroc_std"])  # of one draw
    assert open_id(about, "demo", SIZE)[1] is None


def test_abnormality_risk_is_one_more_score(folder: Path, id_set: IdSet, tmp_path: Path) -> None:
    net, _ = open_checkpoint(folder / "plain")
    few = replace(id_set, train_images=id_set.train_images[:96], train_labels=id_set.train_labels[:96])
    module, _ = train_abnormality(net, few, AbnormalityConfig(1, 1, 48), 0, CPU, silent)
    save_abnormality(tmp_path / "module.safetensors", module, {})
    asked = config(folder, "plain", scores=("msp",), abnormality=tmp_path / "module.safetensors")
    judged = evaluate.evaluate(asked)[0].judged
    np.testing.assert_allclose(judged.id_scores["abnormality"], module.risk(net, id_set.test_images), rtol=1e-6)
    with pytest.raises(MinerError, match="trained over another classifier"):
        evaluate.evaluate(replace(asked, checkpoints=(folder / "reject",)))


# --- corruptions --------------------------------------------------------------------------------------------------


@pytest.fixture
def corrupted(tmp_path: Path, id_set: IdSet) -> Path:
    """Two corruptions of the first 60 test images."""
    images, labels = id_set.test_images[::8][:60].astype(np.int64), id_set.test_labels[::8][:60]
    np.save(tmp_path / "labels.npy", np.tile(labels, 5).astype(np.uint8))
    for name, step in (("brightness", 40), ("dark", -40)):
        levels = [np.clip(images + step * severity, 0, 255).astype(np.uint8) for severity in range(1, 6)]
        np.save(tmp_path / f"{name}.npy", np.concatenate(levels))
    return tmp_path


def test_corruptions_by_severity_and_overall(folder: Path, corrupted: Path) -> None:
    judged = evaluate.evaluate(config(folder, "plain", corrupted=corrupted, scores=("msp",)))[0].judged
    net, _ = open_checkpoint(folder / "plain")
    labels, of_severity = np.load(corrupted / "labels.npy"), []
    for severity in range(1, 6):
        rows, of_set = slice(60 * (severity - 1), 60 * severity), []
        for name in ("brightness", "dark"):
            out = scores.outputs(net, np.load(corrupted / f"{name}.npy")[rows])
            want = metrics.misclassification(scores.probabilities(out.logits, 10), labels[rows])
            where = (f"corrupted-{severity}", name, "misclassification")
            assert judged.values["msp", *where, "aurc_x1000"] == pytest.approx(want["aurc_x1000"])
            assert judged.values[NO_SCORE, *where, "accuracy"] == want["accuracy"]
            of_set.append(want["aurc_x1000"])
        mean = judged.values["msp", f"corrupted-{severity}", MEAN, "misclassification", "aurc_x1000"]
        assert mean == pytest.approx(np.mean(of_set))
        of_severity.append(of_set)
    of_each = [
        judged.values["msp", "corrupted", name, "misclassification", "aurc_x1000"] for name in ("brightness", "dark")
    ]
    assert of_each == pytest.approx(np.mean(of_severity, axis=0))
    overall = judged.values["msp", "corrupted", MEAN, "misclassification", "aurc_x1000"]
    assert overall == pytest.approx(np.mean(of_severity))


def test_corrupted_images_of_held_out_classes_are_left_out(folder: Path, corrupted: Path) -> None:
    net, about = open_checkpoint(folder / "held")
    rows = judge_corrupted(net, about, corrupted, SIZE, ["msp"])
    labels = np.load(corrupted / "labels.npy")[:60]
    stay = ~np.isin(labels, OUT)
    out = scores.outputs(net, np.load(corrupted / "dark.npy")[:60][stay])
    new = labels[stay].astype(int) - sum(labels[stay] > c for c in OUT)
    want = metrics.misclassification(scores.probabilities(out.logits, 8), new)["nll"]
    assert [r.value for r in rows if r[1:3] == ("corrupted-1", "dark") and r.metric == "nll"] == [want]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda p: (p / "labels.npy").unlink(), r"labels\.npy: missing; the layout of CIFAR-10-C"),
        (lambda p: np.save(p / "labels.npy", np.zeros(299, np.uint8)), r"uint8 \[299\]; \[5 n\] whole numbers"),
        (lambda p: np.save(p / "labels.npy", np.full(300, 11)), "labels 11 to 11; the checkpoint knows 10 classes"),
        (lambda p: np.save(p / "dark.npy", np.zeros((295, SIZE, SIZE, 3), np.uint8)), "295 images, labels.npy has 300"),
        (lambda p: [(p / f"{name}.npy").unlink() for name in ("dark", "brightness")], "no corruption in it"),
    ],
)
def test_a_broken_folder_of_corruptions(
    folder: Path, corrupted: Path, change: Callable[[Path], object], told: str
) -> None:
    change(corrupted)
    with pytest.raises(MinerError, match=told):
        evaluate.evaluate(config(folder, "plain", corrupted=corrupted, scores=("msp",)))


# --- bad input ----------------------------------------------------------------------------------------------------


def test_the_folder_of_the_results_is_tried_first(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(MinerError, match=r"file: results cannot be written \(File exists\); choose another --out"):
        prepare(config(folder, "plain", out=tmp_path / "file", ood=("no such set",)), print)
    prepare(config(folder, "plain", out=tmp_path / "deep" / "results"), print)
    assert list((tmp_path / "deep" / "results").iterdir()) == []


def test_a_full_gpu_is_one_line_and_a_bug_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(error: Exception) -> None:
        raise error

    with pytest.raises(SystemExit, match="1"):
        cli.run(lambda: fail(torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")))
    said = capsys.readouterr().err
    assert said == "error: the GPU's memory is full: a smaller --batch or --batch-outliers, --model or --size\n"
    with pytest.raises(RuntimeError, match="a bug"):
        cli.run(lambda: fail(RuntimeError("a bug")))


def test_test_images_among_the_training_outliers(folder: Path, id_set: IdSet, tmp_path: Path) -> None:
    net, about = open_checkpoint(folder / "plain")
    save_checkpoint(tmp_path / "checkpoint.safetensors", net, about)
    ood, said = np.load(folder / "dim.npy"), list[str]()
    outliers = ImageSet("bg", (ood[40:42], id_set.train_images[:9]), [f"bg/{i}" for i in range(11)])
    pq.write_table(record(outliers), tmp_path / "outliers.parquet")
    asked = replace(config(folder), checkpoints=(tmp_path,))
    with pytest.raises(MinerError, match=r"2 of 11 outliers are also in far set dim \(e\.g\. bg/0 = 40, bg/1 = 41\)"):
        prepare(asked, said.append)
    assert len(prepare(replace(asked, allow_overlap=True), said.append)) == 1
    assert said == [f"{tmp_path}: 2 of its 11 training outliers are also test images"]
    assert len(prepare(replace(asked, size=24), said.append)) == 1
    assert "made at 16 px" in said[1]
    pq.write_table(record(ImageSet("bg", (id_set.test_images[7:8],))), tmp_path / "outliers.parquet")
    with pytest.raises(MinerError, match="1 of 1 outliers are also in id set demo"):
        prepare(asked, said.append)
    (tmp_path / "outliers.parquet").write_bytes(b"PAR1 cut off")
    with pytest.raises(MinerError, match=r"outliers\.parquet: damaged .*; train again"):
        prepare(asked, said.append)


@pytest.mark.parametrize(
    ("change", "kind", "told"),
    [
        ({"scores": ("msp", "margin")}, UsageError, "--scores margin: unknown; choose from msp, maxlogit"),
        ({"scores": ()}, UsageError, "--scores: give one or more"),
        ({"scores": ("reject",)}, UsageError, "no checkpoint here has a reject class"),
        ({"scores": ("abnormality",)}, UsageError, "pass --abnormality FILE"),
        ({"noise": ("pink",)}, UsageError, "--noise pink: unknown; choose from gaussian"),
        ({"repeats": 0}, UsageError, "--repeats 0: must be at least 1"),
        ({"size": 4}, UsageError, "--size 4: must be at least 8"),
        ({"near": ("held-out",)}, UsageError, "held-out: a checkpoint left no class"),
        ({"ood": ("no-such-set",)}, UsageError, "'no-such-set': no such file or folder"),
        ({"checkpoints": ()}, UsageError, "no checkpoint given"),
        ({"checkpoints": (Path("nowhere"),)}, MinerError, "nowhere: no such checkpoint file"),
    ],
)
def test_bad_input_is_one_line(folder: Path, change: dict, kind: type, told: str) -> None:
    with pytest.raises(kind, match=re.escape(told)) as caught:
        evaluate.evaluate(replace(config(folder, "plain"), **change))
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)


def test_class_counts_that_do_not_match(folder: Path, id_set: IdSet, tmp_path: Path) -> None:
    path = tmp_path / "seven.safetensors"
    save_checkpoint(path, models.create("small", 7), meta(id_set, classes=[str(c) for c in range(7)]))
    told = f"{re.escape(str(path))}: the checkpoint has 7 classes, ID set demo has 10; pass --id"
    with pytest.raises(MinerError, match=told):
        evaluate.evaluate(replace(config(folder), checkpoints=(path,)))


def test_checkpoints_of_different_id_sets_or_none(folder: Path, id_set: IdSet, tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_checkpoint(path, models.create("small", 10), meta(id_set, id="svhn"))
    with pytest.raises(UsageError, match=r"for different ID sets \(demo, svhn\); pass --id"):
        evaluate.evaluate(replace(config(folder), checkpoints=(folder / "plain", path)))
    save_checkpoint(path, models.create("small", 10), meta(id_set, id=None))
    with pytest.raises(MinerError, match=r"other\.safetensors: does not say which ID set .*; pass --id"):
        evaluate.evaluate(replace(config(folder), checkpoints=(path,)))
    said: list[str] = []
    save_checkpoint(path, models.create("small", 10), meta(id_set, id=None, classes=list("abcdefghij")))
    assert prepare(replace(config(folder), checkpoints=(path,), id="demo"), said.append)[0].name == "other"
    assert "its classes have other names than those of demo" in said[0]


def test_a_set_too_small(folder: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "few.npy", np.zeros((19, SIZE, SIZE, 3), np.uint8))
    with pytest.raises(MinerError, match="far set few: 19 images; at least 20 are needed"):
        evaluate.evaluate(config(folder, "plain", ood=(f"{tmp_path}/few.npy",)))


def test_two_sets_of_one_name_are_told_apart(folder: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "dim.npy", np.load(folder / "dim.npy")[:30])
    job = prepare(config(folder, "plain", ood=(f"{folder}/dim.npy", f"{tmp_path}/dim.npy")), print)[0]
    assert [group for group, _ in job.sets] == ["far", "far"]
    assert [(images.name, len(images)) for _, images in job.sets] == [("dim", 130), ("dim (2)", 30)]


# --- what people see ----------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Counts tags, checks that they are balanced, and keeps links and the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_needs_nothing_else(full: tuple) -> None:
    html = full[2][2].read_text(encoding="utf-8")
    page = Page(html)
    # A ROC and a PR plot a group, compared and by score; histograms; risk-coverage and accuracy-rejection
    assert page.tags.count("svg") == 2 * 3 + 2 * (2 * 3 + 1) + 2
    assert not {"script", "iframe", "object", "base"} & set(page.tags)
    assert [link for link in page.links if not link.startswith(("data:", "#"))] == []
    assert not re.search(r"https?:|@import|\bon\w+=", html)
    assert "odd <b>|[red]" in page.text
    assert "<b>|[red]" not in html


def test_the_report_states_orientation_and_every_figure(full: tuple) -> None:
    text = full[2][1].read_text(encoding="utf-8")
    assert "Every score is higher for images taken to be in-distribution" in text
    assert "share of ID images flagged at the threshold that detects 95 % of the OOD images" in text
    found = table_of(full[2][0])
    shown = cell(found["plain", "energy", "near", "bright", "full", "aupr_id"], "aupr_id", 2)
    row = next(line for line in text.split("energy, protocol full")[1].splitlines() if line.startswith("| bright |"))
    assert row.split(" | ")[3] == shown
    assert " ± " in text.split("energy, protocol 1:5")[1]
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):  # a name with a bar in it breaks no table
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1


def test_the_terminal_shows_means_and_sets(
    full: tuple, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "50")
    evaluate.show(full[1])
    out = capsys.readouterr().out
    found = table_of(full[2][0])
    for name, label in ((MEAN, "near (mean of 2)"), ("odd <b>|[red]", "odd <b>|[red]")):
        lines = [line.split(label)[1].split() for line in out.splitlines() if line.strip().startswith(label)]
        for score, shown in zip(("msp", "energy"), lines, strict=True):  # 50 columns: a table below the other
            triple = ("auroc", "aupr_ood", "fpr95_ood_detected")
            assert shown == [cell(found["plain", score, "near", name, "full", metric], metric) for metric in triple]
    assert max(len(line.rstrip()) for line in out.splitlines() if "(" not in line) <= 50
    assert "AURC" in out


def test_mean_curves_have_the_mean_area() -> None:
    rng = np.random.default_rng(0)
    inside = rng.normal(1, 1, 3000)
    outside = [rng.normal(shift, 1.5, 900) for shift in (-1, 0, 2)]
    for curve, metric in ((eval_page.roc, "auroc"), (eval_page.precision_recall, "aupr_ood")):
        x, y = np.mean([curve(inside, part) for part in outside], axis=0)
        want = np.mean([metrics.ood(inside, part)[metric] for part in outside])
        assert np.trapezoid(y, x) + x[0] * y[0] == pytest.approx(want, abs=5e-3)


def test_help_is_quick_and_names_every_score() -> None:
    code = "import sys, pipelines.evaluate; print({'torch', 'sklearn'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
    told = getsource(EvaluateConfig)
    assert [name for name in scores.NAMES if not re.search(rf"\b{name}\b", told)] == []


def test_the_command_on_a_demo_run(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["evaluate", *arguments])
        with pytest.raises(SystemExit) as stopped:
            cli.run(evaluate.main)
        return int(stopped.value.code or 0)

    flags = ["--noise", "--scores", "msp", "--repeats", "1", "--out", str(tmp_path)]
    assert run(str(folder / "plain"), *flags) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3:] == [str(tmp_path / f"results.{kind}") for kind in ("parquet", "md", "html")]
    sets = {key[3] for key in table_of(tmp_path / "results.parquet") if key[2] == "far"}
    assert sets == {images.name for images in open_images("demo", SIZE)} | {MEAN}
    assert len(sets) == 10
    assert run(str(tmp_path)) == 1
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert told.startswith(f"error: {tmp_path}: no checkpoint.safetensors or classifier.safetensors in it")
