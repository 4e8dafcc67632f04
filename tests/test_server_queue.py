"""The queue: what is accepted is drawn once - leases, retries, priorities, fairness, cancelling, keys, retention."""

import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import inspect
from sqlalchemy.orm import Session

from sfumato.server.queue import MAX_ATTEMPTS, MAX_CRASHES, Conflict, Full, Queue, turns
from sfumato.server.store import Store
from sfumato.server.tables import Base, JobRow, open_database


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    """The URL of a PostgreSQL server of our own; the tests on it are left out where there is none to start."""
    if not (shutil.which("initdb") and shutil.which("pg_ctl")):
        pytest.skip("PostgreSQL is not installed")
    programs = Path(shutil.which("initdb")).resolve().parent
    folder = Path(tempfile.mkdtemp(prefix="sfumato-postgres-"))
    user = {"user": "nobody"} if os.getuid() == 0 else {}  # as root it does not run
    if user:
        shutil.chown(folder, "nobody")

    def start(program: str, *flags: str) -> None:
        with (folder / "log").open("ab") as log:  # the server keeps its output open
            subprocess.run(
                [programs / program, "-D", folder / "data", *flags], check=True, stdout=log, stderr=log, **user
            )

    try:
        start("initdb", "-A", "trust", "-U", "test", "--no-sync")
        start("pg_ctl", "-w", "-o", f"-c listen_addresses='' -c unix_socket_directories='{folder}' -F", "start")
        folder.chmod(0o755)
        yield f"postgresql+psycopg://test@/postgres?host={folder}"
        start("pg_ctl", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder)


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.services)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'queue.db'}"
    found = request.getfixturevalue("postgres")
    engine = open_database(found)
    with engine.begin() as connection:
        for table in reversed(Base.metadata.sorted_tables):
            connection.execute(table.delete())
    engine.dispose()
    return found


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def queue(url: str, clock: Clock) -> Iterator[Queue]:
    queue = Queue(url, clock, lease=10)
    yield queue
    queue.close()


def test_a_job_goes_its_way(queue: Queue, clock: Clock) -> None:
    entry = queue.submit({"prompt": "a"}, "ann", files=["f" * 64])
    assert entry.state == "queued" and queue.counts()["queued"] == 1
    claimed = queue.claim("w")
    assert claimed is not None and claimed.id == entry.id and claimed.state == "running"
    assert queue.claim("w") is None
    assert queue.beat("w", {entry.id: (2, 4)}) == set()
    assert (queue.get(entry.id).done, queue.get(entry.id).total) == (2, 4)
    clock.now += 5
    assert queue.finish(entry.id, "w", ["a" * 64, "b" * 64], 1.5, 4)
    ended = queue.get(entry.id)
    assert (ended.state, ended.results, ended.done, ended.finished) == ("done", ("a" * 64, "b" * 64), 4, 1005.0)
    assert not queue.finish(entry.id, "w", [], 1.0) and not queue.fail(entry.id, "w", "late")
    assert queue.owns("a" * 64, "ann") and not queue.owns("a" * 64, "bob") and not queue.owns("f" * 64)


def test_a_worker_that_is_silent_loses_its_job_and_one_that_speaks_keeps_it(queue: Queue, clock: Clock) -> None:
    entry = queue.submit({"prompt": "a"})
    queue.claim("dead")
    clock.now += 9
    queue.beat("dead", {entry.id: (1, 2)})
    clock.now += 9
    assert queue.claim("alive") is None
    clock.now += 2
    again = queue.claim("alive")
    assert again is not None and again.id == entry.id and (again.crashes, again.done) == (1, 0)
    assert queue.beat("dead", {entry.id: (2, 2)}) == {entry.id}, "it is told to stop"
    assert not queue.finish(entry.id, "dead", ["a" * 64], 1.0)
    assert queue.finish(entry.id, "alive", ["b" * 64], 1.0)
    assert queue.get(entry.id).results == ("b" * 64,)


def test_a_job_that_always_ends_its_worker_is_given_up(queue: Queue) -> None:
    entry = queue.submit({"prompt": "a"})
    for _ in range(MAX_CRASHES):
        assert queue.claim("w") is not None
        assert queue.recover() == 1
        assert queue.get(entry.id).state == "queued"
    queue.claim("w")
    queue.recover()
    assert queue.get(entry.id).state == "failed" and "ended" in queue.get(entry.id).error


