// The Python face of csrc/: addresses, sizes and a stream in, exceptions out. Memory is the caller's.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "segment_infonce.cuh"

namespace py = pybind11;
using namespace pybind11::literals;

namespace {

template <typename T>
T* address(uintptr_t value, const char* name) {
  if (value == 0) throw py::value_error(std::string(name) + ": expected the address of a tensor's data, got 0");
  return reinterpret_cast<T*>(value);
}

sami_fast::Groups groups_at(uintptr_t offsets, uintptr_t shapes, uintptr_t sizes, int groups) {
  if (groups < 0) throw py::value_error("groups: expected 0 or more, got " + std::to_string(groups));
  sami_fast::Groups made{address<const int64_t>(offsets, "offsets"),
                         address<const sami_fast::GroupShape>(shapes, "shapes"), groups, 0};
  const int64_t* size = address<const int64_t>(sizes, "sizes");
  for (int b = 0; b < groups; ++b) {
    const int64_t side = sami_fast::kMaxSide, C = std::clamp<int64_t>(size[2 * b], 0, side);
    const int64_t R = std::clamp<int64_t>(size[2 * b + 1], 0, side);
    made.max_cells = std::max(made.max_cells, static_cast<int32_t>(C * R));
  }
  return made;
}

const sami_fast::Team<1> kAlone{0, 1, 0};

void forward_host(const sami_fast::ForwardArgs& args) {
  sami_fast::GroupState state;
  std::vector<float> staged(static_cast<size_t>(args.groups.max_cells) + sami_fast::kMaxSide);
  for (int b = 0; b < args.groups.count; ++b) {
    sami_fast::forward_group(kAlone, args, b, state, staged.data(), static_cast<int>(staged.size()));
  }
}

void backward_host(const sami_fast::BackwardArgs& args) {
  for (int b = 0; b < args.groups.count; ++b) sami_fast::backward_group(kAlone, args, b);
}

#ifdef SAMI_FAST_WITH_CUDA
void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

void forward_cuda(const sami_fast::ForwardArgs& args, uintptr_t stream) {
  check(sami_fast::segment_infonce_forward(args, reinterpret_cast<cudaStream_t>(stream)), "segment_infonce_forward");
}

void backward_cuda(const sami_fast::BackwardArgs& args, uintptr_t stream) {
  check(sami_fast::segment_infonce_backward(args, reinterpret_cast<cudaStream_t>(stream)), "segment_infonce_backward");
}

constexpr const char* kCudaDoc =
    "    RuntimeError: the launch failed; the message is CUDA's.\n\n"
    "Device addresses, launched on `stream` (a cudaStream_t) of the current device.\n";
#endif

constexpr const char* kForwardDoc = R"(Symmetric InfoNCE of B ragged groups, its metrics and its gradient.

Every tensor is passed as the address of its contiguous data (`tensor.data_ptr()`); nothing is allocated.

Args:
    token_logprobs: [N] fp32.
    offsets: [S + 1] int64, from 0 to N: pair s owns tokens offsets[s]:offsets[s + 1]; a pair without tokens is not
        scored.
    shapes: [B, 4] int32, 16-byte aligned: constitutions and responses (1 to 256 each; else the group's loss is NaN),
        index of the group's first pair, index of its first response. Pair (j, k) is number j * responses + k.
    sizes: [B, 2] int64, always on the host: constitutions and responses again, by which launch and memory are sized.
        Groups larger than the largest of these are computed just as well, only slower.
    groups: B.
    positives: [sum of responses] int64, constitution of each response (out of range: the group's loss is NaN).
    normalize: "mean" or "sum" of a pair's tokens.
    loss: [B] fp32, written.
    metrics: [B, 3] fp32, written: mutual information (nats), row accuracy, column accuracy.
    matrix: [S] fp32, written; -inf where a pair is not scored.
    pair_grad: [S] fp32, written: d(loss of the pair's group) / d(log-probability), the same for all of its tokens.

Raises:
    ValueError: a null address, negative `groups`, another `normalize`.
)";

constexpr const char* kBackwardDoc = R"(Gradient of the token log-probabilities: `loss_grad` times `pair_grad` at every token.

Args:
    loss_grad: [B] fp32, upstream.
    pair_grad: [S] fp32, as the forward wrote it.
    token_grad: [N] fp32, written.
    offsets, shapes, sizes, groups: as for the forward.

Raises:
    ValueError: a null address, negative `groups`.
)";
constexpr const char* kHostDoc = "\nHost addresses: the kernel's arithmetic compiled for the CPU.\n";

// Extra: the parameters of one variant beyond those of kForwardDoc.
template <typename... Extra, typename Run, typename... ExtraArgs>
void define_forward(py::module_& m, const char* name, const std::string& doc, Run run, ExtraArgs... extra_args) {
  m.def(
      name,
      [run](uintptr_t token_logprobs, uintptr_t offsets, uintptr_t shapes, uintptr_t sizes, int groups,
            uintptr_t positives, const std::string& normalize, uintptr_t loss, uintptr_t metrics,
            uintptr_t matrix, uintptr_t pair_grad, Extra... extra) {
        if (normalize != "mean" && normalize != "sum") {
          throw py::value_error("normalize: expected 'mean' or 'sum', got '" + normalize + "'");
        }
        sami_fast::ForwardArgs args{};
        args.groups = groups_at(offsets, shapes, sizes, groups);
        args.token_logprobs = reinterpret_cast<const float*>(token_logprobs);  // null when no pair has a token
        args.positives = address<const int64_t>(positives, "positives");
        args.mean = normalize == "mean";
        args.loss = address<float>(loss, "loss");
        args.metrics = address<float>(metrics, "metrics");
        args.matrix = address<float>(matrix, "matrix");
        args.pair_grad = address<float>(pair_grad, "pair_grad");
        py::gil_scoped_release release;
        run(args, extra...);
      },
      py::kw_only(), "token_logprobs"_a, "offsets"_a, "shapes"_a, "sizes"_a, "groups"_a, "positives"_a,
      "normalize"_a, "loss"_a, "metrics"_a, "matrix"_a, "pair_grad"_a, extra_args..., doc.c_str());
}

template <typename... Extra, typename Run, typename... ExtraArgs>
void define_backward(py::module_& m, const char* name, const std::string& doc, Run run, ExtraArgs... extra_args) {
  m.def(
      name,
      [run](uintptr_t loss_grad, uintptr_t pair_grad, uintptr_t offsets, uintptr_t shapes, uintptr_t sizes, int groups,
            uintptr_t token_grad, Extra... extra) {
        sami_fast::BackwardArgs args{};
        args.groups = groups_at(offsets, shapes, sizes, groups);
        args.loss_grad = address<const float>(loss_grad, "loss_grad");
        args.pair_grad = address<const float>(pair_grad, "pair_grad");
        args.token_grad = reinterpret_cast<float*>(token_grad);  // null when no pair has a token
        py::gil_scoped_release release;
        run(args, extra...);
      },
      py::kw_only(), "loss_grad"_a, "pair_grad"_a, "offsets"_a, "shapes"_a, "sizes"_a, "groups"_a,
      "token_grad"_a, extra_args..., doc.c_str());
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Kernels of sami_fast in C++: for CUDA where it was built with nvcc, and their arithmetic for the host.";
  m.def(
      "cuda_version",
      []() -> std::optional<std::string> {
#ifdef SAMI_FAST_WITH_CUDA
        return std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
#else
        return std::nullopt;
#endif
      },
      "Version of the CUDA toolkit this module was built with, such as '13.0'; None where it has its host code alone.");
  const std::string forward_doc = kForwardDoc, backward_doc = kBackwardDoc;
#ifdef SAMI_FAST_WITH_CUDA
  define_forward<uintptr_t>(m, "segment_infonce_forward_cuda", forward_doc + kCudaDoc, forward_cuda, "stream"_a);
  define_backward<uintptr_t>(m, "segment_infonce_backward_cuda", backward_doc + kCudaDoc, backward_cuda, "stream"_a);
#endif
  define_forward<>(m, "segment_infonce_forward_host", forward_doc + kHostDoc, forward_host);
  define_backward<>(m, "segment_infonce_backward_host", backward_doc + kHostDoc, backward_host);
}
