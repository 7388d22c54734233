// The arithmetic of segment_infonce, written once: a CUDA block runs it as a team of tiles, the host as a team of one.
//
//   M[j, k]  mean or sum of the token log-probabilities of pair (j, k); -inf for a pair without tokens (unscored)
//   column   1/R sum_k -log softmax_j(M[:, k])[g(k)]
//   row      1/C sum_j mean over {k : g(k) = j} of -log softmax_k(M[j, :])[k]
//   loss     (column + row) / 2
//   MI       ((log C - column) + (log R - row)) / 2
//
// Unscored pairs take no part in a softmax, and a row or column without a scored positive adds nothing to its sum.
#pragma once

#include <cmath>
#include <cstdint>

#include "segment_infonce.h"

#ifdef __CUDACC__
#define SAMI_FAST_HD __host__ __device__ __forceinline__
#else
#define SAMI_FAST_HD inline
#endif

namespace sami_fast {

constexpr int kUnscored = -1;    // a response whose own pair has no tokens
constexpr int kOutOfRange = -2;  // a positive that names no constitution: the group's loss becomes NaN

// The threads that share one group, in tiles of kLanes consecutive lanes of a warp; a tile takes a pair, a row or a
// column at a time. The host is one tile of one lane, so that reductions and barriers have nothing to do.
template <int kLanes>
struct Team {
  int tile, tiles, lane;

  SAMI_FAST_HD int thread() const { return tile * kLanes + lane; }
  SAMI_FAST_HD int threads() const { return tiles * kLanes; }

  SAMI_FAST_HD void sync() const {
#ifdef __CUDA_ARCH__
    __syncthreads();
#endif
  }

  // Both leave the same bits in every lane of the tile.
  template <typename T>
  SAMI_FAST_HD T sum(T value) const {
    for (int step = kLanes / 2; step > 0; step /= 2) value += exchange(value, step);
    return value;
  }
  SAMI_FAST_HD float max(float value) const {
    for (int step = kLanes / 2; step > 0; step /= 2) value = fmaxf(value, exchange(value, step));
    return value;
  }

 private:
  template <typename T>
  SAMI_FAST_HD T exchange(T value, int step) const {
#ifdef __CUDA_ARCH__
    // Only this tile: its neighbours in the warp may still be in a longer loop.
    const unsigned members = (0xffffffffu >> (32 - kLanes)) << (tile * kLanes % 32);
    return __shfl_xor_sync(members, value, step);
#else
    (void)step;  // a host tile has one lane and never gets here
    return value;
#endif
  }
};

// What one row or column of the matrix contributes.
struct Line {
  // log-sum-exp in two parts: `score - top` keeps the digits that a large top + log_sum would round away.
  float top, log_sum;
  float loss;     // mean of -log softmax over the scored positives
  float share;    // 1 / number of scored positives; 0: there is none and the line counts for nothing
  float correct;  // 1 when the best positive is strictly above every negative

  SAMI_FAST_HD float log_softmax(float score) const { return (score - top) - log_sum; }