def test_failures_are_tried_again_later_and_not_for_ever(queue: Queue, clock: Clock) -> None:
    entry = queue.submit({"prompt": "a"})
    for attempt in range(1, MAX_ATTEMPTS + 1):
        assert queue.claim("w").id == entry.id
        assert queue.fail(entry.id, "w", "no luck", retry=True)
        assert queue.claim("w") is None, "not at once"
        assert queue.get(entry.id).attempts == attempt
        clock.now += 60
    ended = queue.get(entry.id)
    assert (ended.state, ended.error) == ("failed", "no luck")
    wrong = queue.submit({"prompt": "b"})
    queue.claim("w")
    queue.fail(wrong.id, "w", "steps=0: no", "steps")
    assert (queue.get(wrong.id).state, queue.get(wrong.id).field) == ("failed", "steps")


def test_priorities_first_then_users_in_turn(queue: Queue) -> None:
    greedy = [queue.submit({"prompt": str(n)}, "greedy").id for n in range(4)]
    modest = [queue.submit({"prompt": str(n)}, "modest").id for n in range(2)]
    urgent = queue.submit({"prompt": "now"}, "greedy", priority=5).id
    order = [queue.claim("w").id for _ in range(7)]
    assert order == [urgent, modest[0], greedy[0], modest[1], greedy[1], greedy[2], greedy[3]]


def test_users_who_have_enough_at_work_are_left_out(queue: Queue) -> None:
    queue.submit({"prompt": "a"}, "ann", priority=9)
    other = queue.submit({"prompt": "b"}, "bob")
    assert queue.claim("w", leave={"ann"}).id == other.id
    assert queue.claim("w", leave={"ann"}) is None and queue.claim("w") is not None


def test_cancelling(queue: Queue) -> None:
    waiting, running, done = (queue.submit({"prompt": name}, "ann") for name in "abc")
    assert queue.cancel(waiting.id, "bob") is None and queue.cancel("nothing") is None
    assert queue.cancel(waiting.id, "ann").state == "cancelled"
    assert queue.claim("w").id == running.id
    assert queue.cancel(running.id).state == "running"
    assert queue.beat("w", {running.id: (1, 4)}) == {running.id}
    assert queue.end_cancelled(running.id, "w") and queue.get(running.id).state == "cancelled"
    queue.claim("w")
    queue.finish(done.id, "w", [], 1.0)
    assert queue.cancel(done.id).state == "done"
    lost = queue.submit({"prompt": "d"})
    queue.claim("w")
    queue.cancel(lost.id)
    queue.recover()
    assert queue.get(lost.id).state == "cancelled", "also where its worker died on the way"


def test_a_key_makes_submitting_twice_once(queue: Queue) -> None:
    first = queue.submit({"prompt": "a"}, "ann", key="k")
    assert queue.submit({"prompt": "a"}, "ann", key="k").id == first.id
    assert queue.submit({"prompt": "a"}, "bob", key="k").id != first.id
    with pytest.raises(Conflict, match="another job"):
        queue.submit({"prompt": "b"}, "ann", key="k")
    with pytest.raises(ValueError, match="characters"):
        queue.submit({"prompt": "b"}, "ann", key="")
    assert sum(queue.counts().values()) == 2


