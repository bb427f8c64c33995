"""Resolves the forms in which clients ask for budgets to the exact tokens of every medium, or refuses them.

    budget               "image=64,audio=/4,total<=256" or "auto", in the body (also under mm_processor_kwargs); amounts
                         also beside a medium
    max_soft_tokens      64: images at so many tokens, beside one or under mm_processor_kwargs
    media_resolution     low, medium or high, in the body or beside a medium
    detail               low, high or auto, of an image

The first of these that speaks of a medium decides, and beside a medium counts before the body. low is the smallest
trained budget, high the largest, medium the one in the middle, auto the server's default, or what its router chooses
where it has no default. A server's cap may be gone below and never above; named budgets mean those within it.

Knows budgets, spaces and extents. Does not know HTTP, files or models.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from mllm.budget import MEDIA, NONE, Amount, Auto, Budget, Extent, Space, TokenCount, count_tokens
from mllm.serving.errors import RequestError, bad_request, refusal_of
from mllm.serving.fields import Fields, shown

RESOLUTIONS = ("low", "medium", "high")
DETAILS = ("low", "high", "auto")
MAX_TOKENS = 1_000_000
"""Nobody's budget is larger; a number beyond it is a mistake."""
MAX_BUDGET_CHARS = 256


@dataclass(frozen=True)
class Wishes:
    """Holds what a client says of budgets in one place: in the body, or beside one medium."""

    where: str = ""
    budget: Budget | None = None
    max_soft_tokens: int | None = None
    media_resolution: str | None = None
    detail: str | None = None


@dataclass(frozen=True)
class ItemBudget:
    """Holds the budget of one medium of a request. `is_free` leaves the amount to a cap on the sum of all media."""

    medium: str
    budget: Budget
    where: str
    is_free: bool = False


@dataclass(frozen=True)
class RequestBudget:
    """Holds the budgets of a request's media in order, and the most tokens that all of them may have together.

    With `choosing` they are resolved for all media together once their files are known (see `mllm.router`).
    """

    items: tuple[ItemBudget, ...] = ()
    total_tokens: int | None = None
    is_total_of_server: bool = False
    choosing: Budget | None = None

    @property
    def amounts_text(self) -> str:
        """Tell what an image that is cut into tiles is cut for: everything that may change its tiles."""
        return ";".join([*(str(item.budget) for item in self.items), f"total<={self.total_tokens}"])


def read_budget(fields: Fields, key: str = "budget") -> Budget | None:
    """Read a budget, a text of the grammar or an object of amounts by medium.

    Raises:
        RequestError: 400, it is none.
    """
    value = fields.get(key)
    if value is None:
        return None
    is_short = isinstance(value, str) and len(value) <= MAX_BUDGET_CHARS
    is_object = isinstance(value, Mapping) and all(
        isinstance(amount, str | int) and not isinstance(amount, bool) and len(str(amount)) <= MAX_BUDGET_CHARS
        for amount in value.values()
    )
    if not is_short and not is_object:
        raise fields.refused(key, f'is {shown(value)}; write a text such as "image=64,audio=/4"')
    try:
        return Budget.of(value)
    except ValueError as error:
        raise refusal_of(error, fields.path(key)) from error


def read_body_wishes(fields: Fields) -> Wishes:
    """Read what a body says of budgets.

    Raises:
        RequestError: 400, forms that are none, or two budgets that differ.
    """
    budget, resolution = read_budget(fields), fields.choice("media_resolution", RESOLUTIONS)
    soft_tokens = None
    if (values := fields.get("mm_processor_kwargs")) is not None:
        options = Fields(values, fields.path("mm_processor_kwargs"))
        other = read_budget(options)
        if None not in (budget, other) and budget != other:
            raise options.refused("budget", f"is {other}, and budget is {budget}; give one of them")
        budget = budget if other is None else other
        soft_tokens = options.whole("max_soft_tokens", 1, MAX_TOKENS)
        options.done()
    return Wishes("", budget, soft_tokens, resolution)


def read_part_wishes(medium: str, parts: Sequence[Fields]) -> Wishes:
    """Read what stands beside one medium of budgets, in the part itself or in the object that holds its URL.

    Raises:
        RequestError: 400, forms that are none, a key in both places, or a budget of another medium.
    """
    values: dict[str, object] = {}
    for fields in parts:
        values_of_part = {
            "budget": read_budget(fields),
            "max_soft_tokens": fields.whole("max_soft_tokens", 1, MAX_TOKENS) if medium == "image" else None,
            "media_resolution": fields.choice("media_resolution", RESOLUTIONS),
            "detail": fields.choice("detail", DETAILS) if medium == "image" else None,
        }
        for key, value in values_of_part.items():
            if value is not None and key in values:
                raise fields.refused(key, "is given twice; give it in one place")
            values |= {} if value is None else {key: value}
    wishes = Wishes(parts[0].where, **values)  # pyright: ignore[reportArgumentType]
    named = wishes.budget
    if named is not None and (named.media != {medium} or named.total_tokens is not None or named.is_open):
        raise parts[0].refused("budget", f"is {str(named)!r}; beside one medium write {medium}=N and no total")
    return wishes


