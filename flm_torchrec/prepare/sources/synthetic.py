"""Synthetic logs with planted structure: not data about people, a proof that each head learns its own signal.

Each event is drawn by one of three mechanisms, chosen by chance in proportion to their strengths:

* content: the user likes some genres, brands, title words and prices, all visible as features of the items; the
  user's own features hint at the taste;
* collaborative: users and items have hidden groups that no feature reveals, only co-occurrence does;
* sequential: each item has a few successors, independent of features and groups.

All are mixed with a popularity skew, and no user meets an item twice. As p(item | user, item before) is known,
so are the scores of an oracle that ranks by it: nothing can do better on average.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np
import polars as pl

from flm_torchrec.errors import DataError
from flm_torchrec.prepare.options import Recipe
from flm_torchrec.prepare.sources.source_data import DeclaredFeature, SourceData

MECHANISMS = ("content", "collaborative", "sequential")
GENRES = (
    "comedy",
    "drama",
    "history",
    "horror",
    "music",
    "nature",
    "romance",
    "science",
    "sport",
    "travel",
    "war",
    "western",
)
ADJECTIVES = (
    "Amber",
    "Bold",
    "Calm",
    "Distant",
    "Eager",
    "Frozen",
    "Golden",
    "Hidden",
    "Iron",
    "Jade",
    "Last",
    "Silent",
)
NOUNS = (
    "Bridge",
    "Candle",
    "Door",
    "Engine",
    "Forest",
    "Garden",
    "Harbour",
    "Island",
    "Letter",
    "Mirror",
    "River",
    "Tower",
)
BRANDS = 40
GROUPS = 32
SUCCESSORS = 5
START = 1_600_000_000
"""Unix seconds of the first event."""
DAY = 86_400
BLOCK = 256
"""Users drawn together: bounds the memory to a few tables of BLOCK x items."""
MIXTURE = "all"
"""The oracle that knows the mixture of the mechanisms, not which of them drew an event."""
TOP = 10
"""Length of the oracles' lists, and the cut-off of their metrics."""


@dataclass(frozen=True)
class World:
    """The planted structure."""

    share: np.ndarray  # [3] chance of each mechanism
    popularity: np.ndarray  # [items], sums to 1
    genre: np.ndarray  # [items]
    brand: np.ndarray  # [items]
    adjective: np.ndarray  # [items]
    noun: np.ndarray  # [items]
    price: np.ndarray  # [items]
    group: np.ndarray  # [items] hidden
    successors: np.ndarray  # [items, SUCCESSORS] items
    weights: np.ndarray  # [items, SUCCESSORS] their chances
    taste: np.ndarray  # [users] favourite genre
    second: np.ndarray  # [users] the genre liked next best
    brands: np.ndarray  # [users, 3] liked
    word: np.ndarray  # [users] liked noun
    budget: np.ndarray  # [users] logarithm of the price liked best
    member: np.ndarray  # [users] hidden group


@dataclass(frozen=True)
class Drawn:
    """The events: row u holds those of user u, in order; values past `lengths[u]` mean nothing."""

    item: np.ndarray  # [users, longest]
    mechanism: np.ndarray  # [users, longest] index into MECHANISMS
    lengths: np.ndarray  # [users]


@dataclass(frozen=True)
class Truth:
    """What is known of each user's last event; the oracles are `MIXTURE` and each of MECHANISMS alone."""

    mechanism: np.ndarray  # [users] index into MECHANISMS: what drew the event
    ranks: dict[str, np.ndarray]
    """[users] by oracle: the rank of the event's item, 1 is best, among the items not met before."""
    best: dict[str, np.ndarray]
    """[users, TOP] by oracle: the best items, best first."""


def read(recipe: Recipe) -> SourceData:
    """Draw the logs; the same for the same recipe.

    Raises:
        DataError: as of `read_with_truth`.
    """
    return read_with_truth(recipe)[0]


def read_with_truth(recipe: Recipe) -> tuple[SourceData, Truth]:
    """Draw the logs, and tell what an oracle knows of them; the same for the same recipe.

    Raises:
        DataError: sizes or strengths that leave nothing to draw.
    """
    if recipe.items < 100 or recipe.users < 10 or not 3 <= recipe.events <= recipe.items // 4:
        raise DataError(
            f"synthetic: {recipe.users} users, {recipe.items} items, {recipe.events} events a user do not go"
            " together; give at least 10 users, 100 items, and from 3 events to a quarter of the items"
        )
    strengths = np.array([recipe.content, recipe.collaborative, recipe.sequential])
    if not np.isfinite(strengths).all() or (strengths < 0).any() or strengths.sum() == 0:
        raise DataError("synthetic: strengths must be finite and 0 or more, one of them above 0")
    if recipe.seed < 0:
        raise DataError(f"synthetic: seed {recipe.seed} must be 0 or more")
    rng = np.random.default_rng(recipe.seed)
    world = _world(recipe, strengths / strengths.sum(), rng)
    drawn = _draw(recipe, world, rng)
    truth = _truth(world, drawn)
    source = SourceData(
        name="synthetic",
        source="synthetic",
        interactions=_frame(drawn, rng),
        items=_items(world),
        users=_users(world, rng),
        features=(
            DeclaredFeature("title", "item", "text"),
            DeclaredFeature("genre", "item", "categorical"),
            DeclaredFeature("brand", "item", "categorical"),
            DeclaredFeature("price", "item", "numeric"),
            DeclaredFeature("interests", "user", "multi_categorical"),
            DeclaredFeature("spending", "user", "numeric"),
        ),
        title="title",
        notes={"synthetic": "made up from a seed; not data about people", "recipe": asdict(recipe)},
        oracle=_oracle(truth),
    )
    return source, truth