  // d(loss) / d(score). expm1 keeps the digits of 1 - p when the positive has nearly all of the mass.
  SAMI_FAST_HD float gradient(float score, bool is_positive) const {
    if (share == 0.0f) return 0.0f;
    const float logp = log_softmax(score);
    return is_positive ? expm1f(logp) + (1.0f - share) : expf(logp);
  }
};

// Everything a block keeps on a group beside the matrix.
struct GroupState {
  int positive[kMaxSide];  // constitution of each response, kUnscored or kOutOfRange
  Line rows[kMaxSide];
  Line columns[kMaxSide];
};

// Run by one tile: sum of values[begin:end], in float64, since a sum over a long response must not lose the digits that
// tell two constitutions apart. Loads go out in batches, the last one included, or each would wait for the one before.
template <int kLanes>
SAMI_FAST_HD double sum_tokens(const Team<kLanes>& team, const float* values, int64_t begin, int64_t end) {
  constexpr int kBatch = 8;
  double total = 0.0;
  for (int64_t i = begin + team.lane; i < end; i += kBatch * kLanes) {
    float batch[kBatch];
    for (int u = 0; u < kBatch; ++u) batch[u] = i + u * kLanes < end ? values[i + u * kLanes] : 0.0f;
    for (int u = 0; u < kBatch; ++u) total += static_cast<double>(batch[u]);
  }
  return team.sum(total);
}

// Run by one tile over the n scores `scores[i * stride]`; `is_positive(i)` marks the positives.
// Unscored entries are -inf and add exp(-inf) = 0. A NaN entry, or nothing but -inf, makes the line NaN.
template <int kLanes, typename IsPositive>
SAMI_FAST_HD Line reduce_line(const Team<kLanes>& team, const float* scores, int n, int stride,
                              IsPositive is_positive) {
  float best_positive = -INFINITY, best_negative = -INFINITY;
  int count = 0;
  for (int i = team.lane; i < n; i += kLanes) {
    const float score = scores[i * stride];
    if (is_positive(i)) {
      best_positive = fmaxf(best_positive, score);
      ++count;
    } else {
      best_negative = fmaxf(best_negative, score);
    }
  }
  best_positive = team.max(best_positive);
  best_negative = team.max(best_negative);
  count = team.sum(count);

  Line line;
  line.top = fmaxf(best_positive, best_negative);
  float total = 0.0f;
  for (int i = team.lane; i < n; i += kLanes) total += expf(scores[i * stride] - line.top);
  line.log_sum = logf(team.sum(total));

  float loss = 0.0f;
  for (int i = team.lane; i < n; i += kLanes) {
    if (is_positive(i)) loss -= line.log_softmax(scores[i * stride]);
  }
  loss = team.sum(loss);
  line.share = count > 0 ? 1.0f / static_cast<float>(count) : 0.0f;
  line.loss = count > 0 ? loss / static_cast<float>(count) : 0.0f;
  line.correct = best_positive > best_negative && line.log_sum == line.log_sum ? 1.0f : 0.0f;
  return line;
}

// Run by one tile: mean over the n lines of their losses and of their hits.
template <int kLanes>
SAMI_FAST_HD void mean_of_lines(const Team<kLanes>& team, const Line* lines, int n, float* loss, float* accuracy) {
  float losses = 0.0f, hits = 0.0f;
  for (int i = team.lane; i < n; i += kLanes) {
    losses += lines[i].loss;
    hits += lines[i].correct;
  }
  *loss = team.sum(losses) / static_cast<float>(n);
  *accuracy = team.sum(hits) / static_cast<float>(n);
}

SAMI_FAST_HD bool computable(const GroupShape& shape) {
  return shape.constitutions >= 1 && shape.constitutions <= kMaxSide && shape.responses >= 1 &&
         shape.responses <= kMaxSide;
}

// Group b, by the whole team. The matrix is kept in `staged` when `staged_floats` hold it, else read from args.matrix.
template <int kLanes>
SAMI_FAST_HD void forward_group(const Team<kLanes>& team, const ForwardArgs& args, int b, GroupState& state,
                                float* staged, int staged_floats) {
  const GroupShape shape = args.groups.shapes[b];
  const int C = shape.constitutions, R = shape.responses;
  if (!computable(shape)) {
    if (team.thread() == 0) {
      args.loss[b] = NAN;
      for (int i = 0; i < 3; ++i) args.metrics[3 * b + i] = NAN;
    }
    return;
  }
  const int64_t* offsets = args.groups.offsets + shape.cell_base;
  float* matrix = args.matrix + shape.cell_base;
  // An odd row pitch spreads a column over all banks of shared memory.
  const bool stage = C * (R | 1) <= staged_floats;
  const int pitch = stage ? (R | 1) : R;
  float* scores = stage ? staged : matrix;

  for (int k = team.thread(); k < R; k += team.threads()) {
    const int64_t owner = args.positives[shape.response_base + k];
    int positive = kOutOfRange;
    if (owner >= 0 && owner < C) {
      positive = static_cast<int>(owner);
      const int cell = positive * R + k;
      if (offsets[cell] == offsets[cell + 1]) positive = kUnscored;
    }
    state.positive[k] = positive;
  }
  for (int cell = team.tile; cell < C * R; cell += team.tiles) {
    const int64_t begin = offsets[cell], end = offsets[cell + 1];
    const double total = sum_tokens(team, args.token_logprobs, begin, end);
    const float score = begin == end ? -INFINITY : static_cast<float>(args.mean ? total / (end - begin) : total);
    if (team.lane == 0) {
      matrix[cell] = score;
      if (stage) staged[cell / R * pitch + cell % R] = score;
    }
  }
  team.sync();

  const int* positive = state.positive;
  for (int i = team.tile; i < C + R; i += team.tiles) {
    if (i < C) {
      const Line row = reduce_line(team, scores + i * pitch, R, 1, [=](int k) { return positive[k] == i; });
      if (team.lane == 0) state.rows[i] = row;
    } else {
      const int k = i - C, owner = positive[k];
      Line column = reduce_line(team, scores + k, C, pitch, [=](int j) { return j == owner; });
      if (owner == kOutOfRange) column.loss = column.log_sum = NAN;
      if (team.lane == 0) state.columns[k] = column;
    }
  }
  team.sync();

  if (team.tile == 0) {
    float row, row_accuracy, column, column_accuracy;
    mean_of_lines(team, state.rows, C, &row, &row_accuracy);
    mean_of_lines(team, state.columns, R, &column, &column_accuracy);
    if (team.lane == 0) {
      args.loss[b] = 0.5f * (column + row);
      args.metrics[3 * b] = 0.5f * ((logf(static_cast<float>(C)) - column) + (logf(static_cast<float>(R)) - row));
      args.metrics[3 * b + 1] = row_accuracy;
      args.metrics[3 * b + 2] = column_accuracy;
    }
  }
  for (int cell = team.thread(); cell < C * R; cell += team.threads()) {
    const int j = cell / R, k = cell % R;
    const float score = scores[j * pitch + k];
    const bool is_positive = positive[k] == j;
    const float column = state.columns[k].gradient(score, is_positive) / static_cast<float>(R);
    const float row = state.rows[j].gradient(score, is_positive) / static_cast<float>(C);
    float grad = 0.5f * (column + row);
    if (args.mean) grad /= static_cast<float>(offsets[cell + 1] - offsets[cell]);
    args.pair_grad[shape.cell_base + cell] = grad;
  }
}

// The tokens of group b, by the whole team: a tile takes a pair at a time.
template <int kLanes>
SAMI_FAST_HD void backward_group(const Team<kLanes>& team, const BackwardArgs& args, int b) {
  const GroupShape shape = args.groups.shapes[b];
  if (!computable(shape)) return;
  const int64_t* offsets = args.groups.offsets + shape.cell_base;
  for (int cell = team.tile; cell < shape.constitutions * shape.responses; cell += team.tiles) {
    const float grad = args.loss_grad[b] * args.pair_grad[shape.cell_base + cell];
    const int64_t end = offsets[cell + 1];
    for (int64_t i = offsets[cell] + team.lane; i < end; i += kLanes) args.token_grad[i] = grad;
  }
}

}  // namespace sami_fast
