// The native module: raw addresses, or tensors as tensor_views.h reads them; no link to torch.
// beft_ext/ops/ holds the operators' schemas and checks; what arrives here has been checked there.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "adamw_tables.h"
#include "cpu/bias_adamw_step_cpu.h"
#include "cpu/bias_grad_stats_cpu.h"
#include "grad_arguments.h"
#include "tensor_views.h"
#ifdef BEFT_WITH_CUDA
#include <cuda_runtime.h>

#include "cuda/bias_adamw_step_cuda.h"
#include "cuda/bias_grad_stats_cuda.h"
#endif

namespace py = pybind11;

namespace {

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Other Python threads run meanwhile, where the work is worth handing over for.
using Released = std::optional<py::gil_scoped_release>;
constexpr int64_t kWorthReleasing = 16384;  // elements: some microseconds of work

int64_t elements(const beft::GradView& view) {
  return (view.offsets ? 1 : view.batch) * view.tokens * view.width;
}

beft::GradView grad_view(uintptr_t data, int dtype, int64_t batch, int64_t tokens, int64_t width,
                         int64_t stride_b, int64_t stride_t, int64_t stride_h, uintptr_t offsets) {
  return {pointer<const void>(data),
          static_cast<beft::DType>(dtype),
          batch,
          tokens,
          width,
          stride_b,
          stride_t,
          stride_h,
          pointer<const int64_t>(offsets)};
}

bool stats_cpu(uintptr_t data, int dtype, int64_t batch, int64_t tokens, int64_t width,
               int64_t stride_b, int64_t stride_t, int64_t stride_h, uintptr_t offsets, float scale,
               int threads, uintptr_t grad, uintptr_t sum, uintptr_t sum_sq) {
  const auto view =
      grad_view(data, dtype, batch, tokens, width, stride_b, stride_t, stride_h, offsets);
  Released released;
  if (elements(view) > kWorthReleasing) released.emplace();
  return beft::bias_grad_stats_cpu(view, scale, threads, pointer<float>(grad), pointer<float>(sum),
                                   pointer<float>(sum_sq));
}

bool example_grads_cpu(uintptr_t data, int dtype, int64_t batch, int64_t tokens, int64_t width,
                       int64_t stride_b, int64_t stride_t, int64_t stride_h, uintptr_t offsets,
                       float scale, int threads, uintptr_t out, int out_dtype, int64_t out_stride) {
  const auto view =
      grad_view(data, dtype, batch, tokens, width, stride_b, stride_t, stride_h, offsets);
  const beft::RowsView rows{pointer<void>(out), static_cast<beft::DType>(out_dtype), out_stride};
  Released released;
  if (elements(view) > kWorthReleasing) released.emplace();
  return beft::bias_example_grads_cpu(view, scale, threads, rows);
}

// Tensors of a step from packed words: addresses, 0 for no gradient; and of each tensor dtype,
// group, and the sizes of parameter and gradient.
std::vector<beft::AdamWTensor> tensors_of(const py::bytes& params, const py::bytes& grads,
                                          const py::bytes& forms) {
  auto words = [](const py::bytes& packed) {
    return reinterpret_cast<const int64_t*>(PyBytes_AS_STRING(packed.ptr()));
  };
  const int64_t *p = words(params), *g = words(grads), *f = words(forms);
  std::vector<beft::AdamWTensor> tensors(PyBytes_GET_SIZE(params.ptr()) / sizeof(int64_t));
  for (size_t i = 0; i < tensors.size(); ++i, f += 4)
    tensors[i] = {pointer<void>(p[i]), pointer<const void>(g[i]), f[0], f[1], f[2], f[3]};
  return tensors;
}

std::vector<beft::AdamWGroup> groups_of(const std::vector<double>& numbers) {
  std::vector<beft::AdamWGroup> groups;
  for (size_t i = 0; i + 6 <= numbers.size(); i += 6) {
    const double* n = &numbers[i];
    groups.push_back({n[0], n[1], n[2], n[3], n[4], n[5]});
  }
  return groups;
}

// Addresses of params and grads and the forms that tensors_of reads, of the operator's arguments;
// None where something does not fit.
py::object adamw_gather(const py::tuple& arguments, int64_t longest) {
  beft::AdamWTables tables(arguments);
  if (!tables.fit(longest)) return py::none();
  return py::make_tuple(beft::packed(tables.params), beft::packed(tables.grads),
                        beft::packed(tables.forms));
}

// groups: six numbers each, as in AdamWGroup. Then tensors of AdamWTables (beft_ext/ops/), and
// global_norm: -1 for that of these gradients.
double adamw_cpu(const py::bytes& params, const py::bytes& grads, const py::bytes& forms,
                 const std::vector<double>& groups, py::handle blocks, py::handle state,
                 py::handle steps, py::handle scores, double max_grad_norm, double global_norm,
                 double inverse_scale, int threads) {
  const auto table = beft::plain_view(blocks), flat = beft::plain_view(state);
  auto row = [&](int64_t i) { return pointer<float>(flat.address()) + i * flat.sizes[1]; };
  const beft::AdamWView view{tensors_of(params, grads, forms),
                             groups_of(groups),
                             pointer<const beft::AdamWBlock>(table.address()),
                             table.sizes[0],
                             row(0),
                             row(1),
                             row(2),
                             flat.sizes[0] == 4 ? row(3) : nullptr,
                             pointer<float>(beft::plain_view(steps).address()),
                             pointer<float>(beft::plain_view(scores).address()),
                             max_grad_norm,
                             global_norm,
                             inverse_scale};
  Released released;
  if (flat.sizes[1] > kWorthReleasing) released.emplace();
  return beft::bias_adamw_step_cpu(view, threads);
}

#ifdef BEFT_WITH_CUDA
// Nothing where the kernels of each file run on the current device, else CUDA's reason.
std::string cuda_refusal() {
  for (const auto ready : {beft_bias_grad_stats_ready, beft_cuda::bias_adamw_step_ready}) {
    const cudaError_t status = ready();
    if (status == cudaSuccess) continue;
    cudaGetLastError();  // or the next launch would be told of it
    return cudaGetErrorString(status);
  }
  return "";
}

void stats_cuda(uintptr_t data, int dtype, int64_t batch, int64_t tokens, int64_t width,
                int64_t stride_b, int64_t stride_t, int64_t stride_h, uintptr_t offsets,
                int64_t chunks, float scale, uintptr_t workspace, uintptr_t grad, uintptr_t sum,
                uintptr_t sum_sq, uintptr_t stream) {
  py::gil_scoped_release released;  // a launch waits where the queue is full
  const cudaError_t status = beft_bias_grad_stats_cuda(
      pointer<const void>(data), dtype, batch, tokens, width, stride_b, stride_t, stride_h,
      pointer<const int64_t>(offsets), chunks, scale, pointer<float>(workspace),
      pointer<float>(grad), pointer<float>(sum), pointer<float>(sum_sq),
      pointer<CUstream_st>(stream));
  if (status != cudaSuccess)
    throw std::runtime_error(std::string("bias_grad_stats on CUDA: ") + cudaGetErrorString(status));
}

void example_grads_cuda(uintptr_t data, int dtype, int64_t batch, int64_t tokens, int64_t width,
                        int64_t stride_b, int64_t stride_t, int64_t stride_h, uintptr_t offsets,
                        int64_t chunks, float scale, uintptr_t workspace, uintptr_t out,
                        int out_dtype, int64_t out_stride, uintptr_t stream) {
  py::gil_scoped_release released;
  const cudaError_t status = beft_bias_example_grads_cuda(
      pointer<const void>(data), dtype, batch, tokens, width, stride_b, stride_t, stride_h,
      pointer<const int64_t>(offsets), chunks, scale, pointer<float>(workspace), pointer<void>(out),
      out_dtype, out_stride, pointer<CUstream_st>(stream));
  if (status != cudaSuccess)
    throw std::runtime_error(std::string("bias_example_grads on CUDA: ") +
                             cudaGetErrorString(status));
}

// As adamw_cpu; addresses of the device. workspace: 4 * block_count + segments + 1 zeros before
// the first call.
void adamw_cuda(const py::bytes& params, const py::bytes& grads, const py::bytes& forms,
                const std::vector<double>& groups, uintptr_t blocks, int block_count,
                uintptr_t first_blocks, int segments, uintptr_t state, int64_t elements,
                uintptr_t steps, uintptr_t scores, uintptr_t workspace, uintptr_t norm,
                uintptr_t lr, double max_grad_norm, uintptr_t global_norm, uintptr_t grad_scale,
                uintptr_t found_inf, uintptr_t stream) {
  const auto tensors = tensors_of(params, grads, forms);
  const auto own = groups_of(groups);
  const beft_cuda::AdamWTables tables{pointer<const beft::AdamWBlock>(blocks),
                                      pointer<const int64_t>(first_blocks),
                                      pointer<float>(state),
                                      pointer<float>(steps),
                                      pointer<float4>(scores),
                                      pointer<const float>(lr),
                                      pointer<const float>(grad_scale),
                                      pointer<const float>(found_inf),
                                      pointer<const float>(global_norm),
                                      pointer<float4>(workspace),
                                      pointer<unsigned>(workspace) + 4 * int64_t{block_count},
                                      pointer<float>(norm),
                                      elements,
                                      max_grad_norm,
                                      block_count,
                                      segments,
                                      static_cast<int>(tensors.size())};
  py::gil_scoped_release released;
  const cudaError_t status =
      beft_cuda::bias_adamw_step(tensors.data(), own.data(), static_cast<int>(own.size()), tables,
                                 pointer<CUstream_st>(stream));
  if (status != cudaSuccess)
    throw std::runtime_error(std::string("bias_adamw_step on CUDA: ") + cudaGetErrorString(status));
}
#endif

}  // namespace

PYBIND11_MODULE(_native, m) {
  // Counted up with each change of what Python hands over: dispatch.py refuses another number.
  m.attr("interface") = 4;
  m.def("survey", &beft::survey);
  m.def("bias_grad_stats_arguments", &beft::stats_arguments);
  m.def("bias_example_grads_arguments", &beft::rows_arguments);
  m.def("bias_grad_stats_cpu", &stats_cpu);
  m.def("bias_example_grads_cpu", &example_grads_cpu);
  m.def("bias_adamw_step_cpu", &adamw_cpu);
  m.def("bias_adamw_step_gather", &adamw_gather);
#ifdef BEFT_WITH_CUDA
  m.attr("has_cuda") = true;
  m.def("cuda_refusal", &cuda_refusal);
  m.def("bias_grad_stats_cuda", &stats_cuda);
  m.def("bias_example_grads_cuda", &example_grads_cuda);
  m.def("bias_adamw_step_cuda", &adamw_cuda);
  m.attr("bias_adamw_step_limits") =
      py::make_tuple(int{beft_cuda::kMaxTensors}, int{beft_cuda::kMaxGroups});
#else
  m.attr("has_cuda") = false;
#endif
}
