"""Native code of a team: threads that walk one table together.

A team is a block of memory. `CURRENT` is a number that only grows: even while a row of the table is open, odd where
none is, and then a table is done. A row is open until all its parts are done, one for each thread. Every thread claims
its own part first; one that waits for a while claims what is left over, so that nobody waits for a thread that sleeps
or has no core, and workers may come late or never. Whoever does the last part of a row runs the rows behind it that
are not shared, follows the jumps among them, and opens the next one that is.

A claim is CURRENT's number in the line of a part, put there if less stood there: it fails where a row has been closed,
and what it protects, the table, then is not touched.

Whoever waits pauses, then gives its core away, then sleeps on a futex. A wake-up takes 20 to 50 us where cores are
virtual and halt; a row costs two threads that run 0.05 to 0.2 us.
https://man7.org/linux/man-pages/man2/futex.2.html
"""

from __future__ import annotations

from cpu_fallback.native import Target
from cpu_fallback.walk_code import JUMP, PAUSE

LINE = 128
"""Bytes between words that different threads write: processors fetch cache lines in pairs."""
CURRENT, SLEEPERS, DONE, JOB, CORE, LINES = (LINE * i for i in range(6))
TABLE, STEPS, SHARES, ROW, THREADS, STOPPED = (JOB + 8 * i for i in range(6))
CLAIM, TEAM, THREAD, PARTS = 0, 8, 16, 24
COUNTS = LINES + PARTS
"""In a thread's own line, from LINES on: the last claim of its part, where the team is, which thread it is, how many
parts it has done."""

PAUSES = 200
STEALING = 24
"""Looks before a thread does another one's part; none if it did so last time."""
PATIENCE = PAUSES + 300
"""Looks before a thread sleeps."""
FUTEX = {"x86_64": 202, "aarch64": 98}
"""The number of the system call."""


def team_module(target: Target, machine: str) -> str:
    """LLVM IR of `lead(job)`, which is {table, steps, shares, team}, `serve(line of a worker)` and `stop(team)`."""
    declared, called = PAUSE[target.x86]
    numbers = {name: value for name, value in globals().items() if isinstance(value, int)}
    return CODE.format(declared=declared, called=called, futex=FUTEX[machine], JUMP=JUMP, **numbers)


