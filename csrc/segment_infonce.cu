#include <algorithm>

#include "segment_infonce.cuh"

namespace sami_fast {
namespace {

constexpr int kWarp = 32;
constexpr int kMinThreads = 128;
constexpr int kMaxThreads = 1024;
constexpr int kBackwardWarps = 8;
constexpr int kMaxGridY = 65535;
constexpr size_t kDefaultSharedBytes = 48 << 10;  // more must be asked for

template <int kLanes>
__global__ void __launch_bounds__(kMaxThreads)
    segment_infonce_forward_kernel(const __grid_constant__ ForwardArgs args, const int staged_floats) {
  extern __shared__ __align__(16) unsigned char shared[];
  GroupState& state = *reinterpret_cast<GroupState*>(shared);
  float* staged = reinterpret_cast<float*>(shared + sizeof(GroupState));
  const int thread = static_cast<int>(threadIdx.x);
  const Team<kLanes> team{thread / kLanes, static_cast<int>(blockDim.x) / kLanes, thread % kLanes};
  forward_group(team, args, static_cast<int>(blockIdx.x), state, staged, staged_floats);
}

// Grid: (groups, blocks that share a group). A warp takes a pair at a time.
__global__ void __launch_bounds__(kBackwardWarps* kWarp)
    segment_infonce_backward_kernel(const __grid_constant__ BackwardArgs args) {
  const int thread = static_cast<int>(threadIdx.x);
  const Team<kWarp> team{static_cast<int>(blockIdx.y) * kBackwardWarps + thread / kWarp,
                         static_cast<int>(gridDim.y) * kBackwardWarps, thread % kWarp};
  backward_group(team, args, static_cast<int>(blockIdx.x));
}

template <int kLanes>
cudaError_t launch_forward(const ForwardArgs& args, size_t shared_bytes, cudaStream_t stream) {
  const auto kernel = segment_infonce_forward_kernel<kLanes>;
  if (shared_bytes > kDefaultSharedBytes) {
    const cudaError_t status =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (status != cudaSuccess) return status;
  }
  const int staged_floats = static_cast<int>((shared_bytes - sizeof(GroupState)) / sizeof(float));
  const int threads = std::clamp(kLanes * args.groups.max_cells, kMinThreads, kMaxThreads) / kWarp * kWarp;
  kernel<<<args.groups.count, threads, shared_bytes, stream>>>(args, staged_floats);
  return cudaGetLastError();
}

}  // namespace

cudaError_t segment_infonce_forward(const ForwardArgs& args, cudaStream_t stream) {
  if (args.groups.count == 0) return cudaSuccess;
  int device = 0, most_shared_bytes = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  status = cudaDeviceGetAttribute(&most_shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (status != cudaSuccess) return status;

  // The odd row pitch adds at most one float a row.
  const size_t wanted = sizeof(GroupState) + sizeof(float) * (static_cast<size_t>(args.groups.max_cells) + kMaxSide);
  const size_t shared_bytes = std::min(wanted, static_cast<size_t>(most_shared_bytes));
  // A warp for each pair while there are warps enough; beyond that narrow tiles keep more loads in flight.
  return args.groups.max_cells <= kMaxThreads / kWarp ? launch_forward<kWarp>(args, shared_bytes, stream)
                                                      : launch_forward<8>(args, shared_bytes, stream);
}

cudaError_t segment_infonce_backward(const BackwardArgs& args, cudaStream_t stream) {
  if (args.groups.count == 0) return cudaSuccess;
  const int blocks = std::clamp((args.groups.max_cells + kBackwardWarps - 1) / kBackwardWarps, 1, kMaxGridY);
  segment_infonce_backward_kernel<<<dim3(args.groups.count, blocks), kBackwardWarps * kWarp, 0, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace sami_fast