@dataclass(frozen=True)
class BudgetPolicy:
    """Decides budgets as a server is told to.

    Args:
        space: the model's.
        default: what media get that a request says nothing of; their most tokens where it does not name them.
        cap: which requests may go below and never above.
        has_router: whether budgets can be chosen (`auto`).

    Raises:
        ValueError: a default or cap that the model cannot serve, or a default above the cap.
    """

    space: Space
    default: Budget = field(default_factory=Budget)
    cap: Budget = field(default_factory=Budget)
    has_router: bool = False

    def __post_init__(self) -> None:
        if self.cap.is_open:
            raise ValueError(f"max_budget is {str(self.cap)!r}; write it in amounts, or as total<=N")
        for key, budget in (("budget", self.default), ("max_budget", self.cap)):
            try:
                self.space.check(budget)
            except ValueError as error:
                raise ValueError(f"{key}: {error}") from error
            if several := [f"{medium}={amount}" for medium, amount in budget.amounts.items() if amount.items]:
                raise ValueError(f"{key} {several[0]} is for requests of so many items; give one amount for all")
        for medium, amount in self.cap.amounts.items():
            kinds = {trained.kind for trained in self.space.media[medium].trained}
            if amount.kind not in kinds:
                raise ValueError(
                    f"max_budget {medium}={amount} must be written as the trained budgets are: "
                    f"{self.space.media[medium].allowed()}"
                )
            if not self.within(medium):
                raise ValueError(f"max_budget {medium}={amount} is below every trained budget of {medium}")
            named = self.default.amounts.get(medium)
            if named is not None and named.kind == amount.kind and not _is_at_most(named, amount):
                raise ValueError(f"budget {medium}={named} is above max_budget {medium}={amount}")

    def is_within(self, budget: Budget) -> bool:
        """Tell whether the cap allows trained amounts, and numbers of frames."""
        most_frames, frames = self.cap.num_frames, budget.num_frames
        if most_frames is not None and "video" in budget.amounts and (frames is None or frames > most_frames):
            return False
        named = [(medium, one) for medium, amount in budget.amounts.items() for one in amount.items or (amount,)]
        return all(amount == NONE or amount in self.within(medium) for medium, amount in named)

    def within(self, medium: str) -> list[Amount]:
        """Return the trained amounts of a medium that the cap allows, most tokens first."""
        trained, cap = self.space.media[medium].trained, self.cap.amounts.get(medium)
        return [amount for amount in trained if cap is None or _is_at_most(amount, cap)]

    def resolve(self, media: Sequence[tuple[str, Wishes]], wishes: Wishes) -> RequestBudget:
        """Decide the budget of every medium of a request, as far as it can be without the files.

        Args:
            media: of each medium, in order, its name and what stands beside it.
            wishes: of the body.

        Raises:
            RequestError: 400, a medium that the model or the request does not have, or a cap on the sum with budgets
                beside media.
        """
        named = wishes.budget or Budget()
        present = {medium for medium, _ in media}
        try:
            for medium in sorted(present | named.media, key=MEDIA.index):
                self.space.check(Budget({medium: Amount("max")}))
            self.space.check(named)
        except ValueError as error:
            raise refusal_of(error, "budget" if named.media - present else None) from error
        if idle := named.media - present:
            raise bad_request(f"the budget {str(named)!r} names {min(idle)}, but the request holds none", "budget")
        if wishes.max_soft_tokens is not None and "image" not in present:
            raise bad_request(
                "mm_processor_kwargs.max_soft_tokens is of images, but the request holds none",
                "mm_processor_kwargs.max_soft_tokens",
            )
        if named.total_tokens is not None and (beside := [one.where for _, one in media if one.budget is not None]):
            raise bad_request(f"total<= is over all media; give it without {beside[0]}.budget", f"{beside[0]}.budget")
        totals = [budget.total_tokens for budget in (named, self.cap) if budget.total_tokens is not None]
        if named.total_tokens is None and self.default.total_tokens is not None and not _says(media, wishes):
            totals.append(self.default.total_tokens)
        total = min(totals, default=None)
        if (choosing := self._choosing(media, wishes)) is not None:
            chosen = tuple(ItemBudget(medium, Budget(), "budget", is_free=True) for medium, _ in media)
            return RequestBudget(chosen, None, choosing=self._capped(replace(choosing, total_tokens=total)))
        bodies = _by_item([medium for medium, _ in media], wishes)
        items = [
            self._item(medium, beside_medium, body) for (medium, beside_medium), body in zip(media, bodies, strict=True)
        ]
        if total is None:
            items = [
                replace(item, budget=self._largest(item), is_free=False) if item.is_free else item for item in items
            ]
        return RequestBudget(tuple(items), total, total is not None and total != named.total_tokens)

    def _choosing(self, media: Sequence[tuple[str, Wishes]], body: Wishes) -> Budget | None:
        """Return the open budget that a request is resolved by; None where amounts are named, or the most is meant.

        Raises:
            RequestError: 400, an open budget together with one that is named beside a medium.
        """
        if body.budget is not None and body.budget.is_open:
            if named := [wishes.where for _, wishes in media if wishes.budget is not None]:
                raise bad_request(
                    f"the budget {str(body.budget)!r} is chosen for all media together; give it without "
                    f"{named[0]}.budget",
                    f"{named[0]}.budget",
                )
            return body.budget
        if _says(media, body):
            return None
        if self.default.is_open:
            return self.default
        is_auto = any(wishes.detail == "auto" for _, wishes in media)
        return Budget(auto=Auto()) if is_auto and self.has_router and not str(self.default) else None

    def _capped(self, choosing: Budget) -> Budget:
        """Put the cap on tiles and on what is seen of an image into an open budget; `is_within` keeps to the rest."""
        smaller = {
            name: min(values)
            for name in ("max_tiles", "max_image_tokens")
            if (values := [one for one in (getattr(choosing, name), getattr(self.cap, name)) if one is not None])
        }
        return replace(choosing, **smaller)

    def _item(self, medium: str, beside_medium: Wishes, body: Wishes) -> ItemBudget:
        """Return the budget of one medium: the first of all that speaks of it; free where nothing does."""
        where = beside_medium.where
        if beside_medium.budget is not None:
            return ItemBudget(medium, beside_medium.budget, f"{where}.budget")
        said = (body.budget or Budget()).only([medium])
        said = replace(said, total_tokens=None)
        if said.amounts:
            return ItemBudget(medium, said, "budget")
        if body.budget is not None and body.budget.total_tokens is not None:
            return ItemBudget(medium, said, "budget", is_free=True)
        amount, key = self._lower_wish(medium, beside_medium, body)
        amount = amount or self.default.amounts.get(medium)
        caps = said if said.media else replace(self.default.only([medium]), amounts={}, total_tokens=None)
        budget = replace(caps, amounts={} if amount is None else {medium: amount})
        return ItemBudget(medium, budget, key or where, is_free=amount is None)

    def _largest(self, item: ItemBudget) -> Budget:
        """Return the most that a medium may have of which nobody speaks."""
        return replace(item.budget, amounts={item.medium: self.within(item.medium)[0]})

    def _lower_wish(self, medium: str, beside_medium: Wishes, body: Wishes) -> tuple[Amount | None, str]:
        """Tell what is asked in other forms than the grammar's, and under which key."""
        if medium == "image":
            keys = (f"{beside_medium.where}.max_soft_tokens", "mm_processor_kwargs.max_soft_tokens")
            for wishes, key in zip((beside_medium, body), keys, strict=True):
                if wishes.max_soft_tokens is not None:
                    return Amount.parse(wishes.max_soft_tokens), key
        amounts = self.within(medium)
        named = {"low": amounts[-1], "medium": amounts[len(amounts) // 2], "high": amounts[0]}
        for wishes, key in ((beside_medium, f"{beside_medium.where}.media_resolution"), (body, "media_resolution")):
            if wishes.media_resolution is not None:
                return named[wishes.media_resolution], key
        if beside_medium.detail in named:
            return named[beside_medium.detail], f"{beside_medium.where}.detail"
        return None, ""

    def counts(self, extents: Sequence[Extent], request: RequestBudget) -> list[TokenCount]:
        """Count the exact tokens of every medium, once its file is known.

        Raises:
            RequestError: 400, a budget that cannot be met, or one above the cap.
        """
        if request.total_tokens is not None and any(item.is_free for item in request.items):
            counts = self._split(extents, request)
        else:
            counts = [self._count(extent, item) for extent, item in zip(extents, request.items, strict=True)]
        for extent, item, count in zip(extents, request.items, counts, strict=True):
            self._check_cap(extent, item, count)
        total = sum(count.tokens for count in counts)
        if request.total_tokens is not None and total > request.total_tokens:
            whose = "this server allows" if request.is_total_of_server else "the budget allows"
            raise bad_request(
                f"the request takes {total} soft tokens; {whose} total<={request.total_tokens}: ask for fewer", "budget"
            )
        return counts

    def _count(self, extent: Extent, item: ItemBudget) -> TokenCount:
        try:
            return count_tokens([extent], item.budget, self.space)[0]
        except ValueError as error:
            raise refusal_of(error, item.where) from error

    def _split(self, extents: Sequence[Extent], request: RequestBudget) -> list[TokenCount]:
        """Share a cap on the sum out among the media; amounts that were asked for stay."""
        merged = Budget(total_tokens=request.total_tokens)
        for item in request.items:
            amounts = dict(merged.amounts) | dict(item.budget.amounts)
            if any(merged.amounts.get(medium, amount) != amount for medium, amount in item.budget.amounts.items()):
                raise bad_request(
                    f"with total<={request.total_tokens} all items of a medium get the same budget", item.where
                )
            tiles, frames, seen = item.budget.max_tiles, item.budget.num_frames, item.budget.max_image_tokens
            merged = Budget(
                amounts,
                merged.total_tokens,
                merged.max_tiles if tiles is None else tiles,
                merged.num_frames if frames is None else frames,
                max_image_tokens=merged.max_image_tokens if seen is None else seen,
            )
        try:
            return count_tokens(extents, merged, self._capped_space())
        except ValueError as error:
            raise refusal_of(error, "budget") from error

    def _capped_space(self) -> Space:
        """Return the space whose trained amounts are those within the cap."""
        spaces = self.space.media.items()
        media = {medium: replace(space, trained=tuple(self.within(medium))) for medium, space in spaces}
        return Space(media)

    def _check_cap(self, extent: Extent, item: ItemBudget, count: TokenCount) -> None:
        cap = self.cap.only([extent.medium])
        cap = replace(cap, total_tokens=None)
        if not cap.media:
            return
        try:
            most = count_tokens([extent], cap, self.space)[0].tokens
        except ValueError:  # a clip so short that the cap itself cannot be met: whatever it takes is below it
            return
        if count.tokens > most:
            allowed = ", ".join(map(str, self.within(extent.medium)))
            raise bad_request(
                f"{item.budget} asks for {count.tokens} soft tokens of {extent.medium}; this server allows at most "
                f"{cap}, so {allowed}",
                item.where,
            )


def _by_item(media: Sequence[str], body: Wishes) -> list[Wishes]:
    """Return what the body says of every item: of amounts that are named one by one, its own.

    Raises:
        RequestError: 400, amounts of another number of items than the request holds.
    """
    if body.budget is None:
        return [body] * len(media)
    try:
        budgets = body.budget.by_item(media)
    except ValueError as error:
        raise refusal_of(error, "budget") from error
    return [replace(body, budget=budget) for budget in budgets]


def _says(media: Sequence[tuple[str, Wishes]], body: Wishes) -> bool:
    """Tell whether a request speaks of budgets at all."""
    said = [body, *(wishes for _, wishes in media)]
    keys = ("budget", "max_soft_tokens", "media_resolution")
    return any(getattr(wishes, key) is not None for wishes in said for key in keys) or any(
        wishes.detail not in (None, "auto") for wishes in said
    )


def _is_at_most(amount: Amount, cap: Amount) -> bool:
    """Tell whether an amount gives no more tokens than another of its kind."""
    return amount.value >= cap.value if amount.kind == "rate" else amount.value <= cap.value


def amounts_of(media: Sequence[str], counts: Sequence[TokenCount]) -> str | None:
    """Write the one budget that all items of a request were served at; None where they differ."""
    amounts: dict[str, Amount] = {}
    tiles: set[int] = set()
    frames: set[int] = set()
    seen: set[int | None] = set()
    for medium, count in zip(media, counts, strict=True):
        if amounts.setdefault(medium, count.amount) != count.amount:
            return None
        tiles |= {count.tiles.count} if count.tiles is not None else set()
        frames |= {count.frames} if count.frames else set()
        seen |= {None if count.resolution is None else count.resolution.tokens} if medium == "image" else set()
    if max(len(tiles), len(frames), len(seen)) > 1:
        return None
    ordered = {medium: amounts[medium] for medium in MEDIA if medium in amounts}
    most_tiles, num_frames, most_seen = (next(iter(values), None) for values in (tiles, frames, seen))
    return str(Budget(ordered, max_tiles=most_tiles, num_frames=num_frames, max_image_tokens=most_seen))


__all__ = [
    "BudgetPolicy",
    "ItemBudget",
    "RequestBudget",
    "RequestError",
    "Wishes",
    "amounts_of",
    "read_body_wishes",
    "read_budget",
    "read_part_wishes",
]
