// The instructions that C++ has no word for, one function each. Addresses in shared memory are 32 bits wide.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "elements.h"

namespace fedms::cuda {

using TensorMap = CUtensorMap;

namespace ptx {

#define FEDMS_DEVICE __device__ __forceinline__

FEDMS_DEVICE int thread() { return threadIdx.x; }
FEDMS_DEVICE int block_x() { return blockIdx.x; }
FEDMS_DEVICE int block_y() { return blockIdx.y; }
FEDMS_DEVICE int block_z() { return blockIdx.z; }
FEDMS_DEVICE int blocks_x() { return gridDim.x; }
FEDMS_DEVICE void sync_block() { __syncthreads(); }
FEDMS_DEVICE float shuffle_xor(float value, int lanes) { return __shfl_xor_sync(0xFFFFFFFF, value, lanes); }

// The dynamic shared memory of the block, at a multiple of 1024 bytes, which the 128-byte swizzle counts from.
FEDMS_DEVICE uint32_t shared_memory() {
  extern __shared__ __align__(1024) uint8_t memory[];
  return static_cast<uint32_t>(__cvta_generic_to_shared(memory));
}

FEDMS_DEVICE uint32_t load_shared_u16(uint32_t from) {
  uint16_t value;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(value) : "r"(from) : "memory");
  return value;
}
FEDMS_DEVICE void store_shared_u32(uint32_t to, uint32_t value) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(value) : "memory");
}
FEDMS_DEVICE Words load_shared_128(uint32_t from) {
  Words v;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
               : "r"(from)
               : "memory");
  return v;
}
FEDMS_DEVICE void store_shared_128(uint32_t to, const Words& v) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(v.word[0]), "r"(v.word[1]), "r"(v.word[2]),
               "r"(v.word[3])
               : "memory");
}

// --- sm_80 and up

// Copies `bytes` (0 .. 16) and fills up to 16 with zeros.
FEDMS_DEVICE void cp_async_16(uint32_t to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
FEDMS_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
FEDMS_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

FEDMS_DEVICE void ldmatrix_x4(uint32_t (&to)[4], uint32_t from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(from)
               : "memory");
}
FEDMS_DEVICE void ldmatrix_x4_trans(uint32_t (&to)[4], uint32_t from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(from)
               : "memory");
}

// d (16, 8) += a (16, 16) b (16, 8)
template <class T>
FEDMS_DEVICE void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#define FEDMS_MMA(TYPE)                                                                                       \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE                                         \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                         \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                               \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
  if constexpr (Number<T>::is_bf16) {
    FEDMS_MMA("bf16");
  } else {
    FEDMS_MMA("f16");
  }
#undef FEDMS_MMA
}

// --- sm_90a

FEDMS_DEVICE void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// Makes initialized barriers visible to the copies of the tensor memory accelerator.
FEDMS_DEVICE void fence_barrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
FEDMS_DEVICE void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
FEDMS_DEVICE void barrier_arrive_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Waits until the phase of that parity is complete.
FEDMS_DEVICE void barrier_wait(uint32_t barrier, int parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;\n}" ::"r"(
          barrier),
      "r"(parity)
      : "memory");
}
// Threads of the block that call it with one id wait for each other; 0 belongs to sync_block.
FEDMS_DEVICE void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

FEDMS_DEVICE void prefetch_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
// The box of a tensor map whose first element is (row, column), to shared memory; zeros where it leaves the tensor.
FEDMS_DEVICE void tma_load(uint32_t to, const TensorMap* map, uint32_t barrier, int row, int column) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::
          "r"(to),
      "l"(map), "r"(barrier), "r"(column), "r"(row)
      : "memory");
}
// How the L2 cache treats what is written: as anything else, or the first to be evicted.
FEDMS_DEVICE uint64_t cache_policy(bool evict_first) {
  uint64_t policy;
  if (evict_first) {
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  } else {
    asm volatile("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
  }
  return policy;
}
// The other way; what lies outside the tensor is not written.
FEDMS_DEVICE void tma_store(const TensorMap* map, uint32_t from, int row, int column, uint64_t policy) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group.L2::cache_hint [%0, {%2, %3}], [%1], %4;" ::"l"(map),
               "r"(from), "r"(column), "r"(row), "l"(policy)
               : "memory");
}
FEDMS_DEVICE void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until all but PENDING groups of this thread's stores have read shared memory.
template <int PENDING>
FEDMS_DEVICE void tma_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory");
}
// Makes this thread's writes to shared memory visible to the tensor memory accelerator.
FEDMS_DEVICE void fence_shared_for_tma() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Programmatic dependent launch. The next launch may start as soon as all blocks of this one have said so, if it is allowed to
// start early; nothing that this one writes is there for it yet.
FEDMS_DEVICE void let_next_launch_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
// Until the launch before has ended, and all that it wrote is there.
FEDMS_DEVICE void wait_for_launch_before() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
// Writes to global memory, of this thread or seen by it, before later copies of the tensor memory accelerator.
FEDMS_DEVICE void fence_global_for_tma() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

template <int COUNT>
FEDMS_DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT>
FEDMS_DEVICE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

