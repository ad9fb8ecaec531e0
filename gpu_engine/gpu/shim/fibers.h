// CUDA C for g++, part 2: barriers and what the lanes of a warp exchange. Every thread of a block is a fiber that runs
// until it waits; when all threads that a barrier is for have arrived, they go on. Blocks run one after another, so
// __shared__ is static memory. A barrier that some threads never reach ends the run with 1.
#pragma once
#include "threads.h"
#include <stdlib.h>
#include <ucontext.h>

enum class Wait { none, block, warp, ended };
struct Fiber {
  ucontext_t context;
  char* stack;
  Wait wait;
  bool released;
  unsigned mask;
  uint64_t given;  // to the other lanes of the warp
};

static const size_t STACK_NBYTES = 1 << 16;
static Fiber* fibers;
static unsigned threads, running;
static ucontext_t scheduler;
static void (*kernel_body)();

static void wait_for(Wait what, unsigned mask) {
  Fiber& own = fibers[running];
  own.wait = what, own.mask = mask;
  swapcontext(&own.context, &scheduler);
}
static void __syncthreads() { wait_for(Wait::block, ~0u); }
static void __syncwarp(unsigned mask = ~0u) { wait_for(Wait::warp, mask); }

// What thread `t` waits for has happened: nobody who takes part is still on the way.
static bool opens(unsigned t) {
  bool whole = fibers[t].wait == Wait::block;
  unsigned first = whole ? 0 : t & ~31u, last = whole || first + 32 > threads ? threads : first + 32;
  for (unsigned other = first; other < last; other++) {
    const Fiber& fiber = fibers[other];
    bool takes_part = whole || (fibers[t].mask >> (other & 31) & 1);
    if (takes_part && fiber.wait != fibers[t].wait && fiber.wait != Wait::ended) return false;
  }
  return true;
}

// The lane's own value for the others, then `read` of a function that knows the value of each lane.
template <class Read> static auto exchanged(unsigned mask, uint64_t value, Read read) {
  fibers[running].given = value;
  __syncwarp(mask);
  auto result = read([](unsigned lane) { return fibers[(running & ~31u) + lane].given; });
  __syncwarp(mask);
  return result;
}
template <class T> static T shuffled(unsigned mask, T value, unsigned lane) {
  static_assert(sizeof(T) <= 8, "lanes exchange at most 8 bytes");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  bits = exchanged(mask, bits, [&](auto of) { return of(lane & 31); });
  memcpy(&value, &bits, sizeof(T));
  return value;
}
template <class T> static T __shfl_sync(unsigned mask, T value, unsigned lane) { return shuffled(mask, value, lane); }
template <class T> static T __shfl_xor_sync(unsigned mask, T value, unsigned bits) {
  return shuffled(mask, value, (running & 31) ^ bits);
}
template <class T> static T __shfl_up_sync(unsigned mask, T value, unsigned distance) {
  unsigned lane = running & 31;
  return shuffled(mask, value, lane < distance ? lane : lane - distance);
}
template <class T> static unsigned __match_any_sync(unsigned mask, T value) {
  return exchanged(mask, (uint64_t)value, [&](auto of) {
    unsigned same = 0;
    for (unsigned lane = 0; lane < 32; lane++) same |= (mask >> lane & 1 && of(lane) == (uint64_t)value) << lane;
    return same;
  });
}
static unsigned __ballot_sync(unsigned mask, int predicate) {
  return exchanged(mask, predicate != 0, [&](auto of) {
    unsigned votes = 0;
    for (unsigned lane = 0; lane < 32; lane++) votes |= (mask >> lane & 1 && of(lane)) << lane;
    return votes;
  });
}

static void fiber_main() {
  kernel_body();
  fibers[running].wait = Wait::ended;
  swapcontext(&fibers[running].context, &scheduler);
}

static bool run_block() {
  for (unsigned t = 0; t < threads; t++) {
    Fiber& fiber = fibers[t];
    fiber.wait = Wait::none;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack;
    fiber.context.uc_stack.ss_size = STACK_NBYTES;
    makecontext(&fiber.context, fiber_main, 0);
  }
  for (;;) {
    unsigned waiting = 0, released = 0;
    for (running = 0; running < threads; running++) {
      if (fibers[running].wait != Wait::none) continue;
      threadIdx = at(running, blockDim);
      swapcontext(&scheduler, &fibers[running].context);
    }
    for (unsigned t = 0; t < threads; t++) {
      fibers[t].released = fibers[t].wait != Wait::ended && opens(t);
      waiting += fibers[t].wait != Wait::ended;
      released += fibers[t].released;
    }
    if (!waiting) return true;
    if (!released) return false;
    for (unsigned t = 0; t < threads; t++)
      if (fibers[t].released) fibers[t].wait = Wait::none;
  }
}

template <class Body> static int run_fibers(Index3 grid, Index3 block, Body body) {
  static Body* called;
  called = &body;
  kernel_body = [] { (*called)(); };
  gridDim = grid, blockDim = block, threads = volume(block);
  fibers = (Fiber*)calloc(threads, sizeof(Fiber));
  char* stacks = (char*)malloc(threads * STACK_NBYTES);
  for (unsigned t = 0; t < threads; t++) fibers[t].stack = stacks + t * STACK_NBYTES;
  bool fine = true;
  for (unsigned b = 0; b < volume(grid) && fine; b++) {
    blockIdx = at(b, grid);
    fine = run_block();
  }
  free(stacks), free(fibers);
  return !fine;
}
