"""Synthetic logs with planted structure: not data about people, a proof that each head learns its own signal.

Each event is drawn by one of three mechanisms, chosen by chance in proportion to their strengths:

* content: the user likes some genres, brands and price, all visible as features of the items; the user's own
  features hint at the taste;
* collaborative: users and items have hidden groups that no feature reveals, only co-occurrence does;
* sequential: each item has a few successors, independent of features and groups.

All are mixed with a popularity skew, and no user meets an item twice. As p(item | user, item before) is known,
so are the scores of an oracle that ranks by it: nothing can do better on average.
"""

from __future__ import annotations

from dataclasses import dataclass


import numpy as np
import polars as pl

from flm_torchrec.data.raw import Declared, Raw
from flm_torchrec.errors import DataError

MECHANISMS = ("content", "collaborative", "sequential")
GENRES = ("comedy", "drama", "history", "horror", "music", "nature", "romance", "science", "sport", "travel", "war", "western")
BRANDS = 40
GROUPS = 16
SUCCESSORS = 5
START = 1_600_000_000
"""Unix seconds of the first event."""
DAY = 86_400
ADJECTIVES = ("Amber", "Bold", "Calm", "Distant", "Eager", "Frozen", "Golden", "Hidden", "Iron", "Jade", "Last", "Silent")
NOUNS = ("Bridge", "Candle", "Door", "Engine", "Forest", "Garden", "Harbour", "Island", "Letter", "Mirror", "River", "Tower")


@dataclass(frozen=True)
class Recipe:
    """Size and strengths."""

    users: int = 4000
    items: int = 1000
    events: int = 40
    """Mean events a user."""
    content: float = 1.0
    collaborative: float = 1.0
    sequential: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class World:
    """What was planted: each mechanism's probabilities, rows of which sum to 1."""

    share: np.ndarray  # [3] chance of each mechanism
    content: np.ndarray  # [users, items]
    collaborative: np.ndarray  # [users, items]
    sequential: np.ndarray  # [items, items], by the item before
    genre: np.ndarray  # [items]
    brand: np.ndarray  # [items]
    price: np.ndarray  # [items]
    taste: np.ndarray  # [users] favourite genre


def read(recipe: Recipe) -> Raw:
    """Draw the logs; the same for the same recipe.

    Raises:
        DataError: sizes or strengths that leave nothing to draw.
    """
    if recipe.items < 100 or recipe.users < 10 or not 3 <= recipe.events <= recipe.items // 4:
        raise DataError(
            f"synthetic: {recipe.users} users, {recipe.items} items, {recipe.events} events a user do not go"
            " together; give at least 10 users, 100 items, and from 3 events to a quarter of the items"
        )
    strengths = np.array([recipe.content, recipe.collaborative, recipe.sequential])
    if (strengths < 0).any() or strengths.sum() == 0:
        raise DataError("synthetic: strengths must be 0 or more, one of them above 0")
    rng = np.random.default_rng(recipe.seed)
    world = _world(recipe, strengths / strengths.sum(), rng)
    item, mechanism, lengths = _draw(recipe, world, rng)
    return Raw(
        name="synthetic",
        source="synthetic",
        interactions=_frame(item, mechanism, lengths, rng),
        items=_items(world, rng),
        users=_users(world, rng),
        features=(
            Declared("title", "item", "text"),
            Declared("genre", "item", "categorical"),
            Declared("brand", "item", "categorical"),
            Declared("price", "item", "numeric"),
            Declared("interests", "user", "multi_categorical"),
        ),
        title="title",
        notes={"synthetic": "made up from a seed; not data about people", "oracle": _oracle(world, item, mechanism, lengths)},
    )


def _world(recipe: Recipe, share: np.ndarray, rng: np.random.Generator) -> World:
    users, items = recipe.users, recipe.items
    popularity = 1.0 / (np.arange(items) + 20.0) ** 0.7
    rng.shuffle(popularity)
    genre, brand = rng.integers(len(GENRES), size=items), rng.integers(BRANDS, size=items)
    price = rng.lognormal(3.0, 0.6, size=items)
    taste, second = rng.integers(len(GENRES), size=users), rng.integers(len(GENRES), size=users)
    brands = rng.integers(BRANDS, size=(users, 4))
    budget = rng.normal(3.0, 0.6, size=users)
    liking = 3.0 * (genre == taste[:, None]) + 1.5 * (genre == second[:, None])
    liking += 2.0 * (brand == brands[:, :, None]).any(1) - 0.5 * ((np.log(price) - budget[:, None]) / 0.6) ** 2
    group, member = rng.integers(GROUPS, size=items), rng.integers(GROUPS, size=users)
    together = np.where(group == member[:, None], 4.0, 0.0)
    successors = np.zeros((items, items))
    chosen = np.argsort(rng.random((items, items)), axis=1)[:, :SUCCESSORS]
    np.put_along_axis(successors, chosen, rng.dirichlet(np.full(SUCCESSORS, 2.0), size=items), axis=1)
    return World(
        share=share,
        content=_rows_to_one(np.exp(liking) * popularity),
        collaborative=_rows_to_one(np.exp(together) * popularity),
        # A little of everything, so that an item whose successors are all used up still leads somewhere.
        sequential=_rows_to_one(successors + 0.05 * popularity / popularity.sum()),
        genre=genre, brand=brand, price=price, taste=taste,
    )  # fmt: skip


