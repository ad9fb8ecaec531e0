// CUDA C for g++, part 1: what a kernel says about its parts, where a thread is, atomics and exact arithmetic.
// One host thread runs all of a grid's threads, so that an atomic is a read and a write.
#pragma once
#include <stdint.h>
#include <string.h>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define __shared__ static

struct Index3 { unsigned x, y, z; };
static Index3 threadIdx, blockIdx, blockDim, gridDim;

static inline Index3 at(unsigned i, Index3 extents) {
  return {i % extents.x, i / extents.x % extents.y, i / (extents.x * extents.y)};
}
static inline unsigned volume(Index3 extents) { return extents.x * extents.y * extents.z; }

template <class T> static inline T atomicExch(T* place, T value) { T old = *place; *place = value; return old; }
template <class T> static inline T atomicAdd(T* place, T value) { return atomicExch(place, T(*place + value)); }
template <class T> static inline T atomicOr(T* place, T value) { return atomicExch(place, T(*place | value)); }

static inline int __ffs(unsigned bits) { return __builtin_ffs((int)bits); }
static inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
static inline int __float_as_int(float x) { int bits; memcpy(&bits, &x, 4); return bits; }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fsub_rn(float a, float b) { return a - b; }
static inline float __fdiv_rn(float a, float b) { return a / b; }

// Every thread from its start to its end: for kernels without a barrier.
template <class Body> static int run_threads(Index3 grid, Index3 block, Body body) {
  gridDim = grid, blockDim = block;
  for (unsigned b = 0; b < volume(grid); b++) {
    blockIdx = at(b, grid);
    for (unsigned t = 0; t < volume(block); t++) {
      threadIdx = at(t, block);
      body();
    }
  }
  return 0;
}
