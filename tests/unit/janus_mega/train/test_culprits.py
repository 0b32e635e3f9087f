"""Who holds the others up, from what ranks told twice."""

from typing import Any

from janus_mega.train.culprits import find_culprits


def told(beat: int, step: int = 7, waits_in: str = "", world: int = 30, dp: int = 20) -> dict[str, Any]:
    return {"beat": beat, "step": step, "waits_in": waits_in, "collectives": {"world": world, "dp": dp}}


def culprits(before: dict[int, Any], after: dict[int, Any], world_size: int = 3) -> dict[int, str]:
    return {found.rank: found.why for found in find_culprits(before, after, world_size)}


def later(beats: dict[int, Any], *silent: int) -> dict[int, Any]:
    return {rank: told | {"beat": told["beat"] + (rank not in silent)} for rank, told in beats.items()}


WAITING = told(5, waits_in="all_reduce over dp")


def test_no_sign_of_life_is_the_strongest_sign() -> None:
    beats = {0: WAITING, 1: told(5), 2: WAITING}
    assert culprits(beats, later(beats, 2)) == {2: "its heartbeat stopped"}
    assert culprits({0: WAITING, 1: WAITING}, later({0: WAITING, 1: WAITING})) == {2: "never began"}


def test_the_one_that_does_not_wait() -> None:
    beats = {0: WAITING, 1: told(5), 2: WAITING}
    assert culprits(beats, later(beats)) == {1: "is busy while others wait in all_reduce over dp"}


def test_one_that_is_already_further_and_busy_is_not_waited_for() -> None:
    beats = {0: told(5, step=8), 1: told(5), 2: WAITING}
    assert set(culprits(beats, later(beats))) == {1}


def test_fewest_collectives_where_no_stack_shows_them() -> None:
    beats = {0: told(5), 1: told(5, world=29), 2: told(5)}
    assert culprits(beats, later(beats)) == {1: "has begun 29 collectives over world, others more"}
    beats = {0: told(5, world=-1), 1: told(5, world=-1), 2: told(5, world=-1, dp=19)}
    assert set(culprits(beats, later(beats))) == {2}


def test_all_alike() -> None:
    beats = {0: WAITING, 1: told(5, waits_in="barrier over world"), 2: WAITING}
    found = culprits(beats, later(beats))
    assert set(found) == {0, 1, 2}
    assert found[0] == "all ranks stand alike in all_reduce over dp, barrier over world"
    beats = {0: told(5, step=8, waits_in="x"), 1: WAITING, 2: WAITING}
    assert culprits(beats, later(beats)) == dict.fromkeys((1, 2), "is at step 7, others are further")