CODE = """
declare void {declared}
declare i64 @syscall(i64, ...)
declare i32 @sched_yield()
declare i32 @sched_getcpu()

define internal void @rest(ptr %team, i64 %seen, i64 %tries) nounwind {{
entry:
  %spins = icmp ult i64 %tries, {PAUSES}
  br i1 %spins, label %pause, label %tired
pause:
  call void {called}
  ret void
tired:
  %patient = icmp ult i64 %tries, {PATIENCE}
  br i1 %patient, label %yield, label %sleep
yield:
  call i32 @sched_yield()
  ret void
sleep:
  %sleepers = getelementptr i8, ptr %team, i64 {SLEEPERS}
  %asleep = atomicrmw add ptr %sleepers, i32 1 seq_cst
  %value = and i64 %seen, 4294967295
  %woken = call i64 (i64, ...) @syscall(i64 {futex}, ptr %team, i64 128, i64 %value, ptr null)
  ret void
}}

define internal void @publish(ptr %team, i64 %value) nounwind {{
entry:
  %sleepers = getelementptr i8, ptr %team, i64 {SLEEPERS}
  store atomic i64 %value, ptr %team seq_cst, align 8
  %count = load atomic i32, ptr %sleepers seq_cst, align 4
  %any = icmp ne i32 %count, 0
  br i1 %any, label %wake, label %done
wake:
  %all = atomicrmw xchg ptr %sleepers, i32 0 seq_cst
  %woken = call i64 (i64, ...) @syscall(i64 {futex}, ptr %team, i64 129, i64 1073741824)
  br label %done
done:
  ret void
}}

define internal i1 @claimed(ptr %team, i64 %part, i64 %row) nounwind {{
entry:
  %line = mul i64 %part, {LINE}
  %offset = add i64 %line, {LINES}
  %place = getelementptr i8, ptr %team, i64 %offset
  %last = load atomic i64, ptr %place monotonic, align 8
  %free = icmp ult i64 %last, %row
  br i1 %free, label %claim, label %no
claim:
  %pair = cmpxchg ptr %place, i64 %last, i64 %row acq_rel monotonic
  %won = extractvalue {{ i64, i1 }} %pair, 1
  ret i1 %won
no:
  ret i1 false
}}

define internal void @call_row(ptr %table, i64 %i, i64 %part, i64 %parts) nounwind {{
entry:
  %row = getelementptr {{ ptr, ptr }}, ptr %table, i64 %i
  %function = load ptr, ptr %row
  %place = getelementptr i8, ptr %row, i64 8
  %block = load ptr, ptr %place
  call void %function(ptr %block, i64 %part, i64 %parts)
  ret void
}}

define internal i64 @behind_jump(ptr %table, i64 %i) nounwind {{
entry:
  %row = getelementptr {{ ptr, ptr }}, ptr %table, i64 %i
  %place = getelementptr i8, ptr %row, i64 8
  %block = load ptr, ptr %place
{JUMP}
  %rows = sdiv i64 %nbytes, 16
  %far = select i1 %taken, i64 %rows, i64 1
  %next = add i64 %i, %far
  ret i64 %next
}}

define internal void @advance(ptr %team, i64 %first) nounwind {{
entry:
  %table_place = getelementptr i8, ptr %team, i64 {TABLE}
  %steps_place = getelementptr i8, ptr %team, i64 {STEPS}
  %shares_place = getelementptr i8, ptr %team, i64 {SHARES}
  %row_place = getelementptr i8, ptr %team, i64 {ROW}
  %table = load ptr, ptr %table_place
  %steps = load i64, ptr %steps_place
  %shares = load ptr, ptr %shares_place
  %last = load i64, ptr %team
  %closed = or i64 %last, 1
  br label %head
head:
  %i = phi i64 [ %first, %entry ], [ %next, %alone ], [ %there, %jump ]
  %more = icmp ult i64 %i, %steps
  br i1 %more, label %body, label %end
body:
  %share_place = getelementptr i8, ptr %shares, i64 %i
  %share = load i8, ptr %share_place
  %shared = icmp ne i8 %share, 0
  br i1 %shared, label %together, label %look
look:
  %row = getelementptr {{ ptr, ptr }}, ptr %table, i64 %i
  %function = load ptr, ptr %row
  %plain = icmp ne ptr %function, null
  br i1 %plain, label %alone, label %jump
alone:
  call void @call_row(ptr %table, i64 %i, i64 0, i64 1)
  %next = add i64 %i, 1
  br label %head
jump:
  %there = call i64 @behind_jump(ptr %table, i64 %i)
  br label %head
together:
  store i64 %i, ptr %row_place
  %open = add i64 %closed, 1
  call void @publish(ptr %team, i64 %open)
  ret void
end:
  %ended = add i64 %closed, 2
  call void @publish(ptr %team, i64 %ended)
  ret void
}}

define internal void @do_part(ptr %team, i64 %part, i64 %threads) nounwind {{
entry:
  %table_place = getelementptr i8, ptr %team, i64 {TABLE}
  %row_place = getelementptr i8, ptr %team, i64 {ROW}
  %done_place = getelementptr i8, ptr %team, i64 {DONE}
  %table = load ptr, ptr %table_place
  %i = load i64, ptr %row_place
  call void @call_row(ptr %table, i64 %i, i64 %part, i64 %threads)
  %before = atomicrmw add ptr %done_place, i64 1 acq_rel
  %after = add i64 %before, 1
  %last = icmp eq i64 %after, %threads
  br i1 %last, label %go_on, label %done
go_on:
  store atomic i64 0, ptr %done_place monotonic, align 8
  %next = add i64 %i, 1
  call void @advance(ptr %team, i64 %next)
  br label %done
done:
  ret void
}}

define internal i64 @take_part(ptr %team, i64 %thread) nounwind {{
entry:
  %threads_place = getelementptr i8, ptr %team, i64 {THREADS}
  %threads = load i64, ptr %threads_place
  %line = mul i64 %thread, {LINE}
  %offset = add i64 %line, {COUNTS}
  %parts = getelementptr i8, ptr %team, i64 %offset
  %early = alloca i64
  store i64 {STEALING}, ptr %early
  br label %look
look:
  %row = load atomic i64, ptr %team acquire, align 8
  %odd = and i64 %row, 1
  %closed = icmp ne i64 %odd, 0
  br i1 %closed, label %done, label %own
own:
  %mine = call i1 @claimed(ptr %team, i64 %thread, i64 %row)
  br i1 %mine, label %run, label %wait
run:
  %part = phi i64 [ %thread, %own ], [ %other, %rob ]
  call void @do_part(ptr %team, i64 %part, i64 %threads)
  %count = load i64, ptr %parts
  %counted = add i64 %count, 1
  store i64 %counted, ptr %parts
  br label %look
rob:
  store i64 0, ptr %early
  br label %run
wait:
  %tries = phi i64 [ 0, %own ], [ %more, %again ]
  %now = load atomic i64, ptr %team acquire, align 8
  %same = icmp eq i64 %now, %row
  br i1 %same, label %stay, label %look
stay:
  %when = load i64, ptr %early
  %stealing = icmp eq i64 %tries, %when
  br i1 %stealing, label %search, label %again
search:
  %other = phi i64 [ 0, %stay ], [ %following, %taken ]
  %left = icmp ult i64 %other, %threads
  br i1 %left, label %steal, label %content
content:
  store i64 {STEALING}, ptr %early
  br label %again
steal:
  %won = call i1 @claimed(ptr %team, i64 %other, i64 %row)
  br i1 %won, label %rob, label %taken
taken:
  %following = add i64 %other, 1
  br label %search
again:
  call void @rest(ptr %team, i64 %row, i64 %tries)
  %more = add i64 %tries, 1
  br label %wait
done:
  ret i64 %row
}}

define void @lead(ptr %job) nounwind {{
entry:
  %given_steps = getelementptr i8, ptr %job, i64 8
  %given_shares = getelementptr i8, ptr %job, i64 16
  %given_team = getelementptr i8, ptr %job, i64 24
  %table = load ptr, ptr %job
  %steps = load i64, ptr %given_steps
  %shares = load ptr, ptr %given_shares
  %team = load ptr, ptr %given_team
  %core = call i32 @sched_getcpu()
  %core_place = getelementptr i8, ptr %team, i64 {CORE}
  store i32 %core, ptr %core_place
  %table_place = getelementptr i8, ptr %team, i64 {TABLE}
  %steps_place = getelementptr i8, ptr %team, i64 {STEPS}
  %shares_place = getelementptr i8, ptr %team, i64 {SHARES}
  store ptr %table, ptr %table_place
  store i64 %steps, ptr %steps_place
  store ptr %shares, ptr %shares_place
  %last = load i64, ptr %team
  %called = add i64 %last, 2
  call void @publish(ptr %team, i64 %called)
  call void @advance(ptr %team, i64 0)
  %closed = call i64 @take_part(ptr %team, i64 0)
  ret void
}}

define ptr @serve(ptr %own) nounwind {{
entry:
  %team_place = getelementptr i8, ptr %own, i64 {TEAM}
  %thread_place = getelementptr i8, ptr %own, i64 {THREAD}
  %team = load ptr, ptr %team_place
  %thread = load i64, ptr %thread_place
  %stopped_place = getelementptr i8, ptr %team, i64 {STOPPED}
  br label %work
work:
  %closed = call i64 @take_part(ptr %team, i64 %thread)
  %stopped = load atomic i64, ptr %stopped_place acquire, align 8
  %ends = icmp ne i64 %stopped, 0
  br i1 %ends, label %done, label %wait
wait:
  %tries = phi i64 [ 0, %work ], [ %more, %again ]
  %now = load atomic i64, ptr %team acquire, align 8
  %same = icmp eq i64 %now, %closed
  br i1 %same, label %again, label %work
again:
  call void @rest(ptr %team, i64 %closed, i64 %tries)
  %more = add i64 %tries, 1
  br label %wait
done:
  ret ptr null
}}

define void @stop(ptr %team) nounwind {{
entry:
  %stopped_place = getelementptr i8, ptr %team, i64 {STOPPED}
  store atomic i64 1, ptr %stopped_place seq_cst, align 8
  %last = load i64, ptr %team
  %called = add i64 %last, 2
  call void @publish(ptr %team, i64 %called)
  ret void
}}
"""
