"""Four ranks, one of which is really killed, at random points: the run goes on to the uninterrupted run's exact end."""

from __future__ import annotations

import random
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from hope_train.checkpoint.manifest import CHECKPOINTS, list_unfinished, verify
from tests.train.kill_ranks import Server
from tests.train.tiny import STEPS, Tiny, assert_same_run

pytestmark = [pytest.mark.filterwarnings("ignore:torch.distributed is disabled"), pytest.mark.timeout(600)]

RANKS = 4
OPTIONS = ("parallel.tp=2", "train.micro_batch_size=1", "checkpoint.every=2", "checkpoint.keep_last=2")
# Saves at even steps sum what levels have collected; the last one, at an odd step, has it rank by rank.


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("kills"))
    yield server
    server.close()


def overrides(tiny: Tiny, name: str, save: str, steps: int = STEPS) -> list[str]:
    return [f"dir={tiny.dir(name)}", *OPTIONS, f"checkpoint.async_save={save}", f"train.tokens={128 * steps}"]


def points(events: list[list[str]], count: int, seed: int) -> list[tuple[int, int]]:
    """(rank, number of its event): a third anywhere, a third inside a save, the rest where things are put in place,
    removed, logged, or a step is taken."""
    rng = random.Random(seed)
    everything = [(rank, number) for rank, labels in enumerate(events) for number in range(len(labels))]

    def where(*words: str) -> list[tuple[int, int]]:
        return [(rank, number) for rank, number in everything if any(word in events[rank][number] for word in words)]

    saving = where(".tmp-")
    rare = where("os.rename", "os.rmdir", "os.remove", "step", "fsync")
    assert len(saving) > 20
    kinds = [everything, saving, rare]
    return [rng.choice(kinds[place % 3]) for place in range(count)]


def whole_run(server: Server, tiny: Tiny, steps: int = STEPS) -> list[list[str]]:
    """The run that nobody interrupts; the events of each of its ranks."""
    found = server.run(tiny.config, overrides(tiny, "whole", "false", steps), RANKS, count=True)
    assert found["codes"] == [0] * RANKS, found["output"]
    assert verify(tiny.checkpoint("whole", steps)).stacked == 2
    events: list[list[str]] = found["events"]
    return events


def kill(server: Server, settings: list[str], tiny: Tiny, point: tuple[int, int], rng: random.Random) -> str:
    """Kill a rank at a point, the others at the same moment or, as a launcher does, a little later; what it was at."""
    rank, number = point
    together, after = rng.random() < 0.5, rng.uniform(0.0, 0.2)
    killed = server.run(tiny.config, settings, RANKS, rank=rank, number=number, after=after, all=together)
    assert killed["codes"][rank] == -signal.SIGKILL, f"rank {rank}, event {number}\n{killed['output']}"
    return f"rank {rank}, event {number}, {killed['killed_at']}"


def resume(server: Server, settings: list[str], tiny: Tiny, name: str, where: str, steps: int = STEPS) -> None:
    """Go on to the end, which is the uninterrupted run's."""
    resumed = server.run(tiny.config, settings, RANKS)
    assert resumed["codes"] == [0] * RANKS, f"{where}\n{resumed['output']}"
    try:
        assert_same_run(tiny, name, "whole", steps)
    except AssertionError as error:
        raise AssertionError(f"{where}\n{resumed['output']}") from error
    assert list_unfinished(tiny.dir(name) / CHECKPOINTS) == [], where


def test_killed_three_times_on_the_way(server: Server, tiny: Tiny) -> None:
    steps, rng = 5, random.Random(0)
    early = [labels[: len(labels) // 3] for labels in whole_run(server, tiny, steps)]
    settings = overrides(tiny, "killed", "true", steps)
    places = [kill(server, settings, tiny, point, rng) for point in points(early, 3, seed=0)]
    resume(server, settings, tiny, "killed", "; ".join(places), steps)


@pytest.mark.slow
def test_killed_at_thirty_points(server: Server, tiny: Tiny) -> None:
    events, rng = whole_run(server, tiny), random.Random(1)
    places = []
    for number, point in enumerate(points(events, 30, seed=1)):
        name = f"killed-{number}"
        settings = overrides(tiny, name, ("false", "true")[number % 2])
        places.append(kill(server, settings, tiny, point, rng))
        resume(server, settings, tiny, name, f"point {number}: {places[-1]}")
        shutil.rmtree(tiny.dir(name))
    print(*places, sep="\n")
    inside = [place for place in places if ".tmp-" in place]
    assert len(inside) >= 10, "points inside saves"
    assert len({Path(place.split()[-1]).name for place in inside}) >= 4, "between several of their files"
