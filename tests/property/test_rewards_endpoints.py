"""Which endpoint of a reward is asked, and when one that fails is left alone."""

import pytest

from xomni_jax.rewards.endpoints import Endpoints


def _request(endpoints, ok):
  endpoints.give_back(endpoints.take(), ok)


def test_breaker_opens_tries_once_and_closes():
  now = [0.0]
  endpoints = Endpoints(["a"], threshold=2, cooldown=5.0, clock=lambda: now[0])
  for _ in range(2):
    _request(endpoints, False)
  assert endpoints.take() == 5.0
  now[0] = 5.5
  trial = endpoints.take()
  assert trial == (0, "a")
  assert isinstance(endpoints.take(), float)  # one request tries, not two
  endpoints.give_back(trial, False)
  assert endpoints.take() == 5.0
  now[0] = 11.0
  _request(endpoints, True)
  for _ in range(2):
    assert endpoints.take() == (0, "a")


@pytest.mark.parametrize("ok", [False, None])
def test_breaker_trial_goes_on_while_older_requests_end(ok):
  now = [0.0]
  endpoints = Endpoints(["a"], threshold=2, cooldown=5.0, clock=lambda: now[0])
  older = [endpoints.take() for _ in range(4)]
  for taken in older[:2]:
    endpoints.give_back(taken, False)
  now[0] = 5.5
  trial = endpoints.take()
  endpoints.give_back(older[2], ok)
  now[0] = 11.0
  assert isinstance(endpoints.take(), float)  # the trial still runs
  endpoints.give_back(trial, None)
  second = endpoints.take()
  assert second == (0, "a")
  assert isinstance(endpoints.take(), float)
  endpoints.give_back(older[3], True)  # it does answer
  assert endpoints.take() == (0, "a")
  endpoints.give_back(second, False)  # an ordinary failure by now
  assert endpoints.take() == (0, "a")


def test_breaker_forgets_failures_after_a_success():
  endpoints = Endpoints(["a"], threshold=2)
  for ok in (False, True, False, None, True, False):
    _request(endpoints, ok)
  assert endpoints.take() == (0, "a")


def test_endpoint_least_loaded_is_taken_and_the_avoided_one_last():
  endpoints = Endpoints(["a", "b", "c"])
  taken = [endpoints.take() for _ in range(6)]
  assert [url for _, url in taken] == list("abcabc")
  endpoints.give_back(taken[1], True)
  assert endpoints.take()[1] == "b"
  endpoints.give_back(taken[2], True)
  assert endpoints.take(avoid=2)[1] != "c"
  assert Endpoints(["a"]).take(avoid=0) == (0, "a")