def _draw(recipe: Recipe, world: World, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Items and mechanisms [users, longest] and lengths [users]: all users step by step together."""
    users = np.arange(recipe.users)
    spread = max(1, recipe.events // 2)
    lengths = np.clip(rng.integers(recipe.events - spread, recipe.events + spread + 1, recipe.users), 3, None)
    longest = int(lengths.max())
    item = np.zeros((recipe.users, longest), np.int64)
    mechanism = rng.choice(len(MECHANISMS), size=(recipe.users, longest), p=world.share)
    unseen = np.ones((recipe.users, recipe.items))
    for step in range(longest):
        before = item[:, step - 1] if step else rng.integers(recipe.items, size=recipe.users)
        tables = np.stack([world.content, world.collaborative, world.sequential[before]])
        chances = tables[mechanism[:, step], users] * unseen
        ladder = np.cumsum(chances, axis=1)
        aim = rng.random(recipe.users) * ladder[:, -1]
        item[:, step] = np.minimum((ladder <= aim[:, None]).sum(1), recipe.items - 1)
        unseen[users, item[:, step]] = 0.0
    return item, mechanism, lengths


def _frame(item: np.ndarray, mechanism: np.ndarray, lengths: np.ndarray, rng: np.random.Generator) -> pl.DataFrame:
    there = np.arange(item.shape[1]) < lengths[:, None]
    begin = rng.integers(0, 180 * DAY, size=(len(item), 1))
    time = START + begin + np.cumsum(rng.integers(60, 3 * DAY, size=item.shape), axis=1)
    user = np.broadcast_to(np.arange(len(item))[:, None], item.shape)
    return pl.DataFrame(
        {"file": "synthetic", "row": np.arange(1, there.sum() + 1), "user": user[there], "item": item[there]}
    ).with_columns(
        user=pl.format("u{}", "user"),
        item=pl.format("i{}", "item"),
        timestamp=pl.Series(time[there]),
        event=pl.lit("view"),
        value=pl.lit(1.0),
        segment=pl.Series(np.array(MECHANISMS)[mechanism[there]]),
    )


def _items(world: World, rng: np.random.Generator) -> pl.DataFrame:
    count = len(world.genre)
    words = zip(rng.integers(len(ADJECTIVES), size=count), rng.integers(len(NOUNS), size=count), world.genre, strict=True)
    return pl.DataFrame(
        {
            "key": [f"i{i}" for i in range(count)],
            "title": [f"The {ADJECTIVES[a]} {NOUNS[n]} ({GENRES[g]})" for a, n, g in words],
            "genre": [GENRES[g] for g in world.genre],
            "brand": [f"brand {b}" for b in world.brand],
            "price": world.price.round(2),
        }
    )


def _users(world: World, rng: np.random.Generator) -> pl.DataFrame:
    """Interests: the favourite genre, which three users in ten keep to themselves, and a random one."""
    told = rng.random(len(world.taste)) < 0.7
    other = rng.integers(len(GENRES), size=len(world.taste))
    interests = [[GENRES[o]] + [GENRES[t]] * int(k) for o, t, k in zip(other, world.taste, told, strict=True)]
    return pl.DataFrame({"key": [f"u{u}" for u in range(len(interests))], "interests": interests})


def _oracle(
    world: World, item: np.ndarray, mechanism: np.ndarray, lengths: np.ndarray
) -> dict[str, dict[str, float]]:
    """HR@10 and NDCG@10 of ranking each user's last item by its true probability: by segment and over all.

    The oracle knows the mixture, not which mechanism drew the event. `only_X` ranks by mechanism X alone, on the
    events that X drew: how much of the segment can be had from that signal.
    """
    users, last = np.arange(len(item)), lengths - 1
    tables = {
        "content": world.content,
        "collaborative": world.collaborative,
        "sequential": world.sequential[item[users, last - 1]],
    }
    tables["all"] = sum(w * tables[m] for w, m in zip(world.share, MECHANISMS, strict=True))
    drawn = mechanism[users, last]
    ranks = {name: _ranks(table, item, last) for name, table in tables.items()}
    scores = {"all": _scores(ranks["all"])}
    for index, name in enumerate(MECHANISMS):
        if (drawn == index).any():
            scores[name] = _scores(ranks["all"][drawn == index])
            scores[f"only_{name}"] = _scores(ranks[name][drawn == index])
    return scores


def _ranks(table: np.ndarray, item: np.ndarray, last: np.ndarray) -> np.ndarray:
    """Rank of each user's last item among those not met before; ties count against."""
    users = np.arange(len(item))
    scores = table.copy()
    truth = scores[users, item[users, last]]
    rows, columns = np.nonzero(np.arange(item.shape[1]) < last[:, None])
    scores[rows, item[rows, columns]] = -1.0
    return (scores >= truth[:, None]).sum(1)


def _scores(ranks: np.ndarray) -> dict[str, float]:
    hit = ranks <= 10
    return {"hr@10": float(hit.mean()), "ndcg@10": float((hit / np.log2(ranks + 1)).mean())}


def _rows_to_one(table: np.ndarray) -> np.ndarray:
    return table / table.sum(1, keepdims=True)


