"""Texts as vectors of a frozen encoder on disk."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from flm_torchrec.cli import main
from flm_torchrec.data.dataset import load_prepared
from flm_torchrec.errors import DataError
from flm_torchrec.prepare import text_vectors as module
from flm_torchrec.prepare.column_options import parse_kinds
from flm_torchrec.prepare.text_encoder import TextEncoder, encoder_digest
from flm_torchrec.prepare.text_vectors import text_vectors

WORDS = ["[UNK]", "[PAD]", "red", "blue", "nail", "polish", "running", "shoe"]
WIDTH = 4


def _tokenizer():  # type: ignore[no-untyped-def]
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return tokenizer


def vectors_of_words(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((len(WORDS), WIDTH)).astype(np.float32)


def static(folder: Path, seed: int = 0) -> Path:
    """A folder of model2vec."""
    model2vec = pytest.importorskip("model2vec")
    model2vec.StaticModel(vectors_of_words(seed), _tokenizer(), config={"model_type": "model2vec"}).save_pretrained(
        folder
    )
    return folder


def as_onnx(folder: Path, pooling: str = "") -> Path:
    """An ONNX model that looks its tokens up."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    helper, kind = onnx.helper, onnx.TensorProto
    ids = [helper.make_tensor_value_info(n, kind.INT64, ["b", "l"]) for n in ("input_ids", "attention_mask")]
    out = helper.make_tensor_value_info("last_hidden_state", kind.FLOAT, ["b", "l", WIDTH])
    table = onnx.numpy_helper.from_array(vectors_of_words(0), "table")
    graph = helper.make_graph(
        [helper.make_node("Gather", ["table", "input_ids"], [out.name])], "g", ids, [out], [table]
    )
    folder.mkdir(parents=True)
    onnx.save(
        helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 17)]), folder / "model.onnx"
    )
    _tokenizer().save(str(folder / "tokenizer.json"))
    if pooling:
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text(json.dumps({f"pooling_mode_{pooling}": True}))
    return folder


def expected(text: str, first: bool = False) -> np.ndarray:
    """The mean of the words' vectors, or the first one, with a mean square of 1."""
    rows = vectors_of_words(0)[[WORDS.index(word) for word in text.split()]]
    vector = rows[0] if first else rows.mean(0)
    return vector / np.sqrt((vector**2).mean())


TEXTS = ["red nail polish", "shoe", "blue running shoe", "red nail polish"]


def test_both_kinds_give_the_mean_of_the_tokens(tmp_path: Path) -> None:
    for folder in (static(tmp_path / "static"), as_onnx(tmp_path / "onnx")):
        found = TextEncoder(folder).encode(TEXTS)
        np.testing.assert_allclose(found, [expected(t) for t in TEXTS], rtol=1e-4, atol=1e-5)


def test_the_pooling_of_the_folder_counts(tmp_path: Path) -> None:
    found = TextEncoder(as_onnx(tmp_path / "first", "cls_token")).encode(TEXTS)
    np.testing.assert_allclose(found, [expected(t, first=True) for t in TEXTS], rtol=1e-5)
    with pytest.raises(DataError, match="pools by pooling_mode_max_tokens, not by the first token or the mean"):
        TextEncoder(as_onnx(tmp_path / "most", "max_tokens"))


def test_the_digest_is_of_what_makes_vectors(tmp_path: Path) -> None:
    one, same, other = (as_onnx(tmp_path / name) for name in ("one", "same", "other"))
    (same / "README.md").write_text("another page")
    (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text().replace('"blue"', '"green"'))
    assert encoder_digest(one) == encoder_digest(same) != encoder_digest(other)


def test_a_cache_is_used_by_its_encoder_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, cache = as_onnx(tmp_path / "onnx"), str(tmp_path / "cache")
    column = pl.Series("title", ["shoe", None, "  ", "red", "shoe "])
    found = text_vectors(column, folder, "a", cache)
    assert found.is_null().to_list() == [False, True, True, False, False] and found.name == "title_vector"
    np.testing.assert_allclose(found[4].to_list(), expected("shoe"), rtol=1e-5)
    encoded: list[str] = []

    class Counting(TextEncoder):
        def encode(self, texts):  # type: ignore[no-untyped-def]
            encoded.extend(texts)
            return super().encode(texts)

    monkeypatch.setattr(module, "TextEncoder", Counting)
    again = text_vectors(pl.Series("title", ["red", "blue", "shoe"]), folder, "a", cache)
    assert encoded == ["blue"]
    assert again[0].to_list() == found[3].to_list()
    text_vectors(column, folder, "b", cache)
    assert encoded == ["blue", "shoe", "red"]
    (tmp_path / "cache" / "c.sqlite").write_text("no database, but long enough to be read as one" * 9)
    with pytest.raises(DataError, match=r"--text-cache .*cache: file is not a database; give another folder"):
        text_vectors(column, folder, "c", cache)
    with sqlite3.connect(tmp_path / "cache" / "a.sqlite") as store:
        assert store.execute("SELECT count(*) FROM vectors").fetchone() == (3,)


