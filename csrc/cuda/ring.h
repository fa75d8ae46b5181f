// A ring of stages in shared memory, for compute capability 9.0: one thread fills them through the tensor memory accelerator, and
// warpgroups multiply what lies in them with wgmma.
#pragma once

#include "device.h"

namespace fedms::cuda {

template <int STAGES, int STAGE_BYTES>
struct Ring {
  static constexpr int BYTES = STAGES * STAGE_BYTES, BARRIER_BYTES = STAGES * 16;
  static_assert(STAGE_BYTES % 1024 == 0);

  uint32_t stages, barriers;  // addresses in shared memory

  // A stage, and the parity of the round through the ring, which is all that barriers know of it.
  struct Cursor {
    int stage = 0, phase = 0;

    FEDMS_DEVICE void advance() {
      if (++stage == STAGES) {
        stage = 0;
        phase ^= 1;
      }
    }
  };

  // Where a warpgroup is. The multiplications of the stage before may still run; there may be none.
  struct Reader {
    Cursor at;
    int before = -1;
  };

  FEDMS_DEVICE uint32_t full(int stage) const { return barriers + stage * 8; }
  FEDMS_DEVICE uint32_t empty(int stage) const { return barriers + (STAGES + stage) * 8; }

  // By all threads of the block. `readers`: how many warpgroups read each stage.
  FEDMS_DEVICE void init(int readers) const {
    if (ptx::thread() == 0) {
      for (int stage = 0; stage < STAGES; ++stage) {
        ptx::barrier_init(full(stage), 1);
        ptx::barrier_init(empty(stage), readers);
      }
      ptx::fence_barrier_init();
    }
    ptx::sync_block();
  }

  // Waits until a stage is free and calls load(its address, the barrier that its copies complete), which starts copies of so many
  // bytes in all.
  template <class Load>
  FEDMS_DEVICE void fill(Cursor& at, Load load, int bytes = STAGE_BYTES) const {
    ptx::barrier_wait(empty(at.stage), at.phase ^ 1);
    ptx::barrier_arrive_expect(full(at.stage), bytes);
    load(stages + at.stage * STAGE_BYTES, full(at.stage));
    at.advance();
  }

  // Calls issue(the stage's address), which issues multiplications, while those of the stage before may still run; that one is
  // free then. How many there are must be known to the compiler: a branch between them would make it wait for each. Before them
  // it calls prepare(the stage's address).
  template <class Issue, class Prepare>
  FEDMS_DEVICE void multiply(Reader& reader, Issue issue, Prepare prepare) const {
    const uint32_t stage = stages + reader.at.stage * STAGE_BYTES;
    ptx::barrier_wait(full(reader.at.stage), reader.at.phase);
    prepare(stage);
    ptx::wgmma_fence();
    issue(stage);
    ptx::wgmma_commit();
    ptx::wgmma_wait<1>();
    release(reader);
    reader.before = reader.at.stage;
    reader.at.advance();
  }

  template <class Issue>
  FEDMS_DEVICE void multiply(Reader& reader, Issue issue) const {
    multiply(reader, issue, [](uint32_t) {});
  }

  // Waits for all multiplications into `sum`.
  template <int N>
  FEDMS_DEVICE void finish(Reader& reader, float (&sum)[N]) const {
    ptx::wgmma_wait<0>();
    ptx::keep_in_place(sum);
    release(reader);
    reader.before = -1;
  }

 private:
  FEDMS_DEVICE void release(const Reader& reader) const {
    if (reader.before >= 0 && ptx::thread() % 128 == 0) ptx::barrier_arrive(empty(reader.before));
  }
};

}  // namespace fedms::cuda
