"""The slots of an engine, the queue before them and the threads that serve them: the only Python threads here.

Every slot that executes or is in flight has one thread, which sleeps until it is called. So a synchronous device has a
thread for each stream, and an asynchronous one has two: one waits for its batch while the other gathers and launches
the next. A slot has one owner at a time: the idle list, its thread, or a caller that runs its own request on it.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

from gpu_engine.errors import DeviceLost, EngineClosed, ForkedEngineError, RequestTimeout
from gpu_engine.runtime.device import Stream
from gpu_engine.runtime.endings import CLOSED, EXPIRED, FORKED, watch_endings
from gpu_engine.runtime.execution import POLL_S, Lane, Shortage, Worker, clock, seconds_left
from gpu_engine.runtime.future import Future
from gpu_engine.runtime.gate import Gate
from gpu_engine.runtime.observation import Observer, watch
from gpu_engine.runtime.requests import Request, fail_all
from gpu_engine.runtime.rounds import Rounds
from gpu_engine.runtime.scheduler import Batch, Batcher
from gpu_engine.runtime.statistics import Statistics, queue_counts, summed
from gpu_engine.runtime.vacancy import Vacancy

_LOGGER = logging.getLogger(__name__)


class Pool:
    """Queue, slots and threads. What an engine shares with its threads, so that they never keep the engine alive."""

    def __init__(
        self, streams: Sequence[Stream], batcher: Batcher[Request], batch: int, batched_outputs: Sequence[bool],
        shortage: Shortage | None = None,
    ) -> None:  # fmt: skip
        self.batcher, self._batch, self.gate = batcher, batch, Gate()
        self.rounds = Rounds(batcher, batched_outputs, lambda: self.gate.is_shut)
        self._lanes = [Lane(stream) for stream in streams]
        slots = max(len(stream.slots) for stream in streams)
        # Slot by slot: `observe` relies on it.
        self._workers = [Worker(lane, lane.stream.slots[i], shortage) for i in range(slots) for lane in self._lanes]
        self._idle = self._workers[::-1]
        self._single = slots == 1
        self._by_thread: dict[int, Worker] = {}
        self._made_at = clock()
        self._coming = 0
        self._timekeeper: Worker | None = None
        self._open = list(self._lanes)
        self._started = self._stopped = self._abandoned = False
        self._make_locks()
        self._forget_exit = watch_endings(self)

    def borrow(self, now: float) -> Worker | None:
        """An idle slot for the calling thread if nothing waits, else None; raises what `gate` says."""
        with self._mutex:
            if self.gate.is_shut:
                self.gate.check()
            if not self._idle or self.batcher.size:
                return None
            worker = self._idle.pop() if self._single else self._pick()
            worker.lane.begin(now)
            return worker

    @contextlib.contextmanager
    def slot(self) -> Iterator[Worker]:
        """An idle slot, waited for, for the calling thread; raises what `gate` says."""
        while (worker := self.borrow(clock())) is None:
            time.sleep(POLL_S)
        try:
            yield worker
        except DeviceLost as error:
            worker.lost = error
            raise
        finally:
            self.give_back(worker)

    def give_back(self, worker: Worker) -> None:
        """End what `borrow` began."""
        if worker.lost is not None:
            self._notice_loss(worker.lost, worker)
        with self._mutex:
            worker.lane.end(clock())
            self._idle.append(worker)
            if self.batcher.size:
                self._call_workers()
            if self.gate.is_shut:
                self._quiet.notify_all()
        if self._stopped:
            self._release_streams()

    def admit(self, requests: Iterable[Request], block: bool = False) -> None:
        """Queue requests as one group; with `block`, wait for room up to each request's deadline.

        Raises what `gate` says, QueueFull without `block`, RequestTimeout with it.
        """
        if not self._started:
            self._start()
        with self._mutex:
            bounded = self.batcher.max_size
            try:
                for request in requests:
                    if bounded and not self._vacancy.has_room() and block:
                        self._call_workers()
                        self._vacancy.wait(request)
                    if self.gate.is_shut:
                        self.gate.check()
                    self.batcher.add(request)
            finally:
                self._call_workers()

    def admit_or_promise(self, request: Request) -> Future[None] | None:
        """Queue a request; if the queue is full, a future that is done when it is worth trying again."""
        if not self._started:
            self._start()
        with self._mutex:
            self.gate.check()
            if self._vacancy.has_room():
                self.batcher.add(request)
                self._call_workers()
                return None
            return self._vacancy.promise()

    def leave(self) -> None:
        """A request was cancelled: its place in a bounded queue is free."""
        with self._mutex:
            self._vacancy.leave()

    @property
    def threads(self) -> int:
        """Threads of the host that all streams together compute with."""
        return sum(lane.stream.threads for lane in self._lanes)

    def collect_for(self, timeout_s: float) -> None:
        """From now on let a batch that is not full wait so long for more rows."""
        with self._mutex:
            self.batcher.timeout_s = timeout_s
            if self._timekeeper is not None:
                self._timekeeper.tokens.put()

    def resize(self, batch: int) -> None:
        """From now on expect a slot to take so many rows at once."""
        self._batch = batch

    def flush(self) -> None:
        """Let all that waits run now."""
        with self._mutex:
            self.batcher.flush()
            self._call_workers()

    def serve_until(self, done: Callable[[], bool]) -> bool:
        """For a callback on one of our own threads that is about to wait: run what the thread cannot while it waits.

        Whether this is such a thread.
        """
        worker = self._by_thread.get(threading.get_ident())
        while worker is not None and not done() and self._serve_one(worker):
            pass
        return worker is not None

    def observe(self, observer: Observer | None) -> None:
        """See `Engine.observe`."""
        with self._mutex:
            if observer is not None:
                self.gate.check()
            for number, worker in enumerate(self._workers):
                place, stream = divmod(number, len(self._lanes))
                worker.watch = None if observer is None else watch(observer, stream, place, worker.slot)

    def statistics(self) -> Statistics:
        with self._mutex:
            queue = queue_counts(self.batcher)
            now = clock()
            age_s = max(now - self._made_at, 1e-9)
            busy = tuple(lane.busy_until(now) / age_s for lane in self._lanes)
            in_flight = tuple(lane.max_in_flight for lane in self._lanes)
        return summed((worker.counters for worker in self._workers), queue, busy, in_flight)

    def close(self, drain: bool, timeout_s: float | None) -> None:
        """Refuse new requests, run or fail those that wait, wait for those in flight, end all threads.

        What has not finished after `timeout_s` fails with EngineClosed. In a callback on one of our own threads nothing
        is waited for: what waits is run there, and the threads end when they are done.
        """
        ends = None if timeout_s is None else clock() + timeout_s
        worker = self._by_thread.get(threading.get_ident())
        self._forget_exit()
        with self._mutex:
            self.gate.shut(EngineClosed, CLOSED)
            if self.gate.forked:
                return
            self._vacancy.announce()
        while drain and worker is not None and self._serve_one(worker):
            pass
        with self._mutex:
            if drain and worker is None:
                self.batcher.flush()
                self._call_workers()
                self._quiet.wait_for(lambda: self._is_quiet() and not self.batcher.size, seconds_left(ends))
            waiting = self.batcher.clear()
        fail_all(waiting, EngineClosed(CLOSED))
        with self._mutex:
            quiet = worker is not None or self._quiet.wait_for(self._is_quiet, seconds_left(ends))
            late = [] if quiet else self._in_flight()
            self._stopped = True
        fail_all(late, EngineClosed(f"{CLOSED} and this request did not finish in time"))
        for each in self._workers:
            each.tokens.put()
        for each in self._workers:
            if each.thread is not None and worker is None:
                each.thread.join(seconds_left(ends))
        self._release_streams()

    def abandon(self) -> None:
        """Close without taking a lock or waiting, for the garbage collector, which runs anywhere."""
        self._abandoned = True
        self._forget_exit()
        for worker in self._workers:
            worker.tokens.put()
        if not self._started and not self.gate.forked:
            self._release_streams()

    def after_fork(self) -> None:
        """In the child of a fork no thread serves the slots: fail what waits, refuse what comes."""
        self.gate.shut(ForkedEngineError, FORKED)
        self._make_locks()
        self._by_thread.clear()
        requests = [*self.batcher.clear(), *self._in_flight()]
        for request in requests:
            request.future.forget_lock()
        fail_all(requests, ForkedEngineError(FORKED))

    def _serve_one(self, worker: Worker) -> bool:
        """Run the next batch on the slot of the worker whose thread this is; False if none waits."""
        with self._mutex:
            self.batcher.flush()
            batch = self.batcher.take(clock())
            expired = self.batcher.pop_expired()
            if self.batcher.max_size:
                self._vacancy.announce()
        fail_all(expired, RequestTimeout(EXPIRED))
        if batch is not None:
            self.rounds.execute(worker, batch)
            if worker.lost is not None:
                self._notice_loss(worker.lost, worker)
        return batch is not None

    def _notice_loss(self, lost: DeviceLost, worker: Worker) -> None:
        """After an execution that found the device broken: fail what waits, at once, and refuse what comes."""
        worker.lost = None
        with self._mutex:
            self.gate.shut(DeviceLost, str(lost))
            waiting = self.batcher.clear()
            self._vacancy.announce()
        worker.counters.failed += sum(not request.cancelled() for request in waiting)
        fail_all(waiting, lost)

    def _make_locks(self) -> None:
        self._mutex = threading.Lock()
        self._quiet = threading.Condition(self._mutex)
        self._vacancy = Vacancy(self._mutex, self.batcher, self.gate)

    def _start(self) -> None:
        with self._mutex:
            if self._started or self.gate.is_shut:
                return
            for i, worker in enumerate(self._workers):
                if worker.thread is None:
                    name = f"gpu-engine slot {i}"
                    thread = threading.Thread(target=self._serve, args=(worker,), name=name, daemon=True)
                    thread.start()
                    worker.thread = thread
            self._started = True

    def _call_workers(self) -> None:
        """Wake sleeping workers for the rows that wait; the mutex is held.

        One on its way takes up to a batch, and calls the next when it has taken and more is left. So a burst wakes few
        threads, and no slot idles while a batch that may run waits.
        """
        if self._timekeeper is not None:
            if not self.batcher.ready(clock()):
                return
            self._coming += 1
            self._timekeeper.called = True
            self._timekeeper.tokens.put()
            self._timekeeper = None
        while self._idle and self.batcher.rows > self._coming * self._batch:
            worker = self._idle.pop() if self._single else self._pick()
            worker.called = True
            self._coming += 1
            worker.tokens.put()

    def _pick(self) -> Worker:
        """An idle worker of the stream with the most idle slots, the last used first."""
        lanes = [worker.lane for worker in self._idle]
        most = max(range(len(lanes)), key=lambda i: (lanes.count(lanes[i]), i))
        return self._idle.pop(most)

    def _serve(self, worker: Worker) -> None:
        """The life of a worker's thread."""
        self._by_thread[threading.get_ident()] = worker
        try:
            worker.lane.stream.enter()
        except Exception:
            _LOGGER.exception("a thread could not be bound to its stream's cores")
        while True:
            worker.tokens.get()
            with self._mutex:
                called = self._answer(worker)
            if called:
                self._work(worker)
            if self._abandoned:
                self._fail_abandoned()
            if self._stopped or self._abandoned:
                break
        del self._by_thread[threading.get_ident()]
        self._release_streams()

    def _answer(self, worker: Worker) -> bool:
        """Whether the worker was called since it last asked; the mutex is held."""
        called, worker.called = worker.called, False
        self._coming -= called
        return called

    def _work(self, worker: Worker) -> None:
        """Run batches until none is left, then put the slot back."""
        ran = False
        while True:
            batch, wait_s = self._next(worker, ran)
            ran = batch is not None
            if batch is not None:
                self.rounds.run(worker, batch)
                if worker.lost is not None:
                    self._notice_loss(worker.lost, worker)
            elif wait_s is None:
                return
            else:
                self._keep_time(worker, wait_s)

    def _next(self, worker: Worker, ran: bool) -> tuple[Batch[Request] | None, float | None]:
        """The worker's next batch, or how long it is to keep time, or neither: then its slot is idle again."""
        with self._mutex:
            now, wait_s = clock(), None
            if ran:
                worker.lane.end(now)
            batch = None if self._abandoned else self.batcher.take(now)
            worker.batch = batch
            if batch is not None:
                worker.lane.begin(now)
            elif self.batcher.size and self._timekeeper is None and not self._abandoned:
                self._timekeeper = worker
                wait_s = max(0.0, (self.batcher.closes_at() or now) - now)
            else:
                self._idle.append(worker)
            if self.batcher.size and not self._abandoned:
                self._call_workers()
            if self.batcher.max_size:
                self._vacancy.announce()
            if self.gate.is_shut:
                self._quiet.notify_all()
            expired = self.batcher.pop_expired()
        if expired:
            fail_all(expired, RequestTimeout(EXPIRED))
        return batch, wait_s

    def _keep_time(self, worker: Worker, wait_s: float) -> None:
        """Sleep until the collecting batch closes for its age, or a token says that it closed before."""
        worker.tokens.get(wait_s)
        with self._mutex:
            if self._timekeeper is worker:
                self._timekeeper = None
            self._answer(worker)

    def _is_quiet(self) -> bool:
        """Whether no slot is owned."""
        return len(self._idle) == len(self._workers)

    def _in_flight(self) -> list[Request]:
        return [part[0] for worker in self._workers if worker.batch for part in worker.batch.parts]

    def _fail_abandoned(self) -> None:
        with self._mutex:
            self.gate.shut(EngineClosed, CLOSED)
            waiting = self.batcher.clear()
        fail_all(waiting, EngineClosed("the engine was dropped before the request ran"))

    def _release_streams(self) -> None:
        """Close the device's streams, once, after the last thread is gone and the last slot is back."""
        if self._by_thread or not self._is_quiet():
            return
        while self._open:
            with contextlib.suppress(IndexError):
                self._open.pop().release(self._workers)
