"""What is expected of responses, and the order in which records start."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flyte_batch.batching.admission import ResponseLengths, admission_order


def test_before_anything_is_known_the_guess_holds_or_half_of_the_limit():
    assert ResponseLengths().expect(10, 200) == 100
    assert ResponseLengths(30).expect(10, 200) == 30
    assert ResponseLengths(300).expect(10, 200) == 200


def test_the_first_short_responses_are_not_taken_for_all():
    lengths = ResponseLengths()
    for _ in range(4):
        lengths.observe(10, 1)
    assert lengths.expect(10, 200) > 50


def test_where_prompts_say_nothing_the_mean_is_expected_of_all():
    rng = random.Random(1)
    lengths = ResponseLengths()
    for _ in range(2000):
        lengths.observe(rng.randint(10, 1000), rng.choice([20, 60]))
    for prompt in (10, 500, 1000):
        assert lengths.expect(prompt, 4096) == pytest.approx(40, rel=0.1)


def test_where_long_prompts_have_long_responses_that_is_learnt():
    rng = random.Random(1)
    lengths = ResponseLengths()
    for _ in range(500):
        prompt = rng.randint(10, 1000)
        lengths.observe(prompt, 0.5 * prompt + rng.randint(-5, 5))
    assert lengths.expect(100, 4096) == pytest.approx(50, abs=8)
    assert lengths.expect(900, 4096) == pytest.approx(450, rel=0.05)


def test_a_change_of_the_work_is_followed():
    lengths = ResponseLengths()
    for _ in range(2000):
        lengths.observe(10, 500)
    for _ in range(2000):
        lengths.observe(10, 20)
    assert lengths.expect(10, 4096) < 40


@given(
    st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 5000)), max_size=30),
    st.integers(0, 9000),
    st.integers(1, 5000),
)
def test_the_expectation_is_between_one_token_and_the_limit(seen, prompt, limit):
    lengths = ResponseLengths()
    for observation in seen:
        lengths.observe(*observation)
    assert 1 <= lengths.expect(prompt, limit) <= limit


def test_the_costliest_come_first_and_equals_in_the_order_of_the_call():
    prompts = [[i] for i in range(5)]
    assert admission_order(prompts, [1, 5, 3, 5, 2], shared=0) == [1, 3, 2, 4, 0]


def test_prompts_that_share_a_prefix_beyond_the_common_one_come_together():
    system, a, b = [0] * 20, [1] * 20, [2] * 20
    prompts = [[*system, *a, 1], [*system, *b, 2], [*system, *a, 3], [*system, *b, 4], [*system, 9]]
    order = admission_order(prompts, [1, 2, 5, 1, 3], shared=16)
    assert order == [2, 0, 4, 1, 3]


def test_one_prefix_that_all_share_is_no_reason_to_group():
    prompts = [[*[0] * 50, i] for i in range(4)]
    assert admission_order(prompts, [1, 4, 2, 3], shared=16) == [1, 3, 2, 0]


@given(
    st.lists(st.tuples(st.lists(st.integers(0, 1), max_size=6), st.integers(0, 9)), max_size=30),
    st.integers(0, 3),
)
def test_every_record_is_admitted_once_and_groups_stay_together(work, shared):
    prompts, costs = [prompt for prompt, _ in work], [cost for _, cost in work]
    order = admission_order(prompts, costs, shared=shared)
    assert sorted(order) == list(range(len(work)))
    if shared and len(work) > 2:
        common = 0
        while all(len(p) > common and p[common] == prompts[0][common] for p in prompts):
            common += 1
        needed = common + shared
        keys = [tuple(prompts[i][:needed]) for i in order if len(prompts[i]) >= needed]
        assert len([1 for i, key in enumerate(keys) if i == 0 or keys[i - 1] != key]) == len(set(keys))