def test_many_threads_claim_each_job_once(url: str) -> None:
    queue = Queue(url)
    ids = [queue.submit({"prompt": str(n)}, user=str(n % 3), key=f"k{n}").id for n in range(30)]
    claimed: list[str] = []

    def work(name: str) -> None:
        while (entry := queue.claim(name)) is not None:
            claimed.append(entry.id)
            assert queue.finish(entry.id, name, [], 0.0)

    threads = [threading.Thread(target=work, args=(f"w{n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(claimed) == sorted(ids)
    queue.close()


def test_a_race_with_one_key_gives_one_job(url: str) -> None:
    queues = [Queue(url) for _ in range(4)]
    ids: list[str] = []
    threads = [
        threading.Thread(target=lambda queue=queue: ids.append(queue.submit({"a": 1}, "u", key="same").id))
        for queue in queues
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(ids) == 4 and len(set(ids)) == 1
    for queue in queues:
        queue.close()


def test_pausing_lets_nothing_begin(queue: Queue) -> None:
    queue.submit({"prompt": "a"})
    queue.pause()
    queue.pause()
    assert queue.paused and queue.claim("w") is None
    queue.pause(False)
    assert not queue.paused and queue.claim("w") is not None


def test_released_jobs_wait_again_as_if_they_had_never_begun(queue: Queue) -> None:
    entry, cancelled = queue.submit({"prompt": "a"}), queue.submit({"prompt": "b"})
    queue.claim("w"), queue.claim("w")
    queue.cancel(cancelled.id)
    queue.release("w")
    assert (queue.get(entry.id).state, queue.get(entry.id).crashes) == ("queued", 0)
    assert queue.get(cancelled.id).state == "cancelled"


def test_lists_have_filters_and_pages(queue: Queue) -> None:
    ids = [queue.submit({"prompt": str(n)}, "ann" if n % 2 else "bob").id for n in range(6)]
    assert [entry.id for entry in queue.page()] == ids[::-1]
    page = queue.page("ann", limit=2)
    assert [entry.id for entry in page] == [ids[5], ids[3]]
    assert [entry.id for entry in queue.page("ann", before=page[-1].seq)] == [ids[1]]
    assert queue.page(state="done") == []
    for wrong in ({"state": "lost"}, {"limit": 0}, {"limit": 10**6}):
        with pytest.raises(ValueError):
            queue.page(**wrong)


def test_only_so_many_may_wait(queue: Queue) -> None:
    for _ in range(2):
        queue.submit({}, "ann", most=2)
    with pytest.raises(Full, match="2 unfinished"):
        queue.submit({}, "ann", most=2)
    queue.submit({}, "bob", most=2)


@pytest.mark.parametrize("priority", [101, -101, True, 1.5, "high"])
def test_a_wrong_priority_is_refused(queue: Queue, priority: object) -> None:
    with pytest.raises(ValueError, match="priority"):
        queue.submit({}, priority=priority)


def test_what_is_old_is_forgotten_with_its_files(queue: Queue, clock: Clock) -> None:
    old, new = queue.submit({"prompt": "a"}), queue.submit({"prompt": "b"})
    queue.claim("w")
    queue.finish(old.id, "w", ["a" * 64, "b" * 64], 1.0)
    clock.now += 100
    queue.claim("w")
    queue.finish(new.id, "w", ["b" * 64], 1.0)
    assert queue.forget(50) == 1
    assert queue.get(old.id) is None and queue.get(new.id) is not None
    assert queue.unused(["a" * 64, "b" * 64]) == ["a" * 64]


def test_a_queue_is_there_after_it_was_closed(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'queue.db'}"
    first = Queue(url)
    entry = first.submit({"prompt": "a", "options": {"s_churn": 1.5}})
    first.close()
    again = Queue(url)
    assert again.get(entry.id) == entry
    again.close()


def test_a_store_names_files_by_their_content(tmp_path: Path) -> None:
    store = Store(tmp_path / "results", ".png")
    name = store.put(b"abc")
    assert name == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert store.put(b"abc") == name and store.path(name).read_bytes() == b"abc"
    for wrong in ("../results/" + name, name.upper(), name[:-1], "", name + "\n"):
        assert store.path(wrong) is None
    half = tmp_path / "results" / f".{name}.1.1.part"
    half.write_bytes(b"a")
    assert list(store.older(1000)) == [] and half.exists()
    os.utime(half, (0, 0))
    os.utime(store.path(name), (0, 0))
    assert list(store.older(1000)) == [name] and not half.exists()
    store.remove(name)
    assert store.path(name) is None and list((tmp_path / "results").iterdir()) == []


WORKER = """
import sys, time
from sfumato.server.queue import Queue
keeps = int(sys.argv[3])
queue = Queue(sys.argv[1], lease=5.0 if keeps else 600.0)
print("ready", flush=True)
sys.stdin.readline()
while (entry := queue.claim(sys.argv[2])) is not None:
    print(entry.id, flush=True)
    if keeps:  # takes so many and does nothing with them, until it is killed
        keeps -= 1
        if not keeps:
            time.sleep(600)
        continue
    assert queue.finish(entry.id, sys.argv[2], [], 0.0)
"""


def worker(url: str, name: str, keeps: int = 0) -> subprocess.Popen[str]:
    """A process that takes jobs as soon as its input ends."""
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, url, name, str(keeps)], cwd=Path(__file__).parents[1], text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip


def test_processes_take_each_job_once_and_those_of_one_that_was_killed_after_its_lease(url: str) -> None:
    queue = Queue(url)
    ids = {queue.submit({"prompt": str(n)}, user=f"u{n % 3}").id for n in range(40)}
    workers = [worker(url, "dead", keeps=3), worker(url, "a"), worker(url, "b"), worker(url, "c")]
    assert all(each.stdout.readline() == "ready\n" for each in workers)
    dead, *alive = workers
    dead.stdin.close()
    lost = [dead.stdout.readline().strip() for _ in range(3)]
    dead.kill()
    dead.wait(30)
    taken = [line for each in alive for line in each.communicate("\n", timeout=60)[0].split()]
    assert all(each.returncode == 0 for each in alive)
    assert len(taken) == len(set(taken)) and ids - set(lost) <= set(taken) <= ids
    while (entry := queue.claim("late")) is not None or queue.counts()["running"]:
        if entry is None:
            time.sleep(0.1)  # until the lease ends
            continue
        assert entry.id in lost and queue.finish(entry.id, "late", [], 0.0)
        taken.append(entry.id)
    assert sorted(taken) == sorted(ids) and queue.counts()["done"] == 40
    assert {id for id in ids if queue.get(id).crashes} == set(lost), "the killed one's were lost once"
    queue.close()


def test_servers_that_begin_together_make_the_tables_once(url: str) -> None:
    if url.startswith("postgresql"):
        engine = open_database(url)
        Base.metadata.drop_all(engine)
        engine.dispose()
    errors: list[BaseException] = []

    def begin(url: str) -> None:
        try:
            open_database(url).dispose()
        except Exception as error:
            errors.append(error)

    others = [f"{url}{number}" for number in range(20)] if url.startswith("sqlite") else []
    for each in (url, *others):  # of a new SQLite file about every fourth such beginning found it locked
        threads = [threading.Thread(target=begin, args=(each,)) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert errors == []
    queue = Queue(url)
    assert queue.submit({"prompt": "a"}).state == "queued"
    queue.close()


def test_a_queue_of_before_gets_its_new_index(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'queue.db'}"
    engine = open_database(url)
    with engine.begin() as connection:
        connection.exec_driver_sql("DROP INDEX jobs_to_begin")
    engine.dispose()
    engine = open_database(url)
    assert "jobs_to_begin" in {index["name"] for index in inspect(engine).get_indexes("jobs")}
    engine.dispose()


def test_taking_a_job_looks_at_few_of_many_that_wait(url: str) -> None:
    queue = Queue(url)
    with Session(queue._engine) as session, session.begin():
        for n in range(3000):
            session.add(JobRow(id=f"{n:032x}", user=f"u{n % 4}", state="queued", priority=n % 2, job={}, created=0.0))
    with queue._engine.begin() as connection:
        connection.exec_driver_sql("ANALYZE")
        statements = [turns(1, 1e12), turns(1, 1e12, {"u1"})]
        for statement in statements:
            text = statement.compile(queue._engine, compile_kwargs={"literal_binds": True})
            explain = "EXPLAIN QUERY PLAN" if url.startswith("sqlite") else "EXPLAIN"
            plan = "\n".join(str(row) for row in connection.exec_driver_sql(f"{explain} {text}"))
            assert "Seq Scan on jobs" not in plan and "SCAN jobs" not in plan, plan
    order = [queue.claim("w") for _ in range(8)]
    assert [(entry.user, entry.seq) for entry in order] == sorted(
        ((entry.user, entry.seq) for entry in order), key=lambda pair: pair[1]
    ), "users in turn, the oldest first"
    assert {entry.priority for entry in order} == {1} and {entry.user for entry in order} == {"u1", "u3"}
    assert queue.claim("w", leave={"u1", "u3"}).priority == 0
    queue.close()
