"""Recommendations for many users are those for each user alone, and those of the server; files are whole or absent."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flm_torchrec.cli import main
from flm_torchrec.config.heads import FUSED, HEADS, REPRESENTATIONS
from flm_torchrec.data.dataset import PreparedData, Ragged
from flm_torchrec.errors import RunError
from flm_torchrec.export import ranker as ranker_module
from flm_torchrec.export.index import Groups, ItemIndex
from flm_torchrec.export.manifest import IndexKind, Quantise
from flm_torchrec.export.ranker import LeftOut
from flm_torchrec.export.recommend import COLUMNS, ExportRecommender, RecommendOptions
from flm_torchrec.export.recommend_file import write_recommendations
from flm_torchrec.export.vectors import decode
from flm_torchrec.export.write import ExportOptions, export
from flm_torchrec.mixture import Mixture
from flm_torchrec.serve.catalogue import load_catalogue
from flm_torchrec.serve.loaded_export import AddedItems, LoadedExport, Query
from tests.evaluation.test_ranking import Alone
from tests.export.test_export import MadeUp, source_of

MIXTURE = Mixture((1.5, 2.0, 1.0), (-3.0, 0.25, 1.0))


def write_mixture(data: PreparedData, folder: Path, index: IndexKind = "flat", quantise: Quantise = "none") -> Path:
    encoder = MadeUp(data)
    encoder.mixture = MIXTURE
    options = ExportOptions(index=index, quantise=quantise, user_block=32, item_block=64, part_rows=50)
    export(replace(source_of(data), encoder=encoder), Alone(), folder, options)
    return folder


@pytest.fixture(scope="module")
def mixed(small: PreparedData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of three parts of users whose fusion is a mixture."""
    return write_mixture(small, tmp_path_factory.mktemp("mixed") / "one")


def rows_of(file: Path) -> dict[str, list[tuple[int, str, str, float]]]:
    """By user, rank, item, title and score."""
    found: dict[str, list[tuple[int, str, str, float]]] = {}
    for row in pq.read_table(file).to_pylist():
        found.setdefault(row.pop("user"), []).append(tuple(row.values()))
    return found


def alone(recommender: ExportRecommender, user: str, options: RecommendOptions) -> list[tuple[int, str, str, float]]:
    one = recommender.recommend(user, options.k, options.head, options.include_seen, options.filter)
    return [(rank, r.item_key, r.title, r.score) for rank, r in enumerate(one, start=1)]


