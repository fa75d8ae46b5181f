// The experts side by side, in the dtype of the products.
#include <algorithm>

#include "ranks.h"

namespace fedms::cuda {
namespace {

template <class T>
struct JoinArguments {
  int n, k, ranks, pitch;
  T *a, *b, *a_t;
};

// A row of blocks for each expert, of which each thread makes one number of A or of B.
template <class T, class From>
__global__ void __launch_bounds__(256) join_experts_kernel(__grid_constant__ const JoinArguments<T> g,
                                                           __grid_constant__ const Items<Expert> experts) {
  const Expert& e = experts.item[ptx::block_y()];
  const int width = e.end - e.first;
  const int64_t of_a = int64_t(width) * g.k, i = int64_t(ptx::block_x()) * 256 + ptx::thread();
  if (i >= of_a + int64_t(e.rows) * width) return;
  const auto value_at = [&](int rank, const void* data, int64_t place) {
    const float value = rank < e.rank ? widened(static_cast<const From*>(data)[place]) : 0;
    return T{Number<T>::narrow(value)};
  };
  if (i < of_a) {
    const int rank = int(i / g.k), column = int(i % g.k), to_rank = e.first + rank;
    const T value = value_at(rank, e.a, rank * e.a_row_stride + column * e.a_column_stride);
    if (to_rank < g.ranks) g.a[int64_t(to_rank) * g.k + column] = value;
    if (g.a_t) g.a_t[int64_t(column) * g.pitch + to_rank] = value;
  } else {
    const int rank = int((i - of_a) % width), row = int((i - of_a) / width);
    g.b[int64_t(e.first_row + row) * g.pitch + e.first + rank] =
        value_at(rank, e.b, row * e.b_row_stride + rank * e.b_column_stride);
  }
}

}  // namespace

void join_experts(const JoinExperts& g, const std::vector<Expert>& experts, const Stream& stream) {
  const Launch what{"join_experts", 0, g.n, g.k, g.ranks, stream};
  if (g.n < 1 || g.k < 1 || g.ranks < 1 || g.pitch < g.ranks) fail(what, "a size is out of range");
  for_items(experts, [&](const Items<Expert>& some, int count) {
    int64_t most = 0;
    for (int i = 0; i < count; ++i) {
      const Expert& e = some.item[i];
      if (e.rank < 0 || e.first < 0 || e.end < e.first + e.rank || e.end > g.pitch) {
        fail(what, "an expert's ranks are out of place");
      }
      if (e.first_row < 0 || e.rows < 1 || int64_t(e.first_row) + e.rows > g.n) fail(what, "an expert's rows are out of place");
      most = std::max(most, (e.end - e.first) * (e.rows + g.k));
    }
    if (most == 0) return;
    for_element(g.element, [&](auto* null) {
      using T = std::remove_pointer_t<decltype(null)>;
      const JoinArguments<T> arguments{int(g.n), int(g.k), int(g.ranks), int(g.pitch), static_cast<T*>(g.a), static_cast<T*>(g.b),
                                       static_cast<T*>(g.a_t)};
      const Grid grid{ceil_div(most, 256), count};
      if (g.fp32) {
        launch(what, join_experts_kernel<T, float>, grid, 256, 0, arguments, some);
      } else {
        launch(what, join_experts_kernel<T, T>, grid, 256, 0, arguments, some);
      }
    });
  });
}

}  // namespace fedms::cuda
