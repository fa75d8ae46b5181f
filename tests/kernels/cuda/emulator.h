// The GPU on a CPU: csrc/cuda compiled by a C++ compiler gets this in the place of ptx.h and launch.h.
//
// Every thread of a block is a fiber, and every instruction has the meaning that the PTX manual gives it: which lane
// holds which value of a fragment, how shared memory is swizzled, what a descriptor addresses, when a barrier's phase
// ends. What the hardware may do early or late is done at both ends, to bring out missing waits: FEDMS_EMULATOR=early
// copies and multiplies at once, `late` (the default) only where the program waits for it. Warps run in random order. A launch
// that lets the next one start early is left until that one waits for it and nothing else can go on.
// With FEDMS_EMULATOR=none no kernel runs: what is left is the work of the host alone, which tests/kernels/cuda/host_cost.py
// counts. fedms_launches() says how many launches there were.
//
// An error is an exception that names the launch: a deadlock, a launch that starts early and does not wait, lanes that disagree
// about the next instruction, addresses outside of shared memory or misaligned ones, reading what a fence should have made visible,
// bank conflicts.
#pragma once

#include "emulated_gpu.h"

namespace fedms::cuda {

namespace ptx {

using namespace emulator;

inline int thread() { return self->number; }
inline int block_x() { return block->x; }
inline int block_y() { return block->y; }
inline int block_z() { return block->z; }
inline int blocks_x() { return block->blocks_x; }
inline uint32_t shared_memory() { return 0; }

inline void named_barrier(int id, int threads) {
  Together& group = block->named[id];
  const long turn = group.turn;
  if (++group.arrived == threads) {
    group.arrived = 0;
    ++group.turn;
    ++events;
  } else {
    wait_until([&] { return group.turn != turn; });
  }
}
inline void sync_block() { named_barrier(0, block->threads); }
inline void let_next_launch_start() {
  if (!may_let_next_start) return;
  next_may_start = true;
  for (;;) yield();
}
inline void wait_for_launch_before() {
  wait_until([] { return left == nullptr; });
}
inline void fence_global_for_tma() {}

inline float shuffle_xor(float value, int lanes) {
  struct Lane {
    float value, result;
    int lanes;
  } lane{value, 0, lanes};
  in_warp("shuffle", &lane, [](const void* const* all) {
    for (int i = 0; i < 32; ++i) {
      auto* to = static_cast<Lane*>(const_cast<void*>(all[i]));
      to->result = static_cast<const Lane*>(all[i ^ to->lanes])->value;
    }
  });
  return lane.result;
}

inline uint32_t load_shared_u16(uint32_t from) {
  in_warp("ld.shared.u16", &from, [](const void* const* all) { check_warp("ld.shared.u16", all, 32, 2); });
  uint16_t value;
  std::memcpy(&value, at(from, 2), 2);
  return value;
}
inline void store_shared_u32(uint32_t to, uint32_t value) {
  in_warp("st.shared.b32", &to, [](const void* const* all) { check_warp("st.shared.b32", all, 32, 4); });
  std::memcpy(at(to, 4), &value, 4);
  wrote(to, 4);
}
inline Words load_shared_128(uint32_t from) {
  in_warp("ld.shared.v4", &from, [](const void* const* all) { check_warp("ld.shared.v4", all, 8, 16); });
  Words value;
  std::memcpy(&value, at(from, 16), 16);
  return value;
}
inline void store_shared_128(uint32_t to, const Words& value) {
  in_warp("st.shared.v4", &to, [](const void* const* all) { check_warp("st.shared.v4", all, 8, 16); });
  std::memcpy(at(to, 16), &value, 16);
  wrote(to, 16);
}

inline void cp_async_16(uint32_t to, const void* from, int bytes) {
  in_warp("cp.async", &to, [](const void* const* all) { check_warp("cp.async", all, 8, 16); });
  if (reinterpret_cast<uintptr_t>(from) % 16) problem("cp.async from a misaligned address");
  if (bytes < 0 || bytes > 16) problem("cp.async of " + std::to_string(bytes) + " bytes");
  uint8_t* place = at(to, 16);
  self->copies.add(block->late, [=] {
    std::memcpy(place, from, bytes);
    std::memset(place + bytes, 0, 16 - bytes);
  });
}
inline void cp_async_commit() { self->copies.commit(); }
template <int PENDING>
void cp_async_wait() {
  self->copies.wait(PENDING);
}

inline void ldmatrix(uint32_t (&to)[4], uint32_t from, bool transposed) {
  struct Lane {
    uint32_t from;
    uint32_t* to;
  } lane{from, to};
  in_warp(transposed ? "ldmatrix.trans" : "ldmatrix", &lane, [&](const void* const* all) {
    const auto of = [&](int i) { return static_cast<const Lane*>(all[i]); };
    for (int matrix = 0; matrix < 4; ++matrix) {
      uint16_t value[8][8];
      uint32_t addresses[8];
      for (int row = 0; row < 8; ++row) {
        addresses[row] = of(matrix * 8 + row)->from;
        std::memcpy(value[row], at(addresses[row], 16), 16);
      }
      check_banks(transposed ? "ldmatrix.trans" : "ldmatrix", addresses, 8, 16);
      for (int i = 0; i < 32; ++i) {
        const int row = i / 4, column = 2 * (i % 4);
        const uint16_t low = transposed ? value[column][row] : value[row][column];
        const uint16_t high = transposed ? value[column + 1][row] : value[row][column + 1];
        of(i)->to[matrix] = low | uint32_t(high) << 16;
      }
    }
  });
}
inline void ldmatrix_x4(uint32_t (&to)[4], uint32_t from) { ldmatrix(to, from, false); }
inline void ldmatrix_x4_trans(uint32_t (&to)[4], uint32_t from) { ldmatrix(to, from, true); }

template <class T>
float number(uint32_t word, int half) {
  return Number<T>::widen(T{static_cast<uint16_t>(word >> (16 * half))});
}

template <class T>
void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Lane {
    float* d;
    const uint32_t* a;
    uint32_t b[2];
  } lane{d, a, {b0, b1}};
  in_warp("mma", &lane, [](const void* const* all) {
    float a[16][16], b[16][8];
    for (int i = 0; i < 32; ++i) {
      const auto* from = static_cast<const Lane*>(all[i]);
      for (int word = 0; word < 4; ++word) {
        for (int half = 0; half < 2; ++half) {
          a[i / 4 + word % 2 * 8][2 * (i % 4) + word / 2 * 8 + half] = number<T>(from->a[word], half);
          if (word < 2) b[2 * (i % 4) + word * 8 + half][i / 4] = number<T>(from->b[word], half);
        }
      }
    }
    for (int i = 0; i < 32; ++i) {
      for (int v = 0; v < 4; ++v) {
        float& sum = static_cast<const Lane*>(all[i])->d[v];
        for (int k = 0; k < 16; ++k) sum += a[i / 4 + v / 2 * 8][k] * b[k][2 * (i % 4) + v % 2];
      }
    }
  });
}

// --- sm_90a

inline Barrier& barrier_at(uint32_t address) {
  at(address, 8);
  if (!block->barriers.count(address)) problem("a barrier that was not initialized");
  return block->barriers[address];
}
inline void complete(Barrier& barrier) {
  if (barrier.pending == 0 && barrier.bytes == 0) {
    barrier.pending = barrier.expected;
    ++barrier.phase;
  }
  ++events;
}
inline void barrier_init(uint32_t address, int arrivals) {
  at(address, 8);
  block->barriers[address] = {arrivals, arrivals, 0, 0};
}
inline void fence_barrier_init() {}
inline void barrier_arrive_expect(uint32_t address, int bytes) {
  Barrier& barrier = barrier_at(address);
  if (barrier.pending == 0) problem("a barrier has more arrivals than it expects");
  --barrier.pending;
  barrier.bytes += bytes;
  complete(barrier);
}
inline void barrier_arrive(uint32_t address) { barrier_arrive_expect(address, 0); }
inline void barrier_wait(uint32_t address, int parity) {
  Barrier& barrier = barrier_at(address);
  wait_until([&] { return (barrier.phase & 1) != parity; });
}

inline void prefetch_map(const TensorMap*) {}
inline void tma_load(uint32_t to, const TensorMap* given, uint32_t barrier, int row, int column) {
  const TensorMap map = *given;  // the thread may be over before the copy
  Block* in = block;             // and another block may run then
  check_start(to, map.row_bytes());
  at(to + map.box_rows * map.row_bytes() - 16, 16);
  const auto copy = [=] {
    for (int i = 0; i < map.box_rows; ++i) {
      for (int j = 0; j < map.box_columns; ++j) {
        const int64_t from_row = int64_t(row) + i, from_column = int64_t(column) + j;
        uint16_t value = 0;
        if (from_row >= 0 && from_row < map.rows && from_column >= 0 && from_column < map.columns) {
          std::memcpy(&value, map.data + (from_row * map.stride + from_column) * 2, 2);
        }
        std::memcpy(in->shared + swizzled(to + i * map.row_bytes() + j * 2, map.row_bytes()), &value, 2);
      }
    }
    Barrier& full = in->barriers[barrier];
    full.bytes -= map.box_rows * map.row_bytes();
    complete(full);
  };
  barrier_at(barrier);
  block->late ? transfers.push_back(copy) : copy();
}
inline void fence_shared_for_tma() {
  for (uint32_t word : self->unfenced) {
    if (block->writer[word] == self->number + 1) block->writer[word] = 0;
  }
  self->unfenced.clear();
}
inline uint64_t cache_policy(bool) { return 0; }
inline void tma_store(const TensorMap* given, uint32_t from, int row, int column, uint64_t) {
  const TensorMap map = *given;
  check_start(from, map.row_bytes());
  check_fenced(from, map.box_rows * map.row_bytes());
  self->stores.add(block->late, [=] {
    for (int i = 0; i < map.box_rows; ++i) {
      for (int j = 0; j < map.box_columns; ++j) {
        const int64_t to_row = int64_t(row) + i, to_column = int64_t(column) + j;
        if (to_row >= map.rows || to_column >= map.columns) continue;
        const uint32_t place = swizzled(from + i * map.row_bytes() + j * 2, map.row_bytes());
        std::memcpy(map.data + (to_row * map.stride + to_column) * 2, block->shared + place, 2);
      }
    }
  });
}
inline void tma_store_commit() { self->stores.commit(); }
template <int PENDING>
void tma_store_wait_read() {
  self->stores.wait(PENDING);
}
template <int COUNT>
void take_registers() {}
template <int COUNT>
void give_registers() {}

inline void wgmma_fence() {
  in_warpgroup("wgmma.fence", nullptr, [](const void* const*) {});
}
inline void wgmma_commit() {
  in_warpgroup("wgmma.commit", nullptr, [](const void* const*) { block->multiplications[self->number / 128].commit(); });
}
template <int PENDING>
void wgmma_wait() {
  in_warpgroup("wgmma.wait", nullptr, [](const void* const*) { block->multiplications[self->number / 128].wait(PENDING); });
}

template <int N>
void keep_in_place(float (&)[N]) {}
inline int computed_here(int value) { return value; }

// Where a descriptor puts number `row` along the columns (or rows of a) and `k` along the reduction: the canonical
// layouts with the 128-byte and the 64-byte swizzle of the PTX manual, "asynchronous warpgroup level canonical layouts".
inline uint32_t described(uint64_t descriptor, bool transposed, int row, int k) {
  const uint32_t start = uint32_t(descriptor & 0x3FFF) << 4, leading = uint32_t(descriptor >> 16 & 0x3FFF) << 4;
  const uint32_t stride = uint32_t(descriptor >> 32 & 0x3FFF) << 4;
  const int swizzle = descriptor >> 62 == 1 ? 128 : descriptor >> 62 == 2 ? 64 : 0;
  if (swizzle == 0 || (descriptor >> 49 & 7)) problem("a descriptor without the 128-byte or the 64-byte swizzle, or off its base");
  // K-major ((8, m), (T, 2)) : ((8T, SBO), (1, T)); MN-major with 128 bytes ((T, 8, m), (8, k)) : ((1, T, LBO), (8T, SBO)), with 64 bytes
  // ((T, 4, m), (8, k)) : ((1, T, LBO), (4T, SBO)); T = 8.
  if (!transposed) return swizzled(start + row % 8 * swizzle + row / 8 * stride + k * 2, swizzle);
  const int of_row = swizzle / 2;
  return swizzled(start + row % of_row * 2 + row / of_row * leading + k % 8 * swizzle + k / 8 * stride, swizzle);
}
template <class T>
float described_number(uint64_t descriptor, bool transposed, int row, int k) {
  const uint32_t address = described(descriptor, transposed, row, k);
  check_fenced(address & ~3u, 4);
  uint16_t bits;
  std::memcpy(&bits, at(address, 2), 2);
  return Number<T>::widen(T{bits});
}

// What a thread brings to a wgmma. Its registers of a are read when the hardware may read them, so `a` is their place.
struct WgmmaLane {
  float* d;
  const uint32_t* a;
  uint64_t a_descriptor, b;
};

// d += a b, where read_a(lanes, a) gives the numbers of a.
template <class T, int N, bool B_ACROSS, class ReadA>
void multiply_in_warpgroup(const char* what, const WgmmaLane& lane, ReadA read_a) {
  in_warpgroup(what, &lane, [read_a](const void* const* all) {
    std::vector<WgmmaLane> lanes(128);
    for (int i = 0; i < 128; ++i) {
      lanes[i] = *static_cast<const WgmmaLane*>(all[i]);
      if (lanes[i].a_descriptor != lanes[0].a_descriptor || lanes[i].b != lanes[0].b) {
        problem("the threads of a warpgroup disagree about wgmma");
      }
    }
    block->multiplications[self->number / 128].add(block->late, [lanes, read_a] {
      static float a[64][16], b[16][N];
      read_a(lanes, a);
      for (int k = 0; k < 16; ++k) {
        for (int j = 0; j < N; ++j) b[k][j] = described_number<T>(lanes[0].b, B_ACROSS, j, k);
      }
      for (int thread = 0; thread < 128; ++thread) {
        for (int v = 0; v < N / 2; ++v) {
          const int row = thread / 32 * 16 + thread % 32 / 4 + v / 2 % 2 * 8, column = v / 4 * 8 + 2 * (thread % 4) + v % 2;
          float sum = lanes[thread].d[v];
          for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
          lanes[thread].d[v] = sum;
        }
      }
    });
  });
}

template <class T, int N, bool B_ACROSS, bool A_ACROSS = false, int D>
void wgmma(float (&d)[D], uint64_t a, uint64_t b) {
  static_assert(N / 2 <= D);
  multiply_in_warpgroup<T, N, B_ACROSS>("wgmma", {d, nullptr, a, b}, [](const std::vector<WgmmaLane>& lanes, float (&to)[64][16]) {
    for (int k = 0; k < 16; ++k) {
      for (int i = 0; i < 64; ++i) to[i][k] = described_number<T>(lanes[0].a_descriptor, A_ACROSS, i, k);
    }
  });
}

// The fragment of a as the PTX manual draws it for wgmma.m64nNk16: 16 rows for each warp.
template <class T, int N, bool B_ACROSS, int D>
void wgmma_from_registers(float (&d)[D], const uint32_t (&a)[4], uint64_t b) {
  static_assert(N / 2 <= D);
  const auto read = [](const std::vector<WgmmaLane>& lanes, float (&to)[64][16]) {
    for (int thread = 0; thread < 128; ++thread) {
      for (int word = 0; word < 4; ++word) {
        for (int half = 0; half < 2; ++half) {
          const int row = thread / 32 * 16 + thread % 32 / 4 + word % 2 * 8, k = 2 * (thread % 4) + word / 2 * 8 + half;
          to[row][k] = number<T>(lanes[thread].a[word], half);
        }
      }
    }
  };
  multiply_in_warpgroup<T, N, B_ACROSS>("wgmma with a in registers", {d, a, 0, b}, read);
}

}  // namespace ptx

template <class... Parameters>
void launch(const Launch& what, void (*kernel)(Parameters...), Grid grid, int threads, int shared_bytes,
            const Parameters&... arguments) {
  using namespace emulator;
  ++launches;
  if (pace() == "none") return;
  if (threads % 32) fail(what, "the emulator wants whole warps");
  Work work{emulated(what), grid, threads, shared_bytes, [=] { kernel(arguments...); }};
  if (!grid.early) finish_left();
  may_let_next_start = !grid.early;
  next_may_start = false;
  try {
    run(work);
  } catch (...) {
    left = nullptr;
    throw;
  }
  if (left) {
    left = nullptr;
    fail(what, "it started early, and did not wait for the launch before it");
  }
  if (next_may_start) left = std::make_unique<Work>(std::move(work));
  next_may_start = false;
}

__attribute__((used)) inline void check_device(int) {}

}  // namespace fedms::cuda
