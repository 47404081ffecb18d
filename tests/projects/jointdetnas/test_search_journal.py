"""Journal and locks of a search: owners, torn lines, dead processes."""

import json
import multiprocessing
import os
import sys
import time

import pytest

from kd_d2.projects.jointdetnas.search.file_lock import FileLock, Holder, held
from kd_d2.projects.jointdetnas.search.journal import COMPLETE, FAILED, RUNNING, Journal, repair


def test_trials(tmp_path):
    journal = Journal(str(tmp_path / "new" / "search"))
    assert journal.trials() == []
    assert journal.begin(0, "a") and not journal.begin(0, "b") and not journal.begin(2, "b")
    assert journal.begin(1, "b") and journal.begin(2, "a")
    journal.note(0, proposal="Base")
    journal.complete(0, 40.5)
    journal.fail(1, "no memory")
    # another process sees the same
    trials = Journal(str(tmp_path / "new" / "search"), create=False).trials()
    assert [(t.number, t.state, t.worker, t.score) for t in trials] == [
        (0, COMPLETE, "a", 40.5),
        (1, FAILED, "b", None),
        (2, RUNNING, "a", None),
    ]
    assert [t.finished for t in trials] == [True, True, False]
    assert trials[0].notes == {"proposal": "Base"} and trials[1].notes == {"error": "no memory"}
    assert trials[0].ended >= trials[0].started and trials[2].ended is None


def test_what_has_ended_stays_so(tmp_path):
    journal = Journal(str(tmp_path))
    for number in range(2):
        journal.begin(number, "a")
    journal.complete(0, 1.0)
    journal.complete(0, 2.0)
    journal.fail(0, "late")
    journal.fail(1, "broken")
    journal.complete(1, 3.0)
    journal.note(1, more="x")
    first, second = journal.trials()
    assert (first.state, first.score, first.notes) == (COMPLETE, 1.0, {})
    assert (second.state, second.score, second.notes) == (FAILED, None, {"error": "broken"})


def test_owners_change_by_release_and_adoption_only(tmp_path):
    journal = Journal(str(tmp_path))
    for number, worker in enumerate(["gone", "gone", "b", "gone"]):
        journal.begin(number, worker)
    journal.complete(1, 0.0)
    assert not journal.adopt(0, "b")
    assert journal.release("gone") == [0, 3] and journal.release("nobody") == []
    assert [t.worker for t in journal.trials()] == ["", "gone", "b", ""]
    assert journal.adopt(3, "b") and not journal.adopt(3, "c") and not journal.adopt(1, "c")
    assert [t.worker for t in journal.trials()] == ["", "gone", "b", "b"]


def test_no_journal(tmp_path):
    with pytest.raises(ValueError, match="is not the folder of a search: it has no journal.log"):
        Journal(str(tmp_path), create=False)
    assert not list(tmp_path.iterdir())


def test_without_optuna(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ValueError, match=r"package optuna .*pip install 'kd-d2\[search\]'"):
        Journal(str(tmp_path))


# ------------------------------------------------------------------------------------ crashes
@pytest.mark.parametrize("tail", ['{"op_code":4,"wor', "{}", "\x00\x00\x00"])
def test_half_line_is_cut_off(tail, tmp_path):
    live = Journal(str(tmp_path))
    live.begin(0, "a")
    path = tmp_path / "journal.log"
    whole = path.read_text()
    path.write_text(whole + tail)
    # of a journal that is open, too: the next line would make it unreadable for everybody
    assert live.begin(1, "a")
    assert [t.worker for t in Journal(str(tmp_path)).trials()] == ["a", "a"]
    assert all(json.loads(line) for line in path.read_text().splitlines())
    path.write_text(path.read_text() + tail)
    assert len(Journal(str(tmp_path)).trials()) == 2
    assert repair(str(path)) == 0


def test_repair(tmp_path):
    path = tmp_path / "file"
    assert repair(str(path)) == 0
    for content, left in ((b"", b""), (b"a\nb\n", b"a\nb\n"), (b"a\nbc", b"a\n"), (b"abc", b"")):
        path.write_bytes(content)
        assert repair(str(path)) == len(content) - len(left)
        assert path.read_bytes() == left


def _take_and_die(path):
    assert FileLock(path).try_acquire()
    os._exit(0)


def test_lock_of_a_dead_process(tmp_path):
    path = str(tmp_path / "lock")
    process = multiprocessing.get_context("fork").Process(target=_take_and_die, args=(path,))
    process.start()
    while process.exitcode is None:
        time.sleep(0.01)
    lock = FileLock(path, grace=None)
    assert lock.holder().pid == process.pid and lock.holder().is_dead
    begun = time.monotonic()
    assert lock.acquire() and time.monotonic() - begun < 5
    assert lock.holder().pid == os.getpid() and not lock.holder().is_dead
    lock.release()
    assert lock.holder() is None and os.listdir(tmp_path) == []


def test_lock_excludes(tmp_path):
    ours, other = FileLock(str(tmp_path / "lock")), FileLock(str(tmp_path / "lock"))
    with ours:
        assert not other.try_acquire()
        with pytest.raises(ValueError, match=f"taken by process {os.getpid()} on"):
            with held(other, "taken by {holder}"):
                raise AssertionError
        other.release()  # it does not have it
        assert not other.try_acquire()
    with held(other, ""):
        assert not ours.try_acquire()
    assert ours.try_acquire()


def test_number_of_a_dead_process_is_used_again(tmp_path):
    path = str(tmp_path / "lock")
    parts = Holder.here().text.split("|")
    parts[3] = "1"  # began just after the machine did
    os.symlink("|".join(parts), path)
    if not os.path.isdir("/proc"):
        pytest.skip("only /proc tells when a process began")
    assert FileLock(path).try_acquire()


def test_lock_of_another_machine(tmp_path):
    path = str(tmp_path / "lock")
    os.symlink("elsewhere|pid:[1]|1|5|abc", path)
    assert str(FileLock(path).holder()) == "process 1 on elsewhere"
    assert not FileLock(path).try_acquire()
    begun = time.monotonic()
    # not looked up, but seen to be the same for too long
    assert FileLock(path, grace=0.2).acquire()
    assert time.monotonic() - begun > 0.2


def test_broken_lock_is_not_given_back(tmp_path):
    path = str(tmp_path / "lock")
    slow, next_one = FileLock(path), FileLock(path)
    slow.acquire()
    holder = slow.holder()
    next_one.break_lock(holder)
    assert next_one.try_acquire()
    next_one.break_lock(holder)  # the same conclusion, drawn by another process
    slow.release()
    assert next_one.holder() is not None


def _count(path, counter, times):
    for _ in range(times):
        with FileLock(path):
            value = int(open(counter).read())
            time.sleep(0.0005)
            with open(counter, "w") as file:
                file.write(str(value + 1))
    os._exit(0)


@pytest.mark.distributed
def test_lock_between_processes(tmp_path):
    counter = tmp_path / "counter"
    counter.write_text("0")
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=_count, args=(str(tmp_path / "lock"), str(counter), 25))
        for _ in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert counter.read_text() == "75"
