// CUDA on the host: each thread of a block is a fiber, and which one runs next is drawn by chance.
//
// Blocks begin in a random order, several at a time; a fiber runs until a barrier, a fence, an
// atomic or its end. So what rests on an order that nobody promised computes wrong numbers. Under
// -fsanitize=thread the fibers are threads to ThreadSanitizer, which are ordered by barriers, and
// by atomics between fences, and by nothing else: a missing one is a race in any order.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
static constexpr bool watched = true;
#else
static constexpr bool watched = false;
static void* __tsan_create_fiber(unsigned) { return nullptr; }
static void* __tsan_get_current_fiber() { return nullptr; }
static void __tsan_destroy_fiber(void*) {}
static void __tsan_switch_to_fiber(void*, unsigned) {}
static void __tsan_acquire(void*) {}
static void __tsan_release(void*) {}
#endif
#define UNWATCHED __attribute__((no_sanitize("thread")))

namespace emulator {

constexpr unsigned kUnordered = 1;  // a switch of fibers orders nothing
constexpr size_t kStack = 1 << 16, kShared = 1 << 15;

struct Block {
  struct Shared {
    int line;
    size_t at;
  };
  uint3 index;
  int alive, waiting = 0;
  unsigned generation = 0;
  char meeting[2];  // addresses to order the threads by, of odd and of even barriers
  Shared shared[8];
  int held = 0;
  size_t used = 0;
  alignas(16) char memory[kShared];
};

struct Fiber {
  Block* block;
  uint3 thread;
  void* known;  // to ThreadSanitizer
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  unsigned generation;
  bool at_barrier = false, done = false, fenced = false;
  void* counter = nullptr;  // the atomic that it touched last
};

static Fiber* current;
static ucontext_t scheduler;
static void* known_scheduler;
static dim3 grid;
static std::function<void()> kernel;
static std::mt19937 chance;
static char begun, ended;

UNWATCHED static void leave() {
  __tsan_switch_to_fiber(known_scheduler, kUnordered);
  swapcontext(&current->context, &scheduler);
}

UNWATCHED static void run() {
  __tsan_acquire(&begun);
  kernel();
  __tsan_release(&ended);
  current->done = true;
  --current->block->alive;
  leave();
}

UNWATCHED static bool runnable(Fiber& fiber) {
  if (fiber.done) return false;
  if (!fiber.at_barrier) return true;
  Block& block = *fiber.block;
  if (fiber.generation == block.generation && block.waiting < block.alive) return false;
  if (fiber.generation == block.generation) ++block.generation, block.waiting = 0;
  return true;
}

UNWATCHED static void resume(Fiber& fiber) {
  current = &fiber;
  __tsan_switch_to_fiber(fiber.known, kUnordered);
  swapcontext(&scheduler, &fiber.context);
}

// Runs the grid; its blocks of threads in any order.
UNWATCHED static void launch(dim3 blocks, dim3 threads, std::function<void()> work) {
  grid = blocks;
  kernel = std::move(work);
  known_scheduler = __tsan_get_current_fiber();
  __tsan_release(&begun);
  const unsigned count = blocks.x * blocks.y, size = threads.x * threads.y;
  std::vector<unsigned> order(count);
  for (unsigned i = 0; i < count; ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), chance);
  std::vector<std::unique_ptr<Block>> running;
  std::vector<std::unique_ptr<Fiber>> fibers, gone;
  std::vector<Fiber*> ready;
  const unsigned resident = 1 + chance() % 4;
  for (unsigned next = 0; next < count || !fibers.empty();) {
    while (next < count && fibers.size() < resident * size) {
      const unsigned b = order[next++];
      running.emplace_back(new Block);
      Block& block = *running.back();
      std::memset(block.memory, 0xff, kShared);  // NaN
      block.index = {b % blocks.x, b / blocks.x, 0};
      block.alive = static_cast<int>(size);
      for (unsigned t = 0; t < size; ++t) {
        fibers.emplace_back(new Fiber);
        Fiber& fiber = *fibers.back();
        fiber.block = &block;
        fiber.thread = {t % threads.x, t / threads.x, 0};
        fiber.known = __tsan_create_fiber(0);
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = kStack;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, run, 0);
      }
    }
    ready.clear();
    for (auto& fiber : fibers)
      if (runnable(*fiber)) ready.push_back(fiber.get());
    if (ready.empty()) std::puts("every thread waits"), std::exit(8);
    std::shuffle(ready.begin(), ready.end(), chance);
    for (Fiber* fiber : ready) resume(*fiber);
    for (size_t i = fibers.size(); i-- > 0;)
      if (fibers[i]->done) {
        if (watched) gone.push_back(std::move(fibers[i]));  // one thread each, to the end
        fibers.erase(fibers.begin() + i);
      }
  }
  __tsan_acquire(&ended);
  for (auto& fiber : gone) __tsan_destroy_fiber(fiber->known);
}

// A block's own copy of what is declared at a line.
template <typename T>
UNWATCHED T& shared(int line) {
  Block& block = *current->block;
  for (int i = 0; i < block.held; ++i)
    if (block.shared[i].line == line)
      return *reinterpret_cast<T*>(block.memory + block.shared[i].at);
  const size_t at = block.used;
  block.used += (sizeof(T) + 15) / 16 * 16;
  if (block.used > kShared || block.held == 8) std::puts("too much shared memory"), std::exit(9);
  block.shared[block.held++] = {line, at};
  return *reinterpret_cast<T*>(block.memory + at);
}

}  // namespace emulator

#define threadIdx (emulator::current->thread)
#define blockIdx (emulator::current->block->index)
#define gridDim emulator::grid

UNWATCHED static void __syncthreads() {
  emulator::Fiber& own = *emulator::current;
  own.generation = own.block->generation;
  own.at_barrier = true;
  ++own.block->waiting;
  char* const meeting = &own.block->meeting[own.generation % 2];
  __tsan_release(meeting);
  emulator::leave();
  own.at_barrier = false;
  __tsan_acquire(meeting);
}

UNWATCHED static void __threadfence() {
  emulator::Fiber& own = *emulator::current;
  if (own.counter) __tsan_acquire(own.counter);
  own.fenced = true;
  emulator::leave();
}

// Relaxed, as CUDA's: it orders what fences before and after it say.
UNWATCHED static unsigned atomicAdd(unsigned* p, unsigned n) {
  emulator::Fiber& own = *emulator::current;
  if (own.fenced) __tsan_release(p);
  const unsigned old = __atomic_fetch_add(p, n, __ATOMIC_RELAXED);
  own.counter = p;
  own.fenced = false;
  emulator::leave();
  return old;
}

template <typename T>
static T __ldg(const T* p) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(T)) std::puts("misaligned load"), std::exit(9);
  return *p;
}
template <typename T>
static T __ldcg(const T* p) {
  return *p;
}

#define cudaGetLastError() cudaSuccess
