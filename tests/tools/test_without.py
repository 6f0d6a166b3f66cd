"""A model that lacks a piece: what the piece would have read has no effect any more."""

from __future__ import annotations

import pytest
import torch

from flm_torchrec.model.heads import ContentHead, ItemContent
from flm_torchrec.model.tower import Tower
from tests.model.test_model import changes, inputs, make_tower
from tools.studies.without import PIECES, main

CHANGED: list[tuple[type, str]] = [(Tower, "forward"), (Tower, "queries")]
CHANGED += [(owner, name) for owner in (ItemContent, ContentHead) for name in ("__init__", "forward")]


@pytest.fixture(autouse=True)
def _methods(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put back what a piece changes."""
    for owner, name in CHANGED:
        monkeypatch.setattr(owner, name, getattr(owner, name))


def test_context_rows_are_not_read() -> None:
    assert "sequential" in changes("item_context")
    PIECES["context rows"]()
    assert changes("item_context") == set()


def test_the_collaborative_head_reads_and_scores_ids() -> None:
    PIECES["collaborative rows"]()
    assert changes("item_source") == set()
    out, batch = make_tower()(**inputs()), inputs()
    torch.testing.assert_close(out.items.chunk(2, 1)[1], batch["looked"].item_id)


def test_the_content_head_is_a_network_alone() -> None:
    """Sketches say nothing, and later items of the history count no more than earlier ones."""
    PIECES["comparison"]()
    tower, batch = make_tower(), inputs()
    before = tower(**batch)
    with torch.no_grad():
        tower.content_head.recency.fill_(1.0)
    after = tower(**{**batch, "item_sketch": -batch["item_sketch"]})
    torch.testing.assert_close(before.items, after.items)
    torch.testing.assert_close(before.representations["content"], after.representations["content"])


def test_the_content_head_goes_by_the_place_of_an_item_alone() -> None:
    """Not by how long ago the item was."""

    def content(hours: int) -> torch.Tensor:
        tower, batch = make_tower(), inputs()
        if tower.content_head.elapsed is not None:
            torch.nn.init.uniform_(tower.content_head.elapsed, generator=torch.Generator().manual_seed(0))
        return tower(**{**batch, "time": batch["time"] * hours * 3600}).representations["content"]

    assert not torch.allclose(content(1), content(50))
    PIECES["elapsed"]()
    torch.testing.assert_close(content(1), content(50))


@pytest.mark.parametrize("arguments", [["rows", "train"], ["comparison", "export"]])
def test_what_there_is_not_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        main(arguments)
    assert (
        refused.value.code == 2
        and f"invalid choice: '{arguments[arguments[0] == 'comparison']}'" in capsys.readouterr().err
    )