def _world(recipe: Recipe, share: np.ndarray, rng: np.random.Generator) -> World:
    users, items = recipe.users, recipe.items
    popularity = 1.0 / (np.arange(items) + 20.0) ** 0.7
    rng.shuffle(popularity)
    # An offset that is never 0: no item follows itself.
    successors = (np.arange(items)[:, None] + rng.integers(1, items, size=(items, SUCCESSORS))) % items
    return World(
        share=share,
        popularity=popularity / popularity.sum(),
        genre=rng.integers(len(GENRES), size=items),
        brand=rng.integers(BRANDS, size=items),
        adjective=rng.integers(len(ADJECTIVES), size=items),
        noun=rng.integers(len(NOUNS), size=items),
        price=rng.lognormal(3.0, 0.6, size=items),
        group=rng.integers(GROUPS, size=items),
        successors=successors,
        weights=rng.dirichlet(np.full(SUCCESSORS, 2.0), size=items),
        taste=rng.integers(len(GENRES), size=users),
        second=rng.integers(len(GENRES), size=users),
        brands=rng.integers(BRANDS, size=(users, 3)),
        word=rng.integers(len(NOUNS), size=users),
        budget=rng.normal(3.0, 0.6, size=users),
        member=rng.integers(GROUPS, size=users),
    )


def _content(world: World, users: np.ndarray) -> np.ndarray:
    """[users, items]: chances in proportion, of the content mechanism."""
    liking = 4.0 * (world.genre == world.taste[users, None]) + 2.0 * (world.genre == world.second[users, None])
    liking += 1.5 * (world.noun == world.word[users, None])
    for brand in world.brands[users].T:
        liking += 1.5 * (world.brand == brand[:, None])
    liking -= 0.5 * ((np.log(world.price) - world.budget[users, None]) / 0.4) ** 2
    return np.exp(liking) * world.popularity


def _collaborative(world: World, users: np.ndarray) -> np.ndarray:
    """[users, items]: chances in proportion, of the collaborative mechanism."""
    return np.where(world.group == world.member[users, None], np.exp(5.0), 1.0) * world.popularity


def _sequential(world: World, before: np.ndarray) -> np.ndarray:
    """[rows, items]: chances in proportion, of the sequential mechanism after the item `before`."""
    # A little of everything, so that an item whose successors are all used up still leads somewhere.
    table = np.tile(0.05 * world.popularity, (len(before), 1))
    table[np.arange(len(before))[:, None], world.successors[before]] += world.weights[before]
    return table


def _blocks(count: int) -> Iterator[np.ndarray]:
    return (np.arange(start, min(start + BLOCK, count)) for start in range(0, count, BLOCK))


