"""Native code of a walk: one call runs the steps of a table, and threads that come back to Python take turns.

A call from Python gives the interpreter's lock away and takes it again. A thread that finds it taken sleeps on a futex,
and who gives it away has to wake it: 20 to 50 us where cores are virtual and halt, more than many models compute. So a
walk ends by taking the turn, a word that holds whose it is, and the next walk of the same thread gives it back: in
between the thread runs Python. Whoever finds the turn taken pauses until it is free, and then finds the lock free too.

The turn protects nothing. A thread that does something else in between keeps it; so whoever has waited for `PAUSES`
takes it away and goes on to the lock itself, and for each time that this happens in a row, twice as many do not wait.
"""

from __future__ import annotations

PAUSES = 2000
"""Looks at the turn: about as long as it takes to be woken."""
MOST_SKIPPED = 63
"""Contended walks that do not wait after many waits in vain."""
PAUSE = {
    True: ("@llvm.x86.sse2.pause()", "@llvm.x86.sse2.pause()"),
    False: ("@llvm.aarch64.hint(i32)", "@llvm.aarch64.hint(i32 1)"),
}
"""How to tell an x86 or ARM processor that a thread only waits: as declared, as called."""
JUMP = """
  %byte = load ptr, ptr %block
  %seen = load i8, ptr %byte
  %set = icmp ne i8 %seen, 0
  %wanted = getelementptr i8, ptr %block, i64 8
  %when = load i64, ptr %wanted
  %should = icmp ne i64 %when, 0
  %taken = icmp eq i1 %set, %should
  %distance = getelementptr i8, ptr %block, i64 16
  %nbytes = load i64, ptr %distance
"""
"""Of the words of a `jumps.Jump` at %block: whether it is %taken, and how many bytes far."""


def walk_module(x86: bool, turns: bool) -> str:
    """LLVM IR of `walk(job)` and, with `turns`, of `walk_in_turn(job)`; a job is {table, steps}."""
    declared, called = PAUSE[x86]
    text = PLAIN + IN_TURN if turns else PLAIN
    return text.format(declared=declared, called=called, PAUSES=PAUSES, MOST_SKIPPED=MOST_SKIPPED, JUMP=JUMP)


PLAIN = """
define void @walk(ptr %job) nounwind {{
entry:
  %table = load ptr, ptr %job
  %count = getelementptr i8, ptr %job, i64 8
  %steps = load i64, ptr %count
  %end = getelementptr {{ ptr, ptr }}, ptr %table, i64 %steps
  br label %head
head:
  %row = phi ptr [ %table, %entry ], [ %next, %step ], [ %target, %jump ]
  %more = icmp ult ptr %row, %end
  br i1 %more, label %body, label %done
body:
  %function = load ptr, ptr %row
  %place = getelementptr i8, ptr %row, i64 8
  %block = load ptr, ptr %place
  %next = getelementptr {{ ptr, ptr }}, ptr %row, i64 1
  %plain = icmp ne ptr %function, null
  br i1 %plain, label %step, label %jump
step:
  call void %function(ptr %block, i64 0, i64 1)
  br label %head
jump:
{JUMP}
  %away = getelementptr i8, ptr %row, i64 %nbytes
  %target = select i1 %taken, ptr %away, ptr %next
  br label %head
done:
  ret void
}}
"""
IN_TURN = """
@turn = internal global [16 x i64] zeroinitializer, align 128
@skipped = internal global [16 x i64] zeroinitializer, align 128

declare void {declared}
declare ptr @llvm.thread.pointer()

define void @walk_in_turn(ptr %job) nounwind {{
entry:
  %self = call ptr @llvm.thread.pointer()
  %me = ptrtoint ptr %self to i64
  %given = cmpxchg ptr @turn, i64 %me, i64 0 seq_cst monotonic
  call void @walk(ptr %job)
  br label %look
look:
  %looks = phi i64 [ 0, %entry ], [ %more, %pause ]
  %owner = load atomic i64, ptr @turn monotonic, align 8
  %free = icmp eq i64 %owner, 0
  br i1 %free, label %take, label %taken
take:
  %pair = cmpxchg ptr @turn, i64 0, i64 %me seq_cst monotonic
  %won = extractvalue {{ i64, i1 }} %pair, 1
  br i1 %won, label %mine, label %taken
mine:
  %waited = icmp ne i64 %looks, 0
  br i1 %waited, label %praise, label %done
praise:
  store atomic i64 0, ptr getelementptr (i8, ptr @skipped, i64 8) monotonic, align 8
  br label %done
taken:
  %first = icmp eq i64 %looks, 0
  br i1 %first, label %ask, label %pause
ask:
  %left = load atomic i64, ptr @skipped monotonic, align 8
  %skips = icmp sgt i64 %left, 0
  br i1 %skips, label %skip, label %pause
skip:
  %fewer = sub i64 %left, 1
  store atomic i64 %fewer, ptr @skipped monotonic, align 8
  br label %steal
pause:
  call void {called}
  %more = add i64 %looks, 1
  %patient = icmp ult i64 %more, {PAUSES}
  br i1 %patient, label %look, label %vain
vain:
  %before = load atomic i64, ptr getelementptr (i8, ptr @skipped, i64 8) monotonic, align 8
  %twice = shl i64 %before, 1
  %longer = or i64 %twice, 1
  %penalty = and i64 %longer, {MOST_SKIPPED}
  store atomic i64 %penalty, ptr getelementptr (i8, ptr @skipped, i64 8) monotonic, align 8
  store atomic i64 %penalty, ptr @skipped monotonic, align 8
  br label %steal
steal:
  store atomic i64 %me, ptr @turn seq_cst, align 8
  br label %done
done:
  ret void
}}
"""
