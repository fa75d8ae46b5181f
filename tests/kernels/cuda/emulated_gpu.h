// The GPU that emulator.h has its instructions for: blocks of threads as fibers, what they share, and launches that overlap.
#pragma once

#include <algorithm>
#include <csetjmp>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <ucontext.h>
#include <vector>

#include "elements.h"
#include "grid.h"

#define FEDMS_DEVICE inline
#define __global__
#define __launch_bounds__(...)
#define __grid_constant__

namespace fedms::cuda {

namespace emulator {
inline int64_t launches = 0;
}
extern "C" __attribute__((visibility("default"), used)) inline int64_t fedms_launches() { return emulator::launches; }

inline std::string emulated(const Launch& launch) { return name_of(launch) + ", emulated: "; }
[[noreturn]] inline void fail(const Launch& launch, const std::string& reason) { throw Error(emulated(launch) + reason); }

struct TensorMap {
  uint8_t* data;
  int64_t rows, columns, stride;
  int box_rows, box_columns;

  int row_bytes() const { return box_columns * 2; }  // of a box in shared memory: as many as the swizzle has
};

inline TensorMap tensor_map(const Launch& what, bool, const void* data, int64_t rows, int64_t columns, int64_t stride,
                            int box_rows, int box_columns) {
  if (reinterpret_cast<uintptr_t>(data) % 16 || stride * 2 % 16) fail(what, "a tensor map needs rows at multiples of 16 bytes");
  const bool fits = box_rows >= 1 && box_rows <= 256 && (box_columns == 64 || box_columns == 32);
  if (!fits || rows < 1 || columns < 1) fail(what, "a tensor map has a size out of range");
  return {static_cast<uint8_t*>(const_cast<void*>(data)), rows, columns, stride, box_rows, box_columns};
}

namespace emulator {

struct Problem : std::runtime_error {
  using std::runtime_error::runtime_error;
};

using Action = std::function<void()>;

// What a thread, or a warpgroup for wgmma, has under way: groups of actions, the newest last.
class Groups {
 public:
  void add(bool late, Action action) { late ? open_.push_back(std::move(action)) : action(); }
  void commit() { closed_.push_back(std::move(open_)), open_.clear(); }
  void wait(size_t pending) {
    while (closed_.size() > pending) {
      for (Action& action : closed_.front()) action();
      closed_.pop_front();
    }
  }
  bool idle() const {
    return open_.empty() && std::all_of(closed_.begin(), closed_.end(), [](const auto& group) { return group.empty(); });
  }