def prepared(folder: Path, encoder: str, *options: str) -> int:
    """The exit code of `flm prepare` of six items with texts."""
    folder.parent.mkdir(exist_ok=True)
    events, items = folder.parent / "events.csv", folder.parent / "items.csv"
    rows = [f"u{u},i{(u + n) % 6},{n}" for u in range(12) for n in range(5)]
    events.write_text("\n".join(["user_id,item_id,timestamp", *rows]))
    texts = ["red nail polish", "blue nail polish", "running shoe", "blue shoe", "red", ""]
    items.write_text("\n".join(["item_id,title", *(f"i{n},{text}" for n, text in enumerate(texts))]))
    given = ["--source", "csv", "--input", str(events), "--items", str(items), "--title", "title"]
    return main(["prepare", *given, f"--item-features=title:text@{encoder}", "--output", str(folder), *options])


def test_data_have_words_and_vectors(tmp_path: Path) -> None:
    encoder = as_onnx(tmp_path / "onnx")
    assert prepared(tmp_path / "data", str(encoder), "--text-cache", str(tmp_path / "cache")) == 0
    data = load_prepared(tmp_path / "data")
    words, vector = data.schema.features
    assert (words.name, words.kind, vector.name, vector.kind) == ("title", "text", "title_vector", "dense")
    assert vector.width == WIDTH and vector.encoder == encoder_digest(encoder)
    np.testing.assert_allclose(data.items.dense[2], expected("running shoe"), rtol=1e-5)
    assert not data.items.dense[5].any()


def test_data_of_another_encoder_are_not_joined(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = as_onnx(tmp_path / "one"), static(tmp_path / "other")
    for name, encoder in (("books", one), ("shop", other)):
        assert prepared(tmp_path / name, str(encoder)) == 0
    data, shop = str(tmp_path / "books"), str(tmp_path / "shop")
    assert main(["join", data, shop, "--output", str(tmp_path / "joint")]) == 2
    told = capsys.readouterr().err
    assert f"feature 'title_vector': its encoder is {encoder_digest(one)} in" in told and told.count("\n") == 1


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("title:text@{}/none", "none: not found; give the folder of a text encoder"),
        ("title:text@{}", "no text encoder; give a folder of model2vec"),
        ("title:text@", "no text encoder"),
        ("title:dense@{}", "only a text has an encoder"),
        ("title:texts@{}", "is not COLUMN:KIND"),
        ("title:text@{}/onnx,title_vector:dense", "'title_vector' is where the vectors of 'title' go"),
    ],
)
def test_what_cannot_encode_is_one_line(given: str, reason: str, tmp_path: Path) -> None:
    as_onnx(tmp_path / "onnx")
    with pytest.raises(DataError, match=reason) as told:
        parse_kinds(given.format(tmp_path), "--item-features")
    assert str(told.value).startswith("--item-features: ") and "\n" not in str(told.value)


def test_a_damaged_encoder_is_one_line_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = as_onnx(tmp_path / "onnx")
    for name, content in (("model.onnx", b"\x00nothing"), ("tokenizer.json", b"{}")):
        kept = (folder / name).read_bytes()
        (folder / name).write_bytes(content)
        assert prepared(tmp_path / "data", str(folder)) == 2
        told = capsys.readouterr().err
        assert "cannot encode (" in told and told.count("\n") == 1 and not (tmp_path / "data").exists()
        (folder / name).write_bytes(kept)


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = as_onnx(tmp_path / "onnx")
    monkeypatch.setattr("flm_torchrec.prepare.text_encoder.find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"needs onnxruntime; pip install 'flm_torchrec\[text\]'"):
        parse_kinds(f"title:text@{folder}", "--item-features")
    (folder / "model.onnx").unlink()
    (folder / "modules.json").write_text("[]")
    with pytest.raises(DataError, match="needs sentence_transformers; pip install sentence-transformers"):
        parse_kinds(f"title:text@{folder}", "--item-features")
