// What the kernels with the ranks on one side share: shrink.cu, lora_grad.cu and reduce.cu.
//
// All kernels with the ranks on one side and the rows, or a side of W, on the other are bound by one pass over x or dy. Sums
// over the rows, or over the columns of dy, are split into partial sums in a workspace, which another kernel adds up in order:
// no atomics, so the bits repeat.
#pragma once

#include <algorithm>
#include <climits>
#include <type_traits>
#include <vector>

#include "mma.h"
#include "philox.h"
#include "segments.h"

namespace fedms::cuda {

constexpr int RANKS = 32;        // of one block; more ranks are more blocks
constexpr int MOST_RANKS = 256;  // of all experts together

template <class T>
FEDMS_DEVICE float widened(T value) {
  return Number<T>::widen(value);
}
FEDMS_DEVICE float widened(float value) { return value; }
template <class T>
FEDMS_DEVICE T narrowed(float value) {
  if constexpr (std::is_same_v<T, float>) {
    return value;
  } else {
    return {Number<T>::narrow(value)};
  }
}

void start_lora_grad_strips(const Launch& what, const LoraGradStrips& call);

// Sets the dropped numbers of a tile in shared memory to zero. (row, column): of its first one in x.
template <int ROWS, int CHUNKS, int THREADS>
FEDMS_DEVICE void drop_tile(const Mask& mask, uint32_t tile, int row, int column, int columns) {
  static_assert(ROWS * CHUNKS % THREADS == 0);
  for (int first = 0; first < ROWS * CHUNKS; first += THREADS) {
    const int i = first + ptx::thread();
    const uint32_t place = tile + chunk_offset<CHUNKS>(i / CHUNKS, i % CHUNKS);
    Words eight = ptx::load_shared_128(place);
    drop_eight(mask, uint64_t(row + i / CHUNKS) * columns + column + i % CHUNKS * 8, eight);
    ptx::store_shared_128(place, eight);
  }
}

// Calls start with a null pointer of the element's type.
template <class Start>
void for_element(Element element, Start start) {
  element == Element::bf16 ? start(static_cast<Bf16*>(nullptr)) : start(static_cast<Fp16*>(nullptr));
}

// What a launch does for each of several items, which travel in its arguments: a row of blocks for each.
constexpr int ITEMS_A_LAUNCH = 32;
template <class Item>
struct Items {
  Item item[ITEMS_A_LAUNCH];
};

// Calls start(items, count) for every ITEMS_A_LAUNCH of them, in their order.
template <class Item, class Start>
void for_items(const std::vector<Item>& all, Start start) {
  for (size_t first = 0; first < all.size(); first += ITEMS_A_LAUNCH) {
    Items<Item> items{};
    const size_t count = std::min<size_t>(all.size() - first, ITEMS_A_LAUNCH);
    std::copy_n(all.begin() + first, count, items.item);
    start(items, static_cast<int>(count));
  }
}

inline void check_sizes(const Launch& what, int64_t m, int64_t columns, int64_t r) {
  if (m < 1 || columns < 1 || m > INT_MAX - 1024 || columns > INT_MAX - 1024) fail(what, "a size is out of range");
  if (r < 1 || r > MOST_RANKS) fail(what, "the total rank must be from 1 to " + std::to_string(MOST_RANKS));
}

}  // namespace fedms::cuda
