// Symmetric InfoNCE of ragged groups, from token log-probabilities to its gradient: arguments and launcher.
#pragma once

#include <cstdint>

#include <cuda_runtime_api.h>

namespace sami_fast {

constexpr int kMaxSide = 256;  // constitutions, and responses, of one group

// One group: its pair (j, k) is segment cell_base + j * responses + k, its response k is positives[response_base + k].
struct alignas(16) GroupShape {
  int32_t constitutions;
  int32_t responses;
  int32_t cell_base;
  int32_t response_base;
};

// B groups, S pairs, N scored tokens. All pointers are device pointers for the launcher, host pointers on the host.
struct SegmentInfonceArgs {
  const float* token_logprobs;  // [N]
  const void* offsets;          // [S + 1] int32 or int64; pair s owns tokens offsets[s] and up to offsets[s + 1]
  bool offsets_are_int64;
  const GroupShape* shapes;  // [B]
  const int32_t* positives;  // [sum of responses] constitution of each response, counted within its group
  int32_t groups;            // B
  int32_t max_cells;         // largest constitutions * responses; larger groups are right too, but read global memory
  bool mean;                 // a pair's score is the mean of its tokens, else their sum
  float* loss;               // [B]
  float* metrics;            // [B, 3] mutual information (nats), row accuracy, column accuracy
  float* matrix;             // [S] scores, -inf where unscored
  float* token_grad;         // [N] d(loss of the token's group) / d(token_logprobs); null: not wanted
};

// Launches on the current device. Allocates nothing, does not synchronise, bitwise reproducible (no atomics).
cudaError_t segment_infonce(const SegmentInfonceArgs& args, cudaStream_t stream);

}  // namespace sami_fast