def _draw(recipe: Recipe, world: World, rng: np.random.Generator) -> Drawn:
    spread = max(1, recipe.events // 2)
    lengths = rng.integers(recipe.events - spread, recipe.events + spread + 1, recipe.users).clip(3)
    mechanism = rng.choice(len(MECHANISMS), size=(recipe.users, lengths.max()), p=world.share)
    item = np.concatenate([_draw_block(world, u, mechanism[u], rng) for u in _blocks(recipe.users)])
    return Drawn(item, mechanism, lengths)


def _draw_block(world: World, users: np.ndarray, mechanism: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Items [users, steps]: all users of the block step by step together."""
    content, collaborative = _content(world, users), _collaborative(world, users)
    rows = np.arange(len(users))
    unseen = np.ones_like(content)
    item = np.zeros_like(mechanism)
    before = rng.integers(len(world.price), size=len(users))
    for step, by in enumerate(mechanism.T):
        chances = np.where((by == 0)[:, None], content, collaborative)
        chances[by == 2] = _sequential(world, before[by == 2])
        ladder = np.cumsum(chances * unseen, axis=1)
        aim = rng.random(len(users)) * ladder[:, -1]
        before = item[:, step] = (ladder > aim[:, None]).argmax(1)
        unseen[rows, before] = 0.0
    return item


def _frame(drawn: Drawn, rng: np.random.Generator) -> pl.DataFrame:
    there = np.arange(drawn.item.shape[1]) < drawn.lengths[:, None]
    begin = rng.integers(0, 180 * DAY, size=(len(there), 1))
    time = START + begin + np.cumsum(rng.integers(60, 3 * DAY, size=there.shape), axis=1)
    return pl.DataFrame(
        {
            "row": np.arange(1, there.sum() + 1),
            "user": np.nonzero(there)[0],
            "item": drawn.item[there],
            "timestamp": time[there],
            "segment": np.array(MECHANISMS)[drawn.mechanism[there]],
        }
    ).with_columns(
        file=pl.lit("synthetic"),
        user=pl.format("u{}", "user"),
        item=pl.format("i{}", "item"),
        event=pl.lit("view"),
        value=pl.lit(1.0),
    )


def _items(world: World) -> pl.DataFrame:
    words = zip(world.adjective, world.noun, world.genre, strict=True)
    return pl.DataFrame(
        {
            "key": [f"i{i}" for i in range(len(world.genre))],
            "title": [f"The {ADJECTIVES[a]} {NOUNS[n]} ({GENRES[g]})" for a, n, g in words],
            "genre": [GENRES[g] for g in world.genre],
            "brand": [f"brand {b}" for b in world.brand],
            "price": world.price.round(2),
        }
    )


def _users(world: World, rng: np.random.Generator) -> pl.DataFrame:
    """Interests: the favourite genre, which three users in ten keep to themselves, and a random one."""
    count = len(world.taste)
    shares_taste = rng.random(count) < 0.7
    other = rng.integers(len(GENRES), size=count)
    interests = [
        [GENRES[o]] + [GENRES[t]] * int(k and o != t) for o, t, k in zip(other, world.taste, shares_taste, strict=True)
    ]
    spending = np.exp(world.budget + rng.normal(0, 0.3, size=count)).round(2)
    return pl.DataFrame({"key": [f"u{u}" for u in range(count)], "interests": interests, "spending": spending})


def _oracle(truth: Truth) -> dict[str, dict[str, float]]:
    """HR@10 and NDCG@10 of ranking each user's last item by its true probability: by segment and over all.

    The oracle knows the mixture, not which mechanism drew the event. `only_X` ranks by mechanism X alone, on the
    events that X drew: what a head that knows all of this signal and nothing else scores there.
    """
    scores = {"all": _scores(truth.ranks[MIXTURE])}
    for index, name in enumerate(MECHANISMS):
        drawn = truth.mechanism == index
        if drawn.any():
            scores[name] = _scores(truth.ranks[MIXTURE][drawn])
            scores[f"only_{name}"] = _scores(truth.ranks[name][drawn])
    return scores


def _truth(world: World, drawn: Drawn) -> Truth:
    ranks: dict[str, list[np.ndarray]] = {name: [] for name in (MIXTURE, *MECHANISMS)}
    best: dict[str, list[np.ndarray]] = {name: [] for name in ranks}
    last = drawn.lengths - 1
    for users in _blocks(len(drawn.item)):
        true = drawn.item[users, last[users]]
        for name, chances in _chances(world, drawn, users).items():
            # Ties count against the oracle, as against every scorer.
            ranks[name].append((chances >= chances[np.arange(len(users)), true, None]).sum(1))
            best[name].append(_best(chances))
    return Truth(
        mechanism=drawn.mechanism[np.arange(len(last)), last],
        ranks={name: np.concatenate(found) for name, found in ranks.items()},
        best={name: np.concatenate(found) for name, found in best.items()},
    )


def _chances(world: World, drawn: Drawn, users: np.ndarray) -> dict[str, np.ndarray]:
    """[users, items] by oracle: the true chance of each item to be the user's last one; 0 if met before."""
    item, last = drawn.item[users], drawn.lengths[users] - 1
    rows = np.arange(len(users))
    unseen = np.ones((len(users), len(world.price)))
    earlier = np.nonzero(np.arange(item.shape[1]) < last[:, None])
    unseen[earlier[0], item[earlier]] = 0.0
    tables = (_content(world, users), _collaborative(world, users), _sequential(world, item[rows, last - 1]))
    # Each mechanism spreads its share over the items not met: to mix before would favour the one most used up.
    chances = dict(zip(MECHANISMS, (_rows_to_one(table * unseen) for table in tables), strict=True))
    return chances | {MIXTURE: np.einsum("m,mui->ui", world.share, np.stack([chances[m] for m in MECHANISMS]))}


def _best(chances: np.ndarray) -> np.ndarray:
    """[users, items] chances → [users, TOP] the items of the largest, largest first."""
    some = np.argpartition(-chances, TOP, axis=1)[:, :TOP]
    order = np.argsort(-np.take_along_axis(chances, some, axis=1), axis=1)
    return np.take_along_axis(some, order, axis=1)


def _scores(ranks: np.ndarray) -> dict[str, float]:
    hit = ranks <= TOP
    return {"hr@10": float(hit.mean()), "ndcg@10": float((hit / np.log2(ranks + 1)).mean())}


def _rows_to_one(table: np.ndarray) -> np.ndarray:
    return table / table.sum(1, keepdims=True)
