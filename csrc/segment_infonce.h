// Symmetric InfoNCE of ragged groups, from token log-probabilities to their gradients: arguments and launchers.
#pragma once

#include <cstdint>

#ifdef SAMI_FAST_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

namespace sami_fast {

constexpr int kMaxSide = 256;  // constitutions, and responses, of one group

// One group: its pair (j, k) is segment cell_base + j * responses + k, its response k is positives[response_base + k].
struct alignas(16) GroupShape {
  int32_t constitutions;
  int32_t responses;
  int32_t cell_base;
  int32_t response_base;
};

// B groups of S pairs, which own N tokens. Pointers are device pointers for the launchers, host pointers on the host.
struct Groups {
  const int64_t* offsets;    // [S + 1]; pair s owns tokens offsets[s] and up to offsets[s + 1]
  const GroupShape* shapes;  // [B]
  int32_t count;             // B
  int32_t max_cells;         // largest constitutions * responses; larger groups are right too, only slower
};

struct ForwardArgs {
  Groups groups;
  const float* token_logprobs;  // [N]
  const int64_t* positives;     // [sum of responses] constitution of each response, counted within its group
  bool mean;                    // a pair's score is the mean of its tokens, else their sum
  float* loss;                  // [B]
  float* metrics;               // [B, 3] mutual information (nats), row accuracy, column accuracy
  float* matrix;                // [S] scores, -inf where unscored
  float* pair_grad;             // [S] d(loss of the pair's group) / d(log-probability), the same for all of its tokens
};

struct BackwardArgs {
  Groups groups;
  const float* loss_grad;  // [B] upstream
  const float* pair_grad;  // [S] as the forward wrote it
  float* token_grad;       // [N]
};

#ifdef SAMI_FAST_WITH_CUDA
// Both launch on the current device, allocate nothing, do not synchronise and are bitwise reproducible (no atomics).
cudaError_t segment_infonce_forward(const ForwardArgs& args, cudaStream_t stream);
cudaError_t segment_infonce_backward(const BackwardArgs& args, cudaStream_t stream);
#endif

}  // namespace sami_fast
