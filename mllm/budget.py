"""How many soft tokens each medium may use: the grammar, the space a model was trained on, and exact counting.

    image=64            64 soft tokens per image
    audio=/4            one soft token per 4 encoder frames
    audio=12.5/s        soft tokens per second of the encoder's clock
    image=max           the largest of the space (what a medium that is not named gets)
    total<=256          a cap over all media of one request: the largest allowed split wins

Knows numbers only: extents (frames, grids), amounts, and the counting rules of the compressors.
Does not know torch, files, tokenizers or weights. A budget is exact or refused; nothing here rounds.
What a training step draws from a space is in `sampler.py`.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal

MEDIA = ("image", "audio", "video")
Compression = Literal["query", "pool", "stack", "hybrid"]
COMPRESSIONS: tuple[Compression, ...] = ("query", "pool", "stack", "hybrid")
FORMS = "a count (64), a rate (/4), tokens per second (12.5/s) or max"


@dataclass(frozen=True)
class Amount:
    """What one medium may cost: `tokens` in all, a `rate` in frames per token, tokens `per_second`, or the `max`."""

    kind: Literal["tokens", "rate", "per_second", "max"]
    value: Fraction = Fraction(0)

    @classmethod
    def parse(cls, text: str | int) -> "Amount":
        """Read one amount.

        Raises:
            ValueError: not one of the four forms, or not a positive number.
        """
        word = str(text).strip()
        if word == "max":
            return cls("max")
        kind: Literal["tokens", "rate", "per_second"] = "tokens"
        number = word
        if word.startswith("/"):
            kind, number = "rate", word[1:]
        elif word.endswith("/s"):
            kind, number = "per_second", word[:-2]
        whole = kind != "per_second"
        if not (number.isascii() and number.replace("." if not whole else "", "", 1).isdigit()):
            raise ValueError(f"budget amount {word!r} is not {FORMS}")
        if (value := Fraction(number)) <= 0:
            raise ValueError(f"budget amount {word!r} must be above 0; allowed is {FORMS}")
        return cls(kind, value)

    def __str__(self) -> str:
        if self.kind == "max":
            return "max"
        number = str(self.value) if self.value.denominator == 1 else _decimal(self.value)
        return {"tokens": number, "rate": f"/{number}", "per_second": f"{number}/s"}[self.kind]


def _decimal(value: Fraction) -> str:
    """A fraction whose denominator has only the primes 2 and 5, which is all `Amount.parse` makes, as a decimal."""
    digits = 0
    while (value * 10**digits).denominator != 1:
        digits += 1
        assert digits < 100, value
    whole, rest = divmod(int(value * 10**digits), 10**digits)
    return f"{whole}.{rest:0{digits}d}"


@dataclass(frozen=True)
class Budget:
    """Amounts by medium and an optional cap on the sum. `Budget.parse(str(b)) == b`."""

    amounts: Mapping[str, Amount] = field(default_factory=dict)
    total_tokens: int | None = None

    def __hash__(self) -> int:
        return hash(str(self))

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """Read `image=64,audio=/4,total<=256`; an empty text asks for the largest of everything.

        Raises:
            ValueError: an unknown medium, a medium named twice, or an amount that is none.
        """
        amounts: dict[str, Amount] = {}
        total: int | None = None
        for item in filter(None, (part.strip() for part in text.split(","))):
            if item.startswith("total"):
                number = item.removeprefix("total").strip().removeprefix("<=").strip()
                if "<=" not in item or not number.isascii() or not number.isdigit() or int(number) < 1 or total:
                    raise ValueError(f"budget cap {item!r} must be written once, as total<=N with N at least 1")
                total = int(number)
                continue
            medium, equals, amount = (word.strip() for word in item.partition("="))
            if not equals or medium not in MEDIA:
                raise ValueError(f"budget item {item!r} must be medium=amount (media: {', '.join(MEDIA)}) or total<=N")
            if medium in amounts:
                raise ValueError(f"budget {text!r} names {medium} twice")
            amounts[medium] = Amount.parse(amount)
        return cls({m: amounts[m] for m in MEDIA if m in amounts}, total)

    def __str__(self) -> str:
        items = [f"{medium}={self.amounts[medium]}" for medium in MEDIA if medium in self.amounts]
        return ",".join(items + ([f"total<={self.total_tokens}"] if self.total_tokens else []))


@dataclass(frozen=True)
class Extent:
    """What is known of one medium before it is compressed: a grid (H, W) of patches, or frames on a clock."""

    medium: str
    grid: tuple[int, int] | None = None
    num_frames: int = 0
    frames_per_second: float | None = None

    @property
    def length(self) -> int:
        """Features the encoder gives: patches of the grid, or frames."""
        return self.grid[0] * self.grid[1] if self.grid else self.num_frames


@dataclass(frozen=True)
class Cost:
    """What one medium costs: its exact soft tokens, and the rate they were asked at (0: a count was asked)."""

    tokens: int
    rate: int = 0


def haar_grids(grid: tuple[int, int]) -> list[tuple[int, int]]:
    """The maps of a grid in Haar order, coarse first: halved in turn along rows and columns while both are even.

    24 x 24 gives 3 x 3, 3 x 6, 6 x 6, 6 x 12, 12 x 12, 12 x 24, 24 x 24. A grid with an odd side gives itself alone.
    """
    grids = [grid]
    rows, columns = grid
    while rows % 2 == 0 and columns % 2 == 0:
        rows, columns = rows // 2, columns // 2
        grids += [(rows, 2 * columns), (rows, columns)]
    return grids[::-1]


SETTINGS = ("compressor", "budgets", "per_budget_projector", "num_queries", "window_frames")
"""The keys of a `media.<medium>` block that shape its space."""


def hybrid_sizes(settings: Mapping[str, Any], key: str = "media.image") -> tuple[tuple[int, ...], int]:
    """The sizes of the pooled map of a hybrid compressor, smallest first, and the largest count.

    Args:
        settings: the `media.image` block. `anchors`, by default 16 and 64 as far as they are below the largest budget;
            one anchor is always among the sizes.
        key: for messages.

    Raises:
        ValueError: sizes that no budget reaches, or counts up to the largest that need queries no budget trains.
    """
    asked = settings["budgets"]
    if isinstance(asked, Mapping):
        asked = range(asked["start"], asked["stop"] + 1, asked["step"])
    counts, given = [int(count) for count in asked], settings.get("anchors")
    most = max(counts)
    sizes = tuple(sorted({1, *(given if given is not None else [size for size in (16, 64) if size < most])}))
    if sizes[0] < 1 or sizes[-1] > most:
        raise ValueError(f"{key}.anchors is {given}; allowed are counts 1..{most}, the largest budget")
    if settings.get("num_queries"):
        raise ValueError(f"{key}.num_queries follows from budgets and anchors under compressor 'hybrid'; leave it out")
    widest = max(range(1, most + 1), key=lambda count: num_queries(count, sizes))
    needed, trained = num_queries(widest, sizes), max(num_queries(count, sizes) for count in counts)
    if not trained or trained < needed:
        add, takes = (widest, needed) if needed else (most + 1, 1)
        raise ValueError(
            f"{key}.budgets train {trained} queries behind anchors {list(sizes)}, and {add} tokens take {takes}; "
            f"add {add} to the budgets, or set other anchors"
        )
    return sizes, most


def num_queries(count: int, sizes: Sequence[int]) -> int:
    """How many of so many soft tokens are queries: those behind the largest map that is not above the count."""
    return count - max(size for size in sizes if size <= count)


@dataclass(frozen=True)
class MediumSpace:
    """The budgets one medium was trained on, largest first, and how its compressor counts.

    `between` allows amounts that were not trained; reports mark them. `max_tokens` is the number of queries (per
    window on a stream) or a hybrid compressor's largest count, `window_frames` the window of a query compressor on a
    stream. With `order` haar a grid has only the counts of whole maps, see `haar_grids`.
    """

    medium: str
    compressor: Compression
    trained: tuple[Amount, ...]
    max_tokens: int = 0
    window_frames: int = 0
    between: bool = True
    order: Literal["raster", "haar"] = "raster"

    @classmethod
    def from_settings(cls, medium: str, settings: Mapping[str, Any]) -> "MediumSpace":
        """Read the `media.<medium>` block of a config: `compressor`, `budgets`, `order` and the sizes of `query`.

        `budgets` is a list of amounts, or {start, stop, step} for an arithmetic run of counts (stop included).

        Raises:
            ValueError: unknown compressor, no budgets, or budgets of mixed kinds.
        """
        key = f"media.{medium}"
        compressor = settings.get("compressor", "pool")
        if compressor not in COMPRESSIONS:
            raise ValueError(f"{key}.compressor is {compressor!r}; allowed: {', '.join(COMPRESSIONS)}")
        asked = settings.get("budgets") or []
        if isinstance(asked, Mapping):
            asked = range(asked["start"], asked["stop"] + 1, asked["step"])
        amounts = {Amount.parse(item) for item in asked}
        kinds = {amount.kind for amount in amounts}
        if len(kinds) != 1 or not kinds <= {"tokens", "rate"}:
            raise ValueError(f"{key}.budgets must be counts only or rates only, and not empty; got {list(asked)}")
        max_tokens = int(settings.get("num_queries", 0))
        if compressor == "hybrid":
            if medium != "image" or kinds != {"tokens"}:
                raise ValueError(f"{key}.compressor 'hybrid' is for pictures at counts; allowed: pool, query, stack")
            _, max_tokens = hybrid_sizes(settings, key)
        fixed = compressor == "stack" or bool(settings.get("per_budget_projector", False))
        return cls(
            medium=medium,
            compressor=compressor,
            trained=tuple(sorted(amounts, key=lambda a: a.value, reverse=kinds == {"tokens"})),
            max_tokens=max_tokens,
            window_frames=int(settings.get("window_frames", 0)),
            between=not fixed,
            order=settings.get("order", "raster"),
        )

    def allowed(self) -> str:
        """The amounts a user may ask for, in words, for messages and `--help`."""
        trained = ", ".join(str(amount) for amount in self.trained)
        return f"{trained} (trained)" if not self.between else f"{trained} (trained) and what lies between them"

    def is_trained(self, amount: Amount) -> bool:
        """Whether training drew this very amount; `max` always is."""
        return amount.kind == "max" or amount in self.trained

    def cost(self, amount: Amount, extent: Extent) -> Cost:
        """The exact cost of one medium at an amount.

        Raises:
            ValueError: the amount cannot be met exactly; the message names what can.
        """
        chosen = self.trained[0] if amount.kind == "max" else amount
        if chosen.kind == "per_second":
            chosen = self._rate_of(chosen, extent)
        if not self.between and chosen not in self.trained:
            raise ValueError(f"{self.medium}={amount} was not trained and this model serves only: {self.allowed()}")
        if extent.grid is not None:
            return self._grid_cost(chosen, extent)
        return self._stream_cost(chosen, extent)

    def _rate_of(self, amount: Amount, extent: Extent) -> Amount:
        if extent.frames_per_second is None:
            raise ValueError(f"{self.medium}={amount}: tokens per second need a stream, and this is a grid")
        rate = Fraction(extent.frames_per_second) / amount.value
        if rate.denominator != 1:
            clock = Fraction(extent.frames_per_second)
            near = sorted({clock / int(rate), clock / (int(rate) + 1)} if rate > 1 else {clock})
            raise ValueError(
                f"{self.medium}={amount} is not a whole number of frames per token at {float(clock):g} frames/s; "
                f"nearest: {', '.join(f'{float(value):g}/s' for value in near)}"
            )
        return Amount("rate", rate)

    def _grid_cost(self, amount: Amount, extent: Extent) -> Cost:
        most = self.max_tokens if self.compressor in ("query", "hybrid") else extent.length
        if amount.kind != "tokens" or amount.value > most:
            raise ValueError(f"{self.medium}={amount} cannot be met: allowed are counts 1..{most}; {self.allowed()}")
        if self.order == "haar":
            assert extent.grid is not None
            counts = [rows * columns for rows, columns in haar_grids(extent.grid)]
            if amount.value not in counts:
                whole = ", ".join(map(str, counts))
                raise ValueError(f"{self.medium}={amount} is no whole map in Haar order: allowed are counts {whole}")
        return Cost(int(amount.value))

    def _stream_cost(self, amount: Amount, extent: Extent) -> Cost:
        frames, value = extent.num_frames, int(amount.value)
        if amount.kind == "rate" and self.compressor == "query":
            if self.window_frames % value or self.window_frames // value > self.max_tokens:
                rates = [
                    f"/{rate}"
                    for rate in range(1, self.window_frames + 1)
                    if self.window_frames % rate == 0 and self.window_frames // rate <= self.max_tokens
                ]
                raise ValueError(f"{self.medium}={amount} cannot be met: allowed are {', '.join(rates)}")
            return Cost(-(-frames // self.window_frames) * (self.window_frames // value), value)
        if amount.kind == "rate":
            if frames < value:
                raise ValueError(
                    f"{self.medium}={amount}: a clip of {frames} frames is too short, it would leave no token"
                )
            return Cost(frames // value, value)
        if self.compressor != "pool":
            raise ValueError(f"{self.medium}={amount}: a {self.compressor} compressor on a stream serves rates only")
        if value > frames:
            raise ValueError(f"{self.medium}={amount}: a clip of {frames} frames cannot give more tokens than frames")
        return Cost(value)


@dataclass(frozen=True)
class Space:
    """The budgets a model was trained on, by medium."""

    media: Mapping[str, MediumSpace]

    @classmethod
    def from_settings(cls, settings: Mapping[str, Mapping[str, Any]]) -> "Space":
        """Read the `media` block of a config; see `MediumSpace.from_settings`."""
        if unknown := set(settings) - set(MEDIA):
            raise ValueError(f"media.{min(unknown)} is not a medium; allowed: {', '.join(MEDIA)}")
        return cls({m: MediumSpace.from_settings(m, settings[m]) for m in MEDIA if m in settings})

    def largest(self) -> Budget:
        """Every medium at its most tokens."""
        return Budget({medium: space.trained[0] for medium, space in self.media.items()})

    def smallest(self) -> Budget:
        """Every medium at its fewest tokens."""
        return Budget({medium: space.trained[-1] for medium, space in self.media.items()})

    def is_trained(self, budget: Budget) -> bool:
        """Whether every amount the budget names was drawn in training; reports mark the others."""
        return all(m in self.media and self.media[m].is_trained(a) for m, a in budget.amounts.items())


def count_tokens(extents: Sequence[Extent], budget: Budget, space: Space) -> list[Cost]:
    """The exact soft tokens of every medium of one request, in order. The only place where tokens are counted.

    Under `total<=N`, media that the budget does not name may take any of their trained amounts (all items of a
    medium the same); the split with the most tokens wins, and between equals the one that favours image, then
    audio, then video.

    Raises:
        ValueError: a medium the model does not take, an amount that cannot be met, or a cap that nothing meets.
    """
    for medium in {extent.medium for extent in extents} | set(budget.amounts):
        if medium not in space.media:
            allowed = ", ".join(space.media) or "text only"
            raise ValueError(f"this model does not take {medium}; it takes {allowed}")
    if budget.total_tokens is None:
        return [_cost_of(extent, budget.amounts.get(extent.medium, Amount("max")), space) for extent in extents]
    return _best_split(extents, budget, space)


def _cost_of(extent: Extent, amount: Amount, space: Space) -> Cost:
    return space.media[extent.medium].cost(amount, extent)


def _best_split(extents: Sequence[Extent], budget: Budget, space: Space) -> list[Cost]:
    present = [medium for medium in MEDIA if any(extent.medium == medium for extent in extents)]
    by_medium = {m: _choices([e for e in extents if e.medium == m], budget.amounts.get(m), space) for m in present}
    best: dict[str, list[Cost]] | None = None
    best_key: tuple[int, ...] = ()
    smallest = 0
    for split in itertools.product(*by_medium.values()):
        sums = [sum(cost.tokens for cost in costs) for costs in split]
        smallest = min(smallest or sum(sums), sum(sums))
        key = (sum(sums), *sums)
        if sum(sums) <= (budget.total_tokens or 0) and key > best_key:
            best, best_key = dict(zip(present, split, strict=True)), key
    if not extents:
        return []
    if best is None:
        raise ValueError(f"{budget} cannot be met: the smallest split of this request takes {smallest} tokens")
    queues = {medium: iter(costs) for medium, costs in best.items()}
    return [next(queues[extent.medium]) for extent in extents]


def _choices(extents: list[Extent], named: Amount | None, space: Space) -> list[list[Cost]]:
    """Costs of one medium's items at every amount it may take; a trained amount its clips are too short for is not."""
    if named is not None:
        return [[_cost_of(extent, named, space) for extent in extents]]
    found, refusals = [], []
    for amount in space.media[extents[0].medium].trained:
        try:
            found.append([_cost_of(extent, amount, space) for extent in extents])
        except ValueError as error:
            refusals.append(error)
    if not found:
        raise refusals[0]
    return found
