// Which rows a block of threads works on, and whose ranks they take.
#pragma once

#include "layout.h"

namespace fedms::cuda {

// Rows that belong together: from `row` up to `end`, with the ranks of `owner`, or of all experts.
struct RowBlock {
  int row, end, owner, first_rank, ranks;
};

// How many blocks of `size` rows, or fewer, cover m rows; in segments none lies in two of them.
FEDMS_HD int row_blocks(const Segments& segments, int size, int m) {
  if (segments.count == 0) return ceil_div(m, size);
  int blocks = 0, start = 0;
  for (int e = 0; e < segments.count; start = segments.ends[e++]) blocks += ceil_div(segments.ends[e] - start, size);
  return blocks;
}

// The block of that number. `full_tiles`: in segments it has just `size` rows, of which no segment has fewer: the last one of a
// segment reaches back into the one before.
FEDMS_HD RowBlock row_block(const Segments& segments, int block, int size, int m, int r, bool full_tiles) {
  if (segments.count == 0) return {block * size, m - block * size < size ? m : (block + 1) * size, 0, 0, r};
  int e = 0, start = 0;
  for (; e < segments.count - 1; start = segments.ends[e++]) {
    const int blocks = ceil_div(segments.ends[e] - start, size);
    if (block < blocks) break;
    block -= blocks;
  }
  const int end = segments.ends[e], row = start + block * size, last = end - size;
  return {full_tiles && row > last ? last : row, row > last ? end : row + size, e, segments.firsts[e], segments.ranks[e]};
}

// The ranks of all experts side by side, with the gaps between segments' experts.
FEDMS_HD int ranks_with_gaps(const Segments& segments, int r) {
  const int last = segments.count - 1;
  return segments.count == 0 ? r : segments.firsts[last] + ceil_div(segments.ranks[last], 16) * 16;
}

// Where a row belongs.
FEDMS_HD RowBlock row_block_of(const Segments& segments, int row, int r) {
  if (segments.count == 0) return {row, row + 1, 0, 0, r};
  int e = 0;
  while (row >= segments.ends[e]) ++e;
  return {row, row + 1, e, segments.firsts[e], segments.ranks[e]};
}

// The factor of a rank in a row: scale times gate.
FEDMS_HD float factor_of(const Factors& factors, const Segments& segments, int owner, int row, int rank) {
  const int expert = segments.count ? owner : factors.expert[rank];
  const float scale = factors.scale[expert];
  return factors.gate ? scale * factors.gate[row * factors.row_stride + expert * factors.expert_stride] : scale;
}

// One number of s (which may be null) and t, from the sum for a row and a rank and their factor: zeros behind the last rank,
// whatever x holds.
template <class T>
FEDMS_HD void put_s(T* s, T* t, int64_t t_stride, int r, const RowBlock& rows, int row, int rank, float sum, float factor) {
  if (row >= rows.end || rank >= t_stride) return;
  const float own = rank < rows.ranks ? sum : 0;
  if (s && rank < r) s[int64_t(row) * r + rank] = {Number<T>::narrow(own)};
  t[row * t_stride + rank] = {Number<T>::narrow(rank < rows.ranks ? own * factor : 0)};
}

inline void check_segments(const Launch& what, const Segments& segments, int64_t m) {
  if (segments.count < 0 || segments.count > MOST_SEGMENTS) fail(what, "there are more than 8 segments");
  for (int e = 0, start = 0; e < segments.count; start = segments.ends[e++]) {
    if (segments.ends[e] < start || segments.ranks[e] < 0 || segments.ranks[e] > what.r || segments.firsts[e] % 16) {
      fail(what, "segment " + std::to_string(e) + " ends before it begins, or its ranks are out of place");
    }
  }
  if (segments.count > 0 && segments.ends[segments.count - 1] != m) fail(what, "the segments do not end with the rows");
}

}  // namespace fedms::cuda