 private:
  std::vector<Action> open_;
  std::deque<std::vector<Action>> closed_;
};

struct Thread {
  int number = 0;
  bool started = false, done = false;
  std::unique_ptr<uint8_t[]> stack;
  jmp_buf place;
  Groups copies, stores;
  std::vector<uint32_t> unfenced;  // words of shared memory that this thread wrote since its last fence
};

// Lanes that execute an instruction together.
struct Together {
  int arrived = 0;
  long turn = 0;
  const char* what = nullptr;
  const void* operands[128];
};

struct Barrier {
  int expected = 0, pending = 0;
  long bytes = 0, phase = 0;
};

struct Block {
  int x, y, z, blocks_x, threads;
  bool late;
  std::vector<uint8_t> memory;
  uint8_t* shared;
  std::vector<uint16_t> writer;  // of each word of shared memory: the thread with an unfenced write, plus one
  std::vector<Thread> fibers;
  std::vector<Together> warps, warpgroups;
  std::vector<Groups> multiplications;  // of each warpgroup
  std::map<int, Together> named;
  std::map<uint32_t, Barrier> barriers;
  const Action* body;  // what each thread does
  std::string problem;
};

// A launch: a kernel with its arguments, and the blocks that it runs with.
struct Work {
  std::string name;
  Grid grid;
  int threads, shared_bytes;
  Action body;
};

// The block and the thread that run now.
inline Block* block = nullptr;
inline Thread* self = nullptr;
inline std::mt19937 random_numbers;
inline std::deque<Action> transfers;  // late copies
inline long events = 0;  // whatever lets another fiber go on
inline jmp_buf scheduler;
inline ucontext_t start_context;
// Programmatic dependent launch. The launch that runs now may let the next one start, and has done so; and a launch that did: it is
// begun again, since this is the first thing that it does.
inline bool may_let_next_start = false, next_may_start = false;
inline std::unique_ptr<Work> left;

inline void yield() {
  if (_setjmp(self->place) == 0) _longjmp(scheduler, 1);
}
[[noreturn]] inline void problem(const std::string& what) {
  if (block->problem.empty()) block->problem = what + ", thread " + std::to_string(self ? self->number : -1);
  for (;;) yield();  // exceptions do not cross fibers: the scheduler throws it
}
template <class Ready>
void wait_until(Ready ready) {
  while (!ready()) yield();
  ++events;
}

inline void fiber() {
  (*block->body)();
  if (!self->copies.idle()) block->problem = "a thread ended before its copies into shared memory";
  self->done = true;
  ++events;
  _longjmp(scheduler, 1);
}

inline void resume(Thread& thread) {
  self = &thread;
  if (_setjmp(scheduler) == 0) {
    if (thread.started) _longjmp(thread.place, 1);
    constexpr size_t STACK = 256 << 10;
    thread.started = true;
    thread.stack.reset(new uint8_t[STACK]);
    getcontext(&start_context);
    start_context.uc_stack.ss_sp = thread.stack.get();
    start_context.uc_stack.ss_size = STACK;
    start_context.uc_link = nullptr;
    makecontext(&start_context, fiber, 0);
    setcontext(&start_context);
  }
}

inline const std::string& pace() {
  static const std::string pace = std::getenv("FEDMS_EMULATOR") ? std::getenv("FEDMS_EMULATOR") : "late";
  return pace;
}

inline void finish_left();

// Runs a block, as far as the launch does not let the next one start.
inline void run_block(Block& now) {
  std::vector<int> order(now.warps.size());
  std::iota(order.begin(), order.end(), 0);
  transfers.clear();
  for (bool going = true; going;) {
    going = false;
    const long before = events;
    std::shuffle(order.begin(), order.end(), random_numbers);
    for (int warp : order) {
      for (int i = warp * 32; i < warp * 32 + 32; ++i) {
        if (now.fibers[i].done) continue;
        going = true;
        block = &now;
        resume(now.fibers[i]);
        if (!now.problem.empty()) throw Problem(now.problem + " of block " + std::to_string(now.x));
        if (next_may_start) return;
      }
    }
    if (!going || events != before) continue;
    if (!transfers.empty()) {  // late copies come in any order
      const size_t pick = random_numbers() % transfers.size();
      transfers[pick]();
      transfers.erase(transfers.begin() + pick);
    } else if (left) {  // what the launch before writes is there as late as may be
      finish_left();
    } else {
      throw Problem("deadlock: every thread waits");
    }
  }
}

// Runs a launch, as far as it does not let the next one start.
inline void run(const Work& work) {
  for (int i = 0; i < work.grid.x * work.grid.y * work.grid.z && !next_may_start; ++i) {
    const int x = i % work.grid.x, y = i / work.grid.x % work.grid.y, z = i / work.grid.x / work.grid.y;
    Block now;
    now.x = x, now.y = y, now.z = z, now.blocks_x = work.grid.x, now.threads = work.threads;
    now.late = pace() != "early";
    // NaNs in bf16 and in fp16, at a multiple of 1024 bytes.
    now.memory.assign(work.shared_bytes + 1024, 0xFF);
    now.shared = now.memory.data() + (1024 - reinterpret_cast<uintptr_t>(now.memory.data()) % 1024) % 1024;
    now.writer.resize(work.shared_bytes / 4 + 4);
    now.fibers = std::vector<Thread>(work.threads);
    for (int thread = 0; thread < work.threads; ++thread) now.fibers[thread].number = thread;
    now.warps.resize(work.threads / 32);
    now.warpgroups.resize((work.threads + 127) / 128);
    now.multiplications.resize(now.warpgroups.size());
    now.body = &work.body;
    random_numbers.seed(unsigned(x + 31 * y + 1009 * z));
    try {
      run_block(now);
    } catch (const Problem& found) {
      throw Error(work.name + found.what() + ", of the block (" + std::to_string(x) + ", " + std::to_string(y) + ", " +
                  std::to_string(z) + ")");
    }
  }
}

// Runs the launch that was left, from its beginning.
inline void finish_left() {
  if (!left) return;
  const std::unique_ptr<Work> work = std::move(left);
  may_let_next_start = false;
  run(*work);
  ++events;
}

// The lanes of a warp or warpgroup meet; the last one runs act(operands of all lanes).
template <class Act>
void together(Together& group, int size, const char* what, const void* operand, Act act) {
  if (group.arrived > 0 && std::strcmp(group.what, what)) problem(std::string("lanes disagree: ") + group.what + " and " + what);
  group.what = what;
  group.operands[self->number % size] = operand;
  const long turn = group.turn;
  if (++group.arrived == size) {
    group.arrived = 0;
    ++group.turn;
    ++events;
    act(group.operands);
  } else {
    wait_until([&] { return group.turn != turn; });
  }
}
template <class Act>
void in_warp(const char* what, const void* operand, Act act) {
  together(block->warps[self->number / 32], 32, what, operand, act);
}
template <class Act>
void in_warpgroup(const char* what, const void* operand, Act act) {
  together(block->warpgroups[self->number / 128], 128, what, operand, act);
}

inline uint8_t* at(uint32_t address, uint32_t bytes) {
  if (address + bytes > block->memory.size() - 1024) problem("an address outside of shared memory: " + std::to_string(address));
  if (address % bytes) problem("a misaligned address in shared memory: " + std::to_string(address));
  return block->shared + address;
}

// Lanes of one phase of a shared memory instruction, each with `bytes` at an address, must not wait for a bank.
inline void check_banks(const char* what, const uint32_t* addresses, int lanes, int bytes) {
  uint32_t held[32];
  bool used[32] = {};
  for (int lane = 0; lane < lanes; ++lane) {
    for (uint32_t word = addresses[lane] / 4; word * 4 < addresses[lane] + bytes; ++word) {
      if (used[word % 32] && held[word % 32] != word) problem(std::string("a bank conflict of ") + what);
      used[word % 32] = true;
      held[word % 32] = word;
    }
  }
}
inline void check_warp(const char* what, const void* const* operands, int lanes_a_phase, int bytes) {
  for (int first = 0; first < 32; first += lanes_a_phase) {
    uint32_t addresses[32];
    for (int i = 0; i < lanes_a_phase; ++i) addresses[i] = *static_cast<const uint32_t*>(operands[first + i]);
    check_banks(what, addresses, lanes_a_phase, bytes);
  }
}

inline void wrote(uint32_t address, int bytes) {
  for (int i = 0; i < bytes; i += 4) {
    block->writer[(address + i) / 4] = uint16_t(self->number + 1);
    self->unfenced.push_back((address + i) / 4);
  }
}
inline void check_fenced(uint32_t address, int bytes) {
  for (int i = 0; i < bytes; i += 4) {
    if (block->writer[(address + i) / 4]) problem("asynchronous hardware reads shared memory that was written without a fence");
  }
}

// The 128-byte swizzle: bits 4 to 6 of an address are changed by bits 7 to 9. The 64-byte one: bits 4 and 5, by bits 7 and 8.
inline uint32_t swizzled(uint32_t address, int bytes) { return address ^ (address >> 3 & (bytes == 128 ? 0x70 : 0x30)); }
// Tiles start where the pattern of a swizzle does.
inline void check_start(uint32_t address, int bytes) {
  if (address % (8 * bytes)) problem("a box must start at a multiple of eight of its rows");
}

}  // namespace emulator

}  // namespace fedms::cuda
