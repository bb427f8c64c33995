"""Reads and writes what a budget says without naming amounts: that a router is to choose, and caps in other units.

    auto                        at least 99 % of what the largest budget gets right, at the fewest tokens
    auto,quality>=0.98          at least 98 % of what the largest budget gets right
    auto,loss<=0.05             a certified promise: at most so much is lost against the largest budget
    auto,mean_tokens<=16        the best answers at 16 soft tokens per request on average
    auto,price=0.005            more tokens where each brings half a point of accuracy
    flops<=2e12                 the dearest trained budget whose request takes at most so many FLOPs
    kv_bytes<=1e6               at most so many bytes of key-value cache
    ms<=120                     at most so many milliseconds, of a table that `mllm bench` measured

Knows words and numbers. Does not know what is chosen; that is `mllm.router`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Goal = Literal["quality", "loss", "mean_tokens", "price"]
LimitUnit = Literal["flops", "kv_bytes", "ms"]
AUTO = "auto"
GOALS: Mapping[str, str] = {"quality": ">=", "loss": "<=", "mean_tokens": "<=", "price": "="}
"""What `auto` aims at, with the sign it is written with."""
LIMITS: Mapping[str, str] = {"flops": "<=", "kv_bytes": "<=", "ms": "<="}
"""Caps in other units than soft tokens, with the sign they are written with."""


@dataclass(frozen=True)
class Auto:
    """Says how a router is to choose: at a goal, or nearly as good as the largest budget where there is none."""

    goal: Goal | None = None
    value: float = 0.0

    def __str__(self) -> str:
        return AUTO if self.goal is None else f"{AUTO},{self.goal}{GOALS[self.goal]}{number_text(self.value)}"


@dataclass(frozen=True)
class Limit:
    """Caps what a request may take, in another unit than soft tokens."""

    unit: LimitUnit
    most: float

    def __str__(self) -> str:
        return f"{self.unit}{LIMITS[self.unit]}{number_text(self.most)}"


def is_automatic(item: str) -> bool:
    """Tell whether an item of a budget is one that is read here."""
    return item == AUTO or _name_of(item) is not None


def read_automatic(text: str, items: list[str]) -> tuple[Auto | None, tuple[Limit, ...]]:
    """Read the items of a budget that name no amounts.

    Args:
        text: the whole budget, for messages.

    Raises:
        ValueError: an item that is none, one that is written twice, two goals, or a goal without `auto`.
    """
    goals: dict[str, float] = {}
    limits: dict[str, float] = {}
    for item in items:
        if item == AUTO:
            continue
        name = _name_of(item)
        assert name is not None, item
        known = goals if name in GOALS else limits
        if name in known:
            raise ValueError(f"budget {text!r} says {name} twice")
        known[name] = _value(item, name)
    is_auto = AUTO in items
    if items.count(AUTO) > 1:
        raise ValueError(f"budget {text!r} says {AUTO} twice")
    if goals and not is_auto:
        goal = next(iter(goals))
        raise ValueError(f"budget {text!r} names a goal without {AUTO}; write {AUTO},{goal}{GOALS[goal]}N")
    if len(goals) > 1:
        raise ValueError(f"budget {text!r} has {len(goals)} goals ({', '.join(goals)}); {AUTO} aims at one")
    aims = [Auto(goal, value) for goal, value in goals.items()]  # type: ignore[arg-type]
    auto = (aims or [Auto()])[0] if is_auto else None
    return auto, tuple(Limit(unit, limits[unit]) for unit in LIMITS if unit in limits)  # type: ignore[arg-type]


def number_text(value: float) -> str:
    """Write a number so that reading it gives the same one, whole numbers without a point."""
    return str(int(value)) if value.is_integer() and abs(value) < 2**63 else repr(value)


def _name_of(item: str) -> str | None:
    """Return the goal or unit that an item speaks of, whatever follows it; None where it is another item."""
    name = item.split("=")[0].rstrip("<>").strip()
    return name if name in GOALS or name in LIMITS else None


def _value(item: str, name: str) -> float:
    sign = GOALS.get(name) or LIMITS[name]
    written, _, number = item.partition(sign)
    is_share = name in ("quality", "loss")
    allowed = "above 0 and at most 1" if is_share else "at least 0" if name == "price" else "above 0"
    try:
        value = float(number) if written.strip() == name else float("nan")
    except ValueError:
        value = float("nan")
    fits = 0 <= value < float("inf") and (value > 0 or name == "price") and (value <= 1 or not is_share)
    if not fits:
        raise ValueError(f"budget item {item!r} must be written as {name}{sign}N with N {allowed}")
    return value
