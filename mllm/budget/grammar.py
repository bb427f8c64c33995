"""Reads and writes budgets as people write them: amounts by medium, caps, and what they say in numbers.

    image=64            64 soft tokens per image
    audio=/4            one soft token per 4 encoder frames
    audio=12.5/s        soft tokens per second of the encoder's clock
    image=max           the largest of the space (what a medium that is not named gets)
    image=64:16         of two images, 64 soft tokens of the first and 16 of the second
    video=none          the medium is left out, where the model was trained so: not a token of it
    tiles<=4            at most so many tiles per image, the thumbnail not counted; 0 shows the thumbnail alone
    frames=8            frames shown of each video whose frames are images
    image<=280          the image is seen smaller, so that it has at most so many tokens before any is pooled
    total<=256          a cap over all media of one request: the largest allowed split wins
    auto                what a router chooses for this request; its goals, and caps in other units, are in
                        `budget/automatic.py`

An image that is cut into tiles costs image=n tokens per tile, and a video of images video=n per frame. `image<=280`
counts all tiles together, and goes with `image=n`: `image=64,image<=280` sees at most 280 and shows 64 of every tile.

Knows words and numbers. Does not know media, encoders, or what can be met; that is `budget/space.py`.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Literal

from mllm.budget.automatic import GOALS, LIMITS, Auto, Limit, is_automatic, read_automatic

MEDIA = ("image", "audio", "video")
FORMS = "a count (64), a rate (/4), tokens per second (12.5/s), max or none; or one of them for each item (64:16)"


@dataclass(frozen=True)
class Amount:
    """Says what one medium may cost: `tokens` in all, a `rate` in frames per token, `per_second`, `max` or `none`.

    The kind `each` has an amount for every item of the medium, in order.
    """

    kind: Literal["tokens", "rate", "per_second", "max", "none", "each"]
    value: Fraction = Fraction(0)
    items: tuple["Amount", ...] = ()

    @classmethod
    def of_items(cls, amounts: Sequence["Amount"]) -> "Amount":
        """Return the amount of several items; that of one where all are alike."""
        return amounts[0] if len(set(amounts)) == 1 else cls("each", items=tuple(amounts))

    @classmethod
    def parse(cls, text: str | int) -> "Amount":
        """Read one amount.

        Raises:
            ValueError: not one of the five forms, or not a positive number.
        """
        word = str(text).strip()
        if ":" in word:
            return cls.of_items([cls.parse(part) for part in word.split(":")])
        if word in ("max", "none"):
            return cls(word)
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
        if self.kind in ("max", "none"):
            return self.kind
        if self.kind == "each":
            return ":".join(map(str, self.items))
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
    """Amounts by medium, caps on tiles, on the sum and on what is seen, and frames. `Budget.parse(str(b)) == b`.

    With `auto` a router chooses the amounts, and with `limits` they are the dearest that keep to caps in other units;
    either is resolved to a budget without them before anything is counted, see `mllm.router`.
    """

    amounts: Mapping[str, Amount] = field(default_factory=dict)
    total_tokens: int | None = None
    max_tiles: int | None = None
    num_frames: int | None = None
    max_image_tokens: int | None = None
    auto: Auto | None = None
    limits: tuple[Limit, ...] = ()

    def __hash__(self) -> int:
        return hash(str(self))

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """Read `image=64,audio=/4,total<=256`; an empty text asks for the largest of everything.

        Raises:
            ValueError: an unknown medium, a medium named twice, or an amount that is none.
        """
        amounts: dict[str, Amount] = {}
        numbers: dict[str, int] = {}
        items = list(filter(None, (part.strip() for part in text.split(","))))
        auto, limits = read_automatic(text, [item for item in items if is_automatic(item)])
        for item in (item for item in items if not is_automatic(item)):
            word = next((word for word in _NUMBERS if item.startswith(word) and _is_number(item, word)), None)
            if word is not None:
                numbers[word] = _number(item, word, numbers)
                continue
            medium, equals, amount = (word.strip() for word in item.partition("="))
            if not equals or medium not in MEDIA:
                raise ValueError(
                    f"budget item {item!r} must be medium=amount (media: {', '.join(MEDIA)}), image<=N, total<=N, "
                    f"tiles<=N, frames=N, auto, or {'<=N, '.join(LIMITS)}<=N"
                )
            if medium in amounts:
                raise ValueError(f"budget {text!r} names {medium} twice")
            amounts[medium] = Amount.parse(amount)
        if auto is not None and (fixed := [*amounts, *(["frames"] if "frames" in numbers else [])]):
            raise ValueError(f"budget {text!r} names {fixed[0]} beside auto, which chooses it; leave one of them out")
        ordered = {m: amounts[m] for m in MEDIA if m in amounts}
        values = (numbers.get(word) for word in ("total", "tiles", "frames", "image"))
        return cls(ordered, *values, auto=auto, limits=limits)

    @classmethod
    def of(cls, value: "BudgetInput") -> "Budget":
        """Read a budget as people hand it over: a `Budget`, a text, or amounts by medium such as {"image": 16}.

        Raises:
            ValueError: anything else, with what to write instead; see `parse`.
        """
        if isinstance(value, Budget):
            return value
        if isinstance(value, Mapping):
            signs = {name: sign for name, (sign, _) in _NUMBERS.items() if name not in MEDIA}
            signs |= {**GOALS, **LIMITS}
            return cls.parse(",".join(f"{key}{signs.get(key, '=')}{amount}" for key, amount in value.items()))
        if isinstance(value, str):
            if value.strip().isdigit():
                raise ValueError(_say_the_medium(value.strip()))
            return cls.parse(value)
        raise ValueError(_say_the_medium(value))

    def __str__(self) -> str:
        items = [] if self.auto is None else [str(self.auto)]
        items += [f"{medium}={self.amounts[medium]}" for medium in MEDIA if medium in self.amounts]
        values = {
            "image": self.max_image_tokens,
            "tiles": self.max_tiles,
            "frames": self.num_frames,
            "total": self.total_tokens,
        }
        items += [f"{name}{_NUMBERS[name][0]}{n}" for name, n in values.items() if n is not None]
        return ",".join([*items, *map(str, self.limits)])

    @property
    def is_open(self) -> bool:
        """Tell whether it must be resolved before tokens can be counted, by a router or by what budgets cost."""
        return self.auto is not None or bool(self.limits)

    @property
    def media(self) -> set[str]:
        """The media it speaks of."""
        numbers = (("image", self.max_tiles), ("image", self.max_image_tokens), ("video", self.num_frames))
        return set(self.amounts) | {medium for medium, number in numbers if number is not None}

    def only(self, media: Collection[str]) -> "Budget":
        """Return what it says of these media."""
        return Budget(
            {medium: amount for medium, amount in self.amounts.items() if medium in media},
            self.total_tokens,
            self.max_tiles if "image" in media else None,
            self.num_frames if "video" in media else None,
            self.max_image_tokens if "image" in media else None,
            self.auto,
            self.limits,
        )

    def by_item(self, media: Sequence[str]) -> list["Budget"]:
        """Return what it says of each item of a request, whose amount is its own where a medium has one for each.

        Args:
            media: of the items, in order.

        Raises:
            ValueError: a medium with amounts for another number of items; a request may hold none of it.
        """
        several = {medium: amount.items for medium, amount in self.amounts.items() if amount.items}
        for medium, amounts in several.items():
            if (num_items := list(media).count(medium)) not in (0, len(amounts)):
                raise ValueError(
                    f"{medium}={self.amounts[medium]} is for {len(amounts)} items, and the request holds {num_items}"
                )
        left = {medium: iter(amounts) for medium, amounts in several.items()}
        return [
            replace(self, amounts={**self.amounts, medium: next(left[medium])}) if medium in left else self
            for medium in media
        ]


BudgetInput = Budget | str | Mapping[str, str | int]
"""A budget, a text such as "image=16,audio=/4", or amounts by medium such as {"image": 16}; see `Budget.of`."""
_NUMBERS = {"tiles": ("<=", 0), "frames": ("=", 1), "total": ("<=", 1), "image": ("<=", 1)}
"""What a budget says beside amounts: the sign it is written with, and the least number."""


def _say_the_medium(value: object) -> str:
    number = value if isinstance(value, str | int) and not isinstance(value, bool) else 16
    return (
        f'budget is {value!r}, which does not say of what; write the medium: "image={number}" for soft tokens of an '
        'image, "audio=/4" or "video=/2" for frames per soft token, "total<=256" for all media together'
    )


def _is_number(item: str, word: str) -> bool:
    """Say whether an item that begins with a word is a number of `_NUMBERS`; `image=64` is an amount."""
    return word not in MEDIA or _NUMBERS[word][0] in item


def _number(item: str, word: str, known: Mapping[str, int]) -> int:
    sign, least = _NUMBERS[word]
    number = item.removeprefix(word).strip().removeprefix(sign).strip()
    if sign not in item or not number.isascii() or not number.isdigit() or int(number) < least or word in known:
        raise ValueError(f"budget item {item!r} must be written once, as {word}{sign}N with N at least {least}")
    return int(number)
