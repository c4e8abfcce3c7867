// The native module: raw addresses in, nothing of torch. beft_ext/ops/ holds the operators'
// schemas and checks; what arrives here has been checked there.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "cpu/bias_adamw_step_cpu.h"
#include "cpu/bias_grad_stats_cpu.h"
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
  py::gil_scoped_release release;
  return beft::bias_grad_stats_cpu(view, scale, threads, pointer<float>(grad), pointer<float>(sum),
                                   pointer<float>(sum_sq));
}

bool example_grads_cpu(uintptr_t data, int dtype, int64_t batch, int64_t tokens, int64_t width,
                       int64_t stride_b, int64_t stride_t, int64_t stride_h, uintptr_t offsets,
                       float scale, int threads, uintptr_t out, int out_dtype, int64_t out_stride) {
  const auto view =
      grad_view(data, dtype, batch, tokens, width, stride_b, stride_t, stride_h, offsets);
  const beft::RowsView rows{pointer<void>(out), static_cast<beft::DType>(out_dtype), out_stride};
  py::gil_scoped_release release;
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

// The kernels' number of a dtype of DLPack (floats are 2, bfloat is 4); -1 for fp64.
int64_t dtype_number(const beft::TensorView& view) {
  return view.type_code == 4 ? 1 : view.type_bits == 16 ? 2 : view.type_bits == 32 ? 0 : -1;
}

// Addresses of params and grads and the forms that tensors_of reads, or None where one of them is
// not what the step takes: plain memory of the state's device, a float type, a gradient of its
// parameter's form.
py::object adamw_gather(const py::list& params, const py::list& grads, py::handle state,
                        const std::vector<int64_t>& group_of) {
  std::vector<uint64_t> addresses, grad_addresses, forms;
  beft::TensorView flat{}, own{}, its{};
  if (!beft::view_of(state, flat) || params.size() != grads.size()) return py::none();
  for (size_t i = 0; i < params.size(); ++i) {
    const py::handle p = params[i], g = grads[i];
    if (!beft::view_of(p, own) || beft::negative(p)) return py::none();
    const bool is_float =
        (own.type_code == 2 && own.type_bits >= 16) || (own.type_code == 4 && own.type_bits == 16);
    const bool fits = own.type_bits != 64 || flat.type_bits == 64;
    const bool has_master = own.type_bits != 16 || flat.sizes[0] == 4;
    if (!is_float || !fits || !has_master || !own.same_device(flat)) return py::none();
    addresses.push_back(own.address());
    grad_addresses.push_back(0);
    for (int64_t x : {dtype_number(own), group_of[i], own.reach(), own.elements()})
      forms.push_back(x);
    if (g.is_none()) continue;
    if (!beft::view_of(g, its) || !its.same_kind(own) || !its.contiguous() || beft::negative(g))
      return py::none();
    grad_addresses.back() = its.address();
  }
  return py::make_tuple(beft::packed(addresses), beft::packed(grad_addresses), beft::packed(forms));
}

bool adamw_table_fits(const py::bytes& params, const py::bytes& grads, const py::bytes& forms,
                      uintptr_t blocks, int64_t block_count, uintptr_t first_blocks,
                      int64_t segments, int64_t elements, int64_t longest) {
  const auto tensors = tensors_of(params, grads, forms);
  return beft::table_fits(pointer<const beft::AdamWBlock>(blocks), block_count,
                          pointer<const int64_t>(first_blocks), segments, tensors.data(),
                          static_cast<int64_t>(tensors.size()), elements, longest);
}

// groups: six numbers each, as in AdamWGroup. state: (rows, elements), its rows exp_avg,
// exp_avg_sq, initial and, where kept, master. global_norm: -1 for that of these gradients.
double adamw_cpu(const py::bytes& params, const py::bytes& grads, const py::bytes& forms,
                 const std::vector<double>& groups, uintptr_t blocks, int64_t block_count,
                 uintptr_t state, int64_t elements, bool has_master, uintptr_t steps,
                 uintptr_t scores, double max_grad_norm, double global_norm, double inverse_scale,
                 int threads) {
  float* flat = pointer<float>(state);
  const beft::AdamWView view{tensors_of(params, grads, forms),
                             groups_of(groups),
                             pointer<const beft::AdamWBlock>(blocks),
                             block_count,
                             flat,
                             flat + elements,
                             flat + 2 * elements,
                             has_master ? flat + 3 * elements : nullptr,
                             pointer<float>(steps),
                             pointer<float>(scores),
                             max_grad_norm,
                             global_norm,
                             inverse_scale};
  py::gil_scoped_release release;
  return beft::bias_adamw_step_cpu(view, threads);
}

#ifdef BEFT_WITH_CUDA
void stats_cuda(uintptr_t data, int dtype, int64_t batch, int64_t tokens, int64_t width,
                int64_t stride_b, int64_t stride_t, int64_t stride_h, uintptr_t offsets,
                int64_t chunks, float scale, uintptr_t workspace, uintptr_t grad, uintptr_t sum,
                uintptr_t sum_sq, uintptr_t stream) {
  cudaError_t status = beft_bias_grad_stats_cuda(
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
  cudaError_t status = beft_bias_example_grads_cuda(
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
  cudaError_t status =
      beft_cuda::bias_adamw_step(tensors.data(), own.data(), static_cast<int>(own.size()), tables,
                                 pointer<CUstream_st>(stream));
  if (status != cudaSuccess)
    throw std::runtime_error(std::string("bias_adamw_step on CUDA: ") + cudaGetErrorString(status));
}
#endif

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.def("survey", &beft::survey);
  m.def("bias_grad_stats_cpu", &stats_cpu);
  m.def("bias_example_grads_cpu", &example_grads_cpu);
  m.def("bias_adamw_step_cpu", &adamw_cpu);
  m.def("bias_adamw_step_gather", &adamw_gather);
  m.def("bias_adamw_step_table_fits", &adamw_table_fits);
#ifdef BEFT_WITH_CUDA
  m.attr("has_cuda") = true;
  m.def("bias_grad_stats_cuda", &stats_cuda);
  m.def("bias_example_grads_cuda", &example_grads_cuda);
  m.def("bias_adamw_step_cuda", &adamw_cuda);
  m.attr("bias_adamw_step_limits") =
      py::make_tuple(int{beft_cuda::kMaxTensors}, int{beft_cuda::kMaxGroups});
#else
  m.attr("has_cuda") = false;
#endif
}
