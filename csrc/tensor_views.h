// What tensors of torch say of themselves, read through DLPack's C exchange API: some 60 ns a
// tensor, all of its form at once, and no header of torch or link to it.
#pragma once
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <vector>

namespace beft {

namespace py = pybind11;

// DLPack's DLTensor (major version 1), which a tensor fills in; it owns the two arrays.
struct TensorView {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t type_code, type_bits;
  uint16_t type_lanes;
  const int64_t *sizes, *strides;
  uint64_t byte_offset;

  uint64_t address() const { return reinterpret_cast<uint64_t>(data) + byte_offset; }

  bool same_device(const TensorView& other) const {
    return device_type == other.device_type && device_id == other.device_id;
  }

  bool same_kind(const TensorView& other) const {
    return same_device(other) && type_code == other.type_code && type_bits == other.type_bits &&
           ndim == other.ndim && std::equal(sizes, sizes + ndim, other.sizes);
  }

  int64_t elements() const {
    int64_t count = 1;
    for (int i = 0; i < ndim; ++i) count *= sizes[i];
    return count;
  }

  // Elements from the first to the last.
  int64_t reach() const {
    int64_t last = 0;
    for (int i = 0; i < ndim; ++i) last += (sizes[i] - 1) * strides[i];
    return elements() ? last + 1 : 0;
  }

  bool contiguous() const {
    int64_t expected = 1;
    for (int i = ndim - 1; i >= 0; --i) {
      if (sizes[i] != 1 && strides[i] != expected) return elements() == 0;
      expected *= sizes[i];
    }
    return true;
  }
};

// A thing of torch, found once: looking it up by name takes as long as a call.
inline PyObject* of_tensor(const char* name) {
  return py::object(py::module_::import("torch").attr("Tensor").attr(name)).release().ptr();
}

// Fills in `view`; false where the tensor has no plain memory (sparse, meta, ...).
inline bool view_of(py::handle tensor, TensorView& view) {
  struct ExchangeApi {
    uint32_t major, minor;
    void *older, *allocate, *export_managed, *import_managed;
    int (*view)(void* tensor, TensorView* view);
  };
  static const auto* const api = static_cast<const ExchangeApi*>(
      PyCapsule_GetPointer(of_tensor("__dlpack_c_exchange_api__"), "dlpack_exchange_api"));
  if (!api) throw py::error_already_set();
  if (api->view(tensor.ptr(), &view) == 0) return true;
  PyErr_Clear();
  return false;
}

// Of a tensor that is known to have plain memory.
inline TensorView plain_view(py::handle tensor) {
  TensorView view{};
  if (!view_of(tensor, view)) throw std::invalid_argument("a tensor without plain memory");
  return view;
}

// Whether the values are the negative of what lies in memory.
inline bool negative(py::handle tensor) {
  static PyObject* const is_neg = of_tensor("is_neg");
  const auto answer = py::reinterpret_steal<py::object>(PyObject_CallOneArg(is_neg, tensor.ptr()));
  if (!answer) throw py::error_already_set();
  return answer.ptr() == Py_True;
}

inline py::bytes packed(const std::vector<uint64_t>& words) {
  return py::bytes(reinterpret_cast<const char*>(words.data()), words.size() * sizeof(uint64_t));
}

// Parameters and their gradients as they are now:
//   the gradients, a list;
//   the parameters' addresses, eight bytes each;
//   their forms (device, dtype, sizes, strides, sign), bytes to be compared with earlier ones;
//   the gradients' addresses, 0 for None; or None where one is not contiguous memory of its
//   parameter's device, dtype and sizes.
inline py::tuple survey(const py::list& params) {
  // As getattr(p, "grad") without the search through the bases of p's type.
  static PyObject* const grad = of_tensor("grad");
  static const descrgetfunc grad_of = Py_TYPE(grad)->tp_descr_get;
  static PyTypeObject* const plain_type = reinterpret_cast<PyTypeObject*>(
      py::object(py::module_::import("torch").attr("Tensor")).release().ptr());
  const size_t count = params.size();
  std::vector<uint64_t> addresses(count), grad_addresses(count), forms;
  forms.reserve(8 * count);
  py::list grads(count);
  bool plain = true;
  for (size_t i = 0; i < count; ++i) {
    const py::handle p = PyList_GET_ITEM(params.ptr(), i);
    TensorView own{}, its{};
    const bool seen = view_of(p, own);
    if (seen) {
      addresses[i] = own.address();
      forms.push_back(uint64_t(own.device_type) << 32 | uint32_t(own.device_id));
      forms.push_back(uint64_t(own.type_code) << 24 | uint64_t(own.type_bits) << 16 |
                      uint64_t(own.ndim) << 1 | negative(p));
      for (int d = 0; d < own.ndim; ++d) {
        forms.push_back(own.sizes[d]);
        forms.push_back(own.strides[d]);
      }
    } else {
      forms.push_back(~uint64_t{0});
    }
    PyObject* const g = grad_of(grad, p.ptr(), reinterpret_cast<PyObject*>(Py_TYPE(p.ptr())));
    if (!g) throw py::error_already_set();
    PyList_SET_ITEM(grads.ptr(), i, g);
    if (g == Py_None) continue;
    plain = plain && seen && Py_TYPE(g) == plain_type && view_of(g, its) && its.same_kind(own) &&
            its.contiguous() && !negative(g);
    if (plain) grad_addresses[i] = its.address();
  }
  return py::make_tuple(grads, packed(addresses), packed(forms),
                        plain ? py::object(packed(grad_addresses)) : py::none());
}

}  // namespace beft
