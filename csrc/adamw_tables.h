// The arguments of bias_adamw_step, given by anyone, looked at in one go: a call from Python for
// each of some 200 tensors would cost more than the step.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <initializer_list>
#include <vector>

#include "bias_adamw_step.h"
#include "tensor_views.h"

namespace beft {

// Places in AdamWTables of beft_ext/ops/bias_adamw_tables.py.
enum Argument {
  PARAMS,
  GRADS,
  STATE,
  STEPS,
  SCORES,
  BLOCKS,
  FIRST_BLOCKS,
  GROUP_OF,
  GROUPS,
  LR,
  MAX_GRAD_NORM,
  GRAD_SCALE,
  FOUND_INF,
  WORKSPACE,
  GLOBAL_NORM
};

class AdamWTables {
 public:
  explicit AdamWTables(const py::tuple& arguments) : arguments_(arguments) {}

  // Whether everything is what the kernels take for granted (but for a turned sign, which torch's
  // dispatcher sends elsewhere). Fills in `params`, `grads` and
  // `forms`, packed words. longest: elements of a block at most.
  bool fit(int64_t longest) {
    if (!view_of(at(STATE), state_) || state_.ndim != 2) return false;
    const int64_t rows = state_.sizes[0];
    is_double_ = state_.type_bits == 64;
    if (state_.type_code != FLOAT || (state_.type_bits != 32 && !is_double_)) return false;
    return (rows == 3 || rows == 4) && state_.contiguous() && tensors_fit() && buffers_fit() &&
           (state_.device_type != CPU || blocks_fit(longest));
  }

  std::vector<uint64_t> params, grads, forms;

 private:
  static constexpr int INT = 0, FLOAT = 2, BFLOAT = 4;  // DLPack's type codes
  static constexpr int CPU = 1;                         // and device type

  py::handle at(Argument which) const { return PyTuple_GET_ITEM(arguments_.ptr(), which); }

  bool tensors_fit() {
    const auto own = at(PARAMS).cast<py::list>(), its = at(GRADS).cast<py::list>();
    const auto group_of = at(GROUP_OF).cast<std::vector<int64_t>>();
    const size_t count = own.size(), numbers = py::len(at(GROUPS));
    groups_ = static_cast<int64_t>(numbers / 6);
    if (its.size() != count || group_of.size() != count || numbers % 6) return false;
    for (size_t i = 0; i < count; ++i) {
      if (group_of[i] < 0 || group_of[i] >= groups_) return false;
      if (!add(PyList_GET_ITEM(own.ptr(), i), PyList_GET_ITEM(its.ptr(), i), group_of[i]))
        return false;
    }
    return true;
  }

  // One parameter and its gradient: plain memory of the state's device, a float type that the
  // state has room for, equal forms.
  bool add(py::handle param, py::handle grad, int64_t group) {
    TensorView p{}, g{};
    if (!view_of(param, p) || !p.same_device(state_)) return false;
    const bool half = p.type_bits == 16 && (p.type_code == FLOAT || p.type_code == BFLOAT);
    const bool whole =
        p.type_code == FLOAT && (p.type_bits == 32 || (p.type_bits == 64 && is_double_));
    if (!(half && state_.sizes[0] == 4) && !whole) return false;
    if (!grad.is_none() && !(view_of(grad, g) && g.same_kind(p) && g.contiguous())) return false;
    const int64_t dtype = half ? (p.type_code == BFLOAT ? 1 : 2) : p.type_bits == 32 ? 0 : -1;
    params.push_back(p.address());
    grads.push_back(g.address());
    for (int64_t word : {dtype, group, p.reach(), p.elements()}) forms.push_back(word);
    return true;
  }

  bool plain(py::handle tensor, int code, int bits, std::initializer_list<int64_t> shape) const {
    TensorView v{};
    return view_of(tensor, v) && v.same_device(state_) && v.type_code == code &&
           v.type_bits == bits && v.ndim == static_cast<int>(shape.size()) &&
           std::equal(shape.begin(), shape.end(), v.sizes) && v.contiguous();
  }

  bool buffers_fit() {
    if (!view_of(at(BLOCKS), blocks_) || !view_of(at(FIRST_BLOCKS), first_)) return false;
    count_ = blocks_.ndim ? blocks_.sizes[0] : 0;
    segments_ = first_.elements() - 1;
    const int64_t tensors = static_cast<int64_t>(params.size());
    for (Argument which : {GRAD_SCALE, FOUND_INF, GLOBAL_NORM}) {
      TensorView one{};
      if (at(which).is_none()) continue;
      if (!view_of(at(which), one) || one.elements() != 1 || one.type_code != FLOAT ||
          one.type_bits != 32 || !one.same_device(state_))
        return false;
    }
    const double max_grad_norm = at(MAX_GRAD_NORM).cast<double>();
    return segments_ >= (count_ ? 1 : 0) && max_grad_norm >= 0 && std::isfinite(max_grad_norm) &&
           plain(at(STEPS), FLOAT, 32, {tensors}) && plain(at(SCORES), FLOAT, 32, {segments_, 4}) &&
           plain(at(BLOCKS), INT, 64, {count_, 6}) &&
           plain(at(FIRST_BLOCKS), INT, 64, {segments_ + 1}) &&
           plain(at(WORKSPACE), FLOAT, 32, {4 * count_ + segments_ + 1}) &&
           (at(LR).is_none() || plain(at(LR), FLOAT, 32, {groups_}));
  }

  bool blocks_fit(int64_t longest) const {
    std::vector<AdamWTensor> tensors(params.size());
    for (size_t i = 0; i < tensors.size(); ++i) {
      tensors[i].param_size = static_cast<int64_t>(forms[4 * i + 2]);
      tensors[i].grad_size = static_cast<int64_t>(forms[4 * i + 3]);
    }
    return table_fits(reinterpret_cast<const AdamWBlock*>(blocks_.address()), count_,
                      reinterpret_cast<const int64_t*>(first_.address()), segments_, tensors.data(),
                      static_cast<int64_t>(tensors.size()), state_.sizes[1], longest);
  }

  const py::tuple& arguments_;
  TensorView state_{}, blocks_{}, first_{};
  bool is_double_ = false;
  int64_t groups_ = 0, count_ = 0, segments_ = 0;
};

}  // namespace beft
