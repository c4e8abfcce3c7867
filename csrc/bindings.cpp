// The native module: raw addresses in, nothing of torch. beft_ext/ops/ holds the operators'
// schemas and checks; what arrives here has been checked there.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "cpu/bias_adamw_step_cpu.h"
#include "cpu/bias_grad_stats_cpu.h"
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

bool stats_cpu(uintptr_t data, int dtype, int64_t batch, int64_t tokens, int64_t width,
               int64_t stride_b, int64_t stride_t, int64_t stride_h, uintptr_t offsets, float scale,
               int threads, uintptr_t grad, uintptr_t sum, uintptr_t sum_sq) {
  beft::GradView view{pointer<const void>(data),
                      static_cast<beft::DType>(dtype),
                      batch,
                      tokens,
                      width,
                      stride_b,
                      stride_t,
                      stride_h,
                      pointer<const int64_t>(offsets)};
  py::gil_scoped_release release;
  return beft::bias_grad_stats_cpu(view, scale, threads, pointer<float>(grad), pointer<float>(sum),
                                   pointer<float>(sum_sq));
}

// A method of torch.Tensor, found once: looking it up by name takes as long as the call.
PyObject* method(const char* name) {
  return py::object(py::module_::import("torch").attr("Tensor").attr(name)).release().ptr();
}

py::object ask(PyObject* method, py::handle tensor) {
  PyObject* answer = PyObject_CallOneArg(method, tensor.ptr());
  if (!answer) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(answer);
}

uint64_t address_of(py::handle tensor) {
  static PyObject* const data_ptr = method("data_ptr");
  const uint64_t address = PyLong_AsUnsignedLongLong(ask(data_ptr, tensor).ptr());
  if (PyErr_Occurred()) throw py::error_already_set();
  return address;
}

py::bytes packed(const std::vector<uint64_t>& addresses) {
  return py::bytes(reinterpret_cast<const char*>(addresses.data()),
                   addresses.size() * sizeof(uint64_t));
}

const uint64_t* unpacked(const py::bytes& addresses) {
  return reinterpret_cast<const uint64_t*>(PyBytes_AS_STRING(addresses.ptr()));
}

// Addresses of tensors, eight bytes each; 0 for None.
py::bytes addresses(const py::list& tensors) {
  std::vector<uint64_t> found;
  for (py::handle tensor : tensors) found.push_back(tensor.is_none() ? 0 : address_of(tensor));
  return packed(found);
}

// The gradients of parameters; and their addresses, or None where one is not contiguous.
py::tuple gradients(const py::list& params) {
  static PyObject* const grad = PyUnicode_InternFromString("grad");
  static PyObject* const is_contiguous = method("is_contiguous");
  std::vector<uint64_t> found(params.size());
  py::list grads;
  bool plain = true;
  for (size_t i = 0; i < found.size(); ++i) {
    const auto g = py::reinterpret_steal<py::object>(PyObject_GetAttr(params[i].ptr(), grad));
    if (!g) throw py::error_already_set();
    grads.append(g);
    if (g.is_none()) continue;
    plain = plain && ask(is_contiguous, g).ptr() == Py_True;
    if (plain) found[i] = address_of(g);
  }
  return py::make_tuple(grads, plain ? py::object(packed(found)) : py::none());
}

// params, grads: packed addresses, 0 for no gradient, one a dtype; groups: six numbers each, as
// in AdamWGroup. state: (rows, elements), its rows exp_avg, exp_avg_sq, initial and, where kept,
// master.
double adamw_cpu(const py::bytes& params, const py::bytes& grads, const std::vector<int>& dtypes,
                 const std::vector<int64_t>& group_of, const std::vector<double>& groups,
                 uintptr_t blocks, int64_t block_count, uintptr_t state, int64_t elements,
                 bool has_master, uintptr_t steps, uintptr_t scores, double max_norm,
                 double inverse_scale, int threads) {
  float* flat = pointer<float>(state);
  beft::AdamWView view{{},
                       {},
                       pointer<const beft::AdamWBlock>(blocks),
                       block_count,
                       flat,
                       flat + elements,
                       flat + 2 * elements,
                       has_master ? flat + 3 * elements : nullptr,
                       pointer<float>(steps),
                       pointer<float>(scores),
                       max_norm,
                       inverse_scale};
  for (size_t i = 0; i < dtypes.size(); ++i)
    view.tensors.push_back({pointer<void>(unpacked(params)[i]),
                            pointer<const void>(unpacked(grads)[i]),
                            static_cast<beft::DType>(dtypes[i]), group_of[i]});
  for (size_t i = 0; i + 6 <= groups.size(); i += 6)
    view.groups.push_back(
        {groups[i], groups[i + 1], groups[i + 2], groups[i + 3], groups[i + 4], groups[i + 5]});
  py::gil_scoped_release release;
  return beft::bias_adamw_cpu(view, threads);
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

// As adamw_cpu; addresses of the device. workspace: 4 * block_count + segments + 1 zeros before
// the first call.
void adamw_cuda(const py::bytes& params, const py::bytes& grads, const std::vector<int>& dtypes,
                const std::vector<int>& group_of, const std::vector<double>& groups,
                uintptr_t blocks, int block_count, uintptr_t first_blocks, int segments,
                uintptr_t state, int64_t elements, uintptr_t steps, uintptr_t scores,
                uintptr_t workspace, uintptr_t norm, uintptr_t lr, double max_norm,
                uintptr_t grad_scale, uintptr_t found_inf, uintptr_t stream) {
  std::vector<beft_cuda::AdamWTensor> tensors;
  for (size_t i = 0; i < dtypes.size(); ++i)
    tensors.push_back({pointer<void>(unpacked(params)[i]), pointer<const void>(unpacked(grads)[i]),
                       dtypes[i], group_of[i]});
  std::vector<beft::AdamWGroup> own;
  for (size_t i = 0; i + 6 <= groups.size(); i += 6)
    own.push_back(
        {groups[i], groups[i + 1], groups[i + 2], groups[i + 3], groups[i + 4], groups[i + 5]});
  const beft_cuda::AdamWTables tables{pointer<const beft::AdamWBlock>(blocks),
                                      pointer<const int64_t>(first_blocks),
                                      pointer<float>(state),
                                      pointer<float>(steps),
                                      pointer<float4>(scores),
                                      pointer<const float>(lr),
                                      pointer<const float>(grad_scale),
                                      pointer<const float>(found_inf),
                                      pointer<float4>(workspace),
                                      pointer<unsigned>(workspace) + 4 * int64_t{block_count},
                                      pointer<float>(norm),
                                      elements,
                                      max_norm,
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
  m.def("addresses", &addresses);
  m.def("gradients", &gradients);
  m.def("bias_grad_stats_cpu", &stats_cpu);
  m.def("bias_adamw_cpu", &adamw_cpu);
#ifdef BEFT_WITH_CUDA
  m.attr("has_cuda") = true;
  m.def("bias_grad_stats_cuda", &stats_cuda);
  m.def("bias_adamw_cuda", &adamw_cuda);
  m.attr("bias_adamw_limits") =
      py::make_tuple(int{beft_cuda::kMaxTensors}, int{beft_cuda::kMaxGroups});
#else
  m.attr("has_cuda") = false;
#endif
}
