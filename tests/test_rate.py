"""A rate as a text, and a bucket of its tokens."""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tcpsvc.rate import Rate, TokenBucket

pytestmark = pytest.mark.whatever("engine", "reactor")

#: A time as a clock that counts from 1970 tells it: its steps are coarse.
NOW = 1_790_000_000.0

RATES = st.builds(
    Rate,
    st.floats(0.000_001, 1_000_000),
    st.one_of(st.none(), st.integers(1, 1_000_000)),
)


def taken(bucket: TokenBucket, now: float, most: int = 10_000) -> int:
    """How many tokens there are, which are taken."""
    return next(n for n in range(most) if not bucket.take(now))


@pytest.mark.parametrize(
    ("text", "per_second", "burst"),
    [
        ("10", 10, 10),
        ("10/s", 10, 10),
        ("10/s:20", 10, 20),
        ("0.5", 0.5, 1),
        (".5:3", 0.5, 3),
        ("90/m", 1.5, 2),
        ("6/m:1", 0.1, 1),
        ("36/h:5", 0.01, 5),
        ("1e3/s", 1000, 1000),
        ("2.", 2, 2),
    ],
)
def test_a_text_gives_a_rate(text: str, per_second: float, burst: int) -> None:
    """The unit is a second, and the burst what comes in one, unless it says else."""
    assert Rate.parse(text) == Rate(per_second, burst)


@pytest.mark.parametrize(
    ("rate", "text"),
    [
        (Rate(10), "10/s:10"),
        (Rate(0.1, 4), "6/m:4"),
        (Rate(0.01), "36/h:1"),
        (Rate(1 / 3600, 2), "1/h:2"),
        (Rate(2.5), "2.5/s:3"),
        (Rate(1), "1/s:1"),
        (Rate(1_000_000), "1000000/s:1000000"),
    ],
)
def test_a_rate_as_a_text(rate: Rate, text: str) -> None:
    """The shortest."""
    assert str(rate) == text


@settings(max_examples=200)
@given(RATES)
def test_the_text_gives_the_same_rate_again(rate: Rate) -> None:
    """To the last bit."""
    assert Rate.parse(str(rate)) == rate


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "x", "/s", "10/", "10/d", "10/S", "10 /s", " 10", "10\n", "-1"),
        *("10:", "10:x", "10:-1", "10:1.5", "10/s:20:30", "10:20/s", "1_0", "+1"),
        *("inf", "nan", "0x10", "1e", "\u0661", "10:\u0661", "10:" + "9" * 5000),
    ],
)
def test_texts_of_another_form(text: str) -> None:
    """It is told which form is meant."""
    with pytest.raises(ValueError, match=r"is not of the form .* as in 10/s:20"):
        Rate.parse(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0", "per_second=0.0 is not from"),
        ("0/h:5", "for no limit give no rate"),
        ("1e7", "per_second=10000000.0"),
        ("9" * 400, "per_second=inf"),
        ("1e-99", "per_second=1e-99"),
        ("10:0", "burst=0 is not from 1"),
        ("10:1000001", "burst=1000001"),
    ],
)
def test_texts_out_of_range(text: str, said: str) -> None:
    """The text is named, and what of it is wrong."""
    with pytest.raises(ValueError, match=f"rate '{text}'.*{said}"):
        Rate.parse(text)


@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf, 1e-7, 2_000_000, 10**400])
def test_rates_out_of_range(value: float) -> None:
    """Zero is not taken for no limit."""
    with pytest.raises(ValueError, match=r"per_second=.*for no limit give no rate"):
        Rate(value)


@pytest.mark.parametrize("value", ["10", None, True, 1j])
def test_rates_of_a_wrong_kind(value: Any) -> None:
    """A text is parsed only if asked for."""
    with pytest.raises(TypeError, match=r"per_second=.*is not a number"):
        Rate(value)


@pytest.mark.parametrize("value", [1.0, "1", True])
def test_bursts_of_a_wrong_kind(value: Any) -> None:
    """They are counted."""
    with pytest.raises(TypeError, match=r"burst=.*is not an int"):
        Rate(1, value)


@pytest.mark.parametrize("value", [None, b"10", 10])
def test_only_a_text_is_parsed(value: Any) -> None:
    """Not what looks like one."""
    with pytest.raises(TypeError, match="is not a str"):
        Rate.parse(value)


