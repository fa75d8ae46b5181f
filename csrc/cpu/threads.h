// How many threads share a piece of work.
#pragma once

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace fedms {

// Waking a thread costs about as much as so many multiply-adds: of a product in fp32, of the LoRA branch, whose operands are
// read more often than they are multiplied, and of a product of integers.
constexpr int64_t FP32_WORK = 1 << 18, LORA_WORK = 1 << 17, INTEGER_WORK = 1 << 19;

// At most one thread for `work_per_thread` multiply-adds, and for each part that the work can be cut into. At least 1.
inline int threads_for(int64_t multiply_adds, int64_t work_per_thread, int64_t parts) {
  const int64_t useful = std::min({multiply_adds / work_per_thread, parts, int64_t{omp_get_max_threads()}});
  return static_cast<int>(std::max<int64_t>(1, useful));
}

// One of the threads that share a piece of work.
struct Member {
  int thread, threads;

  // Calls function(i) for its share of 0 ... count - 1, which follow one another.
  template <class Function>
  void share(int64_t count, Function function) const {
    for (int64_t i = count * thread / threads; i < count * (thread + 1) / threads; ++i) function(i);
  }

  // Waits until all of them have come here.
  void wait() const {
    if (threads > 1) {
#pragma omp barrier
    }
  }
};

// Calls function(member) on so many threads. On one thread it is a plain call: OpenMP would make a team of one, and GCC's library
// enters the kernel at each barrier and at the end of a team, whatever its size. Of the 16.3 us of an int8 layer at one row
// (768 -> 768, Zen 4) 1 was expected to go, and 1.2 went.
template <class Function>
void on_threads(int threads, Function function) {
  if (threads <= 1) return function(Member{0, 1});
#pragma omp parallel num_threads(threads)
  function(Member{omp_get_thread_num(), omp_get_num_threads()});
}

// Calls function(i) for 0 ... count - 1, of which each thread takes as many, side by side.
template <class Function>
void share_out(int threads, int64_t count, Function function) {
  on_threads(threads, [&](Member member) { member.share(count, function); });
}

// Hands out 0 ... count - 1, one at a time to the thread that asks first: the cores of a machine in use are not equally fast.
class Queue {
 public:
  explicit Queue(int64_t count) : count_(count) {}

  // Calls function(i) until nothing is left.
  template <class Function>
  void take(Function function) {
    for (int64_t i = next_++; i < count_; i = next_++) function(i);
  }

 private:
  const int64_t count_;
  std::atomic<int64_t> next_{0};
};

}  // namespace fedms