FEDMS_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
FEDMS_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
FEDMS_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Accumulators are written behind the compiler's back until wgmma_wait: it must not move their use before it.
template <int N>
FEDMS_DEVICE void keep_in_place(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// The same value. What follows from it is computed where it is used, and not kept in registers over a loop.
FEDMS_DEVICE int computed_here(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

#define FEDMS_D8(i) \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define FEDMS_D16(i) FEDMS_D8(i), FEDMS_D8(i + 8)
#define FEDMS_D32(i) FEDMS_D16(i), FEDMS_D16(i + 16)
#define FEDMS_NAMES_HALF "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define FEDMS_NAMES_0 \
  FEDMS_NAMES_HALF ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FEDMS_NAMES_32 \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51" \
  ", %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FEDMS_NAMES_64 \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83" \
  ", %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define FEDMS_NAMES_96 \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111"
#define FEDMS_NAMES_112 \
  ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

// d (64, N) += a (64, 16) b (16, N), in the first N / 2 accumulators. The operands are descriptors of shared memory (layout.h); a
// has its columns along memory, or with A_ACROSS its rows, and b its rows, or with B_ACROSS its columns.
template <class T, int N, bool B_ACROSS, bool A_ACROSS = false, int D>
FEDMS_DEVICE void wgmma(float (&d)[D], uint64_t a, uint64_t b) {
  static_assert((N == 32 || N == 64 || N == 128 || N == 192 || N == 224 || N == 256) && N / 2 <= D);
#define FEDMS_WGMMA(SHAPE, TYPE, NAMES, A, B, TRANSPOSED, ...)                                                    \
  asm volatile("wgmma.mma_async.sync.aligned." SHAPE ".f32." TYPE "." TYPE " {" NAMES "}, " A ", " B            \
               ", 1, 1, 1, " TRANSPOSED ";"                                                                        \
               : __VA_ARGS__                                                                                   \
               : "l"(a), "l"(b), "n"(int(A_ACROSS)), "n"(int(B_ACROSS)))
#define FEDMS_WGMMA_OF(SHAPE, ...)                   \
  if constexpr (Number<T>::is_bf16) {                \
    FEDMS_WGMMA(SHAPE, "bf16", __VA_ARGS__);         \
  } else {                                           \
    FEDMS_WGMMA(SHAPE, "f16", __VA_ARGS__);          \
  }
  if constexpr (N == 32) {
    FEDMS_WGMMA_OF("m64n32k16", FEDMS_NAMES_HALF, "%16", "%17", "%18, %19", FEDMS_D16(0))
  } else if constexpr (N == 64) {
    FEDMS_WGMMA_OF("m64n64k16", FEDMS_NAMES_0, "%32", "%33", "%34, %35", FEDMS_D32(0))
  } else if constexpr (N == 128) {
    FEDMS_WGMMA_OF("m64n128k16", FEDMS_NAMES_0 FEDMS_NAMES_32, "%64", "%65", "%66, %67", FEDMS_D32(0), FEDMS_D32(32))
  } else if constexpr (N == 192) {
    FEDMS_WGMMA_OF("m64n192k16", FEDMS_NAMES_0 FEDMS_NAMES_32 FEDMS_NAMES_64, "%96", "%97", "%98, %99", FEDMS_D32(0),
                   FEDMS_D32(32), FEDMS_D32(64))
  } else if constexpr (N == 224) {
    FEDMS_WGMMA_OF("m64n224k16", FEDMS_NAMES_0 FEDMS_NAMES_32 FEDMS_NAMES_64 FEDMS_NAMES_96, "%112", "%113", "%114, %115",
                   FEDMS_D32(0), FEDMS_D32(32), FEDMS_D32(64), FEDMS_D16(96))
  } else {
    FEDMS_WGMMA_OF("m64n256k16", FEDMS_NAMES_0 FEDMS_NAMES_32 FEDMS_NAMES_64 FEDMS_NAMES_96 FEDMS_NAMES_112, "%128", "%129",
                   "%130, %131", FEDMS_D32(0), FEDMS_D32(32), FEDMS_D32(64), FEDMS_D32(96))
  }
#undef FEDMS_WGMMA_OF
#undef FEDMS_WGMMA
}

// The same with a in registers. What each thread holds of it are its accumulators of 16 columns, packed in pairs.
template <class T, int N, bool B_ACROSS, int D>
FEDMS_DEVICE void wgmma_from_registers(float (&d)[D], const uint32_t (&a)[4], uint64_t b) {
  static_assert(N == 192 && N / 2 <= D);
#define FEDMS_WGMMA(TYPE)                                                                                                     \
  asm volatile("wgmma.mma_async.sync.aligned.m64n192k16.f32." TYPE "." TYPE " {" FEDMS_NAMES_0 FEDMS_NAMES_32 FEDMS_NAMES_64 \
               "}, {%96, %97, %98, %99}, %100, 1, 1, 1, %101;"                                                                \
               : FEDMS_D32(0), FEDMS_D32(32), FEDMS_D32(64)                                                                   \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(int(B_ACROSS)))
  if constexpr (Number<T>::is_bf16) {
    FEDMS_WGMMA("bf16");
  } else {
    FEDMS_WGMMA("f16");
  }
#undef FEDMS_WGMMA
}

}  // namespace ptx
}  // namespace fedms::cuda