def test_a_rate_is_a_value() -> None:
    """Equal, hashable, unchangeable."""
    assert {Rate(2), Rate(2.0), Rate(2, 2)} == {Rate(2)}
    assert Rate(2) != Rate(2, 3)
    assert dataclasses.replace(Rate(2), burst=5) == Rate(2, 5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        Rate(2).burst = 3  # type: ignore[misc]


@pytest.mark.parametrize("now", [0.0, -5.0, NOW])
def test_a_bucket_is_full_at_first(now: float) -> None:
    """Whatever the time is."""
    assert taken(TokenBucket(Rate(0.3, 7)), now) == 7


def test_a_bucket_fills_at_its_rate() -> None:
    """And no fuller than its burst."""
    bucket = TokenBucket(Rate(10, 20))
    assert taken(bucket, NOW) == 20
    assert not bucket.take(NOW + 0.09)
    assert bucket.take(NOW + 0.11)
    assert not bucket.take(NOW + 0.19)
    assert taken(bucket, NOW + 1.11) == 10
    assert taken(bucket, NOW + 1000) == 20


def test_asking_in_vain_costs_nothing() -> None:
    """Who asks all the time gets as much as who asks when there is a token."""
    bucket = TokenBucket(Rate(1))
    assert sum(bucket.take(NOW + n / 100) for n in range(1001)) == 11


def test_how_long_to_wait() -> None:
    """Until there is a token, which a question does not use up."""
    bucket = TokenBucket(Rate(0.5, 2))
    assert bucket.wait(NOW) == 0.0
    assert taken(bucket, NOW) == 2
    assert bucket.wait(NOW) == bucket.wait(NOW) == 2.0
    assert bucket.wait(NOW + 1.5) == 0.5
    assert bucket.wait(NOW + 2) == 0.0
    assert bucket.wait(NOW + 9) == 0.0


@settings(max_examples=200)
@given(RATES, st.floats(0, 2e9), st.integers(0, 30))
def test_after_the_wait_there_is_a_token(rate: Rate, now: float, more: int) -> None:
    """However its time is rounded."""
    bucket = TokenBucket(rate)
    for _ in range(min(rate.burst, 50) + more):
        bucket.take(now)
    assert bucket.take(now + bucket.wait(now))


def test_a_clock_set_back_stops_the_time_once() -> None:
    """Neither are tokens lost for as long as it was set back, nor are there more."""
    bucket = TokenBucket(Rate(1, 3))
    assert taken(bucket, NOW) == 3
    back = NOW - 1_000_000
    assert not bucket.take(back)
    assert bucket.wait(back) == 1.0
    assert not bucket.take(back + 0.5)
    assert bucket.take(back + 1)
    assert taken(bucket, back + 3) == 2
    assert taken(bucket, 0.0) == 0
    assert taken(bucket, 2.0) == 2


def test_a_new_rate_keeps_the_tokens() -> None:
    """It fills faster or slower from then on."""
    bucket = TokenBucket(Rate(1, 4))
    assert bucket.take(NOW)
    assert bucket.take(NOW)
    bucket.change(Rate(100, 50), NOW)
    assert bucket.rate == Rate(100, 50)
    assert taken(bucket, NOW) == 2
    assert bucket.wait(NOW) == pytest.approx(0.01, abs=1e-6)
    assert taken(bucket, NOW + 9) == 50
    bucket.change(Rate(0.1, 50), NOW + 9)
    assert taken(bucket, NOW + 9) == 0
    assert taken(bucket, NOW + 40) == 3


def test_a_lowered_burst_lets_tokens_go() -> None:
    """As many as do not fit."""
    bucket = TokenBucket(Rate(10, 20))
    bucket.change(Rate(10, 3), NOW)
    assert taken(bucket, NOW) == 3


def test_a_raised_burst_is_filled_first() -> None:
    """It is room, not tokens."""
    bucket = TokenBucket(Rate(10, 2))
    bucket.change(Rate(1, 10), NOW)
    assert taken(bucket, NOW) == 2
    assert taken(bucket, NOW + 10) == 10


#: Of rates and times whose sums are exact.
EXACT_RATES = st.builds(Rate, st.sampled_from([0.25, 0.5, 1, 2, 4]), st.integers(1, 6))
STEPS = st.integers(0, 64).map(lambda n: n / 16)


@settings(max_examples=200)
@given(EXACT_RATES, st.lists(STEPS, max_size=60))
def test_it_is_a_bucket_of_tokens(rate: Rate, steps: list[float]) -> None:
    """What one float tells is what counting fractions of tokens does."""
    bucket, now = TokenBucket(rate), NOW
    tokens = Fraction(rate.burst)
    for step in steps:
        now += step
        per_second = Fraction(rate.per_second)
        tokens = min(Fraction(rate.burst), tokens + Fraction(step) * per_second)
        assert bucket.wait(now) == max(Fraction(0), (1 - tokens) / per_second)
        assert bucket.take(now) == (tokens >= 1)
        tokens -= tokens >= 1


@settings(max_examples=100)
@given(
    st.builds(Rate, st.floats(0.01, 1000), st.integers(1, 100)),
    st.lists(st.floats(0, 3), max_size=60),
    st.floats(0, 2e9),
)
def test_never_more_than_the_rate(rate: Rate, steps: list[float], start: float) -> None:
    """Over any time: the burst, and what the rate gives in that time."""
    bucket, now, count = TokenBucket(rate), start, 0
    for step in steps:
        now += step
        count += taken(bucket, now)
        assert count <= rate.burst + (now - start) * rate.per_second + 0.5
