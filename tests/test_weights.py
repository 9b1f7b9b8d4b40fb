"""Live columns, their snapshots, and the frozen schema of the weights table."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miner.errors import MinerError
from miner.pool import INDEX_SCHEMA, uid_of
from miner.ranking import NO_RANK
from miner.weights import REASONS, TABLE, ShardState, final_table, load_weights, read_arrow, write_arrow

RULES = ("hedge", "paper", "reference", "equilibrium", "uniform", "toploss", "ntom", "dos", "poem")


def filled(rule: str, rows: int, seed: int = 0) -> ShardState:
    """A state with something, NaN and infinities too, in every column."""
    rng = np.random.default_rng(seed)
    state = ShardState.fresh(rule, rows)
    for column in state.columns.values():
        if column.dtype.kind == "f":
            column[:] = rng.normal(0, 3, rows)
            column[rng.random(rows) < 0.1] = np.nan
            column[rng.random(rows) < 0.05] = -np.inf
        else:
            column[:] = rng.integers(0, 5, rows)
    state.swept, state.averaged = 4, 3
    return state


@pytest.mark.parametrize("rule", RULES)
def test_a_snapshot_comes_back_bit_for_bit(tmp_path: Path, rule: str) -> None:
    state = filled(rule, 257)
    state.write(tmp_path / "a.arrow")
    again = ShardState.read(tmp_path / "a.arrow")
    assert (again.rule, again.swept, again.averaged) == (rule, 4, 3)
    assert again.columns.keys() == state.columns.keys()
    for name, column in state.columns.items():
        assert again[name].dtype == column.dtype
        assert again[name].tobytes() == column.tobytes()
        again[name][:1] += 1  # and it can be played on with
    state.write(tmp_path / "b.arrow")
    assert (tmp_path / "a.arrow").read_bytes() == (tmp_path / "b.arrow").read_bytes()


def test_a_cut_off_snapshot_is_named(tmp_path: Path) -> None:
    path = tmp_path / "shard-000000.arrow"
    filled("hedge", 5).write(path)
    data = path.read_bytes()
    for size in (*range(64), *range(64, len(data), 37), len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(MinerError, match=r"shard-000000\.arrow: ") as caught:
            ShardState.read(path)
        assert "\n" not in str(caught.value), size


def test_no_damaged_byte_gives_anything_but_a_plain_error(tmp_path: Path) -> None:
    path = tmp_path / "shard-000000.arrow"
    state = ShardState.fresh("hedge", 3)
    state.write(path)
    data = path.read_bytes()
    said = []
    for at in range(0, len(data), 3):
        path.write_bytes(data[:at] + bytes([data[at] ^ (0x80 if at % 2 else 1)]) + data[at + 1 :])
        try:
            ShardState.read(path)
        except MinerError as error:
            said.append(str(error))
    assert len(said) > 200
    assert all(text.startswith(f"{path}: ") and "\n" not in text for text in said)


@pytest.mark.parametrize("garbage", [b"ARROW1\0\0", b"\0" * 4096, b"PAR1" * 100, b'{"not": "arrow"}'])
def test_what_is_no_arrow_file_is_named(tmp_path: Path, garbage: bytes) -> None:
    (tmp_path / "x.arrow").write_bytes(garbage)
    with pytest.raises(MinerError, match=r"x\.arrow: cannot be read as Arrow"):
        ShardState.read(tmp_path / "x.arrow")
    with pytest.raises(MinerError, match=r"y\.arrow: cannot be read as Arrow"):
        read_arrow(tmp_path / "y.arrow")


def test_a_snapshot_of_another_kind_is_refused(tmp_path: Path) -> None:
    state = filled("paper", 3)
    state.write(tmp_path / "a.arrow")
    table = read_arrow(tmp_path / "a.arrow")
    for other in (table.drop_columns(["momentum"]), table.replace_schema_metadata(None)):
        write_arrow(other, tmp_path / "b.arrow")
        with pytest.raises(MinerError, match=r"b\.arrow: not a weights snapshot of this version"):
            ShardState.read(tmp_path / "b.arrow")


# --- the weights table ---


def test_the_schema_is_frozen() -> None:
    """Other programs read this table: change it only together with its version and every reader."""
    assert [(field.name, str(field.type), field.nullable) for field in TABLE] == [
        ("uid", "string", False),
        ("key", "string", False),
        ("shard", "int32", False),
        ("row", "int32", False),
        ("label", "int32", True),
        ("weight", "float", False),
        ("loss", "float", True),
        ("loss_mean", "float", True),
        ("visits", "uint32", False),
        ("rank", "uint64", True),
        ("nn_id_row", "int32", True),
        ("nn_id_cosine", "float", True),
        ("nn50_id_cosine", "float", True),
        ("stratum", "int32", True),
        ("excluded_by", "dictionary<values=string, indices=int8, ordered=0>", True),
    ]
    assert REASONS == ("", "exclude-list", "duplicate", "decode", "near-id", "id-duplicate")


def index(rows: int, shard: int = 2) -> pa.Table:
    columns = {
        "uid": [uid_of(bytes([i])) for i in range(rows)],
        "key": [f"{i:03d}" for i in range(rows)],
        "shard": [shard] * rows,
        "row": list(range(rows)),
        "label": [None, *range(1, rows)],
    }
    return pa.table(columns, schema=pa.schema([INDEX_SCHEMA.field(name) for name in columns]))


def test_final_table(tmp_path: Path) -> None:
    state = ShardState.fresh("paper", 6)
    state.exclude(np.array([1]), "exclude-list")
    state.exclude(np.array([2]), "duplicate")
    state.exclude(np.array([3]), "decode")
    state.apply_losses(0, np.array([0.5, np.nan, np.nan, np.nan, 1.5, 2.5], np.float32))
    state["nn_id_row"][[0, 4, 5]] = 7, 0, 9
    state["nn_id_cosine"][[0, 4, 5]] = 0.5, 0.75, 0.25
    state["nn50_id_cosine"][[0, 4, 5]] = 0.25, 0.5, 0.125
    state.exclude(np.array([5]), "near-id")
    state["state"][:] = [3.0, 99, 99, 99, 1.0, 99]
    state["stratum"][4] = 2
    rank = np.array([1, NO_RANK, NO_RANK, NO_RANK, 0, NO_RANK], np.uint64)
    table = final_table(index(6), state, 0.5, rank, {"seed": "3"})
    assert table.schema.equals(TABLE.with_metadata({"seed": "3"}), check_metadata=True)
    found = table.to_pydict()
    assert found["uid"] == [uid_of(bytes([i])) for i in range(6)]
    assert found["label"] == [None, 1, 2, 3, 4, 5]
    assert found["weight"] == [1.5, 0.0, 0.0, 0.0, 0.5, 0.0]
    assert found["loss"] == [0.5, None, None, None, 1.5, 2.5]
    assert found["loss_mean"] == [0.5, None, None, None, 1.5, 2.5]
    assert found["visits"] == [1, 0, 0, 0, 1, 1]
    assert found["rank"] == [1, None, None, None, 0, None]
    assert found["nn_id_row"] == [7, None, None, None, 0, 9]
    assert found["nn_id_cosine"] == [0.5, None, None, None, 0.75, 0.25]
    assert found["nn50_id_cosine"] == [0.25, None, None, None, 0.5, 0.125]
    assert found["stratum"] == [0, 0, 0, 0, 2, 0]
    assert found["excluded_by"] == [None, "exclude-list", "duplicate", "decode", None, "near-id"]
    (tmp_path / "weights").mkdir()
    write_arrow(table, tmp_path / "weights" / "shard-000001.arrow")
    write_arrow(table.slice(0, 0), tmp_path / "weights" / "shard-000000.arrow")
    assert load_weights(tmp_path).equals(table)
    assert load_weights(tmp_path).schema.metadata == {b"seed": b"3"}


def test_a_shard_without_exclusions_and_one_with_nothing_else() -> None:
    state = ShardState.fresh("uniform", 3)
    rank = np.arange(3, dtype=np.uint64)
    assert final_table(index(3), state, 1.0, rank, {})["excluded_by"].null_count == 3
    state.exclude(np.ones(3, bool), "decode")
    table = final_table(index(3), state, 1.0, rank, {})
    assert table["excluded_by"].to_pylist() == ["decode"] * 3
    assert table["rank"].null_count == 3
    assert table["weight"].to_pylist() == [0, 0, 0]


def test_a_run_without_a_weights_table(tmp_path: Path) -> None:
    with pytest.raises(MinerError, match=r"no weights/shard-\*\.arrow here"):
        load_weights(tmp_path)


# --- exclusions and losses ---


def test_the_first_reason_stays() -> None:
    state = ShardState.fresh("hedge", 4)
    state.exclude(np.array([True, False, False, False]), "exclude-list")
    state.exclude(np.array([0, 1]), "duplicate")
    state.exclude(np.array([1, 1, 2]), "near-id")
    state.exclude(np.array([], dtype=np.int64), "decode")
    assert [REASONS[code] for code in state["excluded"]] == ["exclude-list", "duplicate", "near-id", ""]
    assert state.eligible.tolist() == [False, False, False, True]


@pytest.mark.parametrize("rule", RULES)
def test_fresh_weights_are_even_and_excluded_ones_nothing(rule: str) -> None:
    state = ShardState.fresh(rule, 5)
    state.exclude(np.array([2]), "decode")
    expected = np.log(2.0) if rule == "reference" else 1.0
    assert state.weight() == pytest.approx([expected, expected, 0, expected, expected])
    assert np.isnan(state.loss_mean()).all()
    sums_of_nothing = state.outcome()
    assert sums_of_nothing[2] == 0


@settings(derandomize=True, deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=12), st.integers(0, 99))
def test_losses_of_a_round_count_once(rounds: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    state = ShardState.fresh("hedge", 6)
    state.exclude(np.array([4]), "duplicate")
    losses = [rng.exponential(1.0, 6).astype(np.float32) for _ in range(7)]
    applied: list[int] = []
    for round_ in rounds:
        state.apply_losses(round_, losses[round_])
        if not applied or round_ > applied[-1]:
            applied.append(round_)
    keep = np.arange(6) != 4
    total = np.sum([losses[r].astype(np.float64) for r in applied], axis=0)
    np.testing.assert_allclose(state["loss_sum"][keep], total[keep], rtol=1e-15)
    np.testing.assert_allclose(state.loss_mean()[keep], total[keep] / len(applied), rtol=1e-15)
    assert state["visits"].tolist() == [len(applied) * int(k) for k in keep]
    assert np.isnan(state.loss_mean()[4])
    assert state["loss"].tobytes() == losses[applied[-1]].tobytes()


def test_sums_leave_out_excluded_rows() -> None:
    state = ShardState.fresh("paper", 4)
    state.exclude(np.array([3]), "decode")
    state["state"][:] = 1, 2, 3, 1e9
    state.apply_losses(0, np.array([1, 2, 4, np.nan], np.float32))
    assert state.sums() == (3, 6, 17, 7, 21, 14)