@pytest.mark.parametrize("index", ["flat", "hnsw", "none"])
def test_a_file_for_all_has_what_each_user_is_answered(
    small: PreparedData, tmp_path: Path, index: IndexKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit by bit, in blocks of any size, for every head, the mixture, and with a filter."""
    monkeypatch.setattr(ranker_module, "BLOCK", 7)
    folder = write_mixture(small, tmp_path / "out", index, "int8" if index == "none" else "none")
    recommender = ExportRecommender(folder)
    some = RecommendOptions(filter={"genre": ["war", "comedy"]}, k=4)
    asked = [RecommendOptions(head=head, k=3) for head in REPRESENTATIONS]
    for number, options in enumerate([*asked, some, RecommendOptions(include_seen=True, k=60)]):
        written = write_recommendations(recommender, tmp_path / f"{number}.parquet", options)
        found = rows_of(tmp_path / f"{number}.parquet")
        assert written.users == len(found) == 120 and written.rows == sum(map(len, found.values()))
        assert list(found) == small.user_keys
        for user in small.user_keys[::17]:
            assert found[user] == alone(recommender, user, options)


def test_a_file_by_all_heads_is_those_of_each(
    mixed: Path, small: PreparedData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recommender, output = ExportRecommender(mixed), tmp_path / "all.parquet"
    filtered = RecommendOptions(k=4, filter={"genre": ["war"]})
    command = ["recommend", "--export", str(mixed), "-k", "4", "--filter", "genre=war", "--head", "all"]
    assert main([*command, "--all", "--output", str(output)]) == 0
    assert "by all heads for 120 users" in capsys.readouterr().out
    found = pl.read_parquet(output)
    assert found["head"].unique(maintain_order=True).to_list() == list(recommender.manifest.heads)
    for head in recommender.manifest.heads:
        write_recommendations(recommender, tmp_path / f"{head}.parquet", replace(filtered, head=head))
        assert found.filter(pl.col("head") == head).drop("head").equals(pl.read_parquet(tmp_path / f"{head}.parquet"))
    two = pa.array(["u3", "u7"])
    some = write_recommendations(recommender, tmp_path / "some.parquet", RecommendOptions(2, "all"), two)
    assert (some.users, some.rows) == (2, 4 * len(recommender.manifest.heads))
    assert main([*command, "--user", "u1"]) == 2
    assert "--head 'all': choose one of" in capsys.readouterr().err


@pytest.mark.parametrize("head", ["fused", "content"])
def test_the_server_ranks_the_same_vectors_alike(mixed: Path, tmp_path: Path, head: str) -> None:
    """A mixture, a head, seen items left out, and a filter."""
    recommender = ExportRecommender(mixed)
    users = recommender.users.table(["user_key", "seen", *HEADS])
    nothing: Any = None
    blank = np.zeros((0, recommender.manifest.dim), np.float32)
    loaded = LoadedExport(
        number=1,
        rows="",
        folder=mixed,
        manifest=recommender.manifest,
        tower=nothing,
        catalogue=load_catalogue(mixed, recommender.manifest),
        user_of={},
        seen=users["seen"],
        added=AddedItems((), blank, blank),
    )
    for wanted in ({}, {"genre": loaded.catalogue.attributes["genre"].top(1)}):
        output = tmp_path / f"{len(wanted)}.parquet"
        write_recommendations(recommender, output, RecommendOptions(8, head, filter=wanted))
        found = rows_of(output)
        for row in range(0, 120, 13):
            vectors = np.concatenate([decode(users[h])[row : row + 1] for h in HEADS])
            query = Query(vectors, loaded.manifest.mixture) if head == FUSED else Query(vectors[:1])
            best = loaded.best(query, 8, np.array(users["seen"][row].as_py()), wanted)
            mine = found[users["user_key"][row].as_py()]
            assert [item for _, item, _, _ in mine] == [loaded.key(item) for item, _ in best]
            np.testing.assert_allclose([score for *_, score in mine], [score for _, score in best], atol=1e-5)


def test_many_queries_find_what_each_finds_alone() -> None:
    """faiss multiplies matrices for many queries, whose sums depend on the block; items may have equal vectors."""
    rng = np.random.default_rng(0)
    distinct = rng.standard_normal((700, 128)).astype(np.float32)
    rows = np.concatenate([np.arange(700), rng.integers(0, 700, 200)])
    flat = faiss.IndexFlatIP(128)
    flat.add(distinct)
    index = ItemIndex(flat, Groups.of(rows, 700))
    queries = rng.standard_normal((1100, 128)).astype(np.float32)
    scores, items = index.search(queries, 15)
    for q in range(0, 1100, 53):
        one_score, one = index.search(queries[q : q + 1], 15)
        assert items[q].tolist() == one[0].tolist() and scores[q].tolist() == one_score[0].tolist()
    plain = queries[:1].astype(np.float64) @ distinct[rows].T.astype(np.float64)
    assert items[0].tolist() == np.lexsort((np.arange(900), -plain[0].round(4)))[:15].tolist()


def test_left_out_items_are_those_of_the_users_events() -> None:
    rng = np.random.default_rng(0)
    for users in (1, 2, 7):
        seen = [rng.integers(0, 10, rng.integers(0, 6)).tolist() for _ in range(users)]
        flat = np.array([item for row in seen for item in row], np.int64)
        left_out = LeftOut.of(Ragged(np.cumsum([0, *map(len, seen)]), flat), 10)
        items = np.tile(np.arange(-1, 10), (users, 1))
        want = [[item in row for item in range(-1, 10)] for row in seen[::-1]]
        assert left_out.has(np.arange(users)[::-1], items).tolist() == want
        assert left_out.lengths.tolist() == [len(set(row)) for row in seen]


def test_users_of_a_file_are_answered_once(mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "ids.txt").write_text("u7\n\n u3 \nu7\nu110\n\n")
    pl.DataFrame({"age": [1, 2, 3], "user_id": ["u110", "u3", "u7"]}).write_csv(tmp_path / "ids.csv")
    pl.DataFrame({"user": ["u110", "u3", "u7"]}).write_parquet(tmp_path / "ids.parquet")
    for kind in ("txt", "csv", "parquet"):
        output = tmp_path / f"of-{kind}.parquet"
        command = ["recommend", "--export", str(mixed), "--users", str(tmp_path / f"ids.{kind}"), "-k", "5"]
        assert main([*command, "--output", str(output)]) == 0
        assert "15 recommendations by fused for 3 users" in capsys.readouterr().out
        assert pq.read_schema(output).equals(COLUMNS)
        found = rows_of(output)
        assert list(found) == ["u3", "u7", "u110"]
        assert found["u7"] == alone(ExportRecommender(mixed), "u7", RecommendOptions(k=5))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--all", "-k", "0"], "-k 0: ask for at least 1"),
        (["--all", "-k", "150"], "-k 150: the export has 149 items; ask for at most as many"),
        (["--all", "--head", "fusd"], "--head 'fusd': choose one of"),
        (["--all", "--filter", "gerne=war"], "filter: no feature 'gerne'; did you mean 'genre'?"),
        (["--all", "--filter", "genre=waar"], "filter.genre: no value 'waar'; did you mean 'war'?"),
        (["--all", "--filter", "genre"], "--filter 'genre': write it as FEATURE=VALUE"),
        (["--users", "{d}/ids.txt"], "user 'uu7' and 1 more: not in"),
        (["--users", "{d}/ids.csv"], "no column 'user|user_id|user_key'"),
        (["--users", "{d}/gap.txt"], "gap.txt: row 3 has no id"),
        (["--users", "{d}/none.txt"], "none.txt: cannot be read"),
        (["--users", "{d}/empty.txt"], "empty.txt: has no ids"),
        (["--all", "--json"], "--output: name the Parquet file"),
        (["--user", "u1"], "--output: is of --users and --all"),
        (["--all", "--output", "{d}/recs.csv"], "give an --output that ends in .parquet"),
        (["--all", "--output", "{d}/mine.parquet", "--overwrite"], "holds no recommendations, so it is not replaced"),
        (["--all", "--output", "{d}/folder.parquet", "--overwrite"], "so it is not replaced"),
    ],
)
def test_what_is_wrong_is_one_line_and_nothing_is_written(
    mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], told: str
) -> None:
    (tmp_path / "ids.txt").write_text("u1\nuu7\nmadam\n")
    (tmp_path / "ids.csv").write_text("person\nu1\n")
    (tmp_path / "gap.txt").write_text("u1\n\nnull\nu2\n")
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "mine.parquet").write_text("mine")
    (tmp_path / "folder.parquet").mkdir()
    before = sorted(tmp_path.iterdir())
    given = [part.replace("{d}", str(tmp_path)) for part in options]
    output = [] if "--output" in given else ["--output", str(tmp_path / "recs.parquet")]
    assert main(["recommend", "--export", str(mixed), *given, *output]) == 2
    err = capsys.readouterr().err
    assert told in err and err.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before and (tmp_path / "mine.parquet").read_text() == "mine"


def test_an_older_file_stays_unless_a_whole_one_replaces_it(
    mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, recommender = tmp_path / "recs.parquet", ExportRecommender(mixed)
    write_recommendations(recommender, output, RecommendOptions(2))
    older = output.read_bytes()
    with pytest.raises(RunError, match="--overwrite to replace it"):
        write_recommendations(recommender, output, RecommendOptions(3))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(pq.ParquetWriter, "write_table", full)
        with pytest.raises(RunError, match=r"recs\.parquet: No space left on device"):
            write_recommendations(recommender, output, RecommendOptions(3), overwrite=True)
    assert output.read_bytes() == older and list(tmp_path.iterdir()) == [output]
    write_recommendations(recommender, output, RecommendOptions(3), pa.array(["u5"]), overwrite=True)
    assert [len(rows) for rows in rows_of(output).values()] == [3]


def test_a_filter_that_leaves_few_items_gives_these(mixed: Path, small: PreparedData, tmp_path: Path) -> None:
    recommender = ExportRecommender(mixed)
    names = recommender.items.table(["item_key", "attr_genre"]).to_pylist()
    war = {row["item_key"] for row in names if "war" in row["attr_genre"]}
    options = RecommendOptions(149, filter={"genre": ["war"]})
    write_recommendations(recommender, tmp_path / "w.parquet", options)
    for user, rows in rows_of(tmp_path / "w.parquet").items():
        at = small.user_keys.index(user)
        seen = {small.item_keys[i] for i in small.item[small.offsets[at] : small.offsets[at + 1]]}
        assert {item for _, item, _, _ in rows} == war - seen
